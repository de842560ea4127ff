"""How many steps a run takes and when it validates and saves."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_kd.config import ConfigError
from nemo_kd.config.student import LoopConfig

PREFIX = "trainer.knowledge_distillation"


@dataclass(frozen=True)
class TrainingPlan:
    """All in optimizer steps; one step consumes one global batch."""

    steps_per_epoch: int
    max_steps: int
    val_check_interval: int
    save_interval: int


def plan_training(loop: LoopConfig, num_samples: int, global_batch_size: int) -> TrainingPlan:
    """Resolves fractions and -1 against the size of the training data.

    Raises:
        ConfigError: the data is smaller than a global batch, or the intervals contradict each other.
    """
    whole_batches = num_samples // global_batch_size
    if not whole_batches:
        raise ConfigError(
            f"model.global_batch_size: {global_batch_size} exceeds the {num_samples} training examples; use a smaller one"
        )
    steps_per_epoch = max(1, _steps("limit_train_batches", loop.limit_train_batches, whole_batches, whole_batches))
    max_steps = loop.max_epochs * steps_per_epoch
    if loop.max_steps >= 0:
        max_steps = min(max_steps, loop.max_steps) if loop.max_epochs > 0 else loop.max_steps
    if max_steps < 1:
        raise ConfigError(
            f"{PREFIX}.max_steps: {loop.max_steps} with max_epochs {loop.max_epochs} leaves nothing to train"
        )
    val_check_interval = _steps("val_check_interval", loop.val_check_interval, steps_per_epoch)
    save_interval = val_check_interval
    if loop.save_interval is not None:
        save_interval = _steps("save_interval", loop.save_interval, steps_per_epoch)
    if val_check_interval < 1 or save_interval < 1:
        raise ConfigError(
            f"{PREFIX}.val_check_interval: {loop.val_check_interval} and save_interval: {loop.save_interval} must give at least 1 step"
        )
    if save_interval % val_check_interval:
        raise ConfigError(
            f"{PREFIX}.save_interval: {save_interval} steps is not a multiple of val_check_interval ({val_check_interval} steps); "
            "checkpoints are ranked by the validation loss"
        )
    return TrainingPlan(steps_per_epoch, max_steps, val_check_interval, save_interval)


def _steps(key: str, value: int | float, steps_per_epoch: int, largest: int | None = None) -> int:
    if isinstance(value, float):
        if value > 1.0 and not value.is_integer():
            raise ConfigError(f"{PREFIX}.{key}: {value} is neither a whole number of steps nor a fraction up to 1.0")
        steps = int(value) if value > 1.0 else max(1, int(value * steps_per_epoch)) if value > 0 else 0
    else:
        steps = value
    return steps if largest is None else min(steps, largest)
