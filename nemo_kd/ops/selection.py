"""Scores of positions, and the positions with the largest ones.

Shape legend: N positions in the loss, P positions with teacher targets, B examples, v this rank's
vocabulary columns, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from nemo_kd.batch import TeacherRows
from nemo_kd.ops.fused_linear import BLOCK_ROWS
from nemo_kd.ops.vocab import VocabShard, row_blocks
from nemo_kd.ops.vocab_pass import entropy_pass


def teacher_entropy(teacher: TeacherRows[Tensor]) -> Tensor:
    """Return the entropy at temperature 1 over the kept ids and one bucket for all others: at most
    that over the whole vocabulary."""
    log_probs_PK = teacher.topk_logits_PK - teacher.log_sum_exp_logits_P[:, None]
    kept_P = torch.special.entr(log_probs_PK.exp()).sum(dim=-1)
    return kept_P + torch.special.entr(teacher.tail_mass_PT[:, 0])


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
    blocks = row_blocks(len(hidden_NH), 1, block_rows)
    weight_Hv = weight_vH.t()
    return torch.cat([entropy(hidden_NH[rows] @ weight_Hv, shard) for rows in blocks])


def entropy(logits_Nv: Tensor, shard: VocabShard) -> Tensor:
    """Return the entropy of every row in nats, the same on every rank of the shard's group."""
    own_maximum_N, log_sum_exp_N, own_entropy_N = entropy_pass(logits_Nv, shard)
    maximum_N = shard.all_reduce(own_maximum_N.clone(), ReduceOp.MAX)
    log_sum_N = log_sum_exp_N + own_maximum_N - maximum_N
    # Of probabilities w_r p_i with sum w_r = 1: H = sum_r w_r (H_r - log w_r).
    own_N2 = torch.stack(
        [torch.ones_like(log_sum_N), own_entropy_N - log_sum_N], dim=-1
    )
    own_N2 = own_N2 * log_sum_N.exp()[:, None]
    has_none_N1 = own_maximum_N[:, None] == float("-inf")
    sums_N2 = shard.all_reduce(own_N2.masked_fill(has_none_N1, 0), ReduceOp.SUM)
    return sums_N2[:, 0].log() + sums_N2[:, 1] / sums_N2[:, 0]


def largest(scores_N: Tensor, examples_N: Tensor, counts_B: Tensor) -> Tensor:
    """Return True at the `counts_B[b]` largest scores of every example b; of equal scores the first
    count.

    Args:
        examples_N: example of every score.
    """
    order_N = scores_N.argsort(descending=True, stable=True)
    order_N = order_N[examples_N[order_N].argsort(stable=True)]
    sorted_N = examples_N[order_N]
    places_N = torch.arange(len(order_N), device=order_N.device)
    places_N -= torch.searchsorted(sorted_N, sorted_N)  # each example's first place
    is_largest_N = torch.empty_like(order_N, dtype=torch.bool)
    is_largest_N[order_N] = places_N < counts_B[sorted_N]
    return is_largest_N
