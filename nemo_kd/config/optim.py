"""Configuration of the optimizer and of the learning rate over a run: `model.optim`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from nemo_kd.config.errors import ConfigError

KEY = "model.optim"
DEFAULT_WARMUP_STEPS = 10
SHARDED = "distributed_fused_adam"
OPTIMIZERS = (SHARDED, "adamw", "adam")
SCHEDULES = {
    "CosineAnnealing": "cosine",
    "WarmupAnnealing": "linear",
    "linear": "linear",
    "InverseSquareRootAnnealing": "inverse_square_root",
    "inverse_square_root": "inverse_square_root",
    "WarmupPolicy": "constant",
    "constant": "constant",
}
"""NeMo's names and plain ones -> the shape after the warmup."""


class Phases(NamedTuple):
    """How many steps each part of a schedule takes; `constant` ones come last, at min_lr."""

    warmup: int
    decay: int
    constant: int


@dataclass
class SchedConfig:
    name: str = "CosineAnnealing"
    """After a linear warmup: CosineAnnealing or linear (NeMo: WarmupAnnealing) down to min_lr, inverse_square_root (NeMo: InverseSquareRootAnnealing), never below min_lr, or constant (NeMo: WarmupPolicy), which knows no min_lr."""
    warmup_steps: int | None = None
    """Steps of linear warmup; None, without a warmup_ratio: 10."""
    warmup_ratio: float | None = None
    """Instead of warmup_steps: a fraction of all steps."""
    constant_steps: int | None = None
    """CosineAnnealing and linear: last steps, at min_lr."""
    constant_ratio: float | None = None
    """Instead of constant_steps: a fraction of all steps."""
    min_lr: float = 0.0
    """Where the learning rate ends."""

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise ConfigError(
                f"{KEY}.sched.name: {self.name!r} is not one of {', '.join(SCHEDULES)}"
            )
        for phase in ("warmup", "constant"):
            steps, ratio = getattr(self, f"{phase}_steps"), getattr(self, f"{phase}_ratio")
            if steps is not None and ratio is not None:
                raise ConfigError(f"{KEY}.sched: give {phase}_steps or {phase}_ratio, not both")
            if steps is not None and steps < 0:
                raise ConfigError(f"{KEY}.sched.{phase}_steps: {steps} must not be negative")
            if ratio is not None and not 0 <= ratio <= 1:
                raise ConfigError(f"{KEY}.sched.{phase}_ratio: {ratio} must be from 0 to 1")
        if (self.constant_steps or self.constant_ratio) and self.shape not in ("cosine", "linear"):
            raise ConfigError(
                f"{KEY}.sched.constant_steps and constant_ratio are for CosineAnnealing and linear; leave them out with "
                f"name={self.name}"
            )

    @property
    def shape(self) -> str:
        """cosine, linear, inverse_square_root or constant."""
        return SCHEDULES[self.name]

    def phases(self, max_steps: int) -> Phases:
        """The parts of a run of `max_steps`.

        A warmup that is longer than the run is allowed, as short trials have it; the rate stays below its maximum then.
        Constant steps that do not fit after the warmup are left out: otherwise a short run would train at min_lr throughout.
        """
        warmup = _steps(self.warmup_steps, self.warmup_ratio, DEFAULT_WARMUP_STEPS, max_steps)
        constant = self.asked_constant_steps(max_steps)
        if warmup + constant > max_steps:
            constant = 0
        return Phases(warmup, max(0, max_steps - warmup - constant), constant)

    def asked_constant_steps(self, max_steps: int) -> int:
        """Return the constant steps of the configuration, whether the run has room for them or not."""
        return _steps(self.constant_steps, self.constant_ratio, 0, max_steps)


def _steps(steps: int | None, ratio: float | None, default: int, max_steps: int) -> int:
    if ratio is not None:
        return int(ratio * max_steps)
    return default if steps is None else steps


@dataclass
class OptimConfig:
    name: str = SHARDED
    """distributed_fused_adam or adamw: Adam with decoupled weight decay; the former shards its state over data-parallel ranks. adam: weight decay is added to the gradient (L2), as NeMo's adam does. Apex's or Transformer Engine's fused kernel is used where one is installed."""
    lr: float = 3e-5
    """Largest learning rate."""
    weight_decay: float = 0.01
    """Weight decay; none on biases and norms."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    """Adam's decay rates."""
    eps: float = 1e-8
    """Adam's denominator offset."""
    sched: SchedConfig = field(default_factory=SchedConfig)

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise ConfigError(f"{KEY}.name: {self.name!r} is not one of {', '.join(OPTIMIZERS)}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"{KEY}.betas: {self.betas} must be two numbers from [0, 1)")
        for name in ("lr", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{KEY}.{name}: {getattr(self, name)} must not be negative")
        if not self.eps > 0:
            raise ConfigError(f"{KEY}.eps: {self.eps} must be above 0")
        if not 0 <= self.sched.min_lr <= self.lr and self.sched.shape != "constant":
            raise ConfigError(
                f"{KEY}.sched.min_lr: {self.sched.min_lr} must be from 0 to {KEY}.lr ({self.lr})"
            )

    @property
    def is_sharded(self) -> bool:
        """Whether every data-parallel rank holds a part of the optimizer's state only."""
        return self.name == SHARDED
