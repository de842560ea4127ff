"""Scores of positions, and the positions with the largest ones.

Shape legend: N positions in the loss, P positions with teacher targets, B examples, v this rank's
vocabulary columns, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_kd.batch import TeacherRows
from nemo_kd.ops.fused_linear import BLOCK_ROWS
from nemo_kd.ops.student_logits import entropy
from nemo_kd.ops.vocab import VocabShard, row_blocks


def teacher_entropy(teacher: TeacherRows[Tensor]) -> Tensor:
    """Return the entropy at temperature 1 over the kept ids and one bucket for all others: at most
    that over the whole vocabulary."""
    log_probs_PK = teacher.topk_logits_PK - teacher.log_sum_exp_logits_P[:, None]
    probs_PK = log_probs_PK.exp()
    kept_P = torch.special.entr(probs_PK).sum(dim=-1)
    tail_P = torch.special.entr(teacher.tail_mass_PT[:, 0])
    return kept_P + tail_P


def most_uncertain(teacher: TeacherRows[Tensor], count: int) -> Tensor:
    """Return True at the `count` rows of one example with the largest entropy."""
    scores_P = teacher_entropy(teacher)
    examples_P = torch.zeros_like(scores_P, dtype=torch.int64)
    return largest(scores_P, examples_P, torch.tensor([count]))


@torch.no_grad()
def student_entropy(
    hidden_NH: Tensor,
    weight_vH: Tensor,
    shard: VocabShard,
    block_rows: int = BLOCK_ROWS,
) -> Tensor:
    """Return the entropy of softmax(hidden @ weight.T) over the whole real vocabulary.

    The logits exist for a block of positions at a time. Two all-reduces per block.
    """
    weight_Hv = weight_vH.t()
    parts = []
    for rows in row_blocks(len(hidden_NH), 1, block_rows):
        logits_Nv = hidden_NH[rows] @ weight_Hv
        parts.append(entropy(logits_Nv, shard))
    return torch.cat(parts)


def largest(scores_N: Tensor, examples_N: Tensor, counts_B: Tensor) -> Tensor:
    """Return True at the `counts_B[b]` largest scores of every example b; of equal scores the first
    count.

    Args:
        examples_N: example of every score.
    """
    by_score_N = scores_N.argsort(descending=True, stable=True)
    by_example_N = examples_N[by_score_N].argsort(stable=True)
    order_N = by_score_N[by_example_N]
    sorted_N = examples_N[order_N]
    first_N = torch.searchsorted(sorted_N, sorted_N)
    place_N = torch.arange(len(order_N), device=order_N.device)
    is_largest_N = torch.empty_like(order_N, dtype=torch.bool)
    is_largest_N[order_N] = place_N - first_N < counts_B[sorted_N]
    return is_largest_N
