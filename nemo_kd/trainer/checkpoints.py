"""Training checkpoints: how they reach the disk and when."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins import CheckpointIO
from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint

from nemo_kd.mcore.distributed_checkpoint import load_sharded, save_sharded


def checkpoint_folder(path: str | Path) -> Path:
    """The folder of a checkpoint that Lightning calls `path`: NeMo drops the .ckpt of checkpoints that are folders."""
    return Path(str(path).removesuffix(".ckpt"))


class DistributedCheckpointIO(CheckpointIO):
    """Lightning's checkpoints as Megatron distributed checkpoints; every rank takes part in saving and loading."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        save_sharded(checkpoint, checkpoint_folder(path))

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = None,
        sharded_state: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        return load_sharded(sharded_state or {}, checkpoint_folder(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        shutil.rmtree(checkpoint_folder(path), ignore_errors=True)


class ValidatedCheckpoints(NeMoModelCheckpoint):
    """Saves after a validation, at multiples of `save_interval` steps and after the last step.

    The best checkpoints by the monitored value are kept, and the latest under `*-last`, from which a run resumes.
    """

    def __init__(self, save_interval: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.save_interval = save_interval
        self.CHECKPOINT_NAME_LAST = f"{self.filename}-last"

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step % self.save_interval == 0 or trainer.global_step >= trainer.max_steps:
            super().on_validation_end(trainer, pl_module)
