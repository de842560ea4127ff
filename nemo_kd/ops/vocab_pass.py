"""The two passes that a loss makes over a student's logits: what it needs to know, then the gradient in their place.

A loss here is a function of few numbers a row: the logits of some kept ids, of the label and of tail samples, and the
log-sum-exp of all logits that are not kept. So its gradient is made of the derivatives by those numbers (`Slope`):

    d loss / dz_v = tail * scale * exp(scale * z_v - tail's log-sum-exp)      and at kept ids the kept id's own instead

Kept ids are left out of the sum and overwritten in the gradient: a tail of 1e-8 that is found by subtraction, or a gradient
that is corrected after it was written, would be rounding error. Exponentials are relative to the tail's largest logit, so
nothing overflows or loses digits however large the logits. Both passes work on blocks of rows in float32 (float64 for float64
logits) that stay in the processor's cache: the logits are read once, and read and written once.

Shape legend: N positions, v this rank's vocabulary columns, K kept ids, M tail samples, J label (1) and samples, S scales.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from nemo_kd.ops.vocab import VocabShard, reduction_dtype, row_blocks

CPU_BLOCK_ELEMENTS = 1 << 19
"""2 MiB of float32: fits a core's second-level cache."""
GPU_BLOCK_ELEMENTS = 1 << 24


class TokenIds(NamedTuple):
    """Ids whose logits a loss needs: kept ones are distinct within a row, samples need not be; -1 is none."""

    labels_N: Tensor
    kept_NK: Tensor | None = None
    samples_NM: Tensor | None = None


class StudentLogits(NamedTuple):
    """What a loss needs to know of the logits, the same on all ranks.

    Attributes:
        shift_N: each row's largest logit; all others below are less it.
        label_N, kept_NK, samples_NM: logits at `TokenIds`; kept ones -inf for id -1.
        log_tail_NS: log-sum-exp of scale * logits outside the kept ids, for every scale; -inf where nothing is outside.
        mean_N: of all logits of the real vocabulary; None where nobody asked.
        tail_maximum_N, tail_sum_exp_NS: largest logit outside the kept ids (not shifted, 0 where there is none), and the
            sum of exp(scale * (logit - tail_maximum)).
    """

    shift_N: Tensor
    label_N: Tensor
    kept_NK: Tensor | None
    samples_NM: Tensor | None
    log_tail_NS: Tensor
    mean_N: Tensor | None
    tail_maximum_N: Tensor
    tail_sum_exp_NS: Tensor


class Slope(NamedTuple):
    """Derivatives of a loss by what it is a function of; None where it is not.

    Attributes:
        scale_index: which of the scales the tail's log-sum-exp is at.
        tail_N: by that log-sum-exp.
        kept_NK: by the kept ids' logits.
        label_N, samples_NM: by the logits of label and samples as such, whether they are also kept or in the tail.
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
    """The first pass. Two all-reduces: [N], and [N, S + 1 + K + M]. The first of `scales` is 1."""
    local_maximum_N, log_sum_exp_NS, parts = _sum_pass(logits_Nv, ids, scales, shard, with_mean, compiled)
    maximum_N = shard.all_reduce(local_maximum_N.clone(), ReduceOp.MAX)
    log_sum_exp_NS += torch.stack([scale * (local_maximum_N - maximum_N) for scale in scales], dim=-1)
    # A rank without any logit in the tail (-inf, or nan where no rank has one) adds nothing.
    parts.insert(0, torch.where(local_maximum_N[:, None] > float("-inf"), log_sum_exp_NS.exp_(), 0))
    widths = [part.shape[1] for part in parts]
    sums = iter(shard.all_reduce(torch.cat(parts, dim=1), ReduceOp.SUM).split(widths, dim=1))
    tail_sum_exp_NS, label_N, shift_N, kept_NK, samples_NM = next(sums), next(sums)[:, 0], maximum_N, None, None
    if ids.kept_NK is not None:
        kept_NK = next(sums).masked_fill(ids.kept_NK < 0, float("-inf"))
        shift_N = torch.cat([shift_N[:, None], kept_NK], dim=1).amax(dim=-1)
        kept_NK -= shift_N[:, None]
    if ids.samples_NM is not None:
        samples_NM = next(sums) - shift_N[:, None]
    gap_N = maximum_N - shift_N
    return StudentLogits(
        shift_N=shift_N,
        label_N=label_N - shift_N,
        kept_NK=kept_NK,
        samples_NM=samples_NM,
        log_tail_NS=tail_sum_exp_NS.log() + torch.stack([scale * gap_N for scale in scales], dim=-1),
        mean_N=next(sums)[:, 0] / shard.vocab_size - shift_N if with_mean else None,
        tail_maximum_N=maximum_N.masked_fill(maximum_N == float("-inf"), 0),
        tail_sum_exp_NS=tail_sum_exp_NS,
    )


def write_gradient(
    logits_Nv: Tensor,
    out_Nv: Tensor,
    ids: TokenIds,
    scales: Sequence[float],
    student: StudentLogits,
    losses: Sequence[tuple[Tensor, Slope]],
    shard: VocabShard,
    compiled: bool = False,
) -> None:
    """The second pass: fills `out_Nv`, which may be the logits themselves; padding columns get 0. No collectives.

    Args:
        losses: (derivative [N] of what is minimised by the loss, the loss's own slope) of each.
    """
    coefficients_NS, constant_N = torch.zeros_like(student.tail_sum_exp_NS), None
    kept_NK = None if student.kept_NK is None else torch.zeros_like(student.kept_NK)
    samples_NM = None if student.samples_NM is None else torch.zeros_like(student.samples_NM)
    label_N = torch.zeros_like(student.label_N)
    for d_loss_N, slope in losses:
        coefficients_NS[:, slope.scale_index] += d_loss_N * slope.tail_N * scales[slope.scale_index]
        if kept_NK is not None and slope.kept_NK is not None:
            kept_NK.addcmul_(slope.kept_NK, d_loss_N[:, None])
        if slope.label_N is not None:
            label_N += d_loss_N * slope.label_N
        if samples_NM is not None and slope.samples_NM is not None:
            samples_NM.addcmul_(slope.samples_NM, d_loss_N[:, None])
        if slope.constant:
            constant_N = slope.constant * d_loss_N
    coefficients_NS = torch.where(student.tail_sum_exp_NS > 0, coefficients_NS / student.tail_sum_exp_NS, 0)
    exponentials = _compiled(_exponentials) if compiled else _exponentials
    added = [(_columns(ids.labels_N[:, None], shard), label_N[:, None])]
    if ids.samples_NM is not None and samples_NM is not None:
        added.append((_columns(ids.samples_NM, shard), samples_NM))
    kept_columns_NK = None if ids.kept_NK is None else _columns(ids.kept_NK, shard)
    for rows, block, scratch in _blocks(logits_Nv, shard, num_buffers=len(scales)):
        real, reference = logits_Nv[rows, : shard.num_real], student.tail_maximum_N[rows, None]
        for index, scale in enumerate(scales):
            target = scratch if index else block
            exponentials(real, reference, scale, coefficients_NS[rows, index, None], target[:, :-1])
            if index:
                block += scratch
        if constant_N is not None:
            block += constant_N[rows, None]
        if kept_columns_NK is not None and kept_NK is not None:
            block.scatter_(1, kept_columns_NK[rows], kept_NK[rows])
        for columns_NJ, values_NJ in added:
            block.scatter_add_(1, columns_NJ[rows], values_NJ[rows])
        out_Nv[rows, : shard.num_real] = block[:, :-1]
    out_Nv[:, shard.num_real :] = 0


def _sum_pass(
    logits_Nv: Tensor, ids: TokenIds, scales: Sequence[float], shard: VocabShard, with_sum: bool, compiled: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Of this rank's real columns: the largest logit outside the kept ids (-inf without any), log-sum-exp of
    scale * (logits - largest) outside them for every scale, and logits at all ids (0 where not held) and their sum."""
    num_rows, dtype = len(logits_Nv), reduction_dtype(logits_Nv)
    maximum_N = logits_Nv.new_full((num_rows,), float("-inf"), dtype=dtype)
    log_sum_exp_NS = logits_Nv.new_zeros((num_rows, len(scales)), dtype=dtype)
    columns = [_columns(ids_NJ, shard) for ids_NJ in (ids.labels_N[:, None], *ids[1:]) if ids_NJ is not None]
    parts = [logits_Nv.new_zeros(columns_NJ.shape, dtype=dtype) for columns_NJ in columns]
    parts += [logits_Nv.new_zeros((num_rows, 1), dtype=dtype)] if with_sum else []
    row_sums = _compiled(_row_sums_in_one_loop) if compiled else _row_sums
    for rows, block, scratch in _blocks(logits_Nv, shard, num_buffers=2):
        block[:, :-1] = logits_Nv[rows, : shard.num_real]
        block[:, -1] = 0
        for columns_NJ, part_NJ in zip(columns, parts, strict=False):
            torch.gather(block, 1, columns_NJ[rows], out=part_NJ[rows])
        if with_sum:
            torch.sum(block, dim=-1, keepdim=True, out=parts[-1][rows])
        block[:, -1] = float("-inf")
        if ids.kept_NK is not None:
            block.scatter_(1, columns[1][rows], float("-inf"))
        maximum_N[rows], log_sum_exp_NS[rows, 0] = row_sums(block, scratch)
        for index, scale in enumerate(scales[1:], start=1):
            log_sum_exp_NS[rows, index] = row_sums(block.mul_(scale / scales[index - 1]), scratch)[1]
    return maximum_N, log_sum_exp_NS, parts


def _blocks(logits_Nv: Tensor, shard: VocabShard, num_buffers: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Row ranges, each with two buffers for its rows (or one, twice); a column past the real ones takes ids of others."""
    if not shard.num_real or not len(logits_Nv):
        return
    max_elements = GPU_BLOCK_ELEMENTS if logits_Nv.is_cuda else CPU_BLOCK_ELEMENTS
    blocks = row_blocks(len(logits_Nv), shard.num_real + 1, max_elements)
    buffers = logits_Nv.new_empty((num_buffers, blocks[0].stop, shard.num_real + 1), dtype=reduction_dtype(logits_Nv))
    for rows in blocks:
        yield rows, buffers[0, : rows.stop - rows.start], buffers[-1, : rows.stop - rows.start]


def _columns(ids_NJ: Tensor, shard: VocabShard) -> Tensor:
    """The column of each id; the one past the real columns for an id that this rank does not hold."""
    columns_NJ = ids_NJ - shard.start
    return columns_NJ.masked_fill_((columns_NJ < 0) | (columns_NJ > shard.num_real), shard.num_real)


def _row_sums(block: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """(maximum, log-sum-exp relative to it) of each row; log_softmax reads a row once where logsumexp reads it four times."""
    torch.log_softmax(block, dim=-1, out=scratch)
    return block.amax(dim=-1), scratch.amax(dim=-1).neg_()


def _row_sums_in_one_loop(block: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """`_row_sums` for the compiler."""
    maximum = block.amax(dim=-1)
    return maximum, (block - maximum[:, None]).exp().sum(dim=-1).log()


def _exponentials(real: Tensor, reference: Tensor, scale: float, coefficient: Tensor, out: Tensor) -> None:
    """out = coefficient * exp(scale * (real - reference))."""
    torch.sub(real, reference, out=out)
    if scale != 1:
        out.mul_(scale)
    out.exp_().mul_(coefficient)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)
