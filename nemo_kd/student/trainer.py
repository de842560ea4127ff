"""Lightning's Trainer on Megatron Core, with NeMo's loggers and callbacks.

A training checkpoint holds:

state_dict         trained weights, sharded; with LoRA the adapters only
optimizer_states   fp32 weights and moments, sharded
random_state       generators of every rank, sharded; loaded into the same layout only
loops              Lightning's counters of steps and batches
callbacks          early stopping: best value and patience used
lr_schedulers      nothing: the learning rate follows from the step
schedule           whether a validation is due, whether the run was stopped early
ranks              scores of the checkpoints that are kept
StudentData        consumed samples and their batch size
non_finite         skipped steps
adapters           LoRA's settings and a hash of the base weights
hyper_parameters   configuration of the run, without secrets; hparams_name: Lightning's name for it
global_step        completed optimizer steps
epoch              Lightning's epoch, always 0: its epoch is the whole run
pytorch-lightning_version

A checkpoint of weights alone lacks optimizer_states, random_state, callbacks, lr_schedulers,
schedule and ranks. `contents.json` beside them lists the files, the layout of the ranks, and the
experiment record that is compared on resume (`run_folder.check_same_experiment`).
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from nemo.utils import logging as nemo_logging
from nemo.utils.exp_manager import exp_manager
from omegaconf import OmegaConf

from nemo_kd.config.exp_manager import ExpManagerConfig
from nemo_kd.config.student import StudentTrainerConfig
from nemo_kd.mcore.distributed_checkpoint import load_sharded
from nemo_kd.mcore.groups import sharded_random_state
from nemo_kd.run.ranks import find_ranks
from nemo_kd.student.checkpoint_folder import CheckpointError, Contents
from nemo_kd.student.data import StudentData

NOT_NEMOS = {
    "create_checkpoint_callback": False,
    "resume_ignore_no_checkpoint": True,
    "resume_from_checkpoint": None,
    "disable_validation_on_resume": False,
    "max_time_per_run": None,
    "create_wandb_logger": False,
}
"""Keys that nemo_kd handles itself.

NeMo's `exp_manager` does not check checkpoints for damage, does not stop all ranks at one step, and
fails if Weights & Biases is out of reach."""


def build_trainer(
    config: StudentTrainerConfig,
    manager: ExpManagerConfig,
    name: str,
    data: StudentData,
) -> tuple[pl.Trainer, Path]:
    """Return a Trainer with NeMo's loggers and callbacks, and the folder of the run.

    Args:
        name: of the run.
    """
    loop = config.knowledge_distillation
    trainer = pl.Trainer(
        accelerator="gpu" if data.groups.device.type == "cuda" else "cpu",
        devices=config.num_devices,
        num_nodes=config.num_nodes,
        strategy=MegatronStrategy(
            cluster_environment=LauncherEnvironment(config.num_devices)
        ),
        precision="32-true",  # Megatron casts by itself
        max_epochs=-1,  # `StudentModule` ends the run after `plan.max_steps`
        val_check_interval=data.plan.val_check_interval,
        check_val_every_n_epoch=None,  # counts steps over the whole run
        limit_val_batches=loop.limit_val_batches,
        log_every_n_steps=loop.log_every_n_steps,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        enable_progress_bar=False,
    )
    # NeMo logs that it finds no checkpoint, in the place where it is made to look.
    nemo_logging.set_verbosity(nemo_logging.ERROR)
    settings = {
        key: value
        for key, value in dataclasses.asdict(manager).items()
        if value is not None and key != "log_interval_s"
    }
    settings.setdefault("name", name)
    settings["checkpoint_callback_params"]["dirpath"] = os.devnull
    log_dir = exp_manager(trainer, OmegaConf.create(settings | NOT_NEMOS))
    nemo_logging.set_verbosity(nemo_logging.WARNING)
    assert log_dir is not None
    return trainer, Path(log_dir)


class LauncherEnvironment(LightningEnvironment):
    """The ranks that the launcher started; Lightning's own search reads other jobs' variables."""

    def __init__(self, devices: int) -> None:
        super().__init__()
        self._ranks = find_ranks()
        self._devices = devices

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def local_rank(self) -> int:
        return self._ranks.local_rank

    def node_rank(self) -> int:
        return self._ranks.rank // self._devices


class MegatronStrategy(DDPStrategy):
    """Ranks form Megatron's groups, and Megatron's buffers average the gradients.

    The process group and Megatron's groups exist before the Trainer. All ranks write checkpoints.
    """

    lightning_module: Any

    def configure_ddp(self) -> None:
        """Wrap nothing: the module holds Megatron's DistributedDataParallel."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return optimizer.sharded_state_dict(self.lightning_module_state_dict())

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        filepath: str | Path,
        storage_options: Any = None,
    ) -> None:
        self.lightning_module.checkpoints.write(checkpoint)

    def load_checkpoint(self, checkpoint_path: str | Path) -> dict[str, Any]:
        """
        Raises:
            ConfigError, CheckpointError: the checkpoint is damaged or of another version.
        """
        folder = Path(checkpoint_path)
        state_dict = self.lightning_module_state_dict
        optimizer: Any = self.optimizers[0]
        wanted: dict[str, Any] = {
            "state_dict": state_dict(),
            "optimizer_states": [
                optimizer.sharded_state_dict(state_dict(), is_loading=True)
            ],
        }
        if Contents.read(folder).layout == self.lightning_module.groups.layout():
            wanted["random_state"] = sharded_random_state()
        with self.lightning_module.watchdog.pause("loading the checkpoint"):
            found = load_sharded(wanted, folder)
        if "schedule" not in found:
            raise CheckpointError(
                f"{folder} has no schedule, so another version wrote it; resume it with that version, "
                "or start over in another exp_manager.explicit_log_dir"
            )
        # Earlier versions kept the ranks as a callback's state.
        for key in list(found["callbacks"]):
            if key.startswith("StudentCheckpoints"):
                found["ranks"] = found["callbacks"].pop(key)
        return found

    def teardown(self) -> None:
        """Leave the weights on the device: Megatron's buffers hold them."""
