"""Losses of each position as functions of a few of the student's logits, with their derivatives.

Shape legend: N positions, K kept teacher logits, E entries (K, and 1 for a bucket), M tail samples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from nemo_kd.batch import SMALLEST_SAMPLED_TAIL, TeacherRows
from nemo_kd.config.loss import Divergence
from nemo_kd.ops import objectives
from nemo_kd.ops.objectives import LABEL_ESTIMATORS, Entries, Terms
from nemo_kd.ops.student_logits import Slope, StudentLogits
from nemo_kd.ops.vocab import row_blocks

SMALLEST_TAIL = 1e-12
"""Lower bound of the teacher's tail: a rounded 0 would make the loss infinite."""
BLOCK_ELEMENTS = 1 << 16
"""Rows times entries of one block: temporaries stay small beside the logits."""


def cross_entropy(
    student: StudentLogits, label_smoothing: float, z_loss_weight: float, vocab_size: int
) -> tuple[Tensor, Slope]:
    """Return value and slope of the cross-entropy, with label smoothing and z-loss."""
    log_sum_exp_N = student.log_sum_exp_N
    value_N = log_sum_exp_N - student.label_N
    slope_N = torch.ones_like(log_sum_exp_N)
    if label_smoothing:
        assert student.mean_N is not None
        value_N = value_N + label_smoothing * (student.label_N - student.mean_N)
    if z_loss_weight:
        whole_N = log_sum_exp_N + student.shift_N
        value_N = value_N + z_loss_weight * whole_N.square()
        slope_N = 1 + 2 * z_loss_weight * whole_N
    constant = -label_smoothing / vocab_size
    tail_N, kept_NK = _times_softmax(student, slope_N)
    if kept_NK is not None:
        kept_NK += constant
    label_N = torch.full_like(slope_N, label_smoothing - 1)
    return value_N, Slope(0, tail_N, kept_NK, label_N, constant=constant)


def label_estimator(
    student: StudentLogits,
    teacher: TeacherRows[Tensor],
    divergence: Divergence,
    vocab_size: int,
) -> tuple[Tensor, Slope]:
    """Return value and slope of k1, k2, k3 or low_var_kl."""
    assert teacher.label_logprobs_P is not None
    log_q_N = student.label_N - student.log_sum_exp_N
    value_N, slope_N = LABEL_ESTIMATORS[divergence.objective](
        log_q_N - teacher.label_logprobs_P.to(log_q_N.dtype)
    )
    slope_N = slope_N * divergence.factor
    return value_N * divergence.factor, Slope(
        0, *_times_softmax(student, -slope_N), label_N=slope_N
    )


def _times_softmax(
    student: StudentLogits, factor_N: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return factor * softmax of all logits: its sum over the tail, and at the kept ids."""
    log_sum_exp_N = student.log_sum_exp_N
    tail_N = factor_N * (student.log_tail_NS[:, 0] - log_sum_exp_N).exp()
    if student.kept_NK is None:
        return tail_N, None
    softmax_NK = (student.kept_NK - log_sum_exp_N[:, None]).exp_()
    return tail_N, softmax_NK.mul_(factor_N[:, None])


def divergence_on_support(
    student: StudentLogits,
    teacher: TeacherRows[Tensor],
    divergence: Divergence,
    vocab_size: int,
) -> tuple[Tensor, Slope]:
    """Return value and slope of a divergence over all entries of its support."""
    assert student.kept_NK is not None
    value_N = torch.zeros_like(student.shift_N)
    tail_N = torch.zeros_like(student.shift_N)
    kept_NK = torch.zeros_like(student.kept_NK)
    samples_NM = (
        None if student.samples_NM is None else torch.zeros_like(student.samples_NM)
    )
    num_kept = kept_NK.shape[1]
    column = divergence.tail_column(teacher)
    terms_of = _terms(divergence)
    for rows in row_blocks(len(kept_NK), num_kept + 1, BLOCK_ELEMENTS):
        some = teacher.at(rows)
        some_tail_N = None if column is None else some.tail_mass_PT[:, column]
        num_used_N = (some.topk_token_ids_PK >= 0).sum(dim=-1)
        known_N = num_used_N > 0
        entries = entries_of(
            student, some, some_tail_N, divergence, num_used_N == vocab_size, rows
        )
        terms = terms_of(entries)
        value = terms.value_NE.sum(dim=-1)
        mean_u = terms.q_u_NE.sum(dim=-1)
        if samples_NM is not None:
            assert some_tail_N is not None
            weights_NM, sampled_N = _sampled(student, some, some_tail_N, rows)
            value = value + sampled_N
            mean_u = mean_u - weights_NM.sum(dim=-1)
            samples_NM[rows] = torch.where(
                known_N[:, None], -divergence.factor * weights_NM, 0
            )
        slope_NE = terms.q_u_NE.addcmul(entries.q_NE, mean_u[:, None], value=-1)
        slope_NE.masked_fill_(~known_N[:, None], 0)
        value_N[rows] = torch.where(known_N, value * divergence.factor, 0)
        scale = divergence.factor * divergence.student_scale
        torch.mul(slope_NE[:, :num_kept], scale, out=kept_NK[rows])
        if entries.has_bucket:
            # Slopes sum to 0 (with samples, to their weights). If nearly all of the student's mass
            # is in the bucket, the kept ones' sum gives its slope without cancellation.
            rest_N = slope_NE[:, -1]
            if samples_NM is None:
                others_N = -slope_NE[:, :num_kept].sum(dim=-1)
                rest_N = torch.where(entries.q_NE[:, -1] > 0.5, others_N, rest_N)
            tail_N[rows] = rest_N * divergence.factor
    return value_N, Slope(
        len(divergence.scales) - 1, tail_N, kept_NK, samples_NM=samples_NM
    )


def entries_of(
    student: StudentLogits,
    teacher: TeacherRows[Tensor],
    tail_N: Tensor | None,
    divergence: Divergence,
    all_kept_N: Tensor,
    rows: slice,
    scale_index: int = -1,
) -> Entries:
    """Return log-probabilities of both models at some rows; nan for a row that keeps nothing.

    Args:
        teacher, tail_N, all_kept_N: already cut to `rows`, unlike the student. `tail_N` is the
            teacher's tail at the divergence's temperature; renormalize does not need it.
        scale_index: of the student's tail.
    """
    assert student.kept_NK is not None
    student_NK = _scaled(student.kept_NK[rows], divergence.student_scale)
    teacher_NK = teacher.topk_logits_PK.to(student_NK.dtype)
    log_p_NK = _scaled(teacher_NK, divergence.teacher_scale).log_softmax(dim=-1)
    if divergence.support == "renormalize":
        return Entries.of(log_p_NK, student_NK.log_softmax(dim=-1), has_bucket=False)
    assert tail_N is not None
    tail_N1 = tail_N.to(student_NK.dtype)[:, None].clamp(0, 1)
    log_tail_N1 = torch.full_like(tail_N1, float("-inf"))
    log_tail_q_N1 = student.log_tail_NS[rows, scale_index, None]
    if divergence.support == "tail":
        log_tail_N1 = tail_N1.clamp(min=SMALLEST_TAIL).log()
        # If the student has no mass there, any mass of the teacher would be infinitely wrong: a
        # rounded 0 stays 0.
        nothing_N1 = (tail_N1 <= SMALLEST_TAIL) | all_kept_N[:, None]
        nothing_N1 &= log_tail_q_N1 == float("-inf")
        log_tail_N1.masked_fill_(nothing_N1, float("-inf"))
    log_q_NE = torch.cat([student_NK, log_tail_q_N1], dim=1).log_softmax(dim=-1)
    # A tail that rounds to 1 must stay finite, too.
    log_head_N1 = torch.log1p(-tail_N1).clamp_(min=math.log(objectives.EPSILON))
    log_p_NE = torch.cat([log_p_NK + log_head_N1, log_tail_N1], dim=1)
    return Entries.of(log_p_NE, log_q_NE, has_bucket=True)


def _terms(divergence: Divergence) -> Callable[[Entries], Terms]:
    """Return the objective as a function of entries."""
    parameters = {
        "jsd": {"beta": divergence.jsd_beta},
        "skewed_forward_kl": {"skew": divergence.skew_lambda},
        "skewed_reverse_kl": {"skew": divergence.skew_lambda},
        "adaptive_kl": {"alpha": divergence.adaptive_kl_alpha},
    }
    name = divergence.objective
    return functools.partial(getattr(objectives, name), **parameters.get(name, {}))


def _scaled(logits_NK: Tensor, scale: float) -> Tensor:
    return logits_NK if scale == 1 else logits_NK * scale


def _sampled(
    student: StudentLogits, teacher: TeacherRows[Tensor], tail_N: Tensor, rows: slice
) -> tuple[Tensor, Tensor]:
    """Return (weight of each tail sample, the tail's part of the forward KL less its entropy)."""
    assert student.samples_NM is not None
    assert teacher.tail_token_ids_PM is not None
    tail_N = tail_N.to(student.samples_NM.dtype).clamp(0, 1)
    drawn_NM = teacher.tail_token_ids_PM >= 0
    mass_N = tail_N.clamp(min=SMALLEST_SAMPLED_TAIL) / max(drawn_NM.shape[1], 1)
    weights_NM = drawn_NM * mass_N[:, None]
    log_q_NM = student.samples_NM[rows] - student.log_sum_exp_N[rows, None]
    of_samples_N = torch.where(drawn_NM, weights_NM * log_q_NM, 0).sum(dim=-1)
    return weights_NM, tail_N.xlogy(tail_N) - of_samples_N
