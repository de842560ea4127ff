"""Cross-entropy and top-k divergences of vocabulary-parallel logits, in one pass over the vocabulary.

Teacher p, student q, both renormalised over the teacher's K kept ids:

    forward_kl = sum_k p_k (log p_k - log q_k)      d/dz_k = a (q_k - p_k)
    reverse_kl = sum_k q_k (log q_k - log p_k)      d/dz_k = a q_k (log q_k - log p_k - reverse_kl)

with q = softmax_K(a z), p = softmax_K(b t); a = `student_scale`, b = `teacher_scale` (1 / temperature, no T^2 factor).
The gradient is 0 outside K. Cross-entropy runs over the whole real vocabulary and is never scaled.

Shape legend: N positions, K kept teacher logits, v this rank's vocabulary columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.distributed import ReduceOp

from nemo_kd.ops.vocab import VocabShard, max_and_sum_exp, reduction_dtype, row_blocks

Objective = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(log p [N, K], log q [N, K]) -> (divergence [N], its derivative by log q's logits [N, K])."""


class TokenLosses(NamedTuple):
    """Per-position losses in nats, before the mask. `kd_N` is None without a teacher."""

    ce_N: torch.Tensor
    kd_N: torch.Tensor | None


def forward_kl(log_p_NK: torch.Tensor, log_q_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(teacher || student): covers the teacher's modes."""
    p_NK = log_p_NK.exp()
    # Where p underflows its log is very negative but finite (or -inf): p log p -> 0.
    value_N = torch.where(p_NK > 0, p_NK * (log_p_NK - log_q_NK), 0).sum(dim=-1)
    return value_N, log_q_NK.exp() - p_NK


def reverse_kl(log_p_NK: torch.Tensor, log_q_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(student || teacher): seeks a mode of the teacher."""
    q_NK = log_q_NK.exp()
    log_ratio_NK = torch.where(q_NK > 0, log_q_NK - log_p_NK, 0)
    value_N = (q_NK * log_ratio_NK).sum(dim=-1)
    return value_N, q_NK * (log_ratio_NK - value_N[:, None])


OBJECTIVES: dict[str, Objective] = {"fwd_kl": forward_kl, "bwd_kl": reverse_kl}


class DistillationLoss:
    """Per-position cross-entropy and divergence of one objective.

    Args:
        objective: a key of `OBJECTIVES`.
        student_scale, teacher_scale: multiply the K gathered logits of the divergence.
    """

    def __init__(self, objective: str = "fwd_kl", student_scale: float = 1.0, teacher_scale: float = 1.0) -> None:
        self.objective = OBJECTIVES[objective]
        self.student_scale = student_scale
        self.teacher_scale = teacher_scale

    def __call__(
        self,
        logits_Nv: torch.Tensor,
        labels_N: torch.Tensor,
        shard: VocabShard,
        topk_logits_NK: torch.Tensor | None = None,
        topk_token_ids_NK: torch.Tensor | None = None,
    ) -> TokenLosses:
        """The losses of every position, the same on every rank of the shard's group.

        Two all-reduces forward ([N] and [N, K + 2]), none backward. Sums run in float32 (float64 for float64 logits);
        the gradient has the logits' dtype and is 0 on padding columns.

        Args:
            logits_Nv: this rank's columns of the student's logits.
            labels_N: ids below the real vocabulary.
            topk_logits_NK, topk_token_ids_NK: the teacher's; ids distinct within a row and below the real vocabulary,
                unused entries last, with id -1 and logit -inf.
        """
        if topk_logits_NK is None or topk_token_ids_NK is None:
            return TokenLosses(_Losses.apply(logits_Nv, labels_N, None, None, shard, self)[0], None)
        return TokenLosses(*_Losses.apply(logits_Nv, labels_N, topk_logits_NK, topk_token_ids_NK, shard, self))


def _without_unused(
    topk_token_ids_NK: torch.Tensor, teacher_NK: torch.Tensor, student_NK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both models' kept logits with -inf where an entry is unused; a row without any used entry becomes certain of its
    first, so that its divergence is 0."""
    unused_NK = topk_token_ids_NK < 0
    teacher_NK, student_NK = (logits_NK.masked_fill(unused_NK, float("-inf")) for logits_NK in (teacher_NK, student_NK))
    for logits_NK in (teacher_NK, student_NK):
        logits_NK[:, 0].masked_fill_(unused_NK[:, 0], 0)
    return teacher_NK, student_NK


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_Nv: torch.Tensor,
        labels_N: torch.Tensor,
        topk_logits_NK: torch.Tensor | None,
        topk_token_ids_NK: torch.Tensor | None,
        shard: VocabShard,
        loss: DistillationLoss,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        dtype = reduction_dtype(logits_Nv)
        ids_NJ = labels_N[:, None]
        if topk_token_ids_NK is not None:
            ids_NJ = torch.cat([ids_NJ, topk_token_ids_NK], dim=1)
        columns_NJ, held_NJ = shard.local(ids_NJ)
        maximum_N, sum_exp_N = max_and_sum_exp(logits_Nv, shard)
        gathered_NJ = torch.where(held_NJ, logits_Nv.gather(1, columns_NJ).to(dtype), 0)
        packed = shard.all_reduce(torch.cat([sum_exp_N[:, None], gathered_NJ], dim=1), ReduceOp.SUM)
        log_sum_exp_N, label_logit_N, student_NK = maximum_N + packed[:, 0].log(), packed[:, 1], packed[:, 2:]

        ce_N, kd_N, d_kd_NK = log_sum_exp_N - label_logit_N, None, None
        if topk_logits_NK is not None and topk_token_ids_NK is not None:
            topk_logits_NK, student_NK = _without_unused(topk_token_ids_NK, topk_logits_NK, student_NK)
            log_p_NK = (topk_logits_NK.to(dtype) * loss.teacher_scale).log_softmax(dim=-1)
            log_q_NK = (student_NK * loss.student_scale).log_softmax(dim=-1)
            kd_N, d_kd_NK = loss.objective(log_p_NK, log_q_NK)
            d_kd_NK = d_kd_NK * loss.student_scale
        ctx.save_for_backward(logits_Nv, columns_NJ, held_NJ, log_sum_exp_N, d_kd_NK)
        ctx.shard = shard
        return ce_N, kd_N

    @staticmethod
    def backward(ctx: Any, d_ce_N: torch.Tensor, d_kd_N: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        logits_Nv, columns_NJ, held_NJ, log_sum_exp_N, d_kd_NK = ctx.saved_tensors
        num_real: int = ctx.shard.num_real
        gradient_Nv = torch.zeros_like(logits_Nv)
        at_ids_NJ = -d_ce_N[:, None]
        if d_kd_NK is not None:
            assert d_kd_N is not None
            at_ids_NJ = torch.cat([at_ids_NJ, d_kd_N[:, None] * d_kd_NK], dim=1)
        at_ids_NJ = torch.where(held_NJ, at_ids_NJ, 0)
        for rows in row_blocks(len(logits_Nv), num_real) if num_real else ():
            block = (logits_Nv[rows, :num_real].to(log_sum_exp_N.dtype) - log_sum_exp_N[rows, None]).exp_()
            block.mul_(d_ce_N[rows, None]).scatter_add_(1, columns_NJ[rows], at_ids_NJ[rows])
            gradient_Nv[rows, :num_real] = block
        return gradient_Nv, None, None, None, None, None
