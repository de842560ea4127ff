"""The weights of the best checkpoint, at the end of a run."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint

from nemo_kd.mcore.distributed_checkpoint import load_plain, load_sharded
from nemo_kd.trainer.checkpoints import checkpoint_folder

log = logging.getLogger(__name__)


class Student(Protocol):
    """What is asked of the Lightning module."""

    def sharded_state_dict(self) -> dict[str, Any]: ...

    def load_sharded_state_dict(self, state: dict[str, Any]) -> None: ...

    def save_to(self, save_path: str) -> None: ...


def export_best(trainer: pl.Trainer, student: Student) -> None:
    """Leaves the weights of the best checkpoint as NAME-best.nemo where they are not the last ones; all ranks take part.

    Comes after training, which left the last ones as NAME.nemo. The student has the best ones then. Where the best are
    the last, what an earlier run left as the best is removed. Does nothing where exp_manager writes no archive, or the
    best instead of the last one (`save_best_model`).
    """
    callbacks = [callback for callback in trainer.callbacks if isinstance(callback, NeMoModelCheckpoint)]
    if not callbacks or not callbacks[0].save_nemo_on_train_end or callbacks[0].save_best_model:
        return
    best, last = trainer.strategy.broadcast((callbacks[0].best_model_path, callbacks[0]._format_nemo_checkpoint_name()))
    if not best:
        return
    folder, archive = checkpoint_folder(best), Path(last.removesuffix(".nemo") + "-best.nemo")
    step = load_plain(folder)["global_step"]
    if step == trainer.global_step:
        if trainer.is_global_zero:
            archive.unlink(missing_ok=True)
            shutil.rmtree(archive.with_name(archive.name.removesuffix(".nemo") + "-hf"), ignore_errors=True)
        log.info("the last weights are the best ones by %s: %s", callbacks[0].monitor, last)
        return
    state = load_sharded({"state_dict": student.sharded_state_dict()}, folder)
    student.load_sharded_state_dict(state["state_dict"])
    trainer.datamodule.load_state_dict(state[type(trainer.datamodule).__qualname__])
    student.save_to(str(archive))
    log.info("the best weights by %s, of step %d: %s", callbacks[0].monitor, step, archive)
