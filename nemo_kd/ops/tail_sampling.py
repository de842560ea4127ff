"""Draws token ids from what a teacher's kept ids leave out, so that head and samples together are unbiased.

With head H, tail mass t = 1 - p(H) and M ids x_1 .. x_M drawn from p restricted to the tail, for any function f of a token

    sum_{i in H} p_i f(i) + (t / M) sum_m f(x_m)        has the expectation        sum_i p_i f(i):

each x_m adds t / M * E[f(x) | x not in H]. The draws are stratified: x_m comes from the m-th of M equal slices of the
tail's probability. A slice's expectation is the mean of f over the slice and the mean over all slices is that over the
tail, so nothing changes but the variance, which loses what the slices' means differ by. Where t is below
`SMALLEST_SAMPLED_TAIL` = c, the samples are kept with probability t / c and then stand for c instead of t: the same
expectation, and nothing to store at most positions of a certain teacher.

Shape legend: N positions, K kept ids, M samples, v this rank's vocabulary columns.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.distributed import ReduceOp

from nemo_kd.batch import SMALLEST_SAMPLED_TAIL
from nemo_kd.ops.vocab import VocabShard, max_and_sum_exp, row_blocks


def tail_uniforms(seed: int, example_index: int, num_positions: int, num_samples: int) -> np.ndarray:
    """Random numbers from [0, 1) for `sample_tail`, float64 [num_positions, num_samples + 1]; the seed is below 2^64.

    A function of the seed, the example and the position: neither a rerun nor another batch or layout changes them.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, example_index], dtype=np.uint64)))
    return generator.random((num_positions, num_samples + 1))


@torch.no_grad()
def sample_tail(
    logits_Nv: torch.Tensor, kept_ids_NK: torch.Tensor, uniforms_NU: torch.Tensor, shard: VocabShard
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [N, M] in ascending order, tail mass [N] in float64), the same on every rank.

    Draws by inverse distribution function over the ids in ascending order, so the layout does not matter but for
    rounding at a border of two ids. Rows are -1 where thinning drops them or nothing is left to draw. The vocabulary is
    never gathered: one all-reduce of [N] each for maximum, sum and tail, one all-gather of [N, 1], one all-reduce of
    [N, M]. Sums run in float64.

    Args:
        kept_ids_NK: ids to leave out, -1 where unused.
        uniforms_NU: `tail_uniforms` of the rows; U = M + 1.
    """
    num_rows, num_samples = len(logits_Nv), uniforms_NU.shape[1] - 1
    maximum_N, sum_exp_N = max_and_sum_exp(logits_Nv, shard)
    total_N = shard.all_reduce(sum_exp_N.double(), ReduceOp.SUM)
    tail_N = torch.zeros_like(total_N)
    for rows in _blocks(num_rows, shard):
        tail_N[rows] = _tail_weights(logits_Nv, kept_ids_NK, maximum_N, rows, shard).sum(dim=-1)
    # Every rank finds the same owner of each draw; rounding at the end of the tail asks its last owner.
    ends_NR = shard.gather(tail_N[:, None]).cumsum(dim=-1)
    all_tail_N = ends_NR[:, -1]
    strata_M = torch.arange(num_samples, device=logits_Nv.device, dtype=torch.float64)
    wanted_NM = (strata_M + uniforms_NU[:, :num_samples]) / num_samples * all_tail_N[:, None]
    last_owner_N = torch.searchsorted(ends_NR, ends_NR[:, -1:].contiguous())
    owner_NM = torch.searchsorted(ends_NR, wanted_NM, right=True).minimum(last_owner_N)
    rank = torch.distributed.get_rank(shard.group) if shard.group is not None else 0
    held_NM = (owner_NM == rank) & (all_tail_N > 0)[:, None]
    # Rounding may put a draw right below its owner's part, where it would find the first column even if that is kept.
    wanted_NM = (wanted_NM - (ends_NR[:, rank : rank + 1] - tail_N[:, None])).clamp_(min=0)
    ids_NM = torch.zeros(num_rows, num_samples, dtype=torch.int64, device=logits_Nv.device)
    for rows in _blocks(num_rows, shard):
        running = _tail_weights(logits_Nv, kept_ids_NK, maximum_N, rows, shard).cumsum(dim=-1)
        # The last column that adds anything is the first to reach the end.
        last = torch.searchsorted(running, running[:, -1:].contiguous())
        columns = torch.searchsorted(running, wanted_NM[rows].contiguous(), right=True)
        ids_NM[rows] = torch.where(held_NM[rows], columns.minimum(last) + shard.start, 0)
    shard.all_reduce(ids_NM, ReduceOp.SUM)
    tail_mass_N = all_tail_N / total_N
    thinned_N = uniforms_NU[:, -1] * SMALLEST_SAMPLED_TAIL >= tail_mass_N
    return ids_NM.masked_fill_((thinned_N | (all_tail_N == 0))[:, None], -1), tail_mass_N


def _blocks(num_rows: int, shard: VocabShard) -> list[slice]:
    return row_blocks(num_rows, shard.num_real) if shard.num_real else []


def _tail_weights(
    logits_Nv: torch.Tensor, kept_ids_NK: torch.Tensor, maximum_N: torch.Tensor, rows: slice, shard: VocabShard
) -> torch.Tensor:
    """exp(logit - maximum) of a block of rows in float64, 0 at kept ids."""
    shifted = logits_Nv[rows, : shard.num_real].to(maximum_N.dtype) - maximum_N[rows, None]
    weights = shifted.exp_().double()
    columns_NK, held_NK = shard.local(kept_ids_NK[rows])
    # An id held elsewhere points at column 0: it must multiply by 1 there.
    return weights.scatter_reduce_(1, columns_NK, (~held_NK).double(), "prod")
