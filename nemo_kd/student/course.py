"""The course of a run: what happens before, in and after every step, in one place."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch

from nemo_kd.batch import Batch
from nemo_kd.mcore.groups import set_random_state, sharded_random_state
from nemo_kd.student.checkpoint_folder import CheckpointError
from nemo_kd.student.checkpoints import Checkpoints
from nemo_kd.student.lifetime import Lifetime, StopFlags, StopsAllRanks
from nemo_kd.student.schedule import TrainingPlan

log = logging.getLogger(__name__)


class Course(pl.Callback):
    """Decides after every step whether to validate, save or stop; the same on all ranks.

    Lightning's loop calls, for every step:
        1. `StudentData.train_dataloader`: the next global batch;
        2. `StudentModule.training_step`: forward, backward, clip, step, learning rate;
        3. `RunLog`: log the metrics;
        4. `on_train_batch_end` here: save, if no validation comes first; stop, if asked;
        5. `StudentModule.validation_step` for every validation batch, if a validation is due;
        6. `on_validation_end` here: rank the checkpoint by its metric and save.

    It is the last callback, so that `EarlyStopping` and loggers act first. Lightning has no step
    limit; this callback ends the run through `trainer.should_stop`, and Lightning validates once
    more before it stops.

    Attributes:
        validation_is_due: the current weights have to be validated, and were not yet.
    """

    def __init__(
        self, plan: TrainingPlan, lifetime: Lifetime, checkpoints: Checkpoints | None
    ) -> None:
        self.plan = plan
        self.lifetime = lifetime
        self.checkpoints = checkpoints
        self.validation_is_due = False
        self.flags = StopFlags()
        self._stopped_early = False
        self._random_state: dict[str, Any] | None = None

    def setup(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str
    ) -> None:
        self.flags = pl_module.flags
        self.flags.wants_to_stop = self.lifetime.wants_to_stop
        if self.checkpoints is not None:
            self.flags.is_writing = self.checkpoints.writer.is_writing

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.lifetime.end_loading()
        # On resume Lightning repeats the validation of a step that is a multiple of its interval;
        # the checkpoint records whether that validation took place.
        trainer.val_check_batch = 1 if self.validation_is_due else self.plan.max_steps + 1
        if self._stopped_early and trainer.early_stopping_callback is not None:
            log.warning(
                "the run that this one resumes was stopped early; to train on set "
                "exp_manager.create_early_stopping_callback=false"
            )
            trainer.should_stop = True
        elif self._is_last(trainer) and not self.validation_is_due:
            trainer.should_stop = True
        if self._random_state is not None:
            set_random_state(self._random_state)
            self._random_state = None

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.lifetime.end_loading()

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: list[Batch],
        batch_idx: int,
    ) -> None:
        step = trainer.global_step + 1
        self.lifetime.watchdog.step("step %d: examples %s", step, _Examples(batch))

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        step = trainer.global_step
        is_last = self._is_last(trainer)
        trainer.val_check_batch = self.plan.val_check_interval
        if is_last:
            trainer.should_stop = True
        self.validation_is_due = trainer.enable_validation and (
            is_last or step % self.plan.val_check_interval == 0
        )
        self.lifetime.read(self.flags)
        if self.checkpoints is not None:
            if not self.flags.writing:
                self.checkpoints.finish()
            if self.lifetime.reason or (
                self._is_due(trainer) and not self.validation_is_due
            ):
                self.checkpoints.save_latest(trainer)
        if self.validation_is_due or not is_last:  # else the run is complete
            self.lifetime.raise_if_stopped()
        self.lifetime.watchdog.step("after step %d: waiting for data", step)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: list[Batch],
        batch_idx: int,
        *args: Any,
    ) -> None:
        self.lifetime.watchdog.step(
            "%s after step %d, batch %d: examples %s",
            trainer.state.stage,
            trainer.global_step,
            batch_idx,
            _Examples(batch),
        )

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        *args: Any,
    ) -> None:
        self.flags.sum(
            torch.zeros(0, dtype=torch.float64, device=pl_module.groups.device)
        )
        self.lifetime.read(self.flags)
        if self.checkpoints is not None and trainer.state.fn == "fit":
            if not self.flags.writing:
                self.checkpoints.finish()
            if self.lifetime.reason:
                self.checkpoints.save_latest(trainer)
        self.lifetime.raise_if_stopped()
        self.lifetime.watchdog.step(
            "after batch %d of the %s: waiting for data", batch_idx, trainer.state.stage
        )

    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end

    def on_validation_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> None:
        self.validation_is_due = False
        if self._is_last(trainer):
            trainer.should_stop = True
        if self.checkpoints is not None and self._is_due(trainer):
            self.checkpoints.rank(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.checkpoints is not None:
            self.checkpoints.finish()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Finish the checkpoint if all ranks stop together; a rank that fails alone would hang."""
        together = (
            isinstance(exception, StopsAllRanks)
            or torch.distributed.get_world_size() == 1
        )
        if self.checkpoints and together and not isinstance(exception, CheckpointError):
            self.checkpoints.finish()

    def on_save_checkpoint(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        checkpoint["schedule"] = {
            "validation_is_due": self.validation_is_due,
            "has_stopped": trainer.should_stop and not self._is_last(trainer),
        }
        checkpoint["random_state"] = sharded_random_state()
        if self.checkpoints is not None:
            checkpoint["ranks"] = self.checkpoints.state_dict()

    def on_load_checkpoint(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        self.validation_is_due = checkpoint["schedule"]["validation_is_due"]
        self._stopped_early = checkpoint["schedule"].get("has_stopped", False)
        self._random_state = checkpoint.get("random_state")
        if self.checkpoints is not None:
            self.checkpoints.load_state_dict(checkpoint["ranks"])

    def _is_last(self, trainer: pl.Trainer) -> bool:
        return trainer.global_step >= self.plan.max_steps

    def _is_due(self, trainer: pl.Trainer) -> bool:
        return trainer.should_stop or trainer.global_step % self.plan.save_interval == 0


class _Examples:
    """The indices in a batch, formatted only when they are shown."""

    def __init__(self, micro_batches: Sequence[Batch]) -> None:
        self.micro_batches = micro_batches

    def __str__(self) -> str:
        return str([batch.indices_B.tolist() for batch in self.micro_batches])
