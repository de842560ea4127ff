"""Objectives of a student: divergences between two distributions, and estimators on the
label alone.

A divergence D(p, q) of the teacher p and the student q is computed entry by entry; the entries are
kept token ids and, if the support has one, a bucket for all others, which comes last. With
u_i = dD/dq_i every gradient follows from one identity:

    dD/dz_i = q_i u_i - q_i sum_j q_j u_j

where z are the student's logits, and the bucket's is its log-sum-exp. So an objective supplies its
value and q_i u_i, in a form that stays finite where probabilities underflow. q sums to 1, so any
constant may be added to u: it is chosen such that u = 0 where q = p, or rounding would outweigh the
gradient of a student that is close to its teacher. Probabilities come as logarithms; log 0 = -inf,
and 0 log 0 = 0.

Shape legend: N positions, E entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-30
"""Keeps a ratio of two sums of probabilities finite where both are 0."""


class Terms(NamedTuple):
    """Terms of a divergence, whose sum over the entries is its value, and q_i u_i: both [N, E]."""

    value_NE: Tensor
    q_u_NE: Tensor


class Entries(NamedTuple):
    """Log-probabilities and probabilities of teacher and student on the same entries, [N, E]."""

    log_p_NE: Tensor
    log_q_NE: Tensor
    p_NE: Tensor
    q_NE: Tensor
    has_bucket: bool
    """True if the last entry stands for every token that is not kept."""

    @classmethod
    def of(cls, log_p_NE: Tensor, log_q_NE: Tensor, has_bucket: bool) -> Entries:
        return cls(log_p_NE, log_q_NE, log_p_NE.exp(), log_q_NE.exp(), has_bucket)


def forward_kl(entries: Entries) -> Terms:
    """KL(teacher || student) = sum p log(p / q): covers all of the teacher's modes."""
    p_NE = entries.p_NE
    q_NE = entries.q_NE
    return Terms(
        _weighted(p_NE, entries.log_p_NE - entries.log_q_NE), q_NE - p_NE
    )  # u = 1 - p / q


def reverse_kl(entries: Entries) -> Terms:
    """KL(student || teacher) = sum q log(q / p): settles on what the teacher finds likely."""
    value_NE = _weighted(entries.q_NE, entries.log_q_NE - entries.log_p_NE)
    return Terms(value_NE, value_NE)  # u = log(q / p)


def jsd(entries: Entries, beta: float) -> Terms:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q."""
    p_NE = entries.p_NE
    q_NE = entries.q_NE
    log_m_NE = _log_mix(beta, entries.log_p_NE, entries.log_q_NE)
    student_NE = _weighted((1 - beta) * q_NE, entries.log_q_NE - log_m_NE)
    return Terms(
        _weighted(beta * p_NE, entries.log_p_NE - log_m_NE) + student_NE, student_NE
    )  # u = (1 - beta) log(q / m)


def skewed_forward_kl(entries: Entries, skew: float) -> Terms:
    """KL(p || m), m = skew p + (1 - skew) q: finite where the student has no mass."""
    p_NE = entries.p_NE
    q_NE = entries.q_NE
    log_m_NE = _log_mix(skew, entries.log_p_NE, entries.log_q_NE)
    pull_NE = _weighted(p_NE, (entries.log_q_NE - log_m_NE).exp())
    # u = (1 - skew) (1 - p / m)
    return Terms(
        _weighted(p_NE, entries.log_p_NE - log_m_NE), (1 - skew) * (q_NE - pull_NE)
    )


def skewed_reverse_kl(entries: Entries, skew: float) -> Terms:
    """KL(q || m), m = (1 - skew) p + skew q: finite where the teacher has no mass."""
    q_NE = entries.q_NE
    log_ratio_NE = entries.log_q_NE - _log_mix(
        skew, entries.log_q_NE, entries.log_p_NE
    )
    value_NE = _weighted(q_NE, log_ratio_NE)
    # u = log(q / m) + skew (1 - q / m)
    return Terms(
        value_NE, value_NE + skew * (q_NE - _weighted(q_NE, log_ratio_NE.exp()))
    )


def tvd(entries: Entries) -> Terms:
    """Total variation distance, 1/2 sum |p - q|."""
    gap_NE = 0.5 * (entries.q_NE - entries.p_NE)
    return Terms(gap_NE.abs(), 0.5 * entries.q_NE * gap_NE.sign())


def adaptive_kl(entries: Entries, alpha: float) -> Terms:
    """w KL(p || q) + (1 - w) KL(q || p), w the share of |p - q| that lies in the teacher's head; w
    counts as a constant.

    The tail is the least likely entries whose probabilities sum to at most `alpha`, the bucket
    among them whatever it holds; the head is the rest (Wu et al. 2024, section 4, with ROLL's
    threshold).
    """
    p_NE = entries.p_NE
    gap_NE = (p_NE - entries.q_NE).abs()
    num_kept = p_NE.shape[1] - entries.has_bucket
    ascending_NK, order_NK = p_NE[:, :num_kept].sort(dim=-1)
    ascending_NK = ascending_NK.cumsum_(dim=-1)
    if entries.has_bucket:
        ascending_NK += p_NE[:, -1:]
    above_NK = (ascending_NK > alpha) & (
        alpha < 1
    )  # a sum of all that rounds to more than 1 is no more than 1
    in_head_NK = torch.empty_like(order_NK, dtype=torch.bool).scatter_(
        1, order_NK, above_NK
    )
    head_N = (gap_NE[:, :num_kept] * in_head_NK).sum(dim=-1)
    all_N = gap_NE.sum(dim=-1)
    # Equal distributions have no gaps: both divergences are 0 then and any weight will do.
    weight_N1 = torch.where(all_N > 0, head_N / all_N.clamp(min=EPSILON), 0.5)[:, None]
    forward = forward_kl(entries)
    reverse = reverse_kl(entries)
    return Terms(
        _mix(weight_N1, forward.value_NE, reverse.value_NE),
        _mix(weight_N1, forward.q_u_NE, reverse.q_u_NE),
    )


def k1(log_ratio_N: Tensor) -> tuple[Tensor, Tensor]:
    """log q(y) - log p(y). Its gradient lowers the label's probability, whatever the teacher."""
    return log_ratio_N, torch.ones_like(log_ratio_N)


def k2(log_ratio_N: Tensor) -> tuple[Tensor, Tensor]:
    """(log q(y) - log p(y))^2 / 2."""
    return log_ratio_N.square() / 2, log_ratio_N


def k3(log_ratio_N: Tensor) -> tuple[Tensor, Tensor]:
    """p(y) / q(y) - 1 - log(p(y) / q(y)), which is never negative."""
    inverse_N = (-log_ratio_N).exp()
    return inverse_N - 1 + log_ratio_N, 1 - inverse_N


def low_var_kl(log_ratio_N: Tensor) -> tuple[Tensor, Tensor]:
    """k3 clamped to [-10, 10], with gradient 0 where it is clamped."""
    value_N, slope_N = k3(log_ratio_N)
    return value_N.clamp(-10, 10), torch.where(value_N.abs() > 10, 0, slope_N)


LABEL_ESTIMATORS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "low_var_kl": low_var_kl,
}
"""By name: log q(y) - log p(y) -> (value, derivative by log q(y)), all [N]."""


def _weighted(weight_NE: Tensor, values_NE: Tensor) -> Tensor:
    """weight * values, 0 where the weight is 0: the values may be infinite or nan there."""
    return torch.where(weight_NE != 0, weight_NE * values_NE, 0)


def _mix(weight_N1: Tensor, ones_NE: Tensor, zeros_NE: Tensor) -> Tensor:
    """weight * ones + (1 - weight) * zeros; a term of weight 0 may be infinite."""
    ones_NE = torch.where(weight_N1 > 0, weight_N1 * ones_NE, 0)
    return ones_NE + torch.where(weight_N1 < 1, (1 - weight_N1) * zeros_NE, 0)


def _log_mix(share: float, log_a_NE: Tensor, log_b_NE: Tensor) -> Tensor:
    """log(share * a + (1 - share) * b) from logarithms, -inf where both are 0."""
    return torch.logaddexp(log_a_NE + math.log(share), log_b_NE + math.log1p(-share))
