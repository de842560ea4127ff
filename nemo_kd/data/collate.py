"""From examples to padded batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from nemo_kd.batch import Batch, CachedExample, Example

Row = Example | CachedExample | None


def collate(rows: Sequence[Row], pad_id: int, multiple_of: int = 8) -> Batch:
    """A batch of `rows`, padded on the right to a common length, itself a multiple of `multiple_of`.

    None is a filler row: index -1, nothing in the loss. Padding has loss mask 0, token and label `pad_id`, teacher
    logits 0 and ids 0 to K - 1, so that every value is legal wherever it goes.

    Args:
        rows: all with a teacher, or all without; fillers may stand among them.
    """
    examples = [row.example if isinstance(row, CachedExample) else row for row in rows]
    teachers = [row.teacher for row in rows if isinstance(row, CachedExample)]
    if teachers and len(teachers) != sum(row is not None for row in rows):
        raise ValueError("a batch mixes examples with and without teacher logits")
    longest = max((example.num_tokens for example in examples if example is not None), default=1)
    shape = (len(rows), -(-longest // multiple_of) * multiple_of)
    tokens, labels = np.full(shape, pad_id, dtype=np.int64), np.full(shape, pad_id, dtype=np.int64)
    loss_mask = np.zeros(shape, dtype=np.float32)
    indices = np.full(len(rows), -1, dtype=np.int64)
    for row, example in enumerate(examples):
        if example is not None:
            length = example.num_tokens
            indices[row] = example.index
            tokens[row, :length], labels[row, :length] = example.tokens_S, example.labels_S
            loss_mask[row, :length] = example.loss_mask_S
    batch = Batch(
        indices_B=torch.from_numpy(indices),
        tokens_BS=torch.from_numpy(tokens),
        labels_BS=torch.from_numpy(labels),
        loss_mask_BS=torch.from_numpy(loss_mask),
        position_ids_BS=torch.arange(shape[1]).repeat(len(rows), 1),
    )
    if teachers:
        _add_teacher(batch, rows, k=teachers[0].topk_logits_SK.shape[1])
    return batch


def _add_teacher(batch: Batch, rows: Sequence[Row], k: int) -> None:
    shape = tuple(batch.tokens_BS.shape)
    logits = np.zeros((*shape, k), dtype=np.float32)
    ids = np.broadcast_to(np.arange(k, dtype=np.int64), (*shape, k)).copy()
    log_sum_exp = np.zeros(shape, dtype=np.float32)
    for row, cached in enumerate(rows):
        if isinstance(cached, CachedExample):
            length = cached.example.num_tokens
            logits[row, :length] = cached.teacher.topk_logits_SK
            ids[row, :length] = cached.teacher.topk_token_ids_SK
            log_sum_exp[row, :length] = cached.teacher.log_sum_exp_logits_S
    batch.topk_logits_BSK = torch.from_numpy(logits)
    batch.topk_token_ids_BSK = torch.from_numpy(ids)
    batch.log_sum_exp_logits_BS = torch.from_numpy(log_sum_exp)
