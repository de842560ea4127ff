"""The learning rate over a run, by NeMo's formulas."""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import torch

from nemo_kd.config.optim import OptimConfig, SchedConfig

log = logging.getLogger(__name__)


def learning_rate_factor(step: int, sched: SchedConfig, max_lr: float, max_steps: int) -> float:
    """Learning rate of a step (from 0) as a fraction of `max_lr`.

    As in NeMo, the warmup starts at 0 where there are constant steps, else at max_lr / (warmup + 1). Unlike NeMo's,
    the inverse square root does not fall below min_lr.
    """
    warmup, decay, constant = sched.phases(max_steps)
    if warmup and step <= warmup:
        return step / warmup if constant else (step + 1) / (warmup + 1)
    if sched.shape == "constant" or max_lr == 0:
        return 1.0
    min_factor = sched.min_lr / max_lr
    if sched.shape == "inverse_square_root":
        return max(min_factor, math.sqrt((warmup + 1) / (step + 1)))
    progress = min(1.0, (step - warmup) / decay) if decay else 1.0
    left = 1.0 - progress if sched.shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return min_factor + (1.0 - min_factor) * left


def check_schedule(optim: OptimConfig, max_steps: int) -> None:
    """Warn of constant steps that the run has no room for, and of a warmup that it does not get out of."""
    warmup, _, constant = optim.sched.phases(max_steps)
    asked = optim.sched.asked_constant_steps(max_steps)
    if constant < asked:
        log.warning(
            "model.optim.sched: %d steps of warmup and %d constant steps at min_lr are more than the %d steps of the run; it has no "
            "constant steps, the learning rate falls until the last step (constant_steps=0 asks for that)",
            warmup,
            asked,
            max_steps,
        )
    if warmup >= max_steps:
        last = optim.lr * learning_rate_factor(max_steps - 1, optim.sched, optim.lr, max_steps)
        log.warning(
            "model.optim.sched: a warmup of %d steps in a run of %d: the learning rate ends at %.3g, never reaching lr=%g",
            warmup,
            max_steps,
            last,
            optim.lr,
        )


def lr_scheduler(
    optimizer: torch.optim.Optimizer, optim: OptimConfig, max_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate over the run's optimizer steps."""
    for group in optimizer.param_groups:
        group["initial_lr"] = optim.lr
    return _Schedule(
        optimizer,
        functools.partial(
            learning_rate_factor, sched=optim.sched, max_lr=optim.lr, max_steps=max_steps
        ),
    )


class _Schedule(torch.optim.lr_scheduler.LambdaLR):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on at the step of a checkpoint, by the configuration of now."""
        base_lrs = self.base_lrs
        super().load_state_dict(state_dict)
        self.base_lrs = base_lrs
        # Not get_lr(), which warns whoever is not a step of the scheduler.
        self._last_lr = [
            base_lr * factor(self.last_epoch)
            for base_lr, factor in zip(base_lrs, self.lr_lambdas, strict=True)
        ]
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr
