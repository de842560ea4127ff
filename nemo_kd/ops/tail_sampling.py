"""Draw token ids outside a teacher's kept ids, so that head and samples together are unbiased.

With head H, tail mass t = 1 - p(H) and M ids x_1 .. x_M drawn from p restricted to the tail, for
any function f of a token

    sum_{i in H} p_i f(i) + (t / M) sum_m f(x_m)        has the expectation        sum_i p_i f(i):

each x_m adds t / M * E[f(x) | x not in H]. The draws are stratified: x_m comes from the m-th of M
equal slices of the tail's probability. A slice's expectation is the mean of f over the slice and
the mean over all slices is that over the tail, so nothing changes but the variance, which loses
what the slices' means differ by. Where t is below `SMALLEST_SAMPLED_TAIL` = c, the samples are kept
with probability t / c and then stand for c instead of t: the same expectation, and nothing to store
at most positions of a certain teacher.

Shape legend: N positions, M samples, R ranks, v this rank's vocabulary columns, G groups of g
columns.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.distributed import ReduceOp

from nemo_kd.batch import SMALLEST_SAMPLED_TAIL
from nemo_kd.ops.vocab import VocabShard, row_blocks

GROUP_COLUMNS = 64
"""Consecutive columns whose weights are summed before a draw looks among them."""
BLOCK_ELEMENTS = 1 << 20


def tail_uniforms(
    seed: int, example_index: int, num_positions: int, num_samples: int
) -> np.ndarray:
    """Return random numbers in [0, 1) for `sample_tail`, float64 [num_positions, num_samples + 1].

    They depend on the seed (below 2^64), the example and the position only, not on batch or layout.
    """
    generator = np.random.Generator(
        np.random.Philox(key=np.array([seed, example_index], dtype=np.uint64))
    )
    return generator.random((num_positions, num_samples + 1))


@torch.no_grad()
def sample_tail(
    logits_Nv: torch.Tensor,
    maximum_N: torch.Tensor,
    sums_NG: torch.Tensor,
    tail_mass_N: torch.Tensor,
    uniforms_NU: torch.Tensor,
    shard: VocabShard,
) -> torch.Tensor:
    """Draw ids [N, M] outside the kept ones, in ascending order, the same on every rank.

    Inverts the distribution function over the ids in ascending order: first the rank, then the
    group of columns, then the column. So the layout does not matter except for rounding at a border
    of two ids, and only the groups drawn are read from the logits. Rows are -1 where thinning drops
    them or nothing is left to draw. The vocabulary is never gathered: one all-gather of [N, 1], one
    all-reduce of [N, M].

    Args:
        logits_Nv: this rank's real columns, -inf at kept ids.
        maximum_N: the largest logit of the whole vocabulary, kept or not.
        sums_NG: sums of exp(logit - maximum) of every `GROUP_COLUMNS` columns.
        tail_mass_N: probability outside the kept ids; decides on thinning.
        uniforms_NU: `tail_uniforms` of the rows; U = M + 1.
    """
    num_rows = len(logits_Nv)
    num_samples = uniforms_NU.shape[1] - 1
    ends_NG = sums_NG.double().cumsum(dim=-1)
    ends_NR = shard.gather(ends_NG[:, -1:]).cumsum(dim=-1)
    strata_M = torch.arange(num_samples, device=logits_Nv.device, dtype=torch.float64)
    wanted_NM = (
        (strata_M + uniforms_NU[:, :num_samples]) / num_samples * ends_NR[:, -1:]
    )
    owner_NM, wanted_NM = _find(ends_NR, wanted_NM)  # every rank finds the same owner
    ids_NM = torch.zeros(
        num_rows, num_samples, dtype=torch.int64, device=logits_Nv.device
    )
    if shard.num_real:
        for rows in row_blocks(num_rows, num_samples * GROUP_COLUMNS, BLOCK_ELEMENTS):
            group_NM, inside_NM = _find(ends_NG[rows], wanted_NM[rows])
            column_NM = _find_column(
                logits_Nv[rows], maximum_N[rows], group_NM, inside_NM
            )
            ids_NM[rows] = torch.where(
                owner_NM[rows] == shard.rank, column_NM + shard.start, 0
            )
    shard.all_reduce(ids_NM, ReduceOp.SUM)
    thinned_N = uniforms_NU[:, -1] * SMALLEST_SAMPLED_TAIL >= tail_mass_N
    return ids_NM.masked_fill_((thinned_N | (ends_NR[:, -1] == 0))[:, None], -1)


def _find(
    ends: torch.Tensor, wanted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (first part that ends beyond each wanted number, the number within that part)."""
    # The last part that adds anything is the first to reach the end: rounding must not lead past
    # it, nor below a start, where the first of the part would be found even if it is kept.
    last = torch.searchsorted(ends, ends[..., -1:].contiguous())
    found = torch.searchsorted(ends, wanted.contiguous(), right=True).minimum(last)
    starts = torch.nn.functional.pad(ends, (1, 0)).gather(-1, found)
    return found, (wanted - starts).clamp_(min=0)


def _find_column(
    logits_Nv: torch.Tensor,
    maximum_N: torch.Tensor,
    group_NM: torch.Tensor,
    inside_NM: torch.Tensor,
) -> torch.Tensor:
    """Return the columns [N, M] at which sums over a group pass the wanted numbers."""
    last_column = logits_Nv.shape[1] - 1
    columns_NMg = group_NM[..., None] * GROUP_COLUMNS + torch.arange(
        GROUP_COLUMNS, device=logits_Nv.device
    )
    logits_NMg = logits_Nv.gather(
        1, columns_NMg.clamp(max=last_column).flatten(1)
    ).view(columns_NMg.shape)
    weights_NMg = (
        (logits_NMg.double() - maximum_N[:, None, None])
        .exp_()
        .masked_fill_(columns_NMg > last_column, 0)
    )
    place_NM1, _ = _find(weights_NMg.cumsum(dim=-1), inside_NM[..., None])
    return group_NM * GROUP_COLUMNS + place_NM1[..., 0]
