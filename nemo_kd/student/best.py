"""The weights of the best checkpoint, at the end of a run."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint

from nemo_kd.mcore.distributed_checkpoint import load_plain, load_sharded
from nemo_kd.student.checkpoints import checkpoint_folder
from nemo_kd.student.resume import agreed_damage

log = logging.getLogger(__name__)


class Student(Protocol):
    """What is asked of the Lightning module."""

    def sharded_state_dict(self) -> dict[str, Any]: ...

    def load_sharded_state_dict(self, state: dict[str, Any]) -> None: ...

    def save_to(self, save_path: str) -> None: ...


def take_best(trainer: pl.Trainer, student: Student) -> None:
    """Gives the student the weights of the best checkpoint, and leaves them as NAME-best.nemo where they are not the last.

    All ranks take part. Comes after training, which left the last ones as NAME.nemo. Where the best are the last, what
    an earlier run left as the best is removed. Writes nothing where exp_manager writes no archive
    (`save_nemo_on_train_end`), and does nothing where training ended with the best (`save_best_model`).
    """
    callbacks = [
        callback for callback in trainer.callbacks if isinstance(callback, NeMoModelCheckpoint)
    ]
    if not callbacks or callbacks[0].save_best_model:
        return
    writes = callbacks[0].save_nemo_on_train_end
    best, last = trainer.strategy.broadcast(
        (callbacks[0].best_model_path, callbacks[0]._format_nemo_checkpoint_name())
    )
    if not best:
        return
    folder, archive = checkpoint_folder(best), Path(last.removesuffix(".nemo") + "-best.nemo")
    problem = agreed_damage(folder)
    if problem is not None:
        log.warning(
            "%s, the best checkpoint, is damaged: %s; the last weights take its place",
            folder,
            problem,
        )
        return
    step = load_plain(folder)["global_step"]
    if step == trainer.global_step:
        if trainer.is_global_zero and writes:
            archive.unlink(missing_ok=True)
            shutil.rmtree(
                archive.with_name(archive.name.removesuffix(".nemo") + "-hf"), ignore_errors=True
            )
        log.info("the last weights are the best ones by %s: %s", callbacks[0].monitor, last)
        return
    state = load_sharded({"state_dict": student.sharded_state_dict()}, folder)
    student.load_sharded_state_dict(state["state_dict"])
    trainer.datamodule.load_state_dict(state[type(trainer.datamodule).__qualname__])
    if writes:
        student.save_to(str(archive))
    log.info(
        "the best weights by %s are of step %d%s",
        callbacks[0].monitor,
        step,
        f": {archive}" if writes else "",
    )
