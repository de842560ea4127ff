"""Losses of each position as functions of a few of the student's logits, with their derivatives.

Shape legend: N positions, K kept teacher logits, E entries (K, and 1 for a bucket), M tail samples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nemo_kd.batch import SMALLEST_SAMPLED_TAIL, TeacherRows
from nemo_kd.config.loss import Divergence
from nemo_kd.ops import objectives
from nemo_kd.ops.objectives import LABEL_ESTIMATORS, Entries, Terms
from nemo_kd.ops.student_logits import Slope, StudentLogits

PARAMETERS = {
    "jsd": "jsd_beta",
    "skewed_forward_kl": "skew_lambda",
    "skewed_reverse_kl": "skew_lambda",
    "adaptive_kl": "adaptive_kl_alpha",
}
"""Objectives with a second argument: its name in `Divergence`."""
SMALLEST_TAIL = 1e-12
"""Lower bound of the teacher's tail: a rounded 0 would make the loss infinite."""


COMPARED = (
    "teacher_mass",
    "student_mass",
    "top1_agreement",
    "teacher_kl",
    "teacher_entropy",
    "student_entropy",
)
"""Probability of the kept ids under the teacher and under the student; 1 where both rank the same
token first; KL(teacher || student) and entropies in nats."""


def cross_entropy(
    student: StudentLogits,
    label_smoothing: float,
    z_loss_weight: float,
    vocab_size: int,
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
    entries = entries_of(student, teacher, divergence, vocab_size)
    objective = getattr(objectives, divergence.objective)
    parameter = PARAMETERS.get(divergence.objective)
    terms: Terms = objective(
        entries, *([] if parameter is None else [getattr(divergence, parameter)])
    )
    value_N = terms.value_NE.sum(dim=-1)
    mean_u_N = terms.q_u_NE.sum(dim=-1)
    known_N1 = (teacher.topk_token_ids_PK >= 0).any(dim=-1, keepdim=True)
    samples_NM = None
    if student.samples_NM is not None:
        weights_NM, sampled_N = _sampled(student, teacher)
        value_N = value_N + sampled_N
        mean_u_N = mean_u_N - weights_NM.sum(dim=-1)
        samples_NM = torch.where(known_N1, -divergence.factor * weights_NM, 0)
    slope_NE = terms.q_u_NE.addcmul(entries.q_NE, mean_u_N[:, None], value=-1)
    slope_NE.masked_fill_(~known_N1, 0)
    kept_NK = slope_NE[:, : student.kept_NK.shape[1]]
    tail_N = torch.zeros_like(value_N)
    if entries.has_bucket:
        # Slopes sum to 0 (with samples, to their weights). If nearly all of the student's mass
        # is in the bucket, the kept ones' sum gives its slope without cancellation.
        tail_N = slope_NE[:, -1]
        if samples_NM is None:
            in_bucket_N = entries.q_NE[:, -1] > 0.5
            tail_N = torch.where(in_bucket_N, -kept_NK.sum(dim=-1), tail_N)
    return torch.where(known_N1[:, 0], value_N * divergence.factor, 0), Slope(
        len(divergence.scales) - 1,
        tail_N * divergence.factor,
        kept_NK * (divergence.factor * divergence.student_scale),
        samples_NM=samples_NM,
    )


def entries_of(
    student: StudentLogits,
    teacher: TeacherRows[Tensor],
    divergence: Divergence,
    vocab_size: int,
    scale_index: int = -1,
) -> Entries:
    """Return log-probabilities of both models; nan for a row that keeps nothing.

    Args:
        scale_index: of the student's tail.
    """
    assert student.kept_NK is not None
    student_NK = student.kept_NK * divergence.student_scale
    teacher_NK = teacher.topk_logits_PK.to(student_NK.dtype)
    log_p_NK = (teacher_NK * divergence.teacher_scale).log_softmax(dim=-1)
    if divergence.support == "renormalize":
        return Entries.of(log_p_NK, student_NK.log_softmax(dim=-1), has_bucket=False)
    column = divergence.tail_column(teacher)
    assert column is not None
    tail_N1 = teacher.tail_mass_PT[:, column, None].to(student_NK.dtype).clamp(0, 1)
    log_tail_N1 = torch.full_like(tail_N1, float("-inf"))
    log_tail_q_N1 = student.log_tail_NS[:, scale_index, None]
    if divergence.support == "tail":
        log_tail_N1 = tail_N1.clamp(min=SMALLEST_TAIL).log()
        # If the student has no mass there, any mass of the teacher would be infinitely wrong: a
        # rounded 0 stays 0.
        keeps_all_N1 = (teacher.topk_token_ids_PK >= 0).sum(
            -1, keepdim=True
        ) == vocab_size
        nothing_N1 = (tail_N1 <= SMALLEST_TAIL) | keeps_all_N1
        nothing_N1 &= log_tail_q_N1 == float("-inf")
        log_tail_N1.masked_fill_(nothing_N1, float("-inf"))
    log_q_NE = torch.cat([student_NK, log_tail_q_N1], dim=1).log_softmax(dim=-1)
    # A tail that rounds to 1 must stay finite, too.
    log_head_N1 = torch.log1p(-tail_N1).clamp_(min=math.log(objectives.EPSILON))
    log_p_NK = log_p_NK + log_head_N1
    if divergence.gives_tail_to_label:
        log_p_NK = _with_tail_on_label(log_p_NK, tail_N1, student)
    log_p_NE = torch.cat([log_p_NK, log_tail_N1], dim=1)
    return Entries.of(log_p_NE, log_q_NE, has_bucket=True)


def _with_tail_on_label(
    log_p_NK: Tensor, tail_N1: Tensor, student: StudentLogits
) -> Tensor:
    """Give the teacher's tail to the label: a kept id, or the column that `with_label` added."""
    labels_N1, kept_NK, *_ = student.ids
    added_N1 = torch.full_like(tail_N1, float("-inf"))
    log_p_NK = torch.cat([log_p_NK, added_N1], dim=1)
    on_label_NK = torch.logaddexp(log_p_NK, tail_N1.log())
    return torch.where(kept_NK == labels_N1, on_label_NK, log_p_NK)


def _sampled(
    student: StudentLogits, teacher: TeacherRows[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return (weight of each tail sample, the tail's part of the forward KL less its entropy)."""
    assert student.samples_NM is not None
    assert teacher.tail_token_ids_PM is not None
    tail_N = teacher.tail_mass_PT[:, 0].to(student.samples_NM.dtype).clamp(0, 1)
    drawn_NM = teacher.tail_token_ids_PM >= 0
    mass_N = tail_N.clamp(min=SMALLEST_SAMPLED_TAIL) / drawn_NM.shape[1]
    weights_NM = drawn_NM * mass_N[:, None]
    log_q_NM = student.samples_NM - student.log_sum_exp_N[:, None]
    of_samples_N = torch.where(drawn_NM, weights_NM * log_q_NM, 0).sum(dim=-1)
    return weights_NM, tail_N.xlogy(tail_N) - of_samples_N


def compare(
    student: StudentLogits, teacher: TeacherRows[Tensor], vocab_size: int
) -> Tensor:
    """Measure the distance between student and teacher, whatever loss trains the student.

    At temperature 1, over the teacher's kept ids and one bucket for all others. So every figure is
    a cheap lower bound: the divergence between buckets is at most the one over the whole
    vocabulary, and so are both entropies.

    Returns:
        [N, 1 + len(COMPARED)]: 1 and `COMPARED`; all 0 for a row without kept ids.
    """
    student = student.of_first_kept(teacher.topk_token_ids_PK.shape[1])
    assert student.kept_NK is not None
    known_N = (teacher.topk_token_ids_PK >= 0).any(dim=-1)
    entries = entries_of(student, teacher, Divergence(), vocab_size, scale_index=0)
    columns = [
        known_N,
        1 - entries.p_NE[:, -1],
        entries.q_NE[:, :-1].sum(dim=-1),
        # The student's logit at the teacher's first token, less the largest of all.
        student.kept_NK[:, :1].amax(dim=-1) == 0,
        objectives.forward_kl(entries).value_NE.sum(dim=-1),
        torch.special.entr(entries.p_NE).sum(dim=-1),
        torch.special.entr(entries.q_NE).sum(dim=-1),
    ]
    dtype = entries.q_NE.dtype
    return torch.stack(
        [torch.where(known_N, column.to(dtype), 0) for column in columns], dim=-1
    )
