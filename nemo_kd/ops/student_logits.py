"""Inputs of a loss from the student's logits, and their gradient: two passes over the vocabulary.

A loss here is a function of a few numbers per row: the logits of some kept ids, of the label and of
tail samples, and the log-sum-exp of all logits that are not kept. So its gradient follows from the
derivatives by those numbers (`Slope`):

    d loss / dz_v = tail * scale * exp(scale * z_v - tail's log-sum-exp)

and at a kept id from that id's own derivative instead.

Kept ids are left out of the sum and overwritten in the gradient: a tail of 1e-8 that is found by
subtraction, or a gradient that is corrected after it was written, would be rounding error.
Exponentials are relative to the tail's largest logit, so nothing overflows or loses digits however
large the logits.

Shape legend: N positions, v this rank's vocabulary columns, K kept ids, M tail samples, S scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from nemo_kd.ops.vocab import VocabShard
from nemo_kd.ops.vocab_pass import (
    Columns,
    Exponentials,
    entropy_pass,
    gradient_pass,
    sum_pass,
)


class TokenIds(NamedTuple):
    """Ids whose logits a loss needs, -1 for none; kept ids are distinct within a row."""

    labels_N: Tensor
    kept_NK: Tensor | None = None
    samples_NM: Tensor | None = None


def with_label(kept_NK: Tensor, labels_N: Tensor) -> Tensor:
    """Add a last column to the kept ids: the label where it is not kept, -1 where it is."""
    labels_N1 = labels_N[:, None].to(kept_NK.dtype)
    is_kept_N1 = (kept_NK == labels_N1).any(dim=-1, keepdim=True)
    return torch.cat([kept_NK, labels_N1.masked_fill(is_kept_N1, -1)], dim=1)


class StudentLogits(NamedTuple):
    """Inputs of a loss from the logits, the same on all ranks.

    Attributes:
        shift_N: each row's largest logit; all others below are less it.
        label_N, kept_NK, samples_NM: logits at `TokenIds`; kept ones -inf for id -1.
        log_sum_exp_N: of the whole real vocabulary.
        log_tail_NS: log-sum-exp of scale * logits outside the kept ids, for every scale; -inf where
            nothing is outside.
        mean_N: of all logits of the real vocabulary; None if not asked for.
        tail_maximum_N, tail_sum_exp_NS: largest logit outside the kept ids (not shifted, 0 where
            there is none), and the sum of exp(scale * (logit - tail_maximum)).
        ids: of labels, kept ids and samples, as far as there are any.
        local_sum_exp_NS, columns: this rank's part of that sum, None if not known, and where it
            holds `ids`; these two differ between ranks.
        compiled: run the second pass compiled, as the first.
    """

    shift_N: Tensor
    label_N: Tensor
    kept_NK: Tensor | None
    samples_NM: Tensor | None
    log_sum_exp_N: Tensor
    log_tail_NS: Tensor
    mean_N: Tensor | None
    tail_maximum_N: Tensor
    tail_sum_exp_NS: Tensor
    ids: list[Tensor]
    local_sum_exp_NS: Tensor | None
    columns: list[Columns]
    compiled: bool

    def at(self, part: VocabShard) -> StudentLogits:
        """Return the same for a part of this rank's columns."""
        columns = [Columns.of(ids_NJ, part) for ids_NJ in self.ids]
        return self._replace(local_sum_exp_NS=None, columns=columns)

    def of_first_kept(self, num_kept: int) -> StudentLogits:
        """Return the inputs with fewer kept ids; the others join the tail, at scale 1 only."""
        assert self.kept_NK is not None
        log_rest_N1 = self.kept_NK[:, num_kept:].logsumexp(dim=-1, keepdim=True)
        return self._replace(
            kept_NK=self.kept_NK[:, :num_kept],
            log_tail_NS=torch.logaddexp(self.log_tail_NS[:, :1], log_rest_N1),
        )


class Slope(NamedTuple):
    """Derivatives of a loss by its inputs; None for those it does not use.

    Attributes:
        scale_index: which of the scales the tail's log-sum-exp is at.
        tail_N: by that log-sum-exp.
        kept_NK: by the kept ids' logits.
        label_N, samples_NM: by the logits of label and samples as such, whether they are also kept
            or in the tail.
        constant: by every logit of the real vocabulary, kept ids' not included.
    """

    scale_index: int
    tail_N: Tensor
    kept_NK: Tensor | None = None
    label_N: Tensor | None = None
    samples_NM: Tensor | None = None
    constant: float = 0.0


def read_logits(
    logits_Nv: Tensor,
    ids: TokenIds,
    scales: Sequence[float],
    shard: VocabShard,
    with_mean: bool = False,
    compiled: bool = False,
) -> StudentLogits:
    """Run the first pass. Two all-reduces: [N], and [N, S + 1 + K + M]. `scales` begin with 1."""
    given = [ids.labels_N[:, None], *(one for one in ids[1:] if one is not None)]
    columns = [Columns.of(ids_NJ, shard) for ids_NJ in given]
    kept = 1 if ids.kept_NK is not None else None
    local_maximum_N, local_log_sum_exp_NS, at_columns, sum_N = sum_pass(
        logits_Nv, columns, kept, scales, shard, with_mean, compiled
    )
    maximum_N = shard.all_reduce(local_maximum_N.clone(), ReduceOp.MAX)
    below_NS = torch.stack(
        [scale * (local_maximum_N - maximum_N) for scale in scales], dim=-1
    )
    # A rank without any logit in the tail (-inf, or nan where no rank has one) adds nothing.
    held_N1 = local_maximum_N[:, None] != float("-inf")
    sum_exp_NS = (local_log_sum_exp_NS + below_NS).exp_()
    local_sum_exp_NS = torch.where(held_N1, sum_exp_NS, 0)
    parts = [local_sum_exp_NS, *at_columns]
    parts += [] if sum_N is None else [sum_N[:, None]]
    total = shard.all_reduce(torch.cat(parts, dim=1), ReduceOp.SUM)
    sums = iter(total.split([part.shape[1] for part in parts], dim=1))
    tail_sum_exp_NS = next(sums)
    label_N = next(sums)[:, 0]
    shift_N = maximum_N
    kept_NK = None
    if ids.kept_NK is not None:
        kept_NK = next(sums)
        kept_NK.masked_fill_(ids.kept_NK < 0, float("-inf"))
        if kept_NK.shape[1]:
            shift_N = shift_N.maximum(kept_NK.amax(dim=-1))
        kept_NK -= shift_N[:, None]
    samples_NM = None if ids.samples_NM is None else next(sums) - shift_N[:, None]
    log_tail_NS = tail_sum_exp_NS.log() + torch.stack(
        [scale * (maximum_N - shift_N) for scale in scales], dim=-1
    )
    log_sum_exp_N = log_tail_NS[:, 0]
    if kept_NK is not None:
        log_sum_exp_N = torch.logaddexp(log_sum_exp_N, kept_NK.logsumexp(dim=-1))
    return StudentLogits(
        shift_N=shift_N,
        label_N=label_N - shift_N,
        kept_NK=kept_NK,
        samples_NM=samples_NM,
        log_sum_exp_N=log_sum_exp_N,
        log_tail_NS=log_tail_NS,
        mean_N=next(sums)[:, 0] / shard.vocab_size - shift_N if with_mean else None,
        tail_maximum_N=maximum_N.masked_fill(maximum_N == float("-inf"), 0),
        tail_sum_exp_NS=tail_sum_exp_NS,
        ids=given,
        local_sum_exp_NS=local_sum_exp_NS,
        columns=columns,
        compiled=compiled,
    )


def entropy(logits_Nv: Tensor, shard: VocabShard) -> Tensor:
    """Return the entropy of every row in nats over the whole real vocabulary, the same on every
    rank of the shard's group. Two all-reduces."""
    own_maximum_N, log_sum_exp_N, own_entropy_N = entropy_pass(logits_Nv, shard)
    maximum_N = shard.all_reduce(own_maximum_N.clone(), ReduceOp.MAX)
    log_sum_N = log_sum_exp_N + own_maximum_N - maximum_N
    sum_N = log_sum_N.exp()
    # Of probabilities w_r p_i with sum w_r = 1: H = sum_r w_r (H_r - log w_r).
    weighted_N = sum_N * (own_entropy_N - log_sum_N)
    own_N2 = torch.stack([sum_N, weighted_N], dim=-1)
    has_none_N = own_maximum_N == float("-inf")
    own_N2.masked_fill_(has_none_N[:, None], 0)
    total_N2 = shard.all_reduce(own_N2, ReduceOp.SUM)
    sum_N, weighted_N = total_N2.unbind(dim=-1)
    return sum_N.log() + weighted_N / sum_N


def write_gradient(
    logits_Nv: Tensor,
    out_Nv: Tensor,
    scales: Sequence[float],
    student: StudentLogits,
    weights: Sequence[float | Tensor],
    slopes: Sequence[Slope],
    shard: VocabShard,
) -> None:
    """Run the second pass: fill `out_Nv`, maybe the logits themselves; padding columns get 0.

    No collectives.

    Args:
        weights: derivative of the minimised sum by each loss: [N], or one for all rows.
        slopes: of as many losses or fewer.
    """
    coefficients_NS = torch.zeros_like(student.tail_sum_exp_NS)
    constant_N = None
    kept_NK = None
    samples_NM = (
        None if student.samples_NM is None else torch.zeros_like(student.samples_NM)
    )
    label_N = torch.zeros_like(student.label_N)
    for weight, slope in zip(weights, slopes, strict=False):
        d_loss_N = torch.ones_like(student.label_N) * weight
        coefficients_NS[:, slope.scale_index] += (
            d_loss_N * slope.tail_N * scales[slope.scale_index]
        )
        if slope.kept_NK is not None:
            d_kept_NK = slope.kept_NK * d_loss_N[:, None]
            kept_NK = d_kept_NK if kept_NK is None else kept_NK.add_(d_kept_NK)
        if slope.label_N is not None:
            label_N += d_loss_N * slope.label_N
        if samples_NM is not None and slope.samples_NM is not None:
            samples_NM.addcmul_(slope.samples_NM, d_loss_N[:, None])
        if slope.constant:
            constant_N = slope.constant * d_loss_N
    coefficients_NS = torch.where(
        student.tail_sum_exp_NS != 0, coefficients_NS / student.tail_sum_exp_NS, 0
    )
    at_label, *others = student.columns
    added = [(at_label, at_label.masked(label_N[:, None]))]
    kept = None if kept_NK is None else (others[0], kept_NK)
    if samples_NM is not None:
        added.append((others[-1], others[-1].masked(samples_NM)))
    if out_Nv.data_ptr() != logits_Nv.data_ptr():
        out_Nv.copy_(logits_Nv)
    gradient_pass(
        out_Nv,
        scales,
        Exponentials(student.tail_maximum_N, coefficients_NS),
        student.local_sum_exp_NS,
        constant_N,
        kept,
        added,
        shard,
        student.compiled,
    )


def log_probs_at(
    logits_Nv: Tensor, ids_NJ: Tensor, shard: VocabShard, scale: float = 1.0
) -> Tensor:
    """For custom losses, return log softmax(scale * logits) at some ids: [N, J] in nats.

    The softmax runs over the whole real vocabulary; every rank gets the same. Ids may repeat; -1
    stands for none and gives a number without meaning. Two all-reduces forward, none backward.
    """
    log_probs_NJ: Tensor = _LogProbsAt.apply(logits_Nv, ids_NJ, shard, scale)
    return log_probs_NJ


class _LogProbsAt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_Nv: Tensor, ids_NJ: Tensor, shard: VocabShard, scale: float
    ) -> Tensor:
        ids = TokenIds(torch.full_like(ids_NJ[:, 0], -1), samples_NM=ids_NJ)
        scales = (1.0,) if scale == 1 else (1.0, scale)
        student = read_logits(logits_Nv, ids, scales, shard)
        assert student.samples_NM is not None
        ctx.save_for_backward(logits_Nv)
        ctx.scales = scales
        ctx.student = student
        ctx.shard = shard
        return student.samples_NM * scale - student.log_tail_NS[:, -1:]

    @staticmethod
    def backward(ctx: Any, d_log_probs_NJ: Tensor) -> tuple[Tensor | None, ...]:
        (logits_Nv,) = ctx.saved_tensors
        gradient_Nv = torch.empty_like(logits_Nv)
        scale_index = len(ctx.scales) - 1
        slope = Slope(
            scale_index,
            -d_log_probs_NJ.sum(dim=-1),
            samples_NM=d_log_probs_NJ * ctx.scales[scale_index],
        )
        write_gradient(
            logits_Nv,
            gradient_Nv,
            ctx.scales,
            ctx.student,
            [1.0],
            [slope],
            ctx.shard,
        )
        return gradient_Nv, None, None, None
