"""Passes over the rows of vocabulary-parallel logits: sums of exponentials, and a gradient in their
place.

They work on blocks of rows in float32 (float64 for float64 logits) that stay in the processor's
cache: the logits are read once, and read and written once. On CPU a block goes through torch's
softmax kernels, which take half the time of exp() on its own; compiled, each pass is one loop. Kept
ids are set to -inf while a block is summed and put back after.

Shape legend: N positions, v this rank's vocabulary columns, J ids of a row, K kept ids, S scales of
the logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_kd.ops.vocab import VocabShard, reduction_dtype, row_blocks

BLOCK_ELEMENTS = ((1 << 20, 1 << 22), (1 << 24, 1 << 28))
"""Elements of a block on a CPU and on a GPU, each plain and compiled."""
MINUS_INFINITY = float("-inf")


class Columns(NamedTuple):
    """Places of ids in this rank's columns.

    Attributes:
        index_NJ: valid columns; an id that another rank holds, or -1, points where the row's first
            held id does, or at 0.
        held_NJ: whether this rank holds the id; None if it holds all of them.
        first_N1: place of the row's first held id.
    """

    index_NJ: Tensor
    held_NJ: Tensor | None
    first_N1: Tensor | None

    @classmethod
    def of(cls, ids_NJ: Tensor, shard: VocabShard) -> Columns:
        index_NJ, held_NJ = shard.local(ids_NJ.long())
        if index_NJ.device.type == "cpu" and held_NJ.all():
            return cls(index_NJ, None, None)
        first_N1 = (
            held_NJ.byte().argmax(dim=-1, keepdim=True)
            if held_NJ.shape[1]
            else held_NJ.long()
        )
        return cls(
            torch.where(held_NJ, index_NJ, index_NJ.gather(1, first_N1)),
            held_NJ,
            first_N1,
        )

    def masked(self, values_NJ: Tensor) -> Tensor:
        """Return the values of the ids that this rank holds, 0 for others."""
        return (
            values_NJ if self.held_NJ is None else torch.where(self.held_NJ, values_NJ, 0)
        )

    def held_index(self, rows: slice) -> Tensor:
        """Return the columns in some of the rows, -1 where the id is not held."""
        return (
            self.index_NJ[rows]
            if self.held_NJ is None
            else self.index_NJ[rows].masked_fill(~self.held_NJ[rows], -1)
        )

    def put(self, block: Tensor, rows: slice, values_NJ: Tensor) -> None:
        """Write the values of held ids into a block of some rows; ids are distinct within a row."""
        if self.held_NJ is not None and self.first_N1 is not None:
            # Others write what the first held id writes, or what is there.
            held_NJ = self.held_NJ[rows]
            values_NJ = torch.where(
                held_NJ, values_NJ, values_NJ.gather(1, self.first_N1[rows])
            )
            values_NJ = torch.where(
                held_NJ.any(dim=-1, keepdim=True), values_NJ, block[:, :1]
            )
        _scatter(block, self.index_NJ[rows], values_NJ)


class Sums(NamedTuple):
    """Sums over this rank's real columns without the kept ones.

    Attributes:
        maximum_N: the largest logit, -inf where there is none.
        log_sum_exp_NS: of scale * (logits - maximum), for every scale; means nothing where there is
            none.
        at_columns: for each of the columns asked for the logits there, 0 where the id is not held.
        sum_N: of all logits, with the kept ones; None if not asked for.
    """

    maximum_N: Tensor
    log_sum_exp_NS: Tensor
    at_columns: list[Tensor]
    sum_N: Tensor | None


class Exponentials(NamedTuple):
    """sum_s coefficient_s exp(scale_s (logit - reference)) + constant.

    Attributes:
        coefficients_NS: all finite.
        local_sum_exp_NS: sums of these exponentials over this rank's columns that are not kept.
        constant_N: None for 0.
    """

    reference_N: Tensor
    coefficients_NS: Tensor
    local_sum_exp_NS: Tensor
    constant_N: Tensor | None


def sum_pass(
    logits_Nv: Tensor,
    columns: Sequence[Columns],
    kept: int | None,
    scales: Sequence[float],
    shard: VocabShard,
    with_sum: bool = False,
    compiled: bool = False,
) -> Sums:
    """Return maxima and sums of exponentials of every row without `columns[kept]`."""
    num_rows = len(logits_Nv)
    dtype = reduction_dtype(logits_Nv)
    maximum_N = logits_Nv.new_full((num_rows,), MINUS_INFINITY, dtype=dtype)
    log_sum_exp_NS = logits_Nv.new_zeros((num_rows, len(scales)), dtype=dtype)
    at_columns = [
        logits_Nv.new_zeros(part.index_NJ.shape, dtype=dtype) for part in columns
    ]
    sum_N = logits_Nv.new_zeros(num_rows, dtype=dtype) if with_sum else None
    row_sums = _compiled(_row_sums_in_one_loop) if compiled else _row_sums
    for rows, block, scratch in _blocks(logits_Nv.data, shard, compiled, num_scratch=1):
        if sum_N is not None:
            sum_N[rows] = block.sum(dim=-1, dtype=dtype)
        for part, values_NJ in zip(columns, at_columns, strict=True):
            values_NJ[rows] = block.gather(1, part.index_NJ[rows])
        if kept is not None:
            nothing = torch.full_like(
                at_columns[kept][rows], MINUS_INFINITY, dtype=block.dtype
            )
            columns[kept].put(block, rows, nothing)
        maximum_N[rows], log_sum_exp_NS[rows] = row_sums(block, scales, scratch)
        if kept is not None:
            _scatter(
                block,
                columns[kept].index_NJ[rows],
                at_columns[kept][rows].to(block.dtype),
            )
    at_columns = [
        part.masked(values_NJ)
        for part, values_NJ in zip(columns, at_columns, strict=True)
    ]
    return Sums(maximum_N, log_sum_exp_NS, at_columns, sum_N)


def gradient_pass(
    logits_Nv: Tensor,
    scales: Sequence[float],
    exponentials: Exponentials,
    kept: tuple[Columns, Tensor] | None,
    added: Sequence[tuple[Columns, Tensor]],
    shard: VocabShard,
    compiled: bool = False,
) -> None:
    """Turn the logits into their gradient; padding columns become 0.

    Args:
        kept: columns and the whole gradient there, instead of the exponentials.
        added: columns, any number of times the same, and what to add to the gradient there, 0 where
            an id is not held.
    """
    fill = _compiled(_fill_in_one_loop) if compiled else _fill
    softmax_of_nothing = not compiled and bool((exponentials.local_sum_exp_NS == 0).any())
    for rows, block, scratch in _blocks(
        logits_Nv, shard, compiled, num_scratch=len(scales) - 1
    ):
        some = Exponentials._make(
            None if part is None else part[rows] for part in exponentials
        )
        index_NJ = torch.cat([columns.index_NJ[rows] for columns, _ in added], dim=1)
        added_NJ = torch.cat([values_NJ[rows] for _, values_NJ in added], dim=1)
        logits_NJ = None if block.dtype == added_NJ.dtype else block.gather(1, index_NJ)
        if kept is not None and not compiled:
            kept[0].put(block, rows, torch.full_like(kept[1][rows], MINUS_INFINITY))
        fill(block, scales, some, scratch)
        if softmax_of_nothing:  # nan
            block.masked_fill_(some.local_sum_exp_NS[:, :1] == 0, 0)
        if some.constant_N is not None:
            block += some.constant_N[:, None].to(block.dtype)
        if kept is not None:
            kept[0].put(block, rows, kept[1][rows].to(block.dtype))
        if logits_NJ is None:
            row_N1 = torch.arange(len(block), device=block.device)[:, None]
            block.index_put_((row_N1, index_NJ), added_NJ, accumulate=True)
        else:
            values_NJ = _sum_of_exponentials(logits_NJ, scales, some)
            if some.constant_N is not None:
                values_NJ += some.constant_N[:, None]
            if kept is not None:
                values_NJ = _replaced(
                    values_NJ, index_NJ, kept[0].held_index(rows), kept[1][rows]
                )
            # Added in float32: q - 1 must not be rounded to half precision twice.
            same_NJJ = index_NJ[:, :, None] == index_NJ[:, None]
            values_NJ += torch.where(same_NJJ, added_NJ[:, None], 0).sum(dim=-1)
            _scatter(block, index_NJ, values_NJ.to(block.dtype))
        if block.data_ptr() != logits_Nv[rows].data_ptr():
            logits_Nv[rows, : shard.num_real] = block
    logits_Nv[:, shard.num_real :] = 0


def _blocks(
    logits_Nv: Tensor, shard: VocabShard, compiled: bool, num_scratch: int
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Row ranges, each with its real columns and, unless compiled, as many floats of scratch.

    The columns are the logits themselves where these will do, else a copy in a buffer that the next
    block will use.
    """
    if not shard.num_real or not len(logits_Nv):
        return
    blocks = row_blocks(
        len(logits_Nv), shard.num_real, BLOCK_ELEMENTS[logits_Nv.is_cuda][compiled]
    )
    dtype = reduction_dtype(logits_Nv)
    real_Nv = logits_Nv[:, : shard.num_real]
    copies = not compiled and not (logits_Nv.dtype == dtype and real_Nv.is_contiguous())
    shape = (blocks[0].stop, shard.num_real)
    buffer = logits_Nv.new_empty(shape, dtype=dtype) if copies else None
    scratch = (
        logits_Nv.new_empty(shape, dtype=dtype) if num_scratch and not compiled else None
    )
    for rows in blocks:
        num_rows = rows.stop - rows.start
        block = (
            real_Nv[rows] if buffer is None else buffer[:num_rows].copy_(real_Nv[rows])
        )
        yield rows, block, None if scratch is None else scratch[:num_rows]


def _replaced(
    values_NJ: Tensor, index_NJ: Tensor, kept_index_NK: Tensor, kept_NK: Tensor
) -> Tensor:
    """Replace the values at columns that are also kept."""
    is_kept_NJK = index_NJ[:, :, None] == kept_index_NK[:, None]
    at_kept_NJ = torch.where(is_kept_NJK, kept_NK[:, None], 0).sum(dim=-1)
    return torch.where(is_kept_NJK.any(dim=-1), at_kept_NJ, values_NJ)


def _scatter(block: Tensor, index_NJ: Tensor, values_NJ: Tensor) -> None:
    """Scatter values; half precision as integers, which avoids torch's float32 copy on a CPU."""
    if block.element_size() == 2:
        block = block.view(torch.int16)
        values_NJ = values_NJ.view(torch.int16)
    block.scatter_(1, index_NJ, values_NJ)


def _row_sums(
    block: Tensor, scales: Sequence[float], scratch: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return (maximum [N], log-sum-exp relative to it [N, S]); log_softmax reads a row once."""
    assert scratch is not None
    maximum_N = block.amax(dim=-1)
    log_sum_exp = []
    for scale in scales:
        scaled = (
            block
            if scale == 1
            else torch.sub(block, maximum_N[:, None], out=scratch).mul_(scale)
        )
        torch.log_softmax(scaled, dim=-1, out=scratch)
        log_sum_exp.append(scratch.amax(dim=-1).neg_())
    return maximum_N, torch.stack(log_sum_exp, dim=-1)


def _row_sums_in_one_loop(
    block: Tensor, scales: Sequence[float], scratch: None
) -> tuple[Tensor, Tensor]:
    """`_row_sums` for the compiler."""
    logits = block.to(reduction_dtype(block))
    maximum = logits.amax(dim=-1)
    shifted = logits - maximum[:, None]
    return maximum, torch.stack(
        [(shifted * scale).exp().sum(dim=-1).log() for scale in scales], dim=-1
    )


def _fill(
    block: Tensor,
    scales: Sequence[float],
    exponentials: Exponentials,
    scratch: Tensor | None,
) -> None:
    coefficients_NS = exponentials.coefficients_NS * exponentials.local_sum_exp_NS
    if scratch is not None:
        torch.sub(block, exponentials.reference_N[:, None], out=scratch).mul_(scales[1])
        torch.softmax(scratch, dim=-1, out=scratch).mul_(coefficients_NS[:, 1:])
    torch.softmax(block, dim=-1, out=block).mul_(coefficients_NS[:, :1])
    if scratch is not None:
        block += scratch


def _fill_in_one_loop(
    block: Tensor, scales: Sequence[float], exponentials: Exponentials, scratch: None
) -> None:
    """`_fill` for the compiler."""
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
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)
