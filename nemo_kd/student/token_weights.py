"""Weights of tokens in a term of the loss, which is sum(weight * loss) / sum(weight) of a global batch.

Weights depend on `reduction`: 1 (token), 1 / tokens of the example (sample), or 1 / tokens of the
micro-batch (microbatch).

Shape legend: B examples, N positions in the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_kd.batch import Batch, to_device


def token_weights(batch: Batch, counts_B: Tensor, reduction: str) -> Tensor:
    """Return the weight of a token at each of `batch.loss_positions_N`, float64.

    Args:
        counts_B: tokens of every example that the term has, over all context-parallel ranks.
    """
    positions_N = batch.loss_positions_N
    ones_N = torch.ones_like(positions_N, dtype=torch.float64)
    if reduction == "token":
        return ones_N
    if reduction == "microbatch":
        return ones_N / max(int(counts_B.sum()), 1)
    counts = to_device(counts_B.clamp(min=1), positions_N.device)
    return ones_N / counts[batch.examples_of(positions_N)]


def weight_sum(counts_B: Tensor, reduction: str) -> int:
    """Return the sum of a micro-batch's weights: its tokens, examples with tokens, or 1 if it has
    any."""
    if reduction == "sample":
        return int((counts_B > 0).sum())
    num_tokens = int(counts_B.sum())
    return min(num_tokens, 1) if reduction == "microbatch" else num_tokens
