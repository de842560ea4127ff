"""Padded or packed batches of examples."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from nemo_kd.batch import Batch, CachedExample, Example, TeacherRows
from nemo_kd.config.loss import temperature_index

Row = Example | CachedExample | None


def collate(
    rows: Sequence[Row], pad_id: int, multiple_of: int = 8, every_target: bool = False
) -> Batch:
    """Pad examples on the right to a common length, which is a multiple of `multiple_of`.

    Padding has loss mask 0, and `pad_id` as token and label.

    Args:
        rows: all with a teacher, or all without; None is a filler row: index -1, nothing in the
            loss.
        every_target: keep teacher targets outside the loss, too; only custom losses can use them.
    """
    lengths = [0 if row is None else _example(row).num_tokens for row in rows]
    length = -(-max(1, *lengths) // multiple_of) * multiple_of
    starts = range(0, len(rows) * length, length)
    position_ids_BS = torch.arange(length).repeat(len(rows), 1)
    return _filled(rows, starts, position_ids_BS, pad_id, every_target)


def pack(
    rows: Sequence[Row], pad_id: int, multiple_of: int = 1, every_target: bool = False
) -> Batch:
    """Put examples end to end in one row [1, S], filled up to a multiple of `multiple_of`; for the
    rest see `collate`.

    Positions start at 0 in every example. The filler, tokens and labels `pad_id`, is one more
    sequence at the end; it has no entry in `indices_B`. Without examples the row holds nothing but
    filler.
    """
    examples = [row for row in rows if row is not None]
    lengths = [_example(row).num_tokens for row in examples]
    filler = -sum(lengths) % multiple_of if lengths else multiple_of
    bounds = [0, *itertools.accumulate(lengths + [filler] * bool(filler))]
    position_ids_S = torch.cat([torch.arange(size) for size in np.diff(bounds).tolist()])
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    return _filled(
        examples, bounds, position_ids_S[None], pad_id, every_target, cu_seqlens
    )


def micro_batches(
    rows: Sequence[Sequence[Row]],
    pad_id: int,
    packed: bool,
    multiple_of: int,
    context_rank: int = 0,
    context_size: int = 1,
    every_target: bool = False,
) -> list[Batch]:
    """Make a batch of each list of rows; an empty list becomes filler, because ranks step together.

    A context-parallel rank keeps its columns.
    """
    together = [
        pack(part, pad_id, multiple_of, every_target)
        if packed
        else collate(part or [None], pad_id, multiple_of, every_target)
        for part in rows
    ]
    return [batch.context_part(context_rank, context_size) for batch in together]


def _example(row: Example | CachedExample) -> Example:
    return row.example if isinstance(row, CachedExample) else row


def _filled(
    rows: Sequence[Row],
    starts: Sequence[int],
    position_ids_BS: torch.Tensor,
    pad_id: int,
    every_target: bool,
    cu_seqlens: torch.Tensor | None = None,
) -> Batch:
    """Put every row at its start among all positions, and padding elsewhere."""
    num_positions = position_ids_BS.numel()
    tokens_A = np.full(num_positions, pad_id, dtype=np.int64)
    labels_A = tokens_A.copy()
    loss_mask_A = np.zeros(num_positions, dtype=np.float32)
    indices_B = np.full(len(rows), -1, dtype=np.int64)
    sources_B = np.zeros_like(indices_B)
    lengths_B = np.zeros_like(indices_B)
    targets: list[TeacherRows[np.ndarray]] = []
    positions: list[np.ndarray] = []
    for number, (row, start) in enumerate(zip(rows, starts, strict=False)):
        if row is None:
            continue
        example = _example(row)
        indices_B[number] = example.index
        sources_B[number] = example.source
        lengths_B[number] = example.num_tokens
        place = slice(start, start + example.num_tokens)
        tokens_A[place] = example.tokens_S
        labels_A[place] = example.labels_S
        loss_mask_A[place] = example.loss_mask_S
        if isinstance(row, CachedExample):
            in_loss = row.loss_rows()
            if len(in_loss) < example.num_loss_tokens:
                raise ValueError(
                    f"example {example.index}: only {len(in_loss)} of its "
                    f"{example.num_loss_tokens} positions in the loss have teacher targets"
                )
            targets.append(row.teacher if every_target else in_loss)
            positions.append(start + targets[-1].positions_P)
    if targets and len(targets) != sum(row is not None for row in rows):
        raise ValueError("a batch mixes examples with and without teacher logits")

    def batch_of(values_A: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values_A).view(position_ids_BS.shape)

    return Batch(
        indices_B=torch.from_numpy(indices_B),
        sources_B=torch.from_numpy(sources_B),
        lengths_B=torch.from_numpy(lengths_B),
        tokens_BS=batch_of(tokens_A),
        labels_BS=batch_of(labels_A),
        loss_mask_BS=batch_of(loss_mask_A),
        position_ids_BS=position_ids_BS,
        teacher=_joined(targets, positions) if targets else None,
        cu_seqlens=cu_seqlens,
    )


def _joined(
    targets: Sequence[TeacherRows[np.ndarray]], positions: Sequence[np.ndarray]
) -> TeacherRows[torch.Tensor]:
    """Join the targets of examples, which may keep different numbers of logits. Of a blend of
    caches the batch has the fields and temperatures that all of them have."""

    def joined(parts: Sequence[np.ndarray], dtype: type) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts, dtype=dtype, casting="same_kind"))

    def wide(parts: Sequence[np.ndarray], filler: float, dtype: type) -> torch.Tensor:
        width = max(part.shape[1] for part in parts)
        values_PK = np.full((sum(map(len, parts)), width), filler, dtype=dtype)
        end = 0
        for part in parts:
            values_PK[end : end + len(part), : part.shape[1]] = part
            end += len(part)
        return torch.from_numpy(values_PK)

    def tails(part: TeacherRows[np.ndarray]) -> np.ndarray:
        columns = [
            temperature_index(part.temperatures, temperature) for temperature in shared
        ]
        return part.tail_mass_PT[:, np.array(columns)]

    shared = tuple(
        temperature
        for temperature in targets[0].temperatures
        if all(
            temperature_index(part.temperatures, temperature) is not None
            for part in targets
        )
    )
    labels = [
        part.label_logprobs_P for part in targets if part.label_logprobs_P is not None
    ]
    samples = [
        part.tail_token_ids_PM for part in targets if part.tail_token_ids_PM is not None
    ]
    are_sampled = (
        len(samples) == len(targets) and len({part.shape[1] for part in samples}) == 1
    )
    return TeacherRows(
        positions_P=joined(positions, np.int64),
        topk_logits_PK=wide(
            [part.topk_logits_PK for part in targets], -np.inf, np.float32
        ),
        topk_token_ids_PK=wide(
            [part.topk_token_ids_PK for part in targets], -1, np.int32
        ),
        log_sum_exp_logits_P=joined(
            [part.log_sum_exp_logits_P for part in targets], np.float32
        ),
        tail_mass_PT=joined([tails(part) for part in targets], np.float32),
        temperatures=shared,
        label_logprobs_P=joined(labels, np.float32)
        if len(labels) == len(targets)
        else None,
        tail_token_ids_PM=joined(samples, np.int32) if are_sampled else None,
    )
