"""What a teacher's logits say about each position, over a vocabulary that is spread over tensor-parallel ranks.

Shape legend: N positions, K kept logits, T temperatures, v this rank's vocabulary columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.distributed import ReduceOp

from nemo_kd.ops.vocab import VocabShard, reduction_dtype, row_blocks, row_maximum


class TopK(NamedTuple):
    """The largest logits, shifted so that the first is 0, and what the whole vocabulary's logits shifted alike give.

    `log_sum_exp_logits_TN[t]` is that of the shifted logits divided by temperature t; `label_logprobs_N` is None without
    labels.
    """

    topk_logits_NK: torch.Tensor
    topk_token_ids_NK: torch.Tensor
    log_sum_exp_logits_TN: torch.Tensor
    label_logprobs_N: torch.Tensor | None


@torch.no_grad()
def vocab_parallel_topk(
    logits_Nv: torch.Tensor,
    k: int,
    shard: VocabShard,
    labels_N: torch.Tensor | None = None,
    temperatures: Sequence[float] = (1.0,),
) -> TopK:
    """The `k` largest logits of every row over the whole real vocabulary, on every rank alike.

    Each rank takes the k largest of its own columns; then tp_size * k candidates a row are gathered, never the
    vocabulary. Equal logits are ordered by token id. Two all-reduces of [N] and [T + 1, N] and one all-gather of [N, k]
    values and ids.

    Args:
        logits_Nv: this rank's columns, any float dtype; sums run in float32 (float64 for float64).
        k: at most the real vocabulary.
        temperatures: the first is 1.

    Raises:
        ValueError: k exceeds the vocabulary.
    """
    if k > shard.vocab_size:
        raise ValueError(f"top_k: {k} exceeds the vocabulary of {shard.vocab_size} tokens")
    maximum_N = row_maximum(logits_Nv, shard)
    sums = _sums(logits_Nv, maximum_N, shard, labels_N, temperatures)
    log_sum_exp_TN = sums[: len(temperatures)].log()
    label_logprobs_N = None if labels_N is None else sums[-1] - maximum_N - log_sum_exp_TN[0]

    values_NK = logits_Nv.new_full((len(logits_Nv), k), float("-inf"), dtype=reduction_dtype(logits_Nv))
    ids_NK = torch.full((len(logits_Nv), k), -1, dtype=torch.int64, device=logits_Nv.device)
    num_local = min(k, shard.num_real)
    if num_local:
        values, columns = logits_Nv[:, : shard.num_real].topk(num_local, dim=-1)
        values_NK[:, :num_local] = values
        ids_NK[:, :num_local] = columns + shard.start
    values_NC, ids_NC = shard.gather(values_NK), shard.gather(ids_NK)

    # Ids first, then a stable sort by value: ties end in the same order whatever the layout.
    ids_NC, by_id = ids_NC.sort(dim=-1)
    values_NC, by_value = values_NC.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
    ids_NC = ids_NC.gather(-1, by_value)
    return TopK(values_NC[:, :k] - maximum_N[:, None], ids_NC[:, :k].contiguous(), log_sum_exp_TN, label_logprobs_N)


def _sums(
    logits_Nv: torch.Tensor,
    maximum_N: torch.Tensor,
    shard: VocabShard,
    labels_N: torch.Tensor | None,
    temperatures: Sequence[float],
) -> torch.Tensor:
    """[T + 1, N] over all ranks: sums of exp((logit - maximum) / temperature), and the label's logit."""
    sums = maximum_N.new_zeros(len(temperatures) + 1, len(maximum_N))
    for rows in row_blocks(len(logits_Nv), shard.num_real) if shard.num_real else ():
        shifted = logits_Nv[rows, : shard.num_real].to(maximum_N.dtype) - maximum_N[rows, None]
        for number, temperature in enumerate(temperatures):
            sums[number, rows] = (shifted / temperature).exp_().sum(dim=-1)
    if labels_N is not None:
        columns_N, held_N = shard.local(labels_N)
        label_logits_N = logits_Nv.gather(1, columns_N[:, None])[:, 0].to(sums.dtype)
        sums[-1] = torch.where(held_N, label_logits_N, 0)
    return shard.all_reduce(sums, ReduceOp.SUM)
