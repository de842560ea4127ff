"""Loss of the student. This module alone decides which settings go together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from nemo_kd.config.fields import Section, bounded, choice, positive, scheduled
from nemo_kd.config.schedule import Schedule
from nemo_kd.config.selection import Selection

if TYPE_CHECKING:  # these modules import torch, and --help must not
    from nemo_kd.batch import TeacherRows

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
SUPPORTS: dict[str, tuple[str, ...]] = {
    "renormalize": (),
    "tail": ("tail_mass_PT",),
    "truncate": ("tail_mass_PT",),
    "label": ("tail_mass_PT",),
    "sampled": ("tail_mass_PT", "tail_token_ids_PM"),
}
"""Fields of `TeacherRows` that each support needs beside the kept logits."""
OWN_KEYS = {
    "jsd_beta": ("jsd",),
    "skew_lambda": ("skewed_forward_kl", "skewed_reverse_kl"),
    "adaptive_kl_alpha": ("adaptive_kl",),
    "custom_loss": ("custom",),
    "custom_args": ("custom",),
}
"""Keys that only some objectives have."""


@dataclass(frozen=True)
class Divergence:
    """The KD term at one position.

    Attributes:
        objective: one of `DIVERGENCES`, or of `LABEL_ESTIMATORS`, which have no support and no
            scale.
        support: one of `SUPPORTS`.
        student_scale, teacher_scale: multiply the logits of the divergence, 1 / temperature.
        factor: multiplies the value.
    """

    objective: str = "forward_kl"
    support: str = "tail"
    student_scale: float = 1.0
    teacher_scale: float = 1.0
    factor: float = 1.0
    jsd_beta: float = 0.5
    skew_lambda: float = 0.1
    adaptive_kl_alpha: float = 0.5

    @property
    def on_label(self) -> bool:
        """Return True if the objective compares probabilities of the label only."""
        return self.objective in LABEL_ESTIMATORS

    @property
    def is_sampled(self) -> bool:
        return not self.on_label and self.support == "sampled"

    @property
    def gives_tail_to_label(self) -> bool:
        return not self.on_label and self.support == "label"

    @property
    def needs(self) -> tuple[str, ...]:
        """List the optional fields of `TeacherRows` that must be there."""
        return ("label_logprobs_P",) if self.on_label else SUPPORTS[self.support]

    @property
    def scales(self) -> tuple[float, ...]:
        """Scales of the student's logits at which the tail is summed; cross-entropy needs 1."""
        sums_tail = "tail_mass_PT" in self.needs and self.student_scale != 1
        return (1.0, self.student_scale) if sums_tail else (1.0,)

    def tail_column(self, teacher: TeacherRows[Any]) -> int | None:
        """Return the column of `tail_mass_PT` at the teacher's temperature, if there is one."""
        return teacher.column_of(1 / self.teacher_scale)

    def missing(self, teacher: TeacherRows[Any]) -> list[str]:
        """List the needed fields that `teacher` lacks; a tail at other temperatures is missing."""
        return [
            name
            for name in self.needs
            if getattr(teacher, name) is None
            or (name == "tail_mass_PT" and self.tail_column(teacher) is None)
        ]


class LossAtStep(NamedTuple):
    """sft_weight * CE + kd_weight * KD at one step.

    Attributes:
        divergence: None without one at any step, and for a custom loss.
        scheduled: values of the keys that follow a schedule.
    """

    sft_weight: float
    kd_weight: float
    divergence: Divergence | None
    scheduled: dict[str, float]


SCHEDULED = ("kd_loss_weight", "sft_loss_weight", "temperature")
"""Keys whose values may follow a schedule."""


@dataclass
class LossConfig(Section, key=KEY):
    """loss = sft_loss_weight * CE + kd_loss_weight * KD; docs/losses.md explains."""

    target_logits_scale: float = positive(1.0)
    """Multiplies the teacher's logits in the KD term: 1 / temperature."""
    logits_scale: float = positive(1.0)
    """Multiplies the student's logits in the KD term only: 1 / temperature."""
    temperature: int | float | str | None = scheduled(None, above=0, below=math.inf)
    """Divides both models' logits in the KD term; instead of the two scales. May follow a schedule,
    as the weights, with support=renormalize."""
    multiply_by_squared_temperature: bool = False
    """Multiplies the KD term by temperature^2, which keeps its gradient's size (Hinton 2015)."""
    kd_loss_weight: int | float | str = scheduled(1.0, at_least=0, below=math.inf)
    """Weight of the KD term; 0 trains plain SFT. A number, or a schedule: linear or cosine from
    START to END over steps FIRST to LAST, for example 'cosine from 1.0 to 0.1 over steps 0 to
    1000'. Validation takes the value that the run ends with."""
    sft_loss_weight: int | float | str = scheduled(0.0, at_least=0, below=math.inf)
    """Weight of the cross-entropy with the labels; a number or a schedule."""
    kd_loss: str = choice(
        "forward_kl", (*DIVERGENCES, *LABEL_ESTIMATORS, "custom", *ALIASES)
    )
    """forward_kl (fwd_kl) = KL(teacher || student), reverse_kl (bwd_kl) = KL(student || teacher),
    jsd, skewed_forward_kl, skewed_reverse_kl, adaptive_kl, tvd; on the label's probability alone
    k1, k2, k3, low_var_kl; custom."""
    support: str = choice("tail", SUPPORTS)
    """Tokens that the divergence compares. tail: the teacher's kept ids and one bucket for all
    others. renormalize: the kept ids alone, both models renormalised over them (NeMo-Aligner,
    ROLL); the student's mass elsewhere has no effect. truncate: the kept ids with their true
    probabilities, the teacher's others being 0. label: as truncate, but the label gets the
    teacher's mass outside the kept ids. sampled: the kept ids and the cache's tail samples,
    forward_kl only."""
    jsd_beta: float = bounded(0.5, above=0, below=1)
    """jsd: the teacher's share of the mixture; at 0 and 1 it vanishes."""
    skew_lambda: float = bounded(0.1, above=0, below=1)
    """skewed_*: share of the first argument in the mixture that is the second."""
    adaptive_kl_alpha: float = bounded(0.5, at_least=0, at_most=1)
    """adaptive_kl: teacher's probability that makes up the tail, from the least likely token on."""
    custom_loss: str | None = None
    """kd_loss=custom: import path of a function, package.module.function, also of a file in the
    current folder (examples/custom_loss.py explains)."""
    custom_args: dict[str, Any] = field(default_factory=dict)
    """kd_loss=custom: keyword arguments of the function."""
    select: str | None = None
    """Positions that the KD term trains on, for example 'top 25% by student_entropy': in every
    example the share of its loss tokens with the largest score, which is student_entropy,
    teacher_entropy or entropy_gap (the student's less the teacher's). None: all. Cross-entropy and
    validation always take all."""
    distill_on_prompt: bool = False
    """True: the KD term has all positions of an example, prompts included, and its mean is over
    them; cross-entropy keeps the loss tokens. The cache needs cache.positions=all."""
    reduction: str = choice("token", ("token", "sample", "microbatch"))
    """Mean that both terms are over a global batch: token (of all tokens), sample (of the examples'
    means over their tokens), or microbatch (of the micro-batches' means over their tokens, as in
    NeMo-Aligner; it depends on model.micro_batch_size)."""
    label_smoothing: float = bounded(0.0, at_least=0, below=1)
    """CE: share of the label's mass that is spread over the vocabulary."""
    z_loss_weight: float = bounded(0.0, at_least=0, below=math.inf)
    """CE: weight of the squared log-sum-exp of the logits, which keeps them from drifting."""
    compile: str = choice("auto", ("auto", "on", "off"))
    """torch.compile for the loss: on, off, or auto: on GPUs, and on CPUs in runs of more than 7e10
    logits per rank (steps x loss tokens x vocabulary). The first step then takes 10 to 30 s longer."""
    cross_tokenizer: bool = False
    """Accepts True only if teacher and student share one tokenizer; it then has no effect."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_weights()
        for name in ("label_smoothing", "z_loss_weight"):
            value = getattr(self, name)
            if value and not self.trains_on_labels:
                raise self.error(
                    name,
                    f"{value} belongs to the cross-entropy, which sft_loss_weight=0 leaves out",
                )
        self._check_combination()
        self._check_scales()
        self._check_selection()

    @property
    def objective(self) -> str:
        """Return `kd_loss` without aliases."""
        return ALIASES.get(self.kd_loss, self.kd_loss)

    @property
    def trains_on_teacher(self) -> bool:
        """Return True if the KD term has a weight at any step."""
        return any(self.schedule("kd_loss_weight").ends)

    @property
    def trains_on_labels(self) -> bool:
        """Return True if the cross-entropy has a weight at any step."""
        return any(self.schedule("sft_loss_weight").ends)

    @property
    def selection(self) -> Selection | None:
        """Return the positions that the KD term trains on; None for all."""
        return None if self.select is None else Selection.of(self.select)

    @property
    def divergence(self) -> Divergence | None:
        """Return the KD term when its schedules have ended; None without one, and for a custom
        loss."""
        return self.at(math.inf).divergence

    @property
    def schedules(self) -> dict[str, Schedule]:
        """Return the values of the weights, and of a temperature that is given."""
        given = [name for name in SCHEDULED if getattr(self, name) is not None]
        return {name: self.schedule(name) for name in given}

    def at(self, step: float) -> LossAtStep:
        """Return the loss of a training step, counted from 0, or `math.inf`."""
        schedules = self.schedules
        values = {name: each.at(step) for name, each in schedules.items()}
        changing = [name for name in values if not schedules[name].is_constant]
        return LossAtStep(
            values["sft_loss_weight"],
            values["kd_loss_weight"],
            self._divergence(values.get("temperature")),
            {name: values[name] for name in changing},
        )

    def _divergence(self, temperature: float | None) -> Divergence | None:
        if not self.trains_on_teacher or self.objective == "custom":
            return None
        student_scale, teacher_scale = self._scales(temperature)
        is_squared = self.multiply_by_squared_temperature
        return Divergence(
            self.objective,
            self.support,
            student_scale,
            teacher_scale,
            factor=(temperature or 1.0) ** 2 if is_squared else 1.0,
            jsd_beta=self.jsd_beta,
            skew_lambda=self.skew_lambda,
            adaptive_kl_alpha=self.adaptive_kl_alpha,
        )

    def warnings(self) -> list[str]:
        """Explain settings that work, but are probably not what is wanted."""
        found: list[str] = []
        if self.divergence is None:
            return found
        if self.objective == "k1":
            found.append(
                f"{KEY}.kd_loss=k1: its gradient does not depend on the teacher, it only lowers "
                "the labels' probability; k2, k3 or a divergence pull towards the teacher"
            )
        if self.support == "renormalize" and not all(
            self.schedule("sft_loss_weight").ends
        ):
            found.append(
                f"{KEY}.support=renormalize: without a cross-entropy nothing limits the student's "
                "probability outside the kept ids (in 20 such steps of a trained student the KL "
                "to its teacher rose from 2.4 to 5.6); set sft_loss_weight above 0, or use "
                "support=tail"
            )
        return found

    def missing_targets(self, teacher: TeacherRows[Any]) -> list[str]:
        """Explain what the KD term needs and the rows of a cache lack."""
        divergence = self.divergence
        if divergence is None:
            return []
        temperature = f"{1 / divergence.teacher_scale:g}"
        needed = {
            "label_logprobs_P": "the teacher's log-probability of the labels; compute the cache "
            "with stage 1 of nemo_kd, or use another kd_loss",
            "tail_mass_PT": "the teacher's mass outside the kept ids at temperature "
            f"{temperature}; compute the cache with cache.temperatures=[{temperature}], or use "
            "support=renormalize",
            "tail_token_ids_PM": "tail samples; compute the cache with cache.tail_samples=4, or "
            "use support=tail",
        }
        lacks = (
            f"{KEY}: kd_loss={self.kd_loss}, support={self.support}: the cache lacks"
        )
        return [f"{lacks} {needed[name]}" for name in divergence.missing(teacher)]

    def _scales(self, temperature: float | None) -> tuple[float, float]:
        """Return the factors of the student's and the teacher's logits in the KD term."""
        if temperature is not None:
            return 1 / temperature, 1 / temperature
        return self.logits_scale, self.target_logits_scale

    def _check_weights(self) -> None:
        weights = [self.schedule("kd_loss_weight"), self.schedule("sft_loss_weight")]
        # A weight can only be 0 up to its first step or from its last step on.
        for step in (0, *(each.first_step for each in weights), math.inf):
            if not any(each.at(step) for each in weights):
                raise self.error(
                    "kd_loss_weight",
                    f"{self.kd_loss_weight} and sft_loss_weight={self.sft_loss_weight} are both 0 "
                    f"{'at the end' if step == math.inf else f'at step {step}'}; nothing would be trained",
                )

    def _check_combination(self) -> None:
        for name, owners in OWN_KEYS.items():
            value = getattr(self, name)
            is_given = value != getattr(type(self), name, {})
            if is_given and self.objective not in owners:
                raise self.error(
                    name,
                    f"{value} has no effect with kd_loss={self.kd_loss}, only with "
                    f"{', '.join(owners)}",
                )
        if self.objective == "custom" and not self.custom_loss:
            raise self.error(
                "custom_loss",
                "missing; kd_loss=custom needs the import path of a function",
            )
        if self.objective == "custom" and not self.trains_on_teacher:
            raise self.error("kd_loss", "custom needs kd_loss_weight above 0")
        if self.objective not in DIVERGENCES and self.support != "tail":
            raise self.error(
                "support", f"{self.support} has no effect with kd_loss={self.kd_loss}"
            )
        if self.support in ("truncate", "label") and self.objective in (
            "reverse_kl",
            "adaptive_kl",
        ):
            raise self.error(
                "support",
                f"{self.support} makes {self.kd_loss} infinite, for the student has mass where the "
                "teacher would have none; use tail",
            )
        if self.support == "sampled" and self.objective != "forward_kl":
            raise self.error(
                "support",
                f"sampled works with forward_kl only, not {self.kd_loss}; use tail",
            )

    def _check_selection(self) -> None:
        try:
            selects = self.selection is not None
        except ValueError as error:
            raise self.error("select", str(error)) from error
        reason = "kd_loss_weight=0 leaves out"
        if self.trains_on_teacher:
            reason = "kd_loss=custom computes by itself"
        chosen = {"select": selects, "distill_on_prompt": self.distill_on_prompt}
        for name in filter(chosen.get, chosen):
            if self.divergence is None:
                raise self.error(
                    name,
                    f"{getattr(self, name)} selects positions of the KD term, which {reason}",
                )

    def _check_scales(self) -> None:
        given = (self.logits_scale, self.target_logits_scale)
        if self.temperature is not None and given != (1, 1):
            raise self.error(
                "temperature",
                "give it, or logits_scale and target_logits_scale, not both",
            )
        if self.multiply_by_squared_temperature and self.temperature is None:
            raise self.error(
                "multiply_by_squared_temperature",
                "give temperature, which it multiplies by",
            )
        knows_none = self.objective not in DIVERGENCES or self.support == "sampled"
        temperatures: tuple[float | None, ...] = (None,)
        if self.temperature is not None:
            temperatures = self.schedule("temperature").ends
        if knows_none and any(self._scales(each) != (1, 1) for each in temperatures):
            raise self.error(
                "temperature",
                f"kd_loss={self.kd_loss} with support={self.support} needs temperature and scales "
                "of 1",
            )
        if self.support != "renormalize" and len(set(temperatures)) > 1:
            raise self.error(
                "temperature",
                f"{self.temperature} passes temperatures at which a cache does not hold the "
                f"teacher's tail mass, which support={self.support} needs; use "
                "support=renormalize, or a constant temperature",
            )
