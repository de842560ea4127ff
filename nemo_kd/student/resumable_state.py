"""When a run validates, and what makes a resumed run the same as one that was never stopped."""

from __future__ import annotations

import logging
import math
from typing import Any

import lightning.pytorch as pl

from nemo_kd.mcore.random_state import set_random_state, sharded_random_state
from nemo_kd.student.training_plan import TrainingPlan

log = logging.getLogger(__name__)

RANDOM_STATE, SCHEDULE = "random_state", "schedule"


class StepSchedule(pl.Callback):
    """Tells Lightning when to validate, from the number of completed steps alone, and completes its checkpoints.

    To Lightning a run is one epoch of `plan.max_steps` batches. Its own counters are behind by one or not, depending on
    the hook that a checkpoint was saved in; here they are saved as they are between two steps.

    Attributes:
        validation_is_due: a validation of the weights as they are should take place, and has not yet.
    """

    def __init__(self, plan: TrainingPlan) -> None:
        self.plan, self.validation_is_due, self._has_stopped = plan, False, False
        self._random_state: dict[str, Any] | None = None

    def validates_after(self, trainer: pl.Trainer, step: int) -> bool:
        """Whether a validation follows this step."""
        return trainer.enable_validation and (
            step % self.plan.val_check_interval == 0 or step >= self.plan.max_steps
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tell(trainer)
        if self._has_stopped and trainer.early_stopping_callback is not None:
            log.warning(
                "the run that this one goes on from was stopped early; to train on set "
                "exp_manager.create_early_stopping_callback=false"
            )
            trainer.should_stop = True
        if self._random_state is not None:
            set_random_state(self._random_state)
            self._random_state = None

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.validation_is_due = self.validates_after(trainer, trainer.global_step)
        self._tell(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validation_is_due = False

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["loops"]["fit_loop"] |= _between_steps(
            trainer.global_step, checkpoint["loops"]["fit_loop"]
        )
        checkpoint[SCHEDULE] = {
            "validation_is_due": self.validation_is_due,
            "has_stopped": trainer.should_stop,
        }
        checkpoint[RANDOM_STATE] = sharded_random_state()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.validation_is_due = checkpoint[SCHEDULE]["validation_is_due"]
        self._has_stopped = checkpoint[SCHEDULE].get("has_stopped", False)
        self._random_state = checkpoint.get(RANDOM_STATE)

    def _tell(self, trainer: pl.Trainer) -> None:
        """Lightning looks at this after every step, and when it has resumed."""
        trainer.val_check_batch = 1 if self.validation_is_due else math.inf


def _between_steps(step: int, fit_loop: dict[str, Any]) -> dict[str, Any]:
    """The state of Lightning's loop when `step` batches are done and nothing else has begun."""
    done = {"ready": step, "started": step, "processed": step, "completed": step}
    idle = dict.fromkeys(done, 0)
    batches = {
        **fit_loop["epoch_loop.batch_progress"],
        "total": done,
        "current": done,
        "is_last_batch": False,
    }
    return {
        "epoch_progress": {
            "total": {**idle, "ready": 1, "started": 1},
            "current": {**idle, "ready": 1, "started": 1},
        },
        "epoch_loop.state_dict": {
            **fit_loop["epoch_loop.state_dict"],
            "_batches_that_stepped": step,
        },
        "epoch_loop.batch_progress": batches,
        "epoch_loop.val_loop.batch_progress": {
            **fit_loop["epoch_loop.val_loop.batch_progress"],
            "total": idle,
            "current": idle,
            "is_last_batch": False,
        },
    }
