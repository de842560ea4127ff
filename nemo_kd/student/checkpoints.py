"""Training checkpoints: when they are written, and how they reach the disk while training goes on."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint
from torch.distributed.checkpoint import CheckpointException

from nemo_kd.config import ConfigError
from nemo_kd.files import remove
from nemo_kd.mcore.checkpoint_write import CheckpointWrite
from nemo_kd.mcore.distributed_checkpoint import load_sharded
from nemo_kd.run.collective import on_rank_zero
from nemo_kd.student.checkpoint_folder import (
    CONTENTS,
    LAST,
    PREVIOUS,
    CheckpointError,
    checkpoints,
    discard,
    link,
    publish,
    seal,
    unfinished_folder,
)
from nemo_kd.student.lifetime import Lifetime, StopsAllRanks
from nemo_kd.student.resumable_state import StepSchedule

log = logging.getLogger(__name__)


def checkpoint_folder(path: str | Path) -> Path:
    """The folder of a checkpoint that Lightning calls `path`: NeMo drops the .ckpt of checkpoints that are folders."""
    return Path(str(path).removesuffix(".ckpt"))


def label_of(metric: str) -> str:
    """How the names of checkpoints call a metric, whose own name may have a slash."""
    return metric.replace("/", "_")


@dataclass
class _Saved:
    """A state that was saved.

    Attributes:
        targets: the names that the checkpoint has, or gets when it is whole.
    """

    step: int
    resumable: bool
    targets: list[Path]

    def again(self, step: int, resumable: bool, target: Path) -> bool:
        """Whether it is of this step, and gets one more name."""
        if (self.step, self.resumable) != (step, resumable):
            return False
        self.targets.append(target)
        return True


@dataclass
class _Underway:
    """A checkpoint that is being written.

    Attributes:
        removals: checkpoints that go when it is whole.
    """

    write: CheckpointWrite
    saved: _Saved
    removals: list[Path] = field(default_factory=list)


class DistributedCheckpointIO(CheckpointIO):
    """Lightning's checkpoints as Megatron distributed checkpoints; every rank takes part in all but `is_writing`."""

    def __init__(self, layout: dict[str, int], experiment: dict[str, Any]) -> None:
        self.layout = layout
        self.experiment = experiment
        self._underway: _Underway | None = None
        self._latest = _Saved(-1, False, [])  # the last one that became whole

    def is_writing(self) -> bool:
        """Whether this rank's part of a checkpoint is still being written."""
        return self._underway is not None and self._underway.write.is_running()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Starts to write; `finish` gives the checkpoint its name."""
        self.finish()
        target = checkpoint_folder(path)
        folder: list[Any] = [unfinished_folder(target)]
        torch.distributed.broadcast_object_list(folder, src=0)
        step, resumable = checkpoint["global_step"], "optimizer_states" in checkpoint
        with _errors_that_name(target, folder[0]):
            self._underway = _Underway(
                CheckpointWrite(checkpoint, folder[0]), _Saved(step, resumable, [target])
            )

    def save_again(self, path: str | Path, step: int, resumable: bool) -> bool:
        """Gives the checkpoint of this step another name; False where there is none of it."""
        target = checkpoint_folder(path)
        if self._underway is not None:
            return self._underway.saved.again(step, resumable, target)
        whole = self._latest.targets[-1:]
        if not self._latest.again(step, resumable, target):
            return False
        if whole != [target]:
            self._on_first_rank(lambda: link(whole[0], target), target)
        return True

    def finish(self) -> None:
        """Waits for the checkpoint that is being written, if any, and gives it its names.

        Raises:
            CheckpointError: it could not be written.
        """
        underway, self._underway = self._underway, None
        if underway is None:
            return
        saved, folder = underway.saved, underway.write.folder
        with _errors_that_name(saved.targets[0], folder):
            sums = underway.write.finish()

        def name() -> None:
            seal(folder, saved.step, saved.resumable, self.layout, sums, self.experiment)
            publish(folder, saved.targets)
            _discard(underway.removals)

        self._on_first_rank(name, saved.targets[0])
        self._latest = saved

    @staticmethod
    def _on_first_rank(act: Callable[[], None], target: Path) -> None:
        """Rank 0 acts, the others wait; all of them raise a CheckpointError where that fails."""
        with _errors_that_name(target):
            on_rank_zero(act)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = None,
        sharded_state: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        return load_sharded(sharded_state or {}, checkpoint_folder(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Not before the one that is being written, and may take its place, is whole."""
        if self._underway is not None:
            self._underway.removals.append(checkpoint_folder(path))
        elif torch.distributed.get_rank() == 0:
            _discard([checkpoint_folder(path)])


class StudentCheckpoints(NeMoModelCheckpoint):
    """Saves every `save_interval` steps, after the last step, and where the run has to stop.

    After a validation a checkpoint is ranked by the monitored value, and the best are kept. The latest of all is called
    `*-last`, from which a run resumes, and the one before it `*-previous`.
    """

    save_last: bool | None

    def __init__(
        self,
        save_interval: int,
        schedule: StepSchedule,
        lifetime: Lifetime,
        leaves_hf: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(enable_version_counter=False, **kwargs)
        self.save_interval, self.schedule, self.lifetime = save_interval, schedule, lifetime
        self.leaves_hf = leaves_hf
        self._unranked_name = re.sub(
            rf"(\w+=)?\{{{self.monitor}[^}}]*\}}-?", "", str(self.filename)
        )
        self._first_step = -1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lightning's own: NeMo's deletes what it takes for unfinished."""
        ModelCheckpoint.setup(self, trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._first_step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._look_after_the_writer(trainer)
        if self.lifetime.reason is not None or (
            self._is_due(trainer) and not self.schedule.validation_is_due
        ):
            self._save_latest(trainer, self._unranked_name)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.state.fn != "fit":
            return
        self._look_after_the_writer(trainer)
        if self.lifetime.reason is not None:
            self._save_latest(trainer, self._unranked_name)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and self._is_due(trainer):
            candidates = self._monitor_candidates(trainer)
            if self.monitor not in candidates:
                raise ConfigError(
                    f"exp_manager.checkpoint_callback_params.monitor: {self.monitor!r} is not measured; known: {', '.join(candidates)}"
                )
            is_ranked = bool(torch.as_tensor(candidates[self.monitor]).isfinite())
            if is_ranked:
                self._save_topk_checkpoint(trainer, candidates)
            else:
                log.warning(
                    "%s is not finite after step %d; no checkpoint is ranked by it",
                    self.monitor,
                    trainer.global_step,
                )
            if self.save_last:
                self._save_latest(trainer, str(self.filename) if is_ranked else self._unranked_name)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leaves the archive, unless an earlier run of the same command did and nothing was left to train."""
        nothing_new = self._first_step == trainer.global_step and self._last_global_step_saved == 0
        if not nothing_new and self._last_global_step_saved != trainer.global_step:  # stopped early
            self._save_latest(trainer, self._unranked_name)
        self._finish(trainer)
        if trainer.strategy.broadcast(nothing_new and self._is_left(trainer)):
            log.warning(
                "nothing is left to train: %s is the result of an earlier run of this command, which took all %d steps; to train on "
                "raise trainer.knowledge_distillation.max_steps or max_epochs, to start over give another "
                "exp_manager.explicit_log_dir",
                self._format_nemo_checkpoint_name(),
                trainer.global_step,
            )
            return
        save_last = self.save_last
        self.save_last = False  # what NeMo would save here is there already
        with self.lifetime.watchdog.pause("writing the .nemo archive"):
            super().on_train_end(trainer, pl_module)
        self.save_last = save_last

    def _is_left(self, trainer: pl.Trainer) -> bool:
        """Whether all that a run leaves was written after the checkpoint that this one went on from, in the same folder."""
        if (
            checkpoint_folder(trainer.ckpt_path).absolute().parent
            != Path(str(self.dirpath)).absolute()
        ):
            return False
        archive = Path(self._format_nemo_checkpoint_name())
        wanted = [archive, archive.with_name(f"{archive.stem}-hf")] if self.leaves_hf else [archive]
        made_s = (checkpoint_folder(trainer.ckpt_path) / CONTENTS).stat().st_mtime
        return all(path.exists() and path.stat().st_mtime >= made_s for path in wanted)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Ranks that stop together wait for the checkpoint; one that fails alone would wait for the others forever."""
        together = isinstance(exception, StopsAllRanks) or torch.distributed.get_world_size() == 1
        if together and not isinstance(exception, CheckpointError):
            self._finish(trainer)

    def _is_due(self, trainer: pl.Trainer) -> bool:
        step = trainer.global_step
        return step % self.save_interval == 0 or step >= self.schedule.plan.max_steps

    def _look_after_the_writer(self, trainer: pl.Trainer) -> None:
        if not self.lifetime.agreement.writing:
            self._finish(trainer)

    def _finish(self, trainer: pl.Trainer) -> None:
        with self.lifetime.watchdog.pause("waiting for a checkpoint to be written"):
            trainer.strategy.checkpoint_io.finish()

    def _save_latest(self, trainer: pl.Trainer, name: str) -> None:
        """Saves under `*-last` all that a run needs to go on."""
        path = self.format_checkpoint_name(self._monitor_candidates(trainer), name + LAST)
        self.last_model_path = path  # before it is saved, for it is a part of the state
        self._save(trainer, path, weights_only=False)

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        self._save(trainer, filepath, self.save_weights_only)

    def _save(self, trainer: pl.Trainer, path: str, weights_only: bool) -> None:
        with self.lifetime.watchdog.pause(f"saving the checkpoint {Path(path).name}"):
            if not trainer.strategy.checkpoint_io.save_again(
                path, trainer.global_step, not weights_only
            ):
                trainer.save_checkpoint(path, weights_only)
        self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, path
        if not self.async_save:
            self._finish(trainer)

    def _remove_checkpoint(
        self, trainer: pl.Trainer, filepath: str, override_async: bool = False
    ) -> None:
        trainer.strategy.remove_checkpoint(filepath)

    def _monitor_candidates(self, trainer: pl.Trainer) -> dict[str, torch.Tensor]:
        """A resumed run may save before it has logged anything."""
        consumed = float(trainer.datamodule.training.consumed_samples)
        return {**super()._monitor_candidates(trainer), "consumed_samples": torch.tensor(consumed)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over scores of checkpoints in this run's folder alone.

        The state may be of somebody's checkpoint, and a checkpoint that it names is deleted for a better one, or loaded.
        """
        own = set(self._saved_checkpoint_paths)
        found = state_dict.get("best_k_models")
        ranks = {}
        for path, score in found.items() if isinstance(found, dict) else ():
            here = os.path.join(str(self.dirpath), Path(str(path)).name)
            if checkpoint_folder(here) in own and isinstance(score, int | float | torch.Tensor):
                ranks[here] = float(score)
        if not ranks and state_dict.get("dirpath") != self.dirpath:
            ranks = self.best_k_models  # as the folder's names tell
        unknown = {
            "best_model_path": "",
            "kth_best_model_path": "",
            "last_model_path": "",
            "best_model_score": None,
        }
        super().load_state_dict({"dirpath": self.dirpath, "best_k_models": ranks, **unknown})

    def nemo_topk_check_previous_run(self) -> None:
        """Reads the ranks of an earlier run's checkpoints from their names; NeMo's fails at what is not finite."""
        label = re.escape(label_of(str(self.monitor)))
        value = re.compile(rf"{label}=(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)(?![\w.])")
        found = {
            str(path): float(match[1])
            for path in self._saved_checkpoint_paths
            if (match := value.search(path.name))
        }
        best = sorted(found, key=lambda path: found[path], reverse=self.mode == "max")
        if 0 <= self.save_top_k < len(best):
            if torch.distributed.get_rank() == 0:
                _discard(map(Path, best[self.save_top_k :]))
            del best[self.save_top_k :]
        self.best_k_models = {path: found[path] for path in best}
        self.kth_best_model_path = best[-1] if best else ""
        self.best_model_path = best[0] if best else ""
        self.best_model_score = found[best[0]] if best else None

    @property
    def _saved_checkpoint_paths(self) -> Iterable[Path]:
        """The ranked ones."""
        return [
            path
            for path in checkpoints(Path(str(self.dirpath)))
            if not path.name.endswith((LAST, PREVIOUS))
        ]


@contextlib.contextmanager
def _errors_that_name(target: Path, written: Path | None = None) -> Iterator[None]:
    """Raise errors as a CheckpointError; removes what was `written`, which all ranks have left then."""
    try:
        yield
    except (OSError, CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        before = next((path for path in checkpoints(target.parent) if path != target), None)
        if written is not None and torch.distributed.get_rank() == 0:
            remove(written)
        kept = (
            "no checkpoint was written before"
            if before is None
            else f"the one before it is whole: {before.name}"
        )
        raise CheckpointError(
            f"{target}: the checkpoint cannot be written ({reason}); {kept}. Make room, or set "
            "exp_manager.checkpoint_callback_params.dirpath, and run the same command again"
        ) from error


def _discard(folders: Iterable[Path]) -> None:
    for folder in folders:
        if folder.is_dir():
            discard(folder)
