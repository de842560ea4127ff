"""The losses of each position as functions of a few of the student's logits, with their derivatives.

Shape legend: N positions, K kept teacher logits, E entries (K, and 1 for a bucket), M tail samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_kd.batch import SMALLEST_SAMPLED_TAIL
from nemo_kd.ops import objectives
from nemo_kd.ops.objectives import LABEL_ESTIMATORS, Entries, Terms
from nemo_kd.ops.student_logits import Slope, StudentLogits
from nemo_kd.ops.vocab import row_blocks

SUPPORTS = ("renormalize", "tail", "truncate", "sampled")
SMALLEST_TAIL = 1e-12
"""Teacher's mass outside the kept ids at least: a rounded 0 must not make a student's mass there infinitely wrong."""
BLOCK_ELEMENTS = 1 << 16
"""Rows times entries that are worked on at once: temporaries stay small beside the logits."""


@dataclass(frozen=True)
class TeacherRows:
    """What the teacher said at N positions; fields as in `nemo_kd.batch.TeacherRows`.

    Attributes:
        topk_logits_NK: less any constant of the row; unused entries -inf.
        topk_token_ids_NK: distinct within a row; unused entries -1.
        tail_mass_N: probability outside the kept ids in softmax(teacher_scale * logits). Not needed for renormalize.
        label_logprobs_N: at temperature 1; for label estimators.
        tail_token_ids_NM: for sampled.
        unscaled_tail_mass_N: as `tail_mass_N`, in softmax(logits). With it student and teacher are compared as well.
    """

    topk_logits_NK: Tensor
    topk_token_ids_NK: Tensor
    tail_mass_N: Tensor | None = None
    label_logprobs_N: Tensor | None = None
    tail_token_ids_NM: Tensor | None = None
    unscaled_tail_mass_N: Tensor | None = None

    def rows(self, rows: slice) -> TeacherRows:
        """Some of the positions."""
        return replace(
            self, **{name: field[rows] for name, field in vars(self).items() if field is not None}
        )


@dataclass(frozen=True)
class Divergence:
    """What pulls the student towards the teacher.

    Attributes:
        objective: one of `objectives.DIVERGENCES` or `objectives.LABEL_ESTIMATORS`; the latter know no support and no scale.
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
        return self.objective in LABEL_ESTIMATORS

    @property
    def needs(self) -> tuple[str, ...]:
        """The optional fields of `TeacherRows` that must be there."""
        if self.on_label:
            return ("label_logprobs_N",)
        return {
            "renormalize": (),
            "tail": ("tail_mass_N",),
            "truncate": ("tail_mass_N",),
            "sampled": ("tail_mass_N", "tail_token_ids_NM"),
        }[self.support]

    @property
    def scales(self) -> tuple[float, ...]:
        """Scales of the student's logits at which the tail's log-sum-exp is needed; cross-entropy needs 1."""
        if self.on_label or self.support == "renormalize" or self.student_scale == 1:
            return (1.0,)
        return (1.0, self.student_scale)

    def terms(self) -> Callable[[Entries], Terms]:
        """The objective as a function of entries."""
        return {
            "forward_kl": objectives.forward_kl,
            "reverse_kl": objectives.reverse_kl,
            "jsd": lambda entries: objectives.jsd(entries, self.jsd_beta),
            "skewed_forward_kl": lambda entries: objectives.skewed_forward_kl(
                entries, self.skew_lambda
            ),
            "skewed_reverse_kl": lambda entries: objectives.skewed_reverse_kl(
                entries, self.skew_lambda
            ),
            "adaptive_kl": lambda entries: objectives.adaptive_kl(entries, self.adaptive_kl_alpha),
            "tvd": objectives.tvd,
        }[self.objective]


def cross_entropy(
    student: StudentLogits, label_smoothing: float, z_loss_weight: float, vocab_size: int
) -> tuple[Tensor, Slope]:
    """Cross-entropy with the labels over the real vocabulary, label smoothing and z-loss included."""
    log_sum_exp_N = student.log_sum_exp_N
    value_N, slope_N = log_sum_exp_N - student.label_N, torch.ones_like(log_sum_exp_N)
    if label_smoothing:
        assert student.mean_N is not None
        value_N = value_N + label_smoothing * (student.label_N - student.mean_N)
    if z_loss_weight:
        whole_N = log_sum_exp_N + student.shift_N
        value_N = value_N + z_loss_weight * whole_N.square()
        slope_N = 1 + 2 * z_loss_weight * whole_N
    constant, kept_NK = -label_smoothing / vocab_size, None
    if student.kept_NK is not None:
        kept_NK = (student.kept_NK - log_sum_exp_N[:, None]).exp_()
        if label_smoothing or z_loss_weight:
            kept_NK.mul_(slope_N[:, None]).add_(constant)
    return value_N, Slope(
        scale_index=0,
        tail_N=slope_N * (student.log_tail_NS[:, 0] - log_sum_exp_N).exp(),
        kept_NK=kept_NK,
        label_N=torch.full_like(slope_N, label_smoothing - 1),
        constant=constant,
    )


def label_estimator(
    student: StudentLogits, teacher: TeacherRows, divergence: Divergence
) -> tuple[Tensor, Slope]:
    """k1, k2, k3 or low_var_kl."""
    assert teacher.label_logprobs_N is not None
    log_sum_exp_N = student.log_sum_exp_N
    log_ratio_N = student.label_N - log_sum_exp_N - teacher.label_logprobs_N.to(log_sum_exp_N.dtype)
    value_N, slope_N = LABEL_ESTIMATORS[divergence.objective](log_ratio_N)
    slope_N = slope_N * divergence.factor
    tail_N = -slope_N * (student.log_tail_NS[:, 0] - log_sum_exp_N).exp()
    kept_NK = None
    if student.kept_NK is not None:
        kept_NK = -slope_N[:, None] * (student.kept_NK - log_sum_exp_N[:, None]).exp_()
    return value_N * divergence.factor, Slope(
        scale_index=0, tail_N=tail_N, kept_NK=kept_NK, label_N=slope_N
    )


def divergence_on_support(
    student: StudentLogits, teacher: TeacherRows, divergence: Divergence, vocab_size: int
) -> tuple[Tensor, Slope]:
    """A divergence between teacher and student on the kept ids and what the support has beside them."""
    assert student.kept_NK is not None
    value_N, tail_N = torch.zeros_like(student.shift_N), torch.zeros_like(student.shift_N)
    kept_NK, num_kept = torch.zeros_like(student.kept_NK), student.kept_NK.shape[1]
    samples_NM = None if student.samples_NM is None else torch.zeros_like(student.samples_NM)
    terms_of = divergence.terms()
    for rows in row_blocks(len(kept_NK), num_kept + 1, BLOCK_ELEMENTS):
        some = teacher.rows(rows)
        num_used_N = (some.topk_token_ids_NK >= 0).sum(dim=-1)
        known_N = num_used_N > 0
        entries = entries_of(student, some, divergence, num_used_N == vocab_size, rows)
        terms = terms_of(entries)
        value, mean_u = terms.value_NE.sum(dim=-1), terms.q_u_NE.sum(dim=-1)
        if samples_NM is not None:
            weights_NM, sampled_N = _sampled(student, some, rows)
            value, mean_u = value + sampled_N, mean_u - weights_NM.sum(dim=-1)
            samples_NM[rows] = torch.where(known_N[:, None], -divergence.factor * weights_NM, 0)
        slope_NE = terms.q_u_NE.addcmul(entries.q_NE, mean_u[:, None], value=-1).masked_fill_(
            ~known_N[:, None], 0
        )
        value_N[rows] = torch.where(known_N, value * divergence.factor, 0)
        torch.mul(
            slope_NE[:, :num_kept], divergence.factor * divergence.student_scale, out=kept_NK[rows]
        )
        if entries.has_bucket:
            # Slopes sum to 0 (with samples, to their weights): for a student all outside the kept ids, as the kept ones' sum
            # says it without cancellation.
            rest_N = -slope_NE[:, :num_kept].sum(dim=-1) if samples_NM is None else slope_NE[:, -1]
            tail_N[rows] = (
                torch.where(entries.q_NE[:, -1] > 0.5, rest_N, slope_NE[:, -1]) * divergence.factor
            )
    return value_N, Slope(len(divergence.scales) - 1, tail_N, kept_NK, samples_NM=samples_NM)


def entries_of(
    student: StudentLogits,
    teacher: TeacherRows,
    divergence: Divergence,
    all_kept_N: Tensor,
    rows: slice,
    scale_index: int = -1,
) -> Entries:
    """Log-probabilities of both models; nan for a row that keeps nothing.

    Args:
        teacher: already cut to `rows`, which the student is not.
        scale_index: of the student's tail.
    """
    assert student.kept_NK is not None
    student_NK = _scaled(student.kept_NK[rows], divergence.student_scale)
    teacher_NK = teacher.topk_logits_NK.to(student_NK.dtype)
    log_p_NK = _scaled(teacher_NK, divergence.teacher_scale).log_softmax(dim=-1)
    if divergence.support == "renormalize":
        return Entries.of(log_p_NK, student_NK.log_softmax(dim=-1), has_bucket=False)
    assert teacher.tail_mass_N is not None
    tail_N1 = teacher.tail_mass_N.to(student_NK.dtype)[:, None].clamp(0, 1)
    log_tail_N1 = torch.full_like(tail_N1, float("-inf"))
    log_tail_q_N1 = student.log_tail_NS[rows, scale_index, None]
    if divergence.support == "tail":
        log_tail_N1 = tail_N1.clamp(min=SMALLEST_TAIL).log()
        # Any mass where the student has none would be infinitely wrong, so a rounded 0 must be one there.
        nothing_N1 = (tail_N1 <= SMALLEST_TAIL) | all_kept_N[:, None]
        nothing_N1 &= log_tail_q_N1 == float("-inf")
        log_tail_N1.masked_fill_(nothing_N1, float("-inf"))
    log_q_NE = torch.cat([student_NK, log_tail_q_N1], dim=1).log_softmax(dim=-1)
    log_head_N1 = torch.log1p(-tail_N1).clamp_(
        min=math.log(objectives.EPSILON)
    )  # a rounded 1 is finite, too
    return Entries.of(
        torch.cat([log_p_NK + log_head_N1, log_tail_N1], dim=1), log_q_NE, has_bucket=True
    )


def _scaled(logits_NK: Tensor, scale: float) -> Tensor:
    return logits_NK if scale == 1 else logits_NK * scale


def _sampled(student: StudentLogits, teacher: TeacherRows, rows: slice) -> tuple[Tensor, Tensor]:
    """(weight of each tail sample, what the teacher's tail adds to the forward KL but for its own entropy)."""
    assert student.samples_NM is not None
    assert teacher.tail_mass_N is not None
    assert teacher.tail_token_ids_NM is not None
    tail_N = teacher.tail_mass_N.to(student.samples_NM.dtype).clamp(0, 1)
    drawn_NM = teacher.tail_token_ids_NM >= 0
    weights_NM = (
        drawn_NM * (tail_N.clamp(min=SMALLEST_SAMPLED_TAIL) / max(drawn_NM.shape[1], 1))[:, None]
    )
    log_q_NM = student.samples_NM[rows] - student.log_sum_exp_N[rows, None]
    return weights_NM, tail_N.xlogy(tail_N) - torch.where(drawn_NM, weights_NM * log_q_NM, 0).sum(
        dim=-1
    )
