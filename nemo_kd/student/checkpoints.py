"""Training checkpoints: written during training, named, ranked, and exported at the end."""

from __future__ import annotations

import contextlib
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.distributed.checkpoint import CheckpointException

from nemo_kd.config import ConfigError
from nemo_kd.config.exp_manager import PARAMS
from nemo_kd.config.student import TrainStudentConfig
from nemo_kd.files import remove
from nemo_kd.mcore.checkpoint_write import CheckpointWrite
from nemo_kd.mcore.distributed_checkpoint import load_sharded
from nemo_kd.run.collective import on_rank_zero
from nemo_kd.run.watchdog import Watchdog
from nemo_kd.student.checkpoint_folder import (
    CONTENTS,
    LAST,
    PREVIOUS,
    CheckpointError,
    Contents,
    agreed_damage,
    checkpoints,
    discard,
    link,
    publish,
    seal,
    unfinished_folder,
)

log = logging.getLogger(__name__)

NOT_RANKED = (LAST, PREVIOUS)


class CheckpointWriter:
    """Writes Megatron distributed checkpoints; every rank calls all methods but `is_writing`.

    Args:
        layout: sizes of the process groups.
        experiment: the record of what determines the run's result.
    """

    def __init__(self, layout: dict[str, int], experiment: dict[str, Any]) -> None:
        self.layout = layout
        self.experiment = experiment
        self._write: CheckpointWrite | None = None  # the one that is being written
        self._saved = (-1, False)  # step of the latest one, and whether it is resumable
        self._names: list[Path] = []  # of the latest one
        self._removals: list[Path] = []  # once that one is whole

    def is_writing(self) -> bool:
        """Return True while this rank's part of a checkpoint is being written."""
        return self._write is not None and self._write.is_running()

    def start(self, checkpoint: dict[str, Any], target: Path) -> None:
        """Start to write; `finish` gives the checkpoint its name."""
        self.finish()
        folder: list[Any] = [unfinished_folder(target)]
        torch.distributed.broadcast_object_list(folder, src=0)
        with _explained(target, folder[0]):
            self._write = CheckpointWrite(checkpoint, folder[0])
        self._saved = (checkpoint["global_step"], "optimizer_states" in checkpoint)
        self._names = [target]

    def add_name(self, target: Path, step: int, resumable: bool) -> bool:
        """Give the checkpoint of this step one more name; return False if there is none."""
        if self._saved != (step, resumable):
            return False
        if self._write is None and target not in self._names:
            whole = self._names[-1]
            self._on_first_rank(lambda: link(whole, target), target)
        self._names.append(target)
        return True

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any, and give it its names.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._write is None:
            return
        folder = self._write.folder
        with _explained(self._names[0], folder):
            try:
                sums = self._write.finish()
            finally:
                self._write = None

        def name() -> None:
            step, resumable = self._saved
            seal(folder, step, resumable, self.layout, sums, self.experiment)
            publish(folder, self._names)
            for path in self._removals:
                discard(path)

        self._on_first_rank(name, self._names[0])
        self._removals = []

    @staticmethod
    def _on_first_rank(act: Callable[[], None], target: Path) -> None:
        with _explained(target):
            on_rank_zero(act)

    def remove(self, folder: Path) -> None:
        """Delete a checkpoint once the one that is being written, and may replace it, is whole."""
        if self._write is not None:
            self._removals.append(folder)
        elif torch.distributed.get_rank() == 0:
            discard(folder)


class Checkpoints:
    """Checkpoints of a run: the latest to resume from, and the best by the monitored metric.

    The latest is named `*-last`, the one before it `*-previous`.

    Attributes:
        params: `exp_manager.checkpoint_callback_params`.
        scores: ranked checkpoint -> value of the monitored metric.
    """

    def __init__(
        self,
        config: TrainStudentConfig,
        dirpath: Path,
        writer: CheckpointWriter,
        watchdog: Watchdog,
    ) -> None:
        params = config.exp_manager.checkpoint_callback_params
        self.params = params
        self.dirpath = dirpath.absolute()
        self.writer = writer
        self.watchdog = watchdog
        self.leaves_hf = config.export.hf
        self.archive = self.dirpath / f"{params.prefix or config.name}{params.postfix}"
        self._template = params.filename or (
            f"{config.name}--{params.monitor.replace('/', '_')}={{{params.monitor}:.4f}}"
            "-step={step}-consumed_samples={consumed_samples}"
        )
        self._inserts_names = bool(params.filename) and params.auto_insert_metric_name
        self._saved_step: int | None = None  # by this process
        self._archived: Path | None = None
        self.scores: dict[Path, float] = {}

    @property
    def best(self) -> Path | None:
        """The checkpoint with the best score."""
        return min(self.scores, key=self._rank_key, default=None)

    def rank(self, trainer: pl.Trainer) -> None:
        """Rank and save the weights that were just validated, and save the latest state."""
        monitor = self.params.monitor
        measured = trainer.callback_metrics
        if monitor not in measured:
            raise ConfigError(
                f"{PARAMS}.monitor: {monitor!r} is not measured; known: {', '.join(measured)}"
            )
        score = float(measured[monitor])
        step = trainer.global_step
        if math.isfinite(score):
            self._save_if_good(trainer, score)
        else:
            log.warning(
                "%s is not finite after step %d; no checkpoint is ranked by it",
                monitor,
                step,
            )
        if self.params.save_last or (trainer.should_stop and self._saved_step != step):
            self.save_latest(trainer, with_score=math.isfinite(score))

    def save_latest(self, trainer: pl.Trainer, with_score: bool = False) -> None:
        """Save all that a run needs to resume, as `*-last`."""
        template = self._template
        if not with_score:
            template = re.sub(
                rf"(\w+=)?\{{{self.params.monitor}[^}}]*\}}-?", "", template
            )
        self._save(trainer, self._path(trainer, template + LAST), weights_only=False)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any."""
        with self.watchdog.pause("waiting for a checkpoint to be written"):
            self.writer.finish()

    def write_archives(self, trainer: pl.Trainer, student: Any) -> None:
        """Leave the student's last and best weights as archives; the student keeps the best.

        NAME.nemo holds the last weights and NAME-best.nemo the best, if those are others; with
        `save_best_model`, NAME.nemo holds the best. Skipped if `save_nemo_on_train_end` is off, or
        if an earlier run of the same command left them and no step was trained since. Every rank
        calls it after the training.
        """
        is_left = trainer.strategy.broadcast(
            self._saved_step is None and self._is_left(trainer)
        )
        writes = self.params.save_nemo_on_train_end
        if is_left:
            log.warning(
                "nothing is left to train: %s is the result of an earlier run of this command, "
                "which took all %d steps; to train on raise trainer.knowledge_distillation."
                "max_steps or max_epochs, to start over give another exp_manager.explicit_log_dir",
                self.archive,
                trainer.global_step,
            )
        elif writes and not self.params.save_best_model:
            student.save_to(str(self.archive))
        step = self._load_best(trainer, student)
        if self.params.save_best_model:
            if writes and not is_left:
                student.save_to(str(self.archive))
            return
        best = self.archive.with_name(
            f"{self.archive.name.removesuffix('.nemo')}-best.nemo"
        )
        if step == trainer.global_step:
            if trainer.is_global_zero and writes:
                best.unlink(missing_ok=True)
                shutil.rmtree(best.with_name(f"{best.stem}-hf"), ignore_errors=True)
            log.info(
                "the last weights are the best by %s: %s",
                self.params.monitor,
                self.archive,
            )
        elif step is not None and writes:
            student.save_to(str(best))
            log.info(
                "the best weights by %s are of step %d: %s",
                self.params.monitor,
                step,
                best,
            )

    def state_dict(self) -> dict[str, Any]:
        return {
            "best_k_models": {str(path): score for path, score in self.scores.items()}
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the scores of checkpoints in this run's folder, and of no others.

        The state may come from another person's checkpoint, and a checkpoint that it names may be
        deleted for a better one, or loaded.
        """
        found = state.get("best_k_models")
        own = [
            path
            for path in checkpoints(self.dirpath)
            if not path.name.endswith(NOT_RANKED)
        ]
        self.scores = {}
        for path, score in found.items() if isinstance(found, dict) else ():
            here = self.dirpath / Path(str(path)).name.removesuffix(".ckpt")
            if here in own and isinstance(score, int | float | torch.Tensor):
                self.scores[here] = float(score)

    def _save_if_good(self, trainer: pl.Trainer, score: float) -> None:
        monitor = self.params.monitor
        path = self._path(trainer, self._template)
        self.scores[path] = score
        ranked = sorted(self.scores, key=self._rank_key)
        dropped = ranked[self.params.save_top_k :] if self.params.save_top_k >= 0 else []
        if self.params.verbose:
            outcome = (
                "is not among the best" if path in dropped else f"saved as {path.name}"
            )
            log.info("step %d: %s=%.5f %s", trainer.global_step, monitor, score, outcome)
        if path not in dropped:
            self._save(trainer, path, self.params.save_weights_only)
        for other in dropped:
            del self.scores[other]
            if other != path:
                self.writer.remove(other)

    def _save(self, trainer: pl.Trainer, path: Path, weights_only: bool) -> None:
        step = trainer.global_step
        with self.watchdog.pause(f"saving the checkpoint {path.name}"):
            if not self.writer.add_name(path, step, not weights_only):
                trainer.save_checkpoint(path, weights_only)
                best_is_known = self.params.save_best_model and self.best in (
                    None,
                    self._archived,
                )
                if (
                    self.params.always_save_nemo
                    and not weights_only
                    and not best_is_known
                ):
                    self._archived = self.best
                    trainer.lightning_module.save_to(str(self.archive))
        self._saved_step = step
        if not self.params.async_save:
            self.finish()

    def _path(self, trainer: pl.Trainer, template: str) -> Path:
        values: dict[str, Any] = {
            name: value.item() for name, value in trainer.callback_metrics.items()
        }
        values["step"] = trainer.global_step
        values["epoch"] = int(values.get("epoch", trainer.current_epoch))
        values["consumed_samples"] = float(trainer.datamodule.training.consumed_samples)

        def fill(match: re.Match[str]) -> str:
            name, spec = match.groups(default="")
            label = f"{name}=" if self._inserts_names else ""
            return label + format(values.get(name, 0), spec)

        return self.dirpath / re.sub(r"\{([^{}:]+)(?::([^{}]*))?\}", fill, template)

    def _is_left(self, trainer: pl.Trainer) -> bool:
        """Return True if the archive is newer than the checkpoint that this run resumed."""
        resumed = Path(str(trainer.ckpt_path))
        if resumed.absolute().parent != self.dirpath:
            return False
        hf_folder = self.archive.with_name(f"{self.archive.stem}-hf")
        wanted = [self.archive, hf_folder] if self.leaves_hf else [self.archive]
        made_s = (resumed / CONTENTS).stat().st_mtime
        return all(path.exists() and path.stat().st_mtime >= made_s for path in wanted)

    def _load_best(self, trainer: pl.Trainer, student: Any) -> int | None:
        """Load the best weights into the student; return their step, or None if there are none."""
        folder = trainer.strategy.broadcast(self.best)
        if folder is None:
            return None
        problem = agreed_damage(folder)
        if problem is not None:
            log.warning(
                "%s, the best checkpoint, is damaged: %s; the last weights replace it",
                folder,
                problem,
            )
            return None
        step = Contents.read(folder).step
        if step != trainer.global_step:
            state = load_sharded({"state_dict": student.sharded_state_dict()}, folder)
            student.load_sharded_state_dict(state["state_dict"])
            trainer.datamodule.load_state_dict(
                state[type(trainer.datamodule).__qualname__]
            )
        return step

    def _rank_key(self, path: Path) -> float:
        """Return the score so that less is better."""
        return -self.scores[path] if self.params.mode == "max" else self.scores[path]


@contextlib.contextmanager
def _explained(target: Path, written: Path | None = None) -> Iterator[None]:
    """Raise errors as a CheckpointError; remove what was `written`, which all ranks have left."""
    try:
        yield
    except (OSError, CheckpointException) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        before = next(
            (path for path in checkpoints(target.parent) if path != target), None
        )
        if written is not None and torch.distributed.get_rank() == 0:
            remove(written)
        kept = (
            f"the one before it is whole: {before.name}"
            if before
            else "there is none before it"
        )
        raise CheckpointError(
            f"{target}: the checkpoint cannot be written ({lines[-1]}); {kept}. Make room, or set "
            f"{PARAMS}.dirpath, and run the same command again"
        ) from error
