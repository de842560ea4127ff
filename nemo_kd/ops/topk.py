"""The k largest logits over a vocabulary that is spread over tensor-parallel ranks.

Shape legend: N positions, K kept logits, v this rank's vocabulary columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.distributed import ReduceOp

from nemo_kd.ops.vocab import VocabShard, max_and_sum_exp, reduction_dtype


class TopK(NamedTuple):
    """The largest logits, shifted so that the first is 0, and the log-sum-exp of all logits shifted alike."""

    topk_logits_NK: torch.Tensor
    topk_token_ids_NK: torch.Tensor
    log_sum_exp_logits_N: torch.Tensor


@torch.no_grad()
def vocab_parallel_topk(logits_Nv: torch.Tensor, k: int, shard: VocabShard) -> TopK:
    """The `k` largest logits of every row over the whole real vocabulary, on every rank alike.

    Each rank takes the k largest of its own columns; then tp_size * k candidates a row are gathered, never the
    vocabulary. Equal logits are ordered by token id. Two all-reduces of [N] and one all-gather of [N, k] values and ids.

    Args:
        logits_Nv: this rank's columns, any float dtype; sums run in float32 (float64 for float64).
        k: at most the real vocabulary.

    Raises:
        ValueError: k exceeds the vocabulary.
    """
    if k > shard.vocab_size:
        raise ValueError(f"top_k: {k} exceeds the vocabulary of {shard.vocab_size} tokens")
    maximum_N, sum_exp_N = max_and_sum_exp(logits_Nv, shard)
    log_sum_exp_N = shard.all_reduce(sum_exp_N, ReduceOp.SUM).log()

    values_NK = logits_Nv.new_full((len(logits_Nv), k), float("-inf"), dtype=reduction_dtype(logits_Nv))
    ids_NK = torch.full((len(logits_Nv), k), -1, dtype=torch.int64, device=logits_Nv.device)
    num_local = min(k, shard.num_real)
    if num_local:
        values, columns = logits_Nv[:, : shard.num_real].topk(num_local, dim=-1)
        values_NK[:, :num_local] = values
        ids_NK[:, :num_local] = columns + shard.start
    values_NC, ids_NC = _gather_candidates(values_NK, shard), _gather_candidates(ids_NK, shard)

    # Ids first, then a stable sort by value: ties end in the same order whatever the layout.
    ids_NC, by_id = ids_NC.sort(dim=-1)
    values_NC, by_value = values_NC.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
    ids_NC = ids_NC.gather(-1, by_value)
    return TopK(values_NC[:, :k] - maximum_N[:, None], ids_NC[:, :k].contiguous(), log_sum_exp_N)


def _gather_candidates(tensor_NK: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    if shard.group is None or shard.group.size() == 1:
        return tensor_NK
    parts = [torch.empty_like(tensor_NK) for _ in range(shard.group.size())]
    torch.distributed.all_gather(parts, tensor_NK, group=shard.group)
    return torch.cat(parts, dim=-1)
