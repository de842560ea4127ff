"""Configuration of the optimizer and the learning-rate schedule: `model.optim`."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_kd.config.fields import Section, bounded, choice, positive

DEFAULT_STEPS = {"warmup": 10, "constant": 0}
SHARDED = "distributed_fused_adam"
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


@dataclass
class SchedConfig(Section, key="model.optim.sched"):
    """`model.optim.sched`: the learning rate over a run."""

    name: str = choice("CosineAnnealing", SCHEDULES)
    """Shape after a linear warmup: CosineAnnealing or linear (NeMo: WarmupAnnealing) decay to
    min_lr; inverse_square_root (NeMo: InverseSquareRootAnnealing) decays, but not below min_lr;
    constant (NeMo: WarmupPolicy) ignores min_lr."""
    warmup_steps: int | None = bounded(None, at_least=0)
    """Steps of linear warmup. None: 10, unless warmup_ratio is given."""
    warmup_ratio: float | None = bounded(None, at_least=0, at_most=1)
    """Warmup as a fraction of all steps, instead of warmup_steps."""
    constant_steps: int | None = bounded(None, at_least=0)
    """CosineAnnealing and linear: last steps, which run at min_lr."""
    constant_ratio: float | None = bounded(None, at_least=0, at_most=1)
    """The same as a fraction of all steps, instead of constant_steps."""
    min_lr: float = bounded(9e-7, at_least=0)
    """Learning rate at the end of the decay, at most model.optim.lr."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for phase in ("warmup", "constant"):
            given = (getattr(self, f"{phase}_steps"), getattr(self, f"{phase}_ratio"))
            if None not in given:
                raise self.error(
                    f"{phase}_steps", f"give it or {phase}_ratio, not both"
                )
        has_constant = self.constant_steps or self.constant_ratio
        if has_constant and self.shape not in ("cosine", "linear"):
            raise self.error(
                "constant_steps and constant_ratio",
                f"are for CosineAnnealing and linear; leave them out with name={self.name}",
            )

    @property
    def shape(self) -> str:
        """Return cosine, linear, inverse_square_root or constant."""
        return SCHEDULES[self.name]

    def phases(self, max_steps: int) -> tuple[int, int, int]:
        """Return the steps of warmup, decay and constant rate (min_lr) of a run of `max_steps`.

        A warmup may be longer than the run, as in short trials; the rate then stays below its
        maximum. Constant steps that do not fit after the warmup are left out: a short run would
        train at min_lr throughout.
        """
        warmup = self.asked_steps("warmup", max_steps)
        constant = self.asked_steps("constant", max_steps)
        if warmup + constant > max_steps:
            constant = 0
        return warmup, max(0, max_steps - warmup - constant), constant

    def asked_steps(self, phase: str, max_steps: int) -> int:
        """Return the steps of warmup or constant as configured, even if the run has no room for
        them."""
        ratio = getattr(self, f"{phase}_ratio")
        if ratio is not None:
            return int(ratio * max_steps)
        steps = getattr(self, f"{phase}_steps")
        return DEFAULT_STEPS[phase] if steps is None else steps


@dataclass
class OptimConfig(Section, key="model.optim"):
    """`model.optim`: the optimizer."""

    name: str = choice(SHARDED, (SHARDED, "adamw", "adam"))
    """Optimizer: distributed_fused_adam or adamw (Adam with decoupled weight decay; the former
    shards its state over data-parallel ranks), or adam (adds weight decay to the gradient, as
    NeMo's adam does). Uses the fused kernel of Apex or Transformer Engine if installed."""
    lr: float = bounded(3e-5, at_least=0)
    """Largest learning rate."""
    weight_decay: float = bounded(0.01, at_least=0)
    """Weight decay; biases and norms have none."""
    betas: list[float] = bounded([0.9, 0.98], at_least=0, below=1)
    """Adam's two decay rates."""
    eps: float = positive(1e-8)
    """Adam's denominator offset."""
    sched: SchedConfig = field(default_factory=SchedConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.betas) != 2:
            raise self.error("betas", f"{self.betas} must be two numbers")
        if self.sched.min_lr > self.lr and self.sched.shape != "constant":
            raise self.error(
                "sched.min_lr",
                f"{self.sched.min_lr} must be at most {self.KEY}.lr ({self.lr})",
            )

    @property
    def is_sharded(self) -> bool:
        """Return True if every data-parallel rank holds a part of the optimizer's state."""
        return self.name == SHARDED
