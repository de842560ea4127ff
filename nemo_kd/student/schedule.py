"""Schedules of a run: steps, validations and saves, and the learning rate by NeMo's formulas."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from nemo_kd.config import ConfigError
from nemo_kd.config.optim import OptimConfig
from nemo_kd.config.student import LOOP, LoopConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingPlan:
    """Length and intervals of a run in optimizer steps; a step consumes one global batch."""

    steps_per_epoch: int
    max_steps: int
    val_check_interval: int
    save_interval: int


def plan_training(
    loop: LoopConfig, num_samples: int, global_batch_size: int
) -> TrainingPlan:
    """Resolve fractions and -1 against the size of the training data.

    Raises:
        ConfigError: the data is smaller than a global batch, or an interval has no step.
    """
    whole_batches = num_samples // global_batch_size
    if not whole_batches:
        raise ConfigError(
            f"model.global_batch_size: {global_batch_size} exceeds the {num_samples} training "
            "examples; use a smaller one"
        )
    limit = _steps("limit_train_batches", loop.limit_train_batches, whole_batches)
    steps_per_epoch = max(1, min(limit, whole_batches))
    max_steps = loop.max_epochs * steps_per_epoch
    if loop.max_steps >= 0:
        max_steps = (
            min(max_steps, loop.max_steps) if loop.max_epochs > 0 else loop.max_steps
        )
    if max_steps < 1:
        raise ConfigError(
            f"{LOOP}.max_steps: {loop.max_steps} with max_epochs {loop.max_epochs} leaves nothing "
            "to train"
        )
    val_check_interval = _steps(
        "val_check_interval", loop.val_check_interval, steps_per_epoch
    )
    save_interval = val_check_interval
    if loop.save_interval is not None:
        save_interval = _steps("save_interval", loop.save_interval, steps_per_epoch)
    if val_check_interval < 1 or save_interval < 1:
        raise ConfigError(
            f"{LOOP}.val_check_interval: {loop.val_check_interval} and save_interval: "
            f"{loop.save_interval} must give at least 1 step"
        )
    plan = TrainingPlan(steps_per_epoch, max_steps, val_check_interval, save_interval)
    num_steps = plan.max_steps
    validates_every = val_check_interval if loop.limit_val_batches else 0
    if not loop.limit_val_batches:
        log.warning(
            "%s.limit_val_batches: 0, so nothing is validated, and checkpoints are not ranked",
            LOOP,
        )
    for key, steps, effect in (
        (
            "max_steps",
            loop.max_steps,
            "max_epochs gives no more; raise it to train longer",
        ),
        ("val_check_interval", validates_every, "it validates once, after the last"),
        ("save_interval", save_interval, "a run that is killed starts over"),
        ("log_every_n_steps", loop.log_every_n_steps, "none of them is logged"),
    ):
        if steps > num_steps:
            log.warning(
                "%s.%s: %d, but the run has %d steps: %s",
                LOOP,
                key,
                steps,
                num_steps,
                effect,
            )
    return plan


def _steps(key: str, value: int | float, steps_per_epoch: int) -> int:
    if isinstance(value, int):
        return value
    if value <= 0:
        return 0
    if value <= 1.0:
        return max(1, int(value * steps_per_epoch))
    if not value.is_integer():
        raise ConfigError(
            f"{LOOP}.{key}: {value} is neither a whole number of steps nor a fraction up to 1.0"
        )
    return int(value)


def learning_rate(step: int, optim: OptimConfig, max_steps: int) -> float:
    """Return the learning rate of a step (from 0).

    As in NeMo, the warmup starts at 0 if there are constant steps, else at lr / (warmup + 1).
    Unlike NeMo's, the inverse square root does not fall below min_lr.
    """
    sched = optim.sched
    warmup, decay, constant = sched.phases(max_steps)
    if warmup and step <= warmup:
        return optim.lr * (step / warmup if constant else (step + 1) / (warmup + 1))
    if sched.shape == "constant" or optim.lr == 0:
        return optim.lr
    min_factor = sched.min_lr / optim.lr
    if sched.shape == "inverse_square_root":
        return optim.lr * max(min_factor, math.sqrt((warmup + 1) / (step + 1)))
    progress = min(1.0, (step - warmup) / decay) if decay else 1.0
    left = (
        1.0 - progress
        if sched.shape == "linear"
        else 0.5 * (1.0 + math.cos(math.pi * progress))
    )
    return optim.lr * (min_factor + (1.0 - min_factor) * left)


def check_schedule(optim: OptimConfig, max_steps: int) -> None:
    """Warn if the run is too short for its constant steps or its warmup."""
    warmup, _, constant = optim.sched.phases(max_steps)
    wanted = optim.sched.asked_steps("constant", max_steps)
    if constant < wanted:
        log.warning(
            "model.optim.sched: %d steps of warmup and %d constant steps at min_lr are more than "
            "the %d steps of the run; it has no constant steps, the learning rate falls until the "
            "last step (constant_steps=0 asks for that)",
            warmup,
            wanted,
            max_steps,
        )
    if warmup >= max_steps:
        log.warning(
            "model.optim.sched: a warmup of %d steps in a run of %d: the learning rate ends at "
            "%.3g, never reaching lr=%g",
            warmup,
            max_steps,
            learning_rate(max_steps - 1, optim, max_steps),
            optim.lr,
        )
