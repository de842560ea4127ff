"""Configuration of low-rank adapters, `model.peft`, and of the files that a run exports,
`export`."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from nemo_kd.config.errors import ConfigError
from nemo_kd.config.fields import Section, bounded, choice, count, positive
from nemo_kd.config.model import GPTArchitecture, ParallelConfig

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
