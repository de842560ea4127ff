"""Passes over the rows of vocabulary-parallel logits: sums of exponentials, and a gradient in their
place.

They work on blocks of rows in float32 (float64 for float64 logits) that stay in the processor's
cache: the logits are read once, and read and written once. On CPU a block goes through torch's
softmax kernels, which take half the time of exp() on its own; compiled, each pass is one loop. Kept
ids are set to -inf while a block is summed and put back after.

torch.compile takes longer than a short run's losses, and needs a compiler: `compile_passes` says
if it can be used.

Shape legend: N positions, v this rank's vocabulary columns, J ids of a row, K kept ids, S scales of
the logits.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_kd.ops.vocab import VocabShard, reduction_dtype, row_blocks, scatter

log = logging.getLogger(__name__)

BLOCK_ELEMENTS = ((1 << 20, 1 << 22), (1 << 24, 1 << 28))
"""Elements of a block on a CPU and on a GPU, each plain and compiled."""
COMPILED_ROWS = 32
MINUS_INFINITY = float("-inf")


class Columns(NamedTuple):
    """Places of ids in this rank's columns.

    Attributes:
        index_NJ: valid columns; an id that another rank holds, or -1, points where the row's first
            held id does, or at 0.
        held_NJ: whether this rank holds the id.
        first_N1: place of the row's first held id.
    """

    index_NJ: Tensor
    held_NJ: Tensor
    first_N1: Tensor

    @classmethod
    def of(cls, ids_NJ: Tensor, shard: VocabShard) -> Columns:
        index_NJ, held_NJ = shard.local(ids_NJ.long())
        if not ids_NJ.shape[1]:
            return cls(index_NJ, held_NJ, index_NJ)
        first_N1 = held_NJ.byte().argmax(dim=-1, keepdim=True)
        index_NJ = torch.where(held_NJ, index_NJ, index_NJ.gather(1, first_N1))
        return cls(index_NJ, held_NJ, first_N1)

    def masked(self, values_NJ: Tensor) -> Tensor:
        """Return the values of the ids that this rank holds, 0 for others."""
        return torch.where(self.held_NJ, values_NJ, 0)

    def at(self, rows: slice) -> Columns:
        """Select rows."""
        return Columns(*(part[rows] for part in self))

    def put(self, block: Tensor, values_NJ: Tensor) -> None:
        """Write the values of held ids into these rows; ids are distinct within a row."""
        # Others write what the first held id writes, or what is there.
        first_N1 = values_NJ.gather(1, self.first_N1)
        first_N1 = torch.where(
            self.held_NJ.any(dim=-1, keepdim=True), first_N1, block[:, :1]
        )
        scatter(block, self.index_NJ, torch.where(self.held_NJ, values_NJ, first_N1))


class Exponentials(NamedTuple):
    """sum_s coefficient_s exp(scale_s (logit - reference)), all coefficients finite."""

    reference_N: Tensor
    coefficients_NS: Tensor


def sum_pass(
    logits_Nv: Tensor,
    columns: Sequence[Columns],
    kept: int | None,
    scales: Sequence[float],
    shard: VocabShard,
    with_sum: bool = False,
    compiled: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None]:
    """Sum this rank's real columns of every row, without `columns[kept]`.

    Returns:
        The largest logit [N], -inf where there is none; the log-sum-exp of scale * (logits -
        maximum) [N, S], which means nothing where there is none; for each of `columns` the logits
        there, 0 where the id is not held; the sum of all logits [N], with the kept ones, if asked
        for.
    """
    num_rows = len(logits_Nv)
    zeros = functools.partial(logits_Nv.new_zeros, dtype=reduction_dtype(logits_Nv))
    maximum_N = zeros(num_rows).fill_(MINUS_INFINITY)
    log_sum_exp_NS = zeros(num_rows, len(scales))
    at_columns = [zeros(part.index_NJ.shape) for part in columns]
    sum_N = zeros(num_rows) if with_sum else None
    row_sums = _compiled(_row_sums) if compiled else _row_sums
    for rows, block in _blocks(logits_Nv.data, shard, compiled):
        if sum_N is not None:
            sum_N[rows] = block.sum(dim=-1, dtype=sum_N.dtype)
        some = [part.at(rows) for part in columns]
        for part, values_NJ in zip(some, at_columns, strict=True):
            values_NJ[rows] = part.masked(block.gather(1, part.index_NJ))
        if kept is not None:
            kept_NJ = at_columns[kept][rows].to(block.dtype)
            some[kept].put(block, torch.full_like(kept_NJ, MINUS_INFINITY))
        maximum_N[rows], log_sum_exp_NS[rows] = row_sums(block, scales)
        if kept is not None:
            some[kept].put(block, kept_NJ)
    return maximum_N, log_sum_exp_NS, at_columns, sum_N


def entropy_pass(
    logits_Nv: Tensor, shard: VocabShard
) -> tuple[Tensor, Tensor, Tensor]:
    """Reduce this rank's real columns of every row.

    Returns:
        The largest logit, -inf without a column; the log-sum-exp relative to it and the entropy of
        their softmax, which mean nothing there. All [N].
    """
    num_rows = len(logits_Nv)
    zeros = functools.partial(logits_Nv.new_zeros, dtype=reduction_dtype(logits_Nv))
    maximum_N = zeros(num_rows).fill_(MINUS_INFINITY)
    log_sum_exp_N = zeros(num_rows)
    entropy_N = zeros(num_rows)
    for rows, block in _blocks(logits_Nv, shard, compiled=False):
        maximum_N[rows] = block.amax(dim=-1)
        log_probs = torch.log_softmax(block, dim=-1)
        log_sum_exp_N[rows] = -log_probs.amax(dim=-1)
        log_probs.clamp_(min=torch.finfo(log_probs.dtype).min)  # 0 log 0 = 0
        entropy_N[rows] = -torch.linalg.vecdot(log_probs.exp(), log_probs)
    return maximum_N, log_sum_exp_N, entropy_N


def gradient_pass(
    logits_Nv: Tensor,
    scales: Sequence[float],
    exponentials: Exponentials,
    local_sum_exp_NS: Tensor | None,
    constant_N: Tensor | None,
    kept: tuple[Columns, Tensor] | None,
    added: Sequence[tuple[Columns, Tensor]],
    shard: VocabShard,
    compiled: bool = False,
) -> None:
    """Turn the logits into their gradient, exponentials + constant; padding columns become 0.

    Args:
        local_sum_exp_NS: sums of these exponentials over the columns that are not kept. They save
            half the time of a pass that is not compiled.
        kept: columns and the whole gradient there, instead of the exponentials.
        added: columns, any number of times the same, and what to add to the gradient there, 0 where
            an id is not held.
    """
    fill = _compiled(_fill_in_one_loop) if compiled else _fill_in_one_loop
    softmax_sums_NS = None if compiled else local_sum_exp_NS
    all_index_NJ = torch.cat([columns.index_NJ for columns, _ in added], dim=1)
    all_added_NJ = torch.cat([values_NJ for _, values_NJ in added], dim=1)
    for rows, block in _blocks(logits_Nv, shard, compiled):
        some = Exponentials(*(part[rows] for part in exponentials))
        index_NJ = all_index_NJ[rows]
        added_NJ = all_added_NJ[rows]
        logits_NJ = block.gather(1, index_NJ)
        if kept is not None:
            kept_columns = kept[0].at(rows)
            kept_NK = kept[1][rows]
            kept_columns.put(
                block, torch.full_like(kept_NK, MINUS_INFINITY, dtype=block.dtype)
            )
        if softmax_sums_NS is None:
            fill(block, scales, some)
        else:
            _fill_through_softmax(block, scales, some, softmax_sums_NS[rows])
        if constant_N is not None:
            block += constant_N[rows, None].to(block.dtype)
        if kept is not None:
            kept_columns.put(block, kept_NK.to(block.dtype))
        if block.dtype == added_NJ.dtype:
            row_N1 = torch.arange(len(block), device=block.device)[:, None]
            block.index_put_((row_N1, index_NJ), added_NJ, accumulate=True)
        else:
            # Added in float32: q - 1 must not be rounded to half precision twice.
            values_NJ = _sum_of_exponentials(logits_NJ, scales, some)
            if constant_N is not None:
                values_NJ += constant_N[rows, None]
            if kept is not None:
                values_NJ = _replaced(values_NJ, index_NJ, kept_columns, kept_NK)
            values_NJ += _sums_per_column(index_NJ, added_NJ)
            scatter(block, index_NJ, values_NJ.to(block.dtype))
        if block.data_ptr() != logits_Nv[rows].data_ptr():
            logits_Nv[rows, : shard.num_real] = block
    logits_Nv[:, shard.num_real :] = 0


def _blocks(
    logits_Nv: Tensor, shard: VocabShard, compiled: bool
) -> Iterator[tuple[slice, Tensor]]:
    """Yield row ranges, each with its real columns: the logits where these will do, else a copy."""
    if not shard.num_real:
        return
    max_elements = BLOCK_ELEMENTS[logits_Nv.is_cuda][compiled]
    for rows in row_blocks(len(logits_Nv), shard.num_real, max_elements):
        block = logits_Nv[rows, : shard.num_real]
        if not compiled:
            block = block.to(reduction_dtype(block)).contiguous()
        yield rows, block


def _replaced(
    values_NJ: Tensor, index_NJ: Tensor, kept: Columns, kept_NK: Tensor
) -> Tensor:
    """Replace the values at columns that are also kept."""
    is_kept_NJK = (index_NJ[:, :, None] == kept.index_NJ[:, None]) & kept.held_NJ[
        :, None
    ]
    at_kept_NJ = torch.where(is_kept_NJK, kept_NK[:, None], 0).sum(dim=-1)
    return torch.where(is_kept_NJK.any(dim=-1), at_kept_NJ, values_NJ)


def _sums_per_column(index_NJ: Tensor, values_NJ: Tensor) -> Tensor:
    """Return at each place the sum of the values that have its column."""
    same_NJJ = index_NJ[:, :, None] == index_NJ[:, None]
    return torch.where(same_NJJ, values_NJ[:, None], 0).sum(dim=-1)


def _row_sums(block: Tensor, scales: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return (maximum [N], log-sum-exp relative to it [N, S]); log_softmax reads a row once."""
    block = block.to(reduction_dtype(block))
    maximum_N = block.amax(dim=-1)
    log_sum_exp = []
    for scale in scales:
        scaled = block if scale == 1 else (block - maximum_N[:, None]).mul_(scale)
        log_sum_exp.append(-torch.log_softmax(scaled, dim=-1).amax(dim=-1))
    return maximum_N, torch.stack(log_sum_exp, dim=-1)


def _fill_through_softmax(
    block: Tensor,
    scales: Sequence[float],
    exponentials: Exponentials,
    local_sum_exp_NS: Tensor,
) -> None:
    coefficients_NS = exponentials.coefficients_NS * local_sum_exp_NS
    at_scale = None
    if len(scales) > 1:
        scaled = (block - exponentials.reference_N[:, None]).mul_(scales[1])
        at_scale = torch.softmax(scaled, dim=-1).mul_(coefficients_NS[:, 1:])
    torch.softmax(block, dim=-1, out=block).mul_(coefficients_NS[:, :1])
    if at_scale is not None:
        block += at_scale
    if not local_sum_exp_NS.all():  # a softmax of nothing is nan
        block.masked_fill_(local_sum_exp_NS[:, :1] == 0, 0)


def _fill_in_one_loop(
    block: Tensor, scales: Sequence[float], exponentials: Exponentials
) -> None:
    block.copy_(_sum_of_exponentials(block, scales, exponentials))


def _sum_of_exponentials(
    logits: Tensor, scales: Sequence[float], exponentials: Exponentials
) -> Tensor:
    shifted = (
        logits.to(exponentials.reference_N.dtype) - exponentials.reference_N[:, None]
    )
    values = exponentials.coefficients_NS[:, :1] * shifted.exp()
    if len(scales) > 1:
        values = (
            values + exponentials.coefficients_NS[:, 1:] * (shifted * scales[1]).exp()
        )
    return values


@functools.cache
def compile_passes(
    device: torch.device,
    dtype: torch.dtype,
    num_columns: int,
    num_real: int,
    scales: tuple[float, ...],
) -> bool:
    """Compile both passes for any number of rows, and log the time.

    Every process compiles for itself, without collectives; torch's cache on disk makes it short.

    Returns:
        False if there is nothing to compute; with a warning if there is no compiler or it fails.
    """
    if not num_real:
        return False
    started_s = time.perf_counter()
    # A part of the rows, or the kernels would be those of whole tensors.
    logits_Nv = torch.zeros(2 * COMPILED_ROWS, num_columns, dtype=dtype, device=device)
    block = logits_Nv[:COMPILED_ROWS, :num_real]
    try:
        exponentials = Exponentials(*_compiled(_row_sums)(block, scales))
        _compiled(_fill_in_one_loop)(block, scales, exponentials)
    except Exception as error:  # noqa: BLE001 - torch documents no type
        log.warning(
            "model.knowledge_distillation.compile: torch.compile failed, so the loss takes about "
            "1.5 times as long: %s; install a compiler (g++ for CPUs, triton for GPUs), or set it "
            "to off",
            str(error).strip().partition("\n")[0],
        )
        return False
    log.info(
        "compiled the loss in %.1f s; later processes find it in %s",
        time.perf_counter() - started_s,
        os.environ.get("TORCHINDUCTOR_CACHE_DIR", "torch's cache"),
    )
    return True


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function compiled; as it is for one row, which torch would compile anew."""
    compiled = torch.compile(function, dynamic=True)
    return lambda block, *args: (compiled if len(block) > 1 else function)(
        block, *args
    )
