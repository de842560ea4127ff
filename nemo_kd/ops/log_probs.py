"""Differentiable log-probabilities of vocabulary-parallel logits, for custom losses.

Shape legend: N positions, J ids, v this rank's vocabulary columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo_kd.ops.student_logits import Slope, TokenIds, read_logits, write_gradient
from nemo_kd.ops.vocab import VocabShard


def log_probs_at(
    logits_Nv: Tensor, ids_NJ: Tensor, shard: VocabShard, scale: float = 1.0
) -> Tensor:
    """Return log softmax(scale * logits) over the whole real vocabulary at some ids: [N, J] in
    nats, the same on every rank.

    Ids may repeat; -1 stands for none and gives a number without meaning. Two all-reduces forward,
    none backward.
    """
    log_probs_NJ: Tensor = _LogProbsAt.apply(logits_Nv, ids_NJ, shard, scale)
    return log_probs_NJ


class _LogProbsAt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_Nv: Tensor, ids_NJ: Tensor, shard: VocabShard, scale: float
    ) -> Tensor:
        ids = TokenIds(torch.full_like(ids_NJ[:, 0], -1), samples_NM=ids_NJ)
        scales = (1.0,) if scale == 1 else (1.0, scale)
        student = read_logits(logits_Nv, ids, scales, shard)
        assert student.samples_NM is not None
        ctx.save_for_backward(logits_Nv)
        ctx.scales = scales
        ctx.student = student
        ctx.shard = shard
        return student.samples_NM * scale - student.log_tail_NS[:, -1:]

    @staticmethod
    def backward(ctx: Any, d_log_probs_NJ: Tensor) -> tuple[Tensor | None, ...]:
        (logits_Nv,) = ctx.saved_tensors
        gradient_Nv = torch.empty_like(logits_Nv)
        scale_index = len(ctx.scales) - 1
        slope = Slope(
            scale_index,
            -d_log_probs_NJ.sum(dim=-1),
            samples_NM=d_log_probs_NJ * ctx.scales[scale_index],
        )
        weight_N = torch.ones_like(ctx.student.label_N)
        write_gradient(
            logits_Nv,
            gradient_Nv,
            ctx.scales,
            ctx.student,
            [(weight_N, slope)],
            ctx.shard,
        )
        return gradient_Nv, None, None, None
