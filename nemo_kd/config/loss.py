"""What a student minimises: `model.knowledge_distillation`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from nemo_kd.config.errors import ConfigError

KEY = "model.knowledge_distillation"
ALIASES = {"fwd_kl": "forward_kl", "bwd_kl": "reverse_kl", "js_divergence": "jsd"}
DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "adaptive_kl",
    "tvd",
)
LABEL_ESTIMATORS = ("k1", "k2", "k3", "low_var_kl")
SUPPORTS = ("renormalize", "tail", "truncate", "sampled")
OWN_KEYS = {
    "jsd_beta": ("jsd",),
    "skew_lambda": ("skewed_forward_kl", "skewed_reverse_kl"),
    "adaptive_kl_alpha": ("adaptive_kl",),
    "custom_loss": ("custom",),
    "custom_args": ("custom",),
}
"""Keys that only some objectives have."""


@dataclass
class LossConfig:
    """`model.knowledge_distillation`: loss = sft_loss_weight * CE + kd_loss_weight * KD; docs/losses.md explains."""

    target_logits_scale: float = 1.0
    """Multiplies the teacher's logits in the KD term: 1 / temperature."""
    logits_scale: float = 1.0
    """Multiplies the student's logits in the KD term only: 1 / temperature."""
    temperature: float | None = None
    """Divides both models' logits in the KD term; instead of the two scales."""
    multiply_by_squared_temperature: bool = False
    """Multiplies the KD term by temperature^2, which keeps its gradient's size (Hinton et al. 2015)."""
    kd_loss_weight: float = 1.0
    """Weight of the KD term; 0 trains plain SFT."""
    sft_loss_weight: float = 0.0
    """Weight of the cross-entropy with the labels."""
    kd_loss: str = "forward_kl"
    """forward_kl (fwd_kl) = KL(teacher || student), reverse_kl (bwd_kl) = KL(student || teacher), jsd, skewed_forward_kl, skewed_reverse_kl, adaptive_kl, tvd; on the label's probability alone k1, k2, k3, low_var_kl; custom."""
    support: str = "tail"
    """Where a divergence is taken. tail: the teacher's kept ids and one bucket for all others. renormalize: the kept ids alone, both models renormalised over them (NeMo-Aligner, ROLL); what the student does elsewhere goes unseen. truncate: the kept ids' true probabilities, the teacher's others being 0. sampled: the kept ids and the cache's tail samples, forward_kl only."""
    jsd_beta: float = 0.5
    """jsd: the teacher's share of the mixture."""
    skew_lambda: float = 0.1
    """skewed_*: share of the first argument in the mixture that is the second."""
    adaptive_kl_alpha: float = 0.5
    """adaptive_kl: teacher's probability that makes up the tail, from the least likely token on."""
    custom_loss: str | None = None
    """kd_loss=custom: import path of a function, package.module.function, also of a file in the current folder (examples/custom_loss.py explains)."""
    custom_args: dict[str, Any] = field(default_factory=dict)
    """kd_loss=custom: keyword arguments of the function."""
    label_smoothing: float = 0.0
    """CE: share of the label's mass that is spread over the vocabulary."""
    z_loss_weight: float = 0.0
    """CE: weight of the squared log-sum-exp of the logits, which keeps them from drifting."""
    compile: str = "auto"
    """torch.compile for the loss: auto (on GPUs), on or off. The first step then takes longer."""
    cross_tokenizer: bool = False
    """True is taken only where teacher and student share one tokenizer, and then changes nothing."""

    def __post_init__(self) -> None:
        self.compile = {"True": "on", "False": "off"}.get(
            self.compile, self.compile
        )  # YAML takes on and off for booleans
        self._check_choices()
        self._check_numbers()
        self._check_combination()
        self._check_scales()

    @property
    def objective(self) -> str:
        """`kd_loss` by its own name."""
        return ALIASES.get(self.kd_loss, self.kd_loss)

    @property
    def scales(self) -> tuple[float, float]:
        """What multiplies the student's and the teacher's logits in the KD term."""
        if self.temperature is not None:
            return 1 / self.temperature, 1 / self.temperature
        return self.logits_scale, self.target_logits_scale

    @property
    def factor(self) -> float:
        """What multiplies the KD term beside its weight."""
        return (
            self.temperature**2
            if self.temperature is not None and self.multiply_by_squared_temperature
            else 1.0
        )

    @property
    def uses_teacher(self) -> bool:
        """Whether a cache's fields are needed as the objective says; a custom loss finds out itself."""
        return self.kd_loss_weight > 0 and self.objective != "custom"

    def temperature_index(self, temperatures: Sequence[float]) -> int | None:
        """Which of a cache's temperatures is the teacher's in the KD term; None if none is."""
        wanted = 1 / self.scales[1]
        return next(
            (
                i
                for i, value in enumerate(temperatures)
                if math.isclose(value, wanted, rel_tol=1e-4)
            ),
            None,
        )

    def _check_choices(self) -> None:
        objectives = (*DIVERGENCES, *LABEL_ESTIMATORS, "custom", *ALIASES)
        choices = {"kd_loss": objectives, "support": SUPPORTS, "compile": ("auto", "on", "off")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{KEY}.{name}: {getattr(self, name)!r} is not one of {', '.join(known)}"
                )

    def _check_numbers(self) -> None:
        for name in ("kd_loss_weight", "sft_loss_weight", "z_loss_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(
                    f"{KEY}.{name}: {getattr(self, name)} must be finite and not negative"
                )
        if self.kd_loss_weight == 0 and self.sft_loss_weight == 0:
            raise ConfigError(
                f"{KEY}: kd_loss_weight and sft_loss_weight are both 0; nothing would be trained"
            )
        for name in ("target_logits_scale", "logits_scale", "temperature"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ConfigError(
                    f"{KEY}.{name}: {getattr(self, name)} must be finite and greater than 0"
                )
        for name, limit in (
            ("jsd_beta", "forward_kl or reverse_kl"),
            ("skew_lambda", "forward_kl or reverse_kl"),
        ):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(
                    f"{KEY}.{name}: {getattr(self, name)} must be between 0 and 1, which are excluded; for the limit use {limit}"
                )
        if not 0 <= self.adaptive_kl_alpha <= 1:
            raise ConfigError(
                f"{KEY}.adaptive_kl_alpha: {self.adaptive_kl_alpha} must be from [0, 1]"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"{KEY}.label_smoothing: {self.label_smoothing} must be from [0, 1)")
        for name in ("label_smoothing", "z_loss_weight"):
            if getattr(self, name) and not self.sft_loss_weight:
                raise ConfigError(
                    f"{KEY}.{name}: {getattr(self, name)} belongs to the cross-entropy, which sft_loss_weight=0 leaves out"
                )

    def _check_combination(self) -> None:
        defaults = {item.name: item.default for item in fields(self)} | {"custom_args": {}}
        for name, owners in OWN_KEYS.items():
            if getattr(self, name) != defaults[name] and self.objective not in owners:
                raise ConfigError(
                    f"{KEY}.{name}: {getattr(self, name)} has no effect with kd_loss={self.kd_loss}, only with {', '.join(owners)}"
                )
        if self.objective == "custom" and not self.custom_loss:
            raise ConfigError(
                f"{KEY}.custom_loss: missing; kd_loss=custom needs the import path of a function"
            )
        on_kept_ids = self.objective in DIVERGENCES
        if not on_kept_ids and self.support != "tail":
            what = (
                "the function sees all logits"
                if self.objective == "custom"
                else "it looks at the label alone"
            )
            raise ConfigError(
                f"{KEY}.support: {self.support} has no effect with kd_loss={self.kd_loss}: {what}"
            )
        if self.support == "truncate" and self.objective in ("reverse_kl", "adaptive_kl"):
            raise ConfigError(
                f"{KEY}.support: truncate makes {self.kd_loss} infinite, for the student has mass where the teacher would have none; use tail"
            )
        if self.support == "sampled" and self.objective != "forward_kl":
            raise ConfigError(
                f"{KEY}.support: sampled works with forward_kl only, not {self.kd_loss}: the others need the teacher's "
                "probability of every sample, which a cache does not hold; use tail"
            )

    def _check_scales(self) -> None:
        scaled = self.scales != (1, 1)
        if self.temperature is not None and (
            self.logits_scale != 1 or self.target_logits_scale != 1
        ):
            raise ConfigError(
                f"{KEY}: give temperature, or logits_scale and target_logits_scale, not both"
            )
        if self.multiply_by_squared_temperature and self.temperature is None:
            raise ConfigError(
                f"{KEY}.multiply_by_squared_temperature: give temperature, which it multiplies by"
            )
        if scaled and self.objective not in DIVERGENCES:
            what = (
                "give it as custom_args"
                if self.objective == "custom"
                else "the cache has the label at temperature 1"
            )
            raise ConfigError(
                f"{KEY}: kd_loss={self.kd_loss} knows no temperature and no scales; {what}"
            )
        if scaled and self.support == "sampled":
            raise ConfigError(
                f"{KEY}: tail samples were drawn at temperature 1, so support=sampled works at 1 only"
            )
