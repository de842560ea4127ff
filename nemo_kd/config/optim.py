"""Configuration of the optimizer and the learning-rate schedule (`model.optim`), of adapters
(`model.peft`) and of exports."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from nemo_kd.config import ConfigError
from nemo_kd.config.fields import Section, bounded, choice, count, positive
from nemo_kd.config.shared import GPTArchitecture, ParallelConfig

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


log = logging.getLogger(__name__)

KEY = "model.peft.lora_tuning"
TARGETS = ("attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2")
GROUPS = {"attention": TARGETS[:2], "mlp": TARGETS[2:], "all": TARGETS}
INIT_METHODS = ("xavier", "normal", "kaiming", "zero")


@dataclass
class LoraConfig(Section, key=KEY):
    """`model.peft.lora_tuning`: low-rank adapters."""

    target_modules: list[str] = choice(["attention_qkv"], (*TARGETS, *GROUPS))
    """Projections that get an adapter: attention_qkv, attention_dense, mlp_fc1, mlp_fc2, or the
    groups attention, mlp and all. Query, key and value share the input side of one adapter, gate
    and up projection that of another."""
    adapter_dim: int = count(32)
    """Rank of the adapters."""
    alpha: float | None = positive(None)
    """Scale the output of an adapter by alpha / adapter_dim; None: by 1."""
    adapter_dropout: float = bounded(0.0, at_least=0, below=1)
    """Dropout on an adapter's input."""
    column_init_method: str = choice("xavier", INIT_METHODS)
    """Initialization of an adapter's input side: xavier, normal (standard deviation 0.2), kaiming
    or zero."""
    row_init_method: str = choice("zero", INIT_METHODS)
    """Initialization of its output side; with zero the first step equals the base model."""
    layer_selection: list[int] | None = None
    """Layers that get adapters, counted from 1; None: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.target_modules:
            raise self.error("target_modules", "is empty; give [attention] or [all]")
        if self.column_init_method == self.row_init_method == "zero":
            raise self.error(
                "column_init_method and row_init_method",
                "zero for both leaves no gradient; use xavier and zero",
            )

    @property
    def targets(self) -> tuple[str, ...]:
        """Return the projections with groups replaced by their members."""
        wanted = {
            target
            for name in self.target_modules
            for target in GROUPS.get(name, (name,))
        }
        return tuple(target for target in TARGETS if target in wanted)

    @property
    def scale(self) -> float:
        """Return the factor of an adapter's output."""
        return 1.0 if self.alpha is None else self.alpha / self.adapter_dim

    def has_layer(self, number: int) -> bool:
        """Return True if a layer, counted from 1, gets adapters."""
        return self.layer_selection is None or number in self.layer_selection


@dataclass
class PeftConfig(Section, key="model.peft"):
    """`model.peft`: training of all weights or of adapters."""

    peft_scheme: str | None = choice("none", ("none", "lora"))
    """lora: train low-rank adapters and keep the model's weights. none: train every weight."""
    restore_from_path: str | None = None
    """Not supported: adapters cannot be loaded from a file. Start with the merged weights of the
    earlier run."""
    lora_tuning: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restore_from_path is not None:
            raise self.error(
                "restore_from_path",
                f"{self.restore_from_path} is not read; give the .nemo of the earlier run, which "
                "has the adapters in its weights, as pretrained_checkpoint.restore_from_path",
            )

    @property
    def lora(self) -> LoraConfig | None:
        """Return the adapters; None if every weight is trained."""
        return self.lora_tuning if self.peft_scheme == "lora" else None


@dataclass
class ExportConfig(Section, key="export"):
    """`export`: Hugging Face folders that a run leaves."""

    hf: bool = False
    """Write a Hugging Face folder beside every .nemo archive, with -hf in place of .nemo."""
    lora: str = choice("merged", ("merged", "adapter"))
    """Content of the Hugging Face folder of a LoRA run: merged (the whole model with the adapters
    in its weights) or adapter (the adapters alone, for the peft library). A .nemo archive is always
    merged."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora == "adapter" and not self.hf:
            raise self.error(
                "lora",
                "adapter, but export.hf=false writes no folder for it; add export.hf=true",
            )


def check_lora(
    peft: PeftConfig, architecture: GPTArchitecture, parallel: ParallelConfig
) -> None:
    """Refuse adapters that do not fit the model; warn about adapter settings without effect.

    Raises:
        ConfigError: names the key.
    """
    lora = peft.lora
    if lora is None:
        if peft.lora_tuning != LoraConfig():
            log.warning(
                "%s has no effect: all weights are trained; adapters need "
                "model.peft.peft_scheme=lora",
                KEY,
            )
        return
    layers = architecture.num_layers
    selected = lora.layer_selection
    if selected is not None and not (
        selected and 1 <= min(selected) <= max(selected) <= layers
    ):
        raise ConfigError(
            f"{KEY}.layer_selection: {selected} must be of the model's layers 1 to {layers}"
        )
    stages = parallel.pipeline_model_parallel_size * parallel.chunks_per_stage
    for stage in range(stages):
        own = range(stage * layers // stages + 1, (stage + 1) * layers // stages + 1)
        if not any(map(lora.has_layer, own)):
            raise ConfigError(
                f"{KEY}.layer_selection: {selected} leaves part {stage + 1} of {stages} of the "
                f"pipeline (layers {own[0]} to {own[-1]}) nothing to train; select one of its "
                "layers too, or reduce model.pipeline_model_parallel_size or "
                "model.virtual_pipeline_model_parallel_size"
            )
    experts = [target for target in lora.targets if target.startswith("mlp")]
    if architecture.num_moe_experts is not None and experts:
        raise ConfigError(
            f"{KEY}.target_modules: {', '.join(experts)} would be adapters of experts, which are "
            "not "
            "supported; use attention"
        )
