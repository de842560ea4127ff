"""Lightning on Megatron Core: process groups, optimizer and checkpoints through Lightning's public hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer

from nemo_kd.mcore.distributed_checkpoint import load_plain
from nemo_kd.mcore.groups import ProcessGroups
from nemo_kd.mcore.optimizer import ModelOptimizer
from nemo_kd.mcore.random_state import sharded_random_state
from nemo_kd.run.ranks import find_ranks
from nemo_kd.student.checkpoint_folder import Contents
from nemo_kd.student.checkpoints import DistributedCheckpointIO, checkpoint_folder
from nemo_kd.student.resumable_state import RANDOM_STATE


class ShardedModule(Protocol):
    """What the strategy asks of a Lightning module: its weights as Megatron's sharded tensors, and whether a checkpoint fits."""

    def sharded_state_dict(self) -> dict[str, Any]: ...

    def load_sharded_state_dict(self, state: dict[str, Any]) -> None: ...

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...


class LauncherEnvironment(ClusterEnvironment):
    """The ranks that the launcher started. Lightning's own search reads variables of other steps and jobs too."""

    def __init__(self, devices: int) -> None:
        super().__init__()
        self._ranks = find_ranks()
        self._devices = devices

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return self._ranks.main_address

    @property
    def main_port(self) -> int:
        return self._ranks.main_port

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._ranks.size

    def set_world_size(self, size: int) -> None:
        """Ignore the call: the launcher decides."""

    def global_rank(self) -> int:
        return self._ranks.rank

    def set_global_rank(self, rank: int) -> None:
        """Ignore the call: the launcher decides."""

    def local_rank(self) -> int:
        return self._ranks.local_rank

    def node_rank(self) -> int:
        return self._ranks.rank // self._devices


class MegatronStrategy(DDPStrategy):
    """Ranks form Megatron's groups; the module itself averages gradients through Megatron's buffers.

    The process group and Megatron's groups exist before the Trainer does. Checkpoints are written by all ranks.
    """

    def __init__(self, groups: ProcessGroups, experiment: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(
            checkpoint_io=DistributedCheckpointIO(groups.layout(), experiment), **kwargs
        )
        self.groups = groups

    @property
    def module(self) -> ShardedModule:
        """The Lightning module in its role here."""
        return self.lightning_module

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.groups.data_size, "rank": self.groups.data_rank}

    def setup(self, trainer: pl.Trainer) -> None:
        """Lightning's own, but for tests: that broadcasts rank 0's weights, and here every rank holds others."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().setup(trainer)
            return
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self.model_to_device()
        self.setup_precision_plugin()

    def configure_ddp(self) -> None:
        """Nothing to wrap: the module holds Megatron's DistributedDataParallel."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self.module.sharded_state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return _megatron(optimizer).sharded_state_dict(self.module.sharded_state_dict())

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path) -> dict[str, Any]:
        self.module.check_checkpoint(load_plain(checkpoint_folder(checkpoint_path)))
        state: dict[str, Any] = {"state_dict": self.module.sharded_state_dict()}
        if (
            self.lightning_module is not None
            and self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        ):
            state["optimizer_states"] = [
                _megatron(optimizer).sharded_state_dict(
                    self.module.sharded_state_dict(), is_loading=True
                )
                for optimizer in self.optimizers
            ]
            if Contents.read(checkpoint_folder(checkpoint_path)).layout == self.groups.layout():
                state[RANDOM_STATE] = sharded_random_state()
        return self.checkpoint_io.load_checkpoint(checkpoint_path, sharded_state=state)

    def load_model_state_dict(self, checkpoint: dict[str, Any], strict: bool = True) -> None:
        self.module.load_sharded_state_dict(checkpoint["state_dict"])

    def load_optimizer_state_dict(self, checkpoint: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            _megatron(optimizer).load_sharded_state_dict(state)

    def remove_checkpoint(self, filepath: str | Path) -> None:
        if self.is_global_zero:
            self.checkpoint_io.remove_checkpoint(filepath)

    def teardown(self) -> None:
        """Leaves the weights where they are: moving them off the device would part them from Megatron's buffers."""
        self.checkpoint_io.teardown()


def _megatron(optimizer: Optimizer) -> ModelOptimizer:
    inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
    assert isinstance(inner, ModelOptimizer)
    return inner
