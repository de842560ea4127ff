"""Shards of a vocabulary, and reductions over the ranks that hold the others.

Shape legend: N positions, V real vocabulary, v this rank's columns of it, padding included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup, ReduceOp


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of the vocabulary.

    Embedding rows are padded so that every tensor-parallel rank holds equally many. Ids from
    `vocab_size` on stand for no token; their columns take no part in any result, and a rank may
    hold nothing but padding.

    Attributes:
        start: token id of this rank's first column.
        num_real: how many of this rank's columns are tokens, 0 for a rank that holds only padding.
        vocab_size: real vocabulary over all ranks.
        group: the tensor-parallel ranks; None for a single rank.
    """

    start: int
    num_real: int
    vocab_size: int
    group: ProcessGroup | None = None

    @classmethod
    def of(
        cls, num_columns: int, vocab_size: int, group: ProcessGroup | None = None
    ) -> VocabShard:
        """Return this rank's shard; every rank of `group` has `num_columns` columns."""
        rank = torch.distributed.get_rank(group) if group is not None else 0
        start = rank * num_columns
        return cls(
            start, max(0, min(num_columns, vocab_size - start)), vocab_size, group
        )

    def part(self, columns: slice) -> VocabShard:
        """Return the shard of some of this rank's columns, without the other ranks."""
        num_columns = columns.stop - columns.start
        num_real = max(0, min(num_columns, self.num_real - columns.start))
        return VocabShard(self.start + columns.start, num_real, self.vocab_size)

    @property
    def rank(self) -> int:
        """Place of this rank in the group."""
        return 0 if self.group is None else torch.distributed.get_rank(self.group)

    def local(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (column, True if this rank holds the id) of each id; 0 for one held elsewhere."""
        column = ids - self.start
        held = (column >= 0) & (column < self.num_real)
        return torch.where(held, column, 0), held

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp.RedOpType) -> torch.Tensor:
        """Reduce `tensor` in place over the ranks of the group, and return it."""
        if self.group is not None:
            torch.distributed.all_reduce(tensor, op=op, group=self.group)
        return tensor

    def gather(self, tensor_NC: torch.Tensor) -> torch.Tensor:
        """Join the [N, C] tensors of all ranks of the group side by side, in rank order."""
        if self.group is None:
            return tensor_NC
        parts = [torch.empty_like(tensor_NC) for _ in range(self.group.size())]
        torch.distributed.all_gather(parts, tensor_NC.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)


def reduction_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype of sums over the vocabulary: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def row_blocks(num_rows: int, num_columns: int, max_elements: int) -> list[slice]:
    """Return row ranges that cover `num_rows`: at most `max_elements` elements, or one row.

    There is always a first range, of no rows if there are none.
    """
    rows = max(1, max_elements // max(1, num_columns))
    starts = range(0, max(1, num_rows), rows)
    return [slice(start, min(start + rows, num_rows)) for start in starts]


def scatter(block: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> None:
    """Scatter values into columns in place.

    Half precision is scattered as integers, which avoids torch's float32 copy on a CPU.
    """
    if block.element_size() == 2:
        block = block.view(torch.int16)
        values = values.view(torch.int16)
    block.scatter_(1, index, values)
