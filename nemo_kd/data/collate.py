"""From examples to padded or packed batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from nemo_kd.batch import Batch, CachedExample, Example, TeacherRows

Row = Example | CachedExample | None
Places = Sequence[tuple[int, slice]]
"""Where each example lies in a batch: its row, and its columns there."""


def collate(rows: Sequence[Row], pad_id: int, multiple_of: int = 8) -> Batch:
    """A batch of `rows`, padded on the right to a common length, itself a multiple of `multiple_of`.

    None is a filler row: index -1, nothing in the loss. Padding has loss mask 0, token and label `pad_id`, and is a
    position about which the teacher said nothing.

    Args:
        rows: all with a teacher, or all without; fillers may stand among them.
    """
    lengths = [0 if row is None else _example(row).num_tokens for row in rows]
    length = -(-max(1, *lengths) // multiple_of) * multiple_of
    places = [(row, slice(0, end)) for row, end in enumerate(lengths)]
    return _filled(rows, places, torch.arange(length).repeat(len(rows), 1), pad_id)


def pack(rows: Sequence[Row], pad_id: int, multiple_of: int = 1) -> Batch:
    """A batch of one row [1, T]: the examples end to end, T filled up to a multiple of `multiple_of`.

    Positions start at 0 in every example. The filler, tokens and labels `pad_id`, is one more sequence at the end; it
    has no entry in `indices_B`. Without examples the row is nothing but filler.
    """
    lengths = [_example(row).num_tokens for row in rows if row is not None]
    filler = -sum(lengths) % multiple_of if lengths else multiple_of
    bounds = [0, *itertools.accumulate(lengths + [filler] * bool(filler))]
    places = [(0, slice(start, end)) for start, end in itertools.pairwise(bounds)]
    position_ids = torch.cat(
        [torch.arange(end - start) for start, end in itertools.pairwise(bounds)]
    )
    examples = [row for row in rows if row is not None]
    return _filled(
        examples, places, position_ids[None], pad_id, torch.tensor(bounds, dtype=torch.int32)
    )


def micro_batches(
    rows: Sequence[Sequence[Row]],
    pad_id: int,
    packed: bool,
    multiple_of: int,
    columns: Callable[[int], torch.Tensor] | None = None,
) -> list[Batch]:
    """A batch for each list of rows; for an empty one a batch of filler, which takes part in what ranks do together.

    Args:
        columns: gives the positions to keep of batches of some length: a context-parallel rank's.
    """
    together = [
        pack(part, pad_id, multiple_of) if packed else collate(part or [None], pad_id, multiple_of)
        for part in rows
    ]
    return (
        together
        if columns is None
        else [batch.columns(columns(batch.tokens_BS.shape[1])) for batch in together]
    )


def _example(row: Example | CachedExample) -> Example:
    return row.example if isinstance(row, CachedExample) else row


def _filled(
    rows: Sequence[Row],
    places: Places,
    position_ids_BS: torch.Tensor,
    pad_id: int,
    cu_seqlens: torch.Tensor | None = None,
) -> Batch:
    """A batch with every row at its place and padding elsewhere."""
    teachers = [row.teacher for row in rows if isinstance(row, CachedExample)]
    if teachers and len(teachers) != sum(row is not None for row in rows):
        raise ValueError("a batch mixes examples with and without teacher logits")
    shape = tuple(position_ids_BS.shape)
    tokens, labels = np.full(shape, pad_id, dtype=np.int64), np.full(shape, pad_id, dtype=np.int64)
    loss_mask = np.zeros(shape, dtype=np.float32)
    indices = np.full(len(rows), -1, dtype=np.int64)
    sources, lengths = np.zeros_like(indices), np.zeros_like(indices)
    for number, (row, place) in enumerate(zip(rows, places, strict=False)):
        if row is not None:
            example = _example(row)
            indices[number], sources[number], lengths[number] = (
                example.index,
                example.source,
                example.num_tokens,
            )
            tokens[place], labels[place], loss_mask[place] = (
                example.tokens_S,
                example.labels_S,
                example.loss_mask_S,
            )
    batch = Batch(
        indices_B=torch.from_numpy(indices),
        sources_B=torch.from_numpy(sources),
        lengths_B=torch.from_numpy(lengths),
        tokens_BS=torch.from_numpy(tokens),
        labels_BS=torch.from_numpy(labels),
        loss_mask_BS=torch.from_numpy(loss_mask),
        position_ids_BS=position_ids_BS,
        cu_seqlens=cu_seqlens,
    )
    if teachers:
        _add_teacher(batch, rows, places, teachers)
    return batch


def _add_teacher(
    batch: Batch, rows: Sequence[Row], places: Places, teachers: Sequence[TeacherRows[np.ndarray]]
) -> None:
    shape = tuple(batch.tokens_BS.shape)
    # A blend of caches has in common what all of them have.
    temperatures = tuple(
        t for t in teachers[0].temperatures if all(_columns(teacher, t) for teacher in teachers)
    )
    k = max(teacher.topk_logits_PK.shape[1] for teacher in teachers)
    logits = np.full((*shape, k), -np.inf, dtype=np.float32)
    ids = np.full((*shape, k), -1, dtype=np.int64)
    log_sum_exp = np.zeros(shape, dtype=np.float32)
    tail_mass = np.ones((*shape, len(temperatures)), dtype=np.float32)
    labels = np.zeros(shape, dtype=np.float32)
    samples = [teacher.tail_token_ids_PM for teacher in teachers]
    num_samples = {0 if array is None else array.shape[1] for array in samples}
    tail_ids = np.full((*shape, max(num_samples)), -1, dtype=np.int64)
    for cached, (row, columns_S) in zip(rows, places, strict=False):
        if isinstance(cached, CachedExample):
            teacher = cached.teacher
            place = row, columns_S.start + teacher.positions_P
            row_k = teacher.topk_logits_PK.shape[1]
            logits[(*place, slice(row_k))] = teacher.topk_logits_PK
            ids[(*place, slice(row_k))] = teacher.topk_token_ids_PK
            log_sum_exp[place] = teacher.log_sum_exp_logits_P
            columns = [_columns(teacher, temperature)[0] for temperature in temperatures]
            tail_mass[place] = teacher.tail_mass_PT[:, columns]
            if teacher.label_logprobs_P is not None:
                labels[place] = teacher.label_logprobs_P
            if teacher.tail_token_ids_PM is not None:
                m = teacher.tail_token_ids_PM.shape[1]
                tail_ids[(*place, slice(m))] = teacher.tail_token_ids_PM
    batch.topk_logits_BSK = torch.from_numpy(logits)
    batch.topk_token_ids_BSK = torch.from_numpy(ids)
    batch.log_sum_exp_logits_BS = torch.from_numpy(log_sum_exp)
    batch.tail_mass_BST, batch.temperatures = torch.from_numpy(tail_mass), temperatures
    if all(teacher.label_logprobs_P is not None for teacher in teachers):
        batch.label_logprobs_BS = torch.from_numpy(labels)
    if len(num_samples) == 1 and num_samples != {0}:
        batch.tail_token_ids_BSM = torch.from_numpy(tail_ids)


def _columns(teacher: TeacherRows[np.ndarray], temperature: float) -> list[int]:
    """Where the tail mass at a temperature stands, first of all; one format of caches rounds temperatures to float32."""
    return [
        i
        for i, found in enumerate(teacher.temperatures)
        if math.isclose(found, temperature, rel_tol=1e-4)
    ]
