"""Custom loss: alpha * CE + (1 - alpha) * T^2 * KL(teacher || student) at temperature T, on
the teacher's top-k.

Copy it, change it, and name it by its import path; the folder where the command runs counts:

    train_gpt_knowledge_distillation ... \\
        model.knowledge_distillation.kd_loss=custom \\
        model.knowledge_distillation.custom_loss=examples.custom_loss.hinton \\
        "model.knowledge_distillation.custom_args={alpha: 0.3, temperature: 2.0}" \\
        model.knowledge_distillation.kd_loss_weight=1.0 \\
        model.knowledge_distillation.sft_loss_weight=0.0

Shape legend: B examples, S positions, N = B * S, K kept teacher logits, v this rank's vocabulary
columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nemo_kd.batch import Batch
from nemo_kd.ops.student_logits import log_probs_at
from nemo_kd.ops.vocab import VocabShard


def hinton(
    logits_BSv: torch.Tensor,
    batch: Batch,
    shard: VocabShard,
    token_sum: Callable[[torch.Tensor], torch.Tensor],
    alpha: float,
    temperature: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hinton et al. 2015, section 2, with both models renormalised over the kept ids.

    Args:
        logits_BSv: this rank's columns of the student's logits, part of autograd's graph. All ranks
            of `shard.group` run this function on the same batch; `log_probs_at` is how they see
            each other's columns.
        batch: tokens, labels, masks and teacher targets (`nemo_kd.batch.Batch`).
        token_sum: sums a [B, S] tensor over the positions that count in the loss.
        alpha, temperature: `model.knowledge_distillation.custom_args`.

    Returns:
        The loss, and what to log as train/<name> and validation/<name>. All are sums by
        `token_sum`, the only one that is right with every `reduction`; the trainer divides them.
    """
    logits_Nv = logits_BSv.flatten(0, 1)
    batch_size, length = batch.labels_BS.shape
    ce_N = -log_probs_at(logits_Nv, batch.labels_BS.reshape(-1, 1), shard)[:, 0]
    ce = token_sum(ce_N.view(batch_size, length))

    ids_NK = batch.topk_token_ids_BSK.flatten(0, 1)
    unused_NK = ids_NK < 0
    # Prompts and padding have no teacher targets.
    nothing_N1 = unused_NK.all(dim=-1, keepdim=True)
    student_NK = log_probs_at(logits_Nv, ids_NK, shard, scale=1 / temperature)
    teacher_NK = (
        batch.topk_logits_BSK.flatten(0, 1).masked_fill(nothing_N1, 0) / temperature
    )
    log_q_NK = student_NK.masked_fill(
        unused_NK & ~nothing_N1, float("-inf")
    ).log_softmax(dim=-1)
    log_p_NK = teacher_NK.log_softmax(dim=-1)
    terms_NK = log_p_NK.exp() * (log_p_NK - log_q_NK).masked_fill(unused_NK, 0)
    kl = temperature**2 * token_sum(terms_NK.sum(dim=-1).view(batch_size, length))
    return alpha * ce + (1 - alpha) * kl, {"ce_loss": ce, "kl_loss": kl}
