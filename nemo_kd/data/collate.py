"""From examples to padded or packed batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch

from nemo_kd.batch import Batch, CachedExample, Example, TeacherTopK

Row = Example | CachedExample | None


def collate(rows: Sequence[Row], pad_id: int, multiple_of: int = 8) -> Batch:
    """A batch of `rows`, padded on the right to a common length, itself a multiple of `multiple_of`.

    None is a filler row: index -1, nothing in the loss. Padding has loss mask 0, token and label `pad_id`, and is a
    position about which the teacher said nothing.

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
    sources, lengths = np.zeros_like(indices), np.zeros_like(indices)
    for row, example in enumerate(examples):
        if example is not None:
            length = example.num_tokens
            indices[row], sources[row], lengths[row] = example.index, example.source, length
            tokens[row, :length], labels[row, :length] = example.tokens_S, example.labels_S
            loss_mask[row, :length] = example.loss_mask_S
    batch = Batch(
        indices_B=torch.from_numpy(indices),
        sources_B=torch.from_numpy(sources),
        lengths_B=torch.from_numpy(lengths),
        tokens_BS=torch.from_numpy(tokens),
        labels_BS=torch.from_numpy(labels),
        loss_mask_BS=torch.from_numpy(loss_mask),
        position_ids_BS=torch.arange(shape[1]).repeat(len(rows), 1),
    )
    if teachers:
        _add_teacher(batch, rows, teachers)
    return batch


def pack(examples: Sequence[Example], pad_id: int, multiple_of: int = 1) -> Batch:
    """A batch of one row [1, T]: the examples end to end, T filled up to a multiple of `multiple_of`.

    Positions start at 0 in every example. The filler, tokens and labels `pad_id`, is one more sequence at the end; it
    has no entry in `indices_B`. Without examples the row is nothing but filler.
    """
    lengths = [example.num_tokens for example in examples]
    filler = -sum(lengths) % multiple_of if lengths else multiple_of
    lengths += [filler] * bool(filler)
    padding, no_loss = np.full(filler, pad_id, dtype=np.int64), np.zeros(filler, dtype=np.float32)
    return Batch(
        indices_B=torch.tensor([example.index for example in examples], dtype=torch.int64),
        sources_B=torch.tensor([example.source for example in examples], dtype=torch.int64),
        lengths_B=torch.tensor([example.num_tokens for example in examples], dtype=torch.int64),
        tokens_BS=_row([*(example.tokens_S for example in examples), padding]),
        labels_BS=_row([*(example.labels_S for example in examples), padding]),
        loss_mask_BS=_row([*(example.loss_mask_S for example in examples), no_loss]),
        position_ids_BS=_row([np.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
    )


def micro_batches(rows: Sequence[Row], micro_batch_size: int, pad_id: int) -> list[Batch]:
    """The rows as consecutive micro-batches, padded one by one."""
    return [collate(rows[start : start + micro_batch_size], pad_id) for start in range(0, len(rows), micro_batch_size)]


def _row(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts))[None]


def _add_teacher(batch: Batch, rows: Sequence[Row], teachers: Sequence[TeacherTopK]) -> None:
    shape = tuple(batch.tokens_BS.shape)
    # A blend of caches has in common what all of them have.
    temperatures = tuple(t for t in teachers[0].temperatures if all(_columns(teacher, t) for teacher in teachers))
    k = max(teacher.topk_logits_SK.shape[1] for teacher in teachers)
    logits = np.full((*shape, k), -np.inf, dtype=np.float32)
    ids = np.full((*shape, k), -1, dtype=np.int64)
    log_sum_exp = np.zeros(shape, dtype=np.float32)
    tail_mass = np.ones((*shape, len(temperatures)), dtype=np.float32)
    labels = np.zeros(shape, dtype=np.float32)
    samples = [teacher.tail_token_ids_SM for teacher in teachers]
    num_samples = {0 if array is None else array.shape[1] for array in samples}
    tail_ids = np.full((*shape, max(num_samples)), -1, dtype=np.int64)
    for row, cached in enumerate(rows):
        if isinstance(cached, CachedExample):
            length, teacher = cached.example.num_tokens, cached.teacher
            row_k = teacher.topk_logits_SK.shape[1]
            logits[row, :length, :row_k] = teacher.topk_logits_SK
            ids[row, :length, :row_k] = teacher.topk_token_ids_SK
            log_sum_exp[row, :length] = teacher.log_sum_exp_logits_S
            columns = [_columns(teacher, temperature)[0] for temperature in temperatures]
            tail_mass[row, :length] = teacher.tail_mass_TS[columns].T
            if teacher.label_logprobs_S is not None:
                labels[row, :length] = teacher.label_logprobs_S
            if teacher.tail_token_ids_SM is not None:
                tail_ids[row, :length, : teacher.tail_token_ids_SM.shape[1]] = teacher.tail_token_ids_SM
    batch.topk_logits_BSK = torch.from_numpy(logits)
    batch.topk_token_ids_BSK = torch.from_numpy(ids)
    batch.log_sum_exp_logits_BS = torch.from_numpy(log_sum_exp)
    batch.tail_mass_BST, batch.temperatures = torch.from_numpy(tail_mass), temperatures
    if all(teacher.label_logprobs_S is not None for teacher in teachers):
        batch.label_logprobs_BS = torch.from_numpy(labels)
    if len(num_samples) == 1 and num_samples != {0}:
        batch.tail_token_ids_BSM = torch.from_numpy(tail_ids)


def _columns(teacher: TeacherTopK, temperature: float) -> list[int]:
    """Where the tail mass at a temperature stands, first of all; one format of caches rounds temperatures to float32."""
    return [i for i, found in enumerate(teacher.temperatures) if math.isclose(found, temperature, rel_tol=1e-4)]
