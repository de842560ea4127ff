"""Training checkpoints: written during training, named, ranked, and exported at the end."""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_kd.config.exp_manager import CheckpointParams
from nemo_kd.files import explained, remove
from nemo_kd.mcore.checkpoint_write import CheckpointWrite
from nemo_kd.mcore.distributed_checkpoint import load_sharded
from nemo_kd.run.collective import on_rank_zero
from nemo_kd.run.interruption import Watchdog
from nemo_kd.student.checkpoint_folder import (
    LAST,
    CheckpointError,
    Contents,
    check_whole,
    checkpoints,
    discard,
    publish,
    seal,
    unfinished_folder,
)

if TYPE_CHECKING:
    from nemo_kd.student.module import StudentModule

log = logging.getLogger(__name__)


@dataclass
class Checkpoints:
    """Checkpoints of a run: the latest to resume from, and the best by the monitored metric.

    The latest is named `*-last`, the one before it `*-previous`. Every rank calls all methods but
    `is_writing`.

    Attributes:
        name: of the run.
        layout: sizes of the process groups.
        experiment: the record of what determines the run's result.
        scores: ranked checkpoint -> value of the monitored metric.
    """

    params: CheckpointParams
    name: str
    dirpath: Path
    layout: dict[str, int]
    experiment: dict[str, Any]
    watchdog: Watchdog
    scores: dict[Path, float] = field(default_factory=dict)
    _has_saved: bool = False  # in this process
    _write: CheckpointWrite | None = None  # the one that is being written
    _names: list[Path] = field(default_factory=list)  # of that one
    _removals: list[Path] = field(default_factory=list)  # once it is whole

    def __post_init__(self) -> None:
        params = self.params
        self.dirpath = self.dirpath.absolute()
        self.archive = self.dirpath / f"{params.prefix or self.name}{params.postfix}"
        self.best_archive = self.archive.with_name(f"{self.archive.stem}-best.nemo")
        self._template = params.filename or (
            f"{self.name}--{params.monitor.replace('/', '_')}={{{params.monitor}:.4f}}"
            "-step={step}-consumed_samples={consumed_samples}"
        )
        if params.filename and params.auto_insert_metric_name:
            self._template = re.sub(r"\{([^{}:]+)", r"\1={\1", params.filename)
        # The latest state may have no score.
        score = rf"(\w+=)?\{{{params.monitor}[^}}]*\}}-?"
        self._latest = re.sub(score, "", self._template) + LAST

    @property
    def best(self) -> Path | None:
        """The checkpoint with the best score."""
        return min(self.scores, key=self._rank_key, default=None)

    def is_writing(self) -> bool:
        """Return True while this rank's part of a checkpoint is being written."""
        return self._write is not None and self._write.is_running()

    def rank(self, student: StudentModule) -> None:
        """Save the weights that were just measured if they are good, and the latest state."""
        self.finish()
        monitor = self.params.monitor
        trainer = student.trainer
        step = student.global_step
        section = monitor.partition("/")[0]
        if not any(name.partition("/")[0] == section for name in student.measured):
            self.save_latest(student)  # the metric belongs to other steps
            return
        score = student.measured.get(monitor, math.nan)
        names: list[Path] = []
        if math.isfinite(score):
            path = self._path(student, self._template)
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
                log.info(
                    "step %d: %s=%.5f, kept: %s", step, monitor, score, bool(names)
                )
        else:
            log.warning(
                "%s is not %s after step %d; no checkpoint is ranked by it",
                monitor,
                "finite" if monitor in student.measured else "measured",
                step,
            )
        if names and self.params.save_weights_only:
            self._save(student, names, weights_only=True)
            names = []
        if self.params.save_last or (trainer.should_stop and not names):
            names.append(self._path(student, self._latest))
        if names:
            self._save(student, names)

    def save_latest(self, student: StudentModule) -> None:
        """Save all that a run needs to resume, as `*-last`."""
        self._save(student, [self._path(student, self._latest)])

    def write(self, checkpoint: dict[str, Any]) -> None:
        """Start to write what Lightning has collected; `finish` gives the checkpoint its names.

        Raises:
            FileError: on every rank, it cannot be written; names the checkpoint.
        """
        folder = on_rank_zero(lambda: unfinished_folder(self._names[0]))
        with explained(self._names[0]):
            self._write = CheckpointWrite(checkpoint, folder)
        is_resumable = "optimizer_states" in checkpoint
        self._contents = Contents(
            checkpoint["global_step"], is_resumable, self.layout, {}, self.experiment
        )

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any, and give it its names.

        Raises:
            FileError: on every rank, it could not be written; names the checkpoint.
        """
        write, self._write = self._write, None
        if write is None:
            return

        def complete() -> None:
            seal(write.folder, replace(self._contents, files=sums))
            publish(write.folder, self._names)
            for path in self._removals:
                discard(path)

        with (
            self.watchdog.pause("waiting for a checkpoint to be written"),
            explained(self._names[0]),
        ):
            try:
                sums = write.finish()
            except OSError:
                remove(write.folder)  # of a full disk
                raise
            on_rank_zero(complete)
        self._removals = []

    def write_archives(self, student: StudentModule) -> None:
        """Write the student's last and best weights as archives; the student keeps the best.

        NAME.nemo holds the last weights and NAME-best.nemo the best, if those are others; with
        `save_best_model`, NAME.nemo holds the best. Nothing is written if
        `save_nemo_on_train_end` is off. Every rank calls it after the training.
        """
        best_only = self.params.save_best_model
        writes = self.params.save_nemo_on_train_end
        if student.trainer.ckpt_path and not self._has_saved:
            log.warning(
                "nothing is left to train: an earlier run of this command took all %d steps; to "
                "train on raise trainer.knowledge_distillation.max_steps or max_epochs, to start "
                "over give another exp_manager.explicit_log_dir",
                student.global_step,
            )
        if writes and not best_only:
            student.save_to(self.archive)
        step = self._load_best(student)
        if writes and best_only:
            student.save_to(self.archive)
        elif writes and step not in (None, student.global_step):
            student.save_to(self.best_archive)
        elif writes and step is not None and student.trainer.is_global_zero:
            # An earlier part of the run may have left them.
            remove(self.best_archive)
            remove(self.best_archive.with_name(f"{self.best_archive.stem}-hf"))

    def state_dict(self) -> dict[str, Any]:
        return {
            "best_k_models": {str(path): score for path, score in self.scores.items()}
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the scores of checkpoints in this run's folder, and of no others.

        The state may come from another person's checkpoint, and a checkpoint that it names may be
        deleted for a better one, or loaded.
        """
        own = {path.name: path for path in checkpoints(self.dirpath)}
        for name, score in state["best_k_models"].items():
            path = own.get(Path(name).name.removesuffix(".ckpt"))
            if path is not None:
                self.scores[path] = float(score)

    def _save(
        self, student: StudentModule, names: list[Path], weights_only: bool = False
    ) -> None:
        self.finish()
        self._names = names
        with self.watchdog.pause(f"saving the checkpoint {names[0].name}"):
            student.trainer.save_checkpoint(names[0], weights_only)  # calls `write`
            is_wanted = not self.params.save_best_model or self.best in names
            if self.params.always_save_nemo and not weights_only and is_wanted:
                student.save_to(self.archive)
        self._has_saved = True
        if not self.params.async_save:
            self.finish()

    def _path(self, student: StudentModule, template: str) -> Path:
        # A metric that is not measured is 0.
        values: defaultdict[str, float] = defaultdict(int)
        for name, value in student.trainer.callback_metrics.items():
            values[name] = value.item()
        values.update(student.measured)
        values["step"] = student.global_step
        values["epoch"] = int(values["epoch"])
        values["consumed_samples"] = float(student.data.training.consumed_samples)
        return self.dirpath / template.format_map(values)

    def _load_best(self, student: StudentModule) -> int | None:
        """Load the best weights into the student; return their step, or None if there are none, or
        they are damaged."""
        folder = on_rank_zero(lambda: self.best)
        if folder is None:
            return None
        try:
            step = check_whole(folder).step
        except (CheckpointError, OSError) as error:
            log.warning(
                "%s, the best checkpoint, is damaged (%s); the last weights replace it",
                folder,
                error,
            )
            return None
        if step != student.global_step:
            state = load_sharded({"state_dict": student.state_dict()}, folder)
            student.load_state_dict(state["state_dict"])
            student.data.load_state_dict(state["StudentData"])
        return step

    def _rank_key(self, path: Path) -> float:
        """Return the score so that less is better."""
        return -self.scores[path] if self.params.mode == "max" else self.scores[path]
