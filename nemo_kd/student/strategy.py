"""Lightning on Megatron Core, and the contents of training checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer

from nemo_kd.mcore.distributed_checkpoint import load_plain, load_sharded
from nemo_kd.mcore.groups import ProcessGroups, sharded_random_state
from nemo_kd.mcore.optimizer import ModelOptimizer
from nemo_kd.run.ranks import find_ranks
from nemo_kd.student.checkpoint_folder import CheckpointError, Contents
from nemo_kd.student.checkpoints import CheckpointWriter


@dataclass(frozen=True)
class Entry:
    """An entry of a training checkpoint.

    Attributes:
        holds: for a reader.
        sharded: every rank writes its part and reads it on resume.
        required: a run does not resume without it.
        always: also in a checkpoint of weights alone.
    """

    holds: str
    sharded: bool = False
    required: bool = True
    always: bool = False


ENTRIES = {
    "state_dict": Entry(
        "trained weights; with LoRA the adapters only", sharded=True, always=True
    ),
    "optimizer_states": Entry("fp32 weights and moments", sharded=True),
    "random_state": Entry(
        "random generators of every rank; loaded into the same layout only",
        sharded=True,
        required=False,
    ),
    "lr_schedulers": Entry("nothing: the learning rate follows from the step"),
    "loops": Entry("Lightning's counters of steps and batches", always=True),
    "callbacks": Entry("early stopping: best value and patience used"),
    "schedule": Entry("whether a validation is due, whether the run was stopped early"),
    "ranks": Entry("scores of the checkpoints that are kept", required=False),
    "StudentData": Entry("consumed samples and their batch size", always=True),
    "non_finite": Entry("skipped steps", always=True),
    "adapters": Entry(
        "LoRA's settings and base weights; compared on resume",
        required=False,
        always=True,
    ),
    "hyper_parameters": Entry(
        "configuration of the run, without secrets", required=False, always=True
    ),
    "hparams_name": Entry("Lightning's name for it", required=False, always=True),
    "global_step": Entry("completed optimizer steps", always=True),
    "epoch": Entry(
        "Lightning's epoch, always 0: its epoch is the whole run", always=True
    ),
    "pytorch-lightning_version": Entry("version that wrote the checkpoint", always=True),
}
"""All entries of a training checkpoint.

`contents.json` beside them lists the files, the layout of the ranks, and the experiment record that
is compared on resume (`run_folder.check_same_experiment`)."""


class LauncherEnvironment(LightningEnvironment):
    """The ranks that the launcher started; Lightning's own search reads other jobs' variables."""

    def __init__(self, devices: int) -> None:
        super().__init__()
        self._ranks = find_ranks()
        self._devices = devices

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def world_size(self) -> int:
        return self._ranks.size

    def global_rank(self) -> int:
        return self._ranks.rank

    def local_rank(self) -> int:
        return self._ranks.local_rank

    def node_rank(self) -> int:
        return self._ranks.rank // self._devices


class MegatronStrategy(DDPStrategy):
    """Ranks form Megatron's groups, and Megatron's buffers average the gradients.

    The process group and Megatron's groups exist before the Trainer. All ranks write checkpoints.
    """

    lightning_module: Any

    def __init__(
        self, groups: ProcessGroups, writer: CheckpointWriter, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.groups = groups
        self.writer = writer

    def setup(self, trainer: pl.Trainer) -> None:
        """Set up as Lightning does, but keep each rank's weights in a test.

        Lightning would broadcast those of rank 0.
        """
        if trainer.state.fn == TrainerFn.FITTING:
            super().setup(trainer)
            return
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self.model_to_device()
        self.setup_precision_plugin()

    def configure_ddp(self) -> None:
        """Wrap nothing: the module holds Megatron's DistributedDataParallel."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self.lightning_module.sharded_state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return _megatron(optimizer).sharded_state_dict(self.lightning_module_state_dict())

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        filepath: str | Path,
        storage_options: Any = None,
    ) -> None:
        resumable = "optimizer_states" in checkpoint
        lacking = [
            name
            for name, entry in ENTRIES.items()
            if entry.required and (resumable or entry.always) and name not in checkpoint
        ]
        assert not lacking, lacking
        self.writer.start(checkpoint, Path(filepath))

    def load_checkpoint(self, checkpoint_path: str | Path) -> dict[str, Any]:
        """
        Raises:
            CheckpointError: an entry is missing.
            ConfigError: the checkpoint holds other adapters, or is damaged.
        """
        folder = Path(checkpoint_path)
        plain = _with_todays_entries(load_plain(folder))
        missing = [
            name
            for name, entry in ENTRIES.items()
            if entry.required and not entry.sharded and name not in plain
        ]
        if missing:
            raise CheckpointError(
                f"{folder}: it has no {', '.join(missing)}, so another version wrote it; "
                "resume with that version, or start over in another exp_manager.explicit_log_dir"
            )
        self.lightning_module.check_checkpoint(plain)
        wanted: dict[str, Any] = {
            "state_dict": self.lightning_module_state_dict(),
            "optimizer_states": [
                _megatron(optimizer).sharded_state_dict(
                    self.lightning_module_state_dict(), is_loading=True
                )
                for optimizer in self.optimizers
            ],
        }
        if Contents.read(folder).layout == self.groups.layout():
            wanted["random_state"] = sharded_random_state()
        return _with_todays_entries(load_sharded(wanted, folder))

    def load_model_state_dict(
        self, checkpoint: dict[str, Any], strict: bool = True
    ) -> None:
        self.lightning_module.load_sharded_state_dict(checkpoint["state_dict"])

    def load_optimizer_state_dict(self, checkpoint: dict[str, Any]) -> None:
        for optimizer, state in zip(
            self.optimizers, checkpoint["optimizer_states"], strict=True
        ):
            _megatron(optimizer).load_sharded_state_dict(state)

    def teardown(self) -> None:
        """Leave the weights on the device: Megatron's buffers hold them."""


def _with_todays_entries(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Name the ranks as this version does; earlier ones kept them as a callback's state."""
    callbacks = checkpoint.get("callbacks", {})
    for key in [key for key in callbacks if key.startswith("StudentCheckpoints")]:
        checkpoint["ranks"] = callbacks.pop(key)
    return checkpoint


def _megatron(optimizer: Optimizer) -> ModelOptimizer:
    inner = (
        optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
    )
    assert isinstance(inner, ModelOptimizer)
    return inner
