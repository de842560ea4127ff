"""How many steps a run takes and when it validates and saves."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from nemo_kd.config import ConfigError
from nemo_kd.config.student import LOOP, LoopConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingPlan:
    """All in optimizer steps; one step consumes one global batch."""

    steps_per_epoch: int
    max_steps: int
    val_check_interval: int
    save_interval: int

    def described(self) -> dict[str, int]:
        """Return the numbers by what they count."""
        return {
            "steps": self.max_steps,
            "steps an epoch": self.steps_per_epoch,
            "between validations": self.val_check_interval,
            "between checkpoints": self.save_interval,
        }


def plan_training(loop: LoopConfig, num_samples: int, global_batch_size: int) -> TrainingPlan:
    """Resolves fractions and -1 against the size of the training data.

    Raises:
        ConfigError: the data is smaller than a global batch, or an interval has no step.
    """
    whole_batches = num_samples // global_batch_size
    if not whole_batches:
        raise ConfigError(
            f"model.global_batch_size: {global_batch_size} exceeds the {num_samples} training examples; use a smaller one"
        )
    steps_per_epoch = max(
        1, _steps("limit_train_batches", loop.limit_train_batches, whole_batches, whole_batches)
    )
    max_steps = loop.max_epochs * steps_per_epoch
    if loop.max_steps >= 0:
        max_steps = min(max_steps, loop.max_steps) if loop.max_epochs > 0 else loop.max_steps
    if max_steps < 1:
        raise ConfigError(
            f"{LOOP}.max_steps: {loop.max_steps} with max_epochs {loop.max_epochs} leaves nothing to train"
        )
    val_check_interval = _steps("val_check_interval", loop.val_check_interval, steps_per_epoch)
    save_interval = val_check_interval
    if loop.save_interval is not None:
        save_interval = _steps("save_interval", loop.save_interval, steps_per_epoch)
    if val_check_interval < 1 or save_interval < 1:
        raise ConfigError(
            f"{LOOP}.val_check_interval: {loop.val_check_interval} and save_interval: {loop.save_interval} must give at least 1 step"
        )
    plan = TrainingPlan(steps_per_epoch, max_steps, val_check_interval, save_interval)
    for warning in _doubts(loop, plan):
        log.warning("%s.%s", LOOP, warning)
    return plan


def _doubts(loop: LoopConfig, plan: TrainingPlan) -> list[str]:
    """Settings that can be followed, but hardly do what was meant."""
    run = f"the run has {plan.max_steps} steps"
    doubts = []
    if loop.max_steps > plan.max_steps:
        doubts.append(
            f"max_steps: {loop.max_steps}, but {run}, which is what max_epochs={loop.max_epochs} gives; raise max_epochs to train longer"
        )
    if not loop.limit_val_batches:
        doubts.append(
            "limit_val_batches: 0, so nothing is validated, and no checkpoint is better than another"
        )
    elif plan.val_check_interval > plan.max_steps:
        doubts.append(
            f"val_check_interval: {plan.val_check_interval}, but {run}: it validates once, after the last"
        )
    if plan.save_interval > plan.max_steps:
        doubts.append(
            f"save_interval: {plan.save_interval} steps, but {run}: a run that is killed begins anew; give a smaller one"
        )
    if loop.log_every_n_steps > plan.max_steps:
        doubts.append(
            f"log_every_n_steps: {loop.log_every_n_steps}, but {run}: none of them is logged"
        )
    return doubts


def _steps(key: str, value: int | float, steps_per_epoch: int, largest: int | None = None) -> int:
    if isinstance(value, float):
        if value > 1.0 and not value.is_integer():
            raise ConfigError(
                f"{LOOP}.{key}: {value} is neither a whole number of steps nor a fraction up to 1.0"
            )
        steps = (
            int(value) if value > 1.0 else max(1, int(value * steps_per_epoch)) if value > 0 else 0
        )
    else:
        steps = value
    return steps if largest is None else min(steps, largest)
