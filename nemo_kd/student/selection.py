"""Positions of a micro-batch that the KD term trains on.

Shape legend: B examples, S positions, s this context-parallel rank's positions, N positions in the
loss, H hidden size, v this rank's vocabulary columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from nemo_kd.batch import Batch, TeacherRows, context_positions
from nemo_kd.config.selection import Selection
from nemo_kd.mcore.groups import ProcessGroups
from nemo_kd.ops.selection import largest, student_entropy, teacher_entropy
from nemo_kd.ops.vocab import VocabShard


@dataclass(frozen=True)
class Selector:
    """Selects positions example by example, so that micro-batches and layouts do not matter."""

    selection: Selection
    groups: ProcessGroups

    def counts(self, batch: Batch) -> Tensor:
        """Return the number of selected tokens of each example."""
        lengths = batch.kd_lengths_B.tolist()
        counts = [self.selection.count(length) for length in lengths]
        return torch.tensor(counts, dtype=torch.int64)

    def select(
        self,
        hidden_NH: Tensor,
        weight_vH: Tensor,
        batch: Batch,
        teacher: TeacherRows[Tensor] | None,
        shard: VocabShard,
    ) -> Tensor:
        """Return True at the selected ones of `batch.loss_positions_N`; at most two all-reduces per
        block of positions, and one over context-parallel ranks."""
        scores_N = hidden_NH.new_zeros(len(hidden_NH), dtype=torch.float32)
        if self.selection.needs_student:
            scores_N = scores_N + student_entropy(hidden_NH, weight_vH, shard)
        if self.selection.needs_teacher and teacher is not None:
            sign = -1 if self.selection.needs_student else 1
            scores_N = scores_N + sign * teacher_entropy(teacher)
        if batch.in_kd_N is not None:
            scores_N = scores_N.masked_fill(~batch.in_kd_N, float("-inf"))
        counts_B = self.counts(batch).to(scores_N.device)
        positions_N = batch.loss_positions_N
        if self.groups.context_size == 1:
            return largest(scores_N, batch.examples_of(positions_N), counts_B)
        return self._of_context(scores_N, positions_N, batch.tokens_BS.shape, counts_B)

    def _of_context(
        self,
        scores_N: Tensor,
        positions_N: Tensor,
        shape: torch.Size,
        counts_B: Tensor,
    ) -> Tensor:
        """Rank the scores of whole examples, whose positions are divided over the ranks."""
        num_rows, num_own = shape
        size = self.groups.context_size
        columns_s = context_positions(num_own * size, self.groups.context_rank, size)
        rows_N = positions_N // num_own
        columns_N = columns_s.to(positions_N.device)[positions_N % num_own]
        scores_BS = scores_N.new_full((num_rows, num_own * size), float("-inf"))
        scores_BS[rows_N, columns_N] = scores_N
        torch.distributed.all_reduce(scores_BS, ReduceOp.MAX, self.groups.context)
        rows_A = torch.arange(num_rows, device=scores_N.device)
        rows_A = rows_A.repeat_interleave(num_own * size)
        is_largest_A = largest(scores_BS.flatten(), rows_A, counts_B)
        return is_largest_A.view_as(scores_BS)[rows_N, columns_N]
