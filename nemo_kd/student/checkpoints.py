"""Training checkpoints: written during training, named, ranked, and exported at the end."""

from __future__ import annotations

import contextlib
import logging
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch.distributed.checkpoint import CheckpointException

from nemo_kd.config.exp_manager import PARAMS, CheckpointParams
from nemo_kd.mcore.checkpoint_write import CheckpointWrite
from nemo_kd.mcore.distributed_checkpoint import load_sharded
from nemo_kd.run.collective import on_rank_zero
from nemo_kd.run.interruption import Watchdog
from nemo_kd.student.checkpoint_folder import (
    CONTENTS,
    LAST,
    PREVIOUS,
    CheckpointError,
    Contents,
    agreed_damage,
    checkpoints,
    discard,
    publish,
    seal,
    unfinished_folder,
)

log = logging.getLogger(__name__)


class Checkpoints:
    """Checkpoints of a run: the latest to resume from, and the best by the monitored metric.

    The latest is named `*-last`, the one before it `*-previous`. Every rank calls all methods but
    `is_writing`.

    Args:
        name: of the run.
        layout: sizes of the process groups.
        experiment: the record of what determines the run's result.

    Attributes:
        scores: ranked checkpoint -> value of the monitored metric.
    """

    def __init__(
        self,
        params: CheckpointParams,
        name: str,
        dirpath: Path,
        layout: dict[str, int],
        experiment: dict[str, Any],
        watchdog: Watchdog,
    ) -> None:
        self.params = params
        self.dirpath = dirpath.absolute()
        self.layout = layout
        self.experiment = experiment
        self.watchdog = watchdog
        self.archive = self.dirpath / f"{params.prefix or name}{params.postfix}"
        stem = self.archive.name.removesuffix(".nemo")
        self.best_archive = self.archive.with_name(f"{stem}-best.nemo")
        self._template = params.filename or (
            f"{name}--{params.monitor.replace('/', '_')}={{{params.monitor}:.4f}}"
            "-step={step}-consumed_samples={consumed_samples}"
        )
        self.scores: dict[Path, float] = {}
        self._has_saved = False  # in this process
        self._write: CheckpointWrite | None = None  # the one that is being written
        self._written: tuple[int, bool] = (
            0,
            False,
        )  # its step, and whether it is resumable
        self._names: list[Path] = []  # and its names
        self._removals: list[Path] = []  # once it is whole

    @property
    def best(self) -> Path | None:
        """The checkpoint with the best score."""
        return min(self.scores, key=self._rank_key, default=None)

    def is_writing(self) -> bool:
        """Return True while this rank's part of a checkpoint is being written."""
        return self._write is not None and self._write.is_running()

    def rank(self, trainer: pl.Trainer) -> None:
        """Save the weights that were just validated if they are good, and the latest state."""
        self.finish()
        monitor = self.params.monitor
        score = float(trainer.callback_metrics.get(monitor, math.nan))
        names: list[Path] = []
        if math.isfinite(score):
            path = self._path(trainer, self._template)
            self.scores[path] = score
            ranked = sorted(self.scores, key=self._rank_key)
            keep = self.params.save_top_k
            for other in ranked[keep:] if keep >= 0 else []:
                del self.scores[other]
                if other != path:
                    self._removals.append(other)
            if path in self.scores:
                names.append(path)
            if self.params.verbose:
                outcome = f"saved as {path.name}" if names else "is not among the best"
                log.info(
                    "step %d: %s=%.5f %s", trainer.global_step, monitor, score, outcome
                )
        else:
            log.warning(
                "%s is not finite after step %d; no checkpoint is ranked by it",
                monitor,
                trainer.global_step,
            )
        if names and self.params.save_weights_only:
            self._save(trainer, names, weights_only=True)
            names = []
        if self.params.save_last or (trainer.should_stop and not names):
            names.append(self._latest(trainer, has_score=math.isfinite(score)))
        if names:
            self._save(trainer, names)

    def save_latest(self, trainer: pl.Trainer) -> None:
        """Save all that a run needs to resume, as `*-last`."""
        self._save(trainer, [self._latest(trainer, has_score=False)])

    def write(self, checkpoint: dict[str, Any]) -> None:
        """Start to write what Lightning has collected; `finish` gives the checkpoint its names."""
        folder = on_rank_zero(lambda: unfinished_folder(self._names[0]))
        with self._explained():
            self._write = CheckpointWrite(checkpoint, folder)
        self._written = (checkpoint["global_step"], "optimizer_states" in checkpoint)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any, and give it its names.

        Raises:
            CheckpointError: it could not be written.
        """
        write, self._write = self._write, None
        if write is None:
            return

        def complete() -> None:
            seal(write.folder, *self._written, self.layout, sums, self.experiment)
            publish(write.folder, self._names)
            for path in self._removals:
                discard(path)

        pause = self.watchdog.pause("waiting for a checkpoint to be written")
        with pause, self._explained():
            sums = write.finish()
            on_rank_zero(complete)
        self._removals = []

    def write_archives(self, trainer: pl.Trainer, student: Any) -> None:
        """Leave the student's last and best weights as archives; the student keeps the best.

        NAME.nemo holds the last weights and NAME-best.nemo the best, if those are others; with
        `save_best_model`, NAME.nemo holds the best. Skipped if `save_nemo_on_train_end` is off, or
        if an earlier run of the same command left them and no step was trained since. Every rank
        calls it after the training.
        """
        best_only = self.params.save_best_model
        writes = self.params.save_nemo_on_train_end
        is_left = on_rank_zero(lambda: self._is_left(trainer, student.config.export.hf))
        if is_left:
            log.warning(
                "nothing is left to train: %s is the result of an earlier run of this command, "
                "which took all %d steps; to train on raise trainer.knowledge_distillation."
                "max_steps or max_epochs, to start over give another exp_manager.explicit_log_dir",
                self.archive,
                trainer.global_step,
            )
        elif writes and not best_only:
            student.save_to(str(self.archive))
        step = self._load_best(trainer, student)
        if step is not None:
            log.info("the best weights by %s are of step %d", self.params.monitor, step)
        if best_only:
            if writes and not is_left:
                student.save_to(str(self.archive))
        elif writes and step not in (None, trainer.global_step):
            student.save_to(str(self.best_archive))
        elif writes and step is not None and trainer.is_global_zero:
            # An earlier part of the run may have left them.
            self.best_archive.unlink(missing_ok=True)
            hf_folder = self.best_archive.with_name(f"{self.best_archive.stem}-hf")
            shutil.rmtree(hf_folder, ignore_errors=True)

    def state_dict(self) -> dict[str, Any]:
        return {
            "best_k_models": {str(path): score for path, score in self.scores.items()}
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the scores of checkpoints in this run's folder, and of no others.

        The state may come from another person's checkpoint, and a checkpoint that it names may be
        deleted for a better one, or loaded.
        """
        own = [
            path
            for path in checkpoints(self.dirpath)
            if not path.name.endswith((LAST, PREVIOUS))
        ]
        for name, score in state.get("best_k_models", {}).items():
            path = self.dirpath / Path(name).name.removesuffix(".ckpt")
            if path in own:
                self.scores[path] = float(score)

    def _save(
        self, trainer: pl.Trainer, names: list[Path], weights_only: bool = False
    ) -> None:
        self.finish()
        self._names = names
        with self.watchdog.pause(f"saving the checkpoint {names[0].name}"):
            trainer.save_checkpoint(names[0], weights_only)  # calls `write`
            is_wanted = not self.params.save_best_model or self.best in names
            if self.params.always_save_nemo and not weights_only and is_wanted:
                trainer.lightning_module.save_to(str(self.archive))
        self._has_saved = True
        if not self.params.async_save:
            self.finish()

    def _latest(self, trainer: pl.Trainer, has_score: bool) -> Path:
        template = self._template
        if not has_score:
            pattern = rf"(\w+=)?\{{{self.params.monitor}[^}}]*\}}-?"
            template = re.sub(pattern, "", template)
        return self._path(trainer, template + LAST)

    def _path(self, trainer: pl.Trainer, template: str) -> Path:
        values: dict[str, Any] = {
            name: value.item() for name, value in trainer.callback_metrics.items()
        }
        values["step"] = trainer.global_step
        values["epoch"] = int(values.get("epoch", trainer.current_epoch))
        values["consumed_samples"] = float(trainer.datamodule.training.consumed_samples)
        inserts_names = self.params.filename and self.params.auto_insert_metric_name

        def fill(match: re.Match[str]) -> str:
            name, spec = match.groups(default="")
            label = f"{name}=" if inserts_names else ""
            return label + format(values.get(name, 0), spec)

        return self.dirpath / re.sub(r"\{([^{}:]+)(?::([^{}]*))?\}", fill, template)

    def _is_left(self, trainer: pl.Trainer, wants_hf: bool) -> bool:
        """Return True if nothing was trained and the archive is newer than the checkpoint that
        this run resumed."""
        resumed = Path(str(trainer.ckpt_path))
        if self._has_saved or resumed.absolute().parent != self.dirpath:
            return False
        hf_folder = self.archive.with_name(f"{self.archive.stem}-hf")
        wanted = [self.archive, hf_folder] if wants_hf else [self.archive]
        made_s = (resumed / CONTENTS).stat().st_mtime
        return all(path.exists() and path.stat().st_mtime >= made_s for path in wanted)

    def _load_best(self, trainer: pl.Trainer, student: Any) -> int | None:
        """Load the best weights into the student; return their step, or None if there are none."""
        folder = on_rank_zero(lambda: self.best)
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
            student.data.load_state_dict(state["StudentData"])
        return step

    def _rank_key(self, path: Path) -> float:
        """Return the score so that less is better."""
        return -self.scores[path] if self.params.mode == "max" else self.scores[path]

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise errors of writing as a CheckpointError, on every rank."""
        try:
            yield
        except (OSError, CheckpointException) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            before = next(iter(checkpoints(self.dirpath)), None)
            kept = "there is none before it"
            if before is not None:
                kept = f"the one before it is whole: {before.name}"
            raise CheckpointError(
                f"{self._names[0]}: the checkpoint cannot be written ({lines[-1]}); {kept}. Make "
                f"room, or set {PARAMS}.dirpath, and run the same command again"
            ) from error
