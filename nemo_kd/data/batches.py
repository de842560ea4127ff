"""Micro-batches: which examples are computed together, and their tensors.

Shape legend: as in `nemo_kd.batch`; A all positions of a batch.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from nemo_kd.batch import (
    Batch,
    CachedExample,
    Example,
    TeacherRows,
    join_rows,
    spread,
)

MAX_PADDING = 0.05

Row = Example | CachedExample


@dataclass
class MicroBatches(Dataset[list[Batch]]):
    """This rank's micro-batches, requested by all positions of a global batch.

    Every data-parallel rank gets the same number of micro-batches, some of them filler: ranks run
    each step of the pipeline together. Loader workers divide the positions and read the rows.

    Attributes:
        rows: `cache.blend.CacheBlend` or `TokenizedRows`.
        micro_batch_size: examples of each micro-batch, where `max_tokens` is None.
        max_tokens: most tokens of a micro-batch, padding included; a longer example is alone.
        packed, multiple_of: as `form_batches`.
        pad_id, every_target, distill_on_prompt: as `collate`.
        context_rank, context_size: batches hold the columns of this context-parallel rank.
    """

    rows: Any
    data_rank: int
    data_size: int
    micro_batch_size: int
    max_tokens: int | None = None
    packed: bool = False
    multiple_of: int = 1
    pad_id: int = 0
    every_target: bool = False
    distill_on_prompt: bool = False
    context_rank: int = 0
    context_size: int = 1

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, positions: list[int]) -> list[Batch]:
        """Return the micro-batches; storage may fetch all rows while the first are decoded."""
        shares = self.share(positions)
        self.rows.will_read([position for share in shares for position in share])
        form = pack if self.packed else collate
        batches = []
        for share in shares:
            rows = [self.rows[position] for position in share]
            whole = form(
                rows or [None],
                self.pad_id,
                self.multiple_of,
                self.every_target,
                self.distill_on_prompt,
            )
            batches.append(whole.context_part(self.context_rank, self.context_size))
        return batches

    def share(self, positions: Sequence[int]) -> list[list[int]]:
        """Return the positions of this rank's micro-batches."""
        if self.max_tokens is None:
            per_rank = -(-len(positions) // self.data_size)
            mine = positions[
                self.data_rank * per_rank : (self.data_rank + 1) * per_rank
            ]
            starts = range(0, per_rank, self.micro_batch_size)
            return [
                list(mine[start : start + self.micro_batch_size]) for start in starts
            ]
        lengths = [self.rows.num_tokens(position) for position in positions]
        batches = form_batches(
            lengths, None, self.max_tokens, self.packed, self.multiple_of
        )
        batches = _whole_rounds(batches, lengths, self.data_size)
        # Ranks get neighbours in size, because the first to finish waits for the others.
        return [
            [positions[place] for place in batch]
            for batch in batches[self.data_rank :: self.data_size]
        ]


def form_batches(
    lengths: Sequence[int],
    max_examples: int | None,
    max_tokens: int | None,
    packed: bool,
    multiple_of: int = 1,
) -> list[list[int]]:
    """Group the positions in `lengths` into batches, each position once, long examples first.

    A batch holds at most `max_examples` examples and `max_tokens` tokens, padding included; a
    longer example is alone. Packed examples lie end to end; first-fit decreasing (Johnson 1974)
    fills the batches. Padded examples are joined with neighbours in length. With `max_tokens`, less
    than `MAX_PADDING` of a padded batch is padding. The result depends on the lengths alone.
    """
    by_length = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    batches: list[list[int]] = []
    sums: list[int] = []  # of every batch's lengths
    for position in by_length:
        for number in range(len(batches)) if packed else range(len(batches))[-1:]:
            batch = batches[number]
            tokens = sums[number] + lengths[position]
            longest = lengths[batch[0]]
            size = len(batch) + 1
            room = (
                tokens if packed else size * -(-longest // multiple_of) * multiple_of
            )
            is_dense = packed or tokens > (1 - MAX_PADDING) * size * longest
            fits = max_tokens is None or (room <= max_tokens and is_dense)
            if fits and (max_examples is None or len(batch) < max_examples):
                batch.append(position)
                sums[number] = tokens
                break
        else:
            batches.append([position])
            sums.append(lengths[position])
    return batches


def _whole_rounds(
    batches: list[list[int]], lengths: Sequence[int], num_ranks: int
) -> list[list[int]]:
    """Halve the largest batches, or add empty ones, up to a multiple of `num_ranks`."""

    def tokens(batch: list[int]) -> int:
        return sum(lengths[place] for place in batch)

    while len(batches) % num_ranks:
        largest = max(
            (batch for batch in batches if len(batch) > 1), key=tokens, default=None
        )
        if largest is None:
            batches.append([])
        else:
            batches.remove(largest)
            batches += [largest[::2], largest[1::2]]
    return sorted(batches, key=tokens, reverse=True)


def collate(
    rows: Sequence[Row | None],
    pad_id: int,
    multiple_of: int = 8,
    every_target: bool = False,
    distill_on_prompt: bool = False,
) -> Batch:
    """Pad examples on the right to a common length, which is a multiple of `multiple_of`.

    Padding has loss mask 0, and `pad_id` as token and label.

    Args:
        rows: all with a teacher, or all without; None is a filler row: index -1, nothing in the
            loss.
        every_target: keep teacher targets outside the loss, too; only custom losses can use them.
        distill_on_prompt: the KD term has all positions of an example, not only those in the loss.

    Raises:
        ValueError: an example lacks targets, and the cache does not select positions.
    """
    longest = max(0 if row is None else example_of(row).num_tokens for row in rows)
    length = -(-max(1, longest) // multiple_of) * multiple_of
    bounds = range(0, len(rows) * length + 1, length)
    shape = (len(rows), length)
    return _filled(rows, bounds, shape, pad_id, every_target, distill_on_prompt)


def pack(
    rows: Sequence[Row | None],
    pad_id: int,
    multiple_of: int = 1,
    every_target: bool = False,
    distill_on_prompt: bool = False,
) -> Batch:
    """Put examples end to end in one row [1, S], filled up to a multiple of `multiple_of`; for the
    rest see `collate`.

    Positions start at 0 in every example. The filler, tokens and labels `pad_id`, is one more
    sequence at the end; it has no entry in `indices_B`. Without examples the row holds nothing but
    filler.
    """
    examples = [row for row in rows if row is not None]
    lengths = [example_of(row).num_tokens for row in examples]
    filler = -sum(lengths) % multiple_of if lengths else multiple_of
    bounds = [0, *itertools.accumulate(lengths + [filler] * bool(filler))]
    shape = (1, bounds[-1])
    batch = _filled(examples, bounds, shape, pad_id, every_target, distill_on_prompt)
    return replace(batch, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


def example_of(row: Row) -> Example:
    return row.example if isinstance(row, CachedExample) else row


def _filled(
    rows: Sequence[Row | None],
    bounds: Sequence[int],
    shape: tuple[int, int],
    pad_id: int,
    every_target: bool,
    distill_on_prompt: bool,
) -> Batch:
    """Put every row at its start among all positions, and padding elsewhere."""
    tokens_A = torch.full((bounds[-1],), pad_id)
    labels_A = tokens_A.clone()
    loss_mask_A = torch.zeros(bounds[-1])
    positions = map(torch.arange, np.diff(bounds).tolist())
    position_ids_A = torch.cat(list(positions))
    indices_B = torch.full((len(rows),), -1)
    sources_B = torch.zeros_like(indices_B)
    lengths_B = torch.zeros_like(indices_B)
    loss_lengths_B = torch.zeros_like(indices_B)
    kd_lengths_B = torch.zeros_like(indices_B)
    in_loss_A = torch.zeros(bounds[-1], dtype=torch.bool)
    targets: list[TeacherRows[np.ndarray]] = []
    for number, (row, start) in enumerate(zip(rows, bounds, strict=False)):
        if row is None:
            continue
        example = example_of(row)
        indices_B[number] = example.index
        sources_B[number] = example.source
        lengths_B[number] = example.num_tokens
        loss_lengths_B[number] = example.num_loss_tokens
        place = slice(start, start + example.num_tokens)
        tokens_A[place] = torch.from_numpy(example.tokens_S)
        labels_A[place] = torch.from_numpy(example.labels_S)
        loss_mask_A[place] = torch.from_numpy(example.loss_mask_S)
        on_prompt = distill_on_prompt and example.num_loss_tokens > 0
        in_loss_A[place] = (loss_mask_A[place] > 0) | on_prompt
        if isinstance(row, CachedExample):
            in_kd = _kd_rows(row, on_prompt)
            kd_lengths_B[number] = len(in_kd)
            kept = row.teacher if every_target else in_kd
            targets.append(replace(kept, positions_P=start + kept.positions_P))
    teacher = _joined(targets) if targets else None
    loss_positions_N = in_loss_A.nonzero()[:, 0]
    in_kd_N = None
    if teacher is not None and len(teacher) < len(loss_positions_N):
        in_kd_N = torch.isin(loss_positions_N, teacher.positions_P)
        teacher = _at_loss_positions(teacher, loss_positions_N)
    return Batch(
        indices_B=indices_B,
        sources_B=sources_B,
        lengths_B=lengths_B,
        loss_lengths_B=loss_lengths_B,
        kd_lengths_B=kd_lengths_B,
        tokens_BS=tokens_A.view(shape),
        labels_BS=labels_A.view(shape),
        loss_mask_BS=loss_mask_A.view(shape),
        position_ids_BS=position_ids_A.view(shape),
        teacher=teacher,
        loss_positions_N=loss_positions_N,
        in_kd_N=in_kd_N,
    )


def _kd_rows(row: CachedExample, distill_on_prompt: bool) -> TeacherRows[np.ndarray]:
    """Return the targets of the KD term.

    Raises:
        ValueError: some are missing, and the cache does not select positions.
    """
    found = row.teacher if distill_on_prompt else row.loss_rows()
    example = row.example
    expected = example.num_tokens if distill_on_prompt else example.num_loss_tokens
    if len(found) < expected and (distill_on_prompt or not row.is_selected):
        kind = "positions" if distill_on_prompt else "positions in the loss"
        raise ValueError(
            f"example {example.index}: only {len(found)} of its {expected} {kind} have teacher "
            "targets"
        )
    return found


def _at_loss_positions(
    teacher: TeacherRows[torch.Tensor], positions_N: torch.Tensor
) -> TeacherRows[torch.Tensor]:
    """Return a row for every position in the loss; those that the cache lacks are no targets."""
    places_P = torch.searchsorted(positions_N, teacher.positions_P)
    names = teacher.arrays().keys() - {"positions_P"}
    rows: Any = {
        name: spread(teacher, name, places_P, len(positions_N)) for name in names
    }
    return replace(teacher, positions_P=positions_N, **rows)


def _joined(targets: Sequence[TeacherRows[np.ndarray]]) -> TeacherRows[torch.Tensor]:
    """Join the targets of examples, which may keep different numbers of logits. Of a blend of
    caches the batch has the fields and temperatures that all of them have."""
    shared = tuple(
        temperature
        for temperature in targets[0].temperatures
        if all(part.column_of(temperature) is not None for part in targets)
    )
    width = max(part.topk_logits_PK.shape[1] for part in targets)
    common = set.intersection(*(set(part.arrays()) for part in targets))
    num_samples = {
        part.tail_token_ids_PM.shape[1]
        for part in targets
        if part.tail_token_ids_PM is not None
    }
    if len(num_samples) > 1:
        common.discard("tail_token_ids_PM")  # each sample stands for another mass
    parts = []
    for part in targets:
        absent: dict[str, Any] = dict.fromkeys(part.arrays().keys() - common)
        missing = ((0, 0), (0, width - part.topk_logits_PK.shape[1]))
        columns = np.array([part.column_of(value) for value in shared])
        uniform = replace(
            part,
            topk_logits_PK=np.pad(
                part.topk_logits_PK, missing, constant_values=-np.inf
            ),
            topk_token_ids_PK=np.pad(
                part.topk_token_ids_PK, missing, constant_values=-1
            ),
            tail_mass_PT=part.tail_mass_PT[:, columns],
            temperatures=shared,
            **absent,
        )
        parts.append(uniform)
    return join_rows(parts).map(torch.from_numpy)


class TokenizedRows(list[Example]):
    """Tokenized records in memory, path after path."""

    def __init__(self, paths: Sequence[str]) -> None:
        super().__init__()
        self.paths = list(paths)

    def num_tokens(self, position: int) -> int:
        """Return the positions of an example."""
        return self[position].num_tokens

    def will_read(self, positions: Sequence[int]) -> None:
        """Do nothing: all examples are in memory."""

    def source_chunks(self) -> list[list[int]]:
        """Return each path as one chunk."""
        sizes = Counter(example.source for example in self)
        return [[sizes[source]] for source in range(len(self.paths))]

    def description(self) -> dict[str, Any]:
        """Return paths and the fingerprint of token ids, labels and loss masks."""
        digest = hashlib.sha256()
        for example in self:
            digest.update(example.tokens_S.astype("<i4").tobytes())
            digest.update(example.labels_S.astype("<i4").tobytes())
            digest.update(example.loss_mask_S.astype("u1").tobytes())
        fingerprint = f"sha256:{digest.hexdigest()}"
        return {"paths": self.paths, "fingerprint": fingerprint, "caches": []}
