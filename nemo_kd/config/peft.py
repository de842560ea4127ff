"""Configuration of low-rank adapters, `model.peft`, and of what a run leaves at its end, `export`."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from nemo_kd.config.errors import ConfigError
from nemo_kd.config.model import GPTArchitecture, ParallelConfig

log = logging.getLogger(__name__)

KEY = "model.peft.lora_tuning"
TARGETS = ("attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2")
GROUPS = {"attention": TARGETS[:2], "mlp": TARGETS[2:], "all": TARGETS}
INIT_METHODS = ("xavier", "normal", "kaiming", "zero")


@dataclass
class LoraConfig:
    target_modules: list[str] = field(default_factory=lambda: ["attention_qkv"])
    """Projections that get an adapter: attention_qkv, attention_dense, mlp_fc1, mlp_fc2; attention and mlp stand for two of them, all for four. Query, key and value share the input side of one adapter, gate and up projection of another."""
    adapter_dim: int = 32
    """Rank of the adapters."""
    alpha: float | None = None
    """What an adapter adds is scaled by alpha / adapter_dim; None: by 1."""
    adapter_dropout: float = 0.0
    """Dropout on an adapter's input."""
    column_init_method: str = "xavier"
    """How the input side of an adapter begins: xavier, normal (deviation 0.2), kaiming or zero."""
    row_init_method: str = "zero"
    """How its output side begins; with zero the first step sees the base model."""
    layer_selection: list[int] | None = None
    """Layers that get adapters, counted from 1; None: all."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.target_modules if name not in (*TARGETS, *GROUPS)]
        if unknown or not self.target_modules:
            raise ConfigError(
                f"{KEY}.target_modules: {self.target_modules} must be of {', '.join((*TARGETS, *GROUPS))}"
            )
        if self.adapter_dim < 1:
            raise ConfigError(f"{KEY}.adapter_dim: {self.adapter_dim} must be at least 1")
        if self.alpha is not None and not self.alpha > 0:
            raise ConfigError(f"{KEY}.alpha: {self.alpha} must be above 0")
        if not 0 <= self.adapter_dropout < 1:
            raise ConfigError(f"{KEY}.adapter_dropout: {self.adapter_dropout} must be from [0, 1)")
        for name in ("column_init_method", "row_init_method"):
            if getattr(self, name) not in INIT_METHODS:
                raise ConfigError(
                    f"{KEY}.{name}: {getattr(self, name)!r} is not one of {', '.join(INIT_METHODS)}"
                )
        if self.column_init_method == self.row_init_method == "zero":
            raise ConfigError(
                f"{KEY}.column_init_method and row_init_method: zero for both leaves no gradient; use xavier and zero"
            )

    @property
    def targets(self) -> tuple[str, ...]:
        """The projections that are meant, without groups."""
        wanted = {target for name in self.target_modules for target in GROUPS.get(name, (name,))}
        return tuple(target for target in TARGETS if target in wanted)

    @property
    def scale(self) -> float:
        """What the product of both sides of an adapter is multiplied with."""
        return 1.0 if self.alpha is None else self.alpha / self.adapter_dim

    def has_layer(self, number: int) -> bool:
        """Whether a layer (from 1) gets adapters."""
        return self.layer_selection is None or number in self.layer_selection


@dataclass
class PeftConfig:
    peft_scheme: str | None = "none"
    """lora: the model's weights stay as they are, low-rank adapters beside them are trained. none: every weight is trained."""
    restore_from_path: str | None = None
    """Adapters cannot be continued from a file: begin with the merged weights of the run before."""
    lora_tuning: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        if self.peft_scheme not in ("none", None, "lora"):
            raise ConfigError(
                f"model.peft.peft_scheme: {self.peft_scheme!r} is not available; use lora or none"
            )
        if self.restore_from_path is not None:
            raise ConfigError(
                f"model.peft.restore_from_path: {self.restore_from_path} is not read; give the .nemo that the run before left, whose "
                "weights have its adapters in them, as pretrained_checkpoint.restore_from_path"
            )

    @property
    def lora(self) -> LoraConfig | None:
        """The adapters; None where every weight is trained."""
        return self.lora_tuning if self.peft_scheme == "lora" else None


@dataclass
class ExportConfig:
    hf: bool = False
    """Leaves a Hugging Face folder beside every .nemo archive, under its name with -hf in place of .nemo."""
    lora: str = "merged"
    """What a Hugging Face folder of a LoRA run holds: merged, the whole model with the adapters in its weights, or adapter, these alone as the peft library reads them. A .nemo archive is always merged."""

    def __post_init__(self) -> None:
        if self.lora not in ("merged", "adapter"):
            raise ConfigError(f"export.lora: {self.lora!r} is not one of merged, adapter")
        if self.lora == "adapter" and not self.hf:
            raise ConfigError(
                "export.lora: adapter, but export.hf=false writes no folder for it; add export.hf=true"
            )


def check_lora(peft: PeftConfig, architecture: GPTArchitecture, parallel: ParallelConfig) -> None:
    """Refuses adapters that the model has no place for, and says so where settings of adapters have no effect.

    Raises:
        ConfigError: names the key.
    """
    lora = peft.lora
    if lora is None:
        if peft.lora_tuning != LoraConfig():
            log.warning(
                "%s has no effect: every weight is trained; adapters need model.peft.peft_scheme=lora",
                KEY,
            )
        return
    layers = architecture.num_layers
    outside = [number for number in lora.layer_selection or [] if not 1 <= number <= layers]
    if outside or lora.layer_selection == []:
        raise ConfigError(
            f"{KEY}.layer_selection: {lora.layer_selection} must be of the model's layers 1 to {layers}"
        )
    stages = parallel.pipeline_model_parallel_size * parallel.chunks_per_stage
    for stage in range(stages):
        first, last = stage * layers // stages + 1, (stage + 1) * layers // stages
        if not any(lora.has_layer(number) for number in range(first, last + 1)):
            interleaved = parallel.chunks_per_stage > 1
            raise ConfigError(
                f"{KEY}.layer_selection: {lora.layer_selection} leaves {'part' if interleaved else 'pipeline stage'} {stage + 1} of "
                f"{stages} {'of the interleaved pipeline ' if interleaved else ''}(layers {first} to {last}) nothing to train; choose a "
                f"layer of it too, or a smaller model.{'virtual_' if interleaved else ''}pipeline_model_parallel_size"
            )
    experts = [target for target in lora.targets if target.startswith("mlp")]
    if architecture.num_moe_experts is not None and experts:
        raise ConfigError(
            f"{KEY}.target_modules: {', '.join(experts)} would be adapters of experts, which are not supported; use attention"
        )
