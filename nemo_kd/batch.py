"""Containers of examples, teacher targets and batches. Read this file first.

Shape legend: B examples, S positions, N positions in the loss, P positions with teacher targets, K
kept teacher logits, T temperatures, M tail samples. Labels are shifted by one: position s of
labels, loss mask and teacher targets belongs to the logits that `tokens[:s + 1]` produce.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch


@dataclass(frozen=True)
class Example:
    """One tokenized example, unpadded and shifted.

    Attributes:
        index: position of the record in its dataset file (0-based, blank lines not counted).
        tokens_S: int64, the model's input ids.
        labels_S: int64, the id each position has to predict.
        loss_mask_S: float32, 1.0 where the label counts in the loss, 0.0 elsewhere.
        source: which of the configured paths it comes from.
        left_out: parts of the record that are not in the tokens, counted by reason.
    """

    index: int
    tokens_S: np.ndarray
    labels_S: np.ndarray
    loss_mask_S: np.ndarray
    source: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def num_tokens(self) -> int:
        """Number of positions, prompt included."""
        return len(self.tokens_S)

    @property
    def num_loss_tokens(self) -> int:
        """Number of positions whose label counts in the loss."""
        return int(np.count_nonzero(self.loss_mask_S))


SMALLEST_SAMPLED_TAIL = 2.0**-11
"""Below this tail mass t, tail samples are kept with probability t / SMALLEST_SAMPLED_TAIL and
stand for this mass: unbiased, and most positions of a certain teacher cost nothing."""


ArrayT = TypeVar("ArrayT", np.ndarray, torch.Tensor)


@dataclass(frozen=True)
class TeacherRows(Generic[ArrayT]):
    """Teacher targets: the largest logits of each of P positions, and the probability outside them.

    Numpy arrays for one example, tensors for a batch. Prompts and padding mostly have no targets
    and no row here. Logits are shifted: the largest of a position is 0, and the log-sum-exp is that
    of the shifted logits over the whole real vocabulary, so `topk_logits - log_sum_exp_logits` are
    log-probabilities in nats. A position that keeps fewer than K logits has logit -inf and id -1 in
    its last entries; a row without any entry is no target.

    Attributes:
        positions_P: int64, ascending: positions of the example, in a batch b * S + s.
        topk_logits_PK: float32, all <= 0, descending.
        topk_token_ids_PK: integer, distinct within a position.
        log_sum_exp_logits_P: float32, >= 0.
        tail_mass_PT: float32, probability outside the kept ids at each of `temperatures`: the tail
            of softmax(logits / T).
        temperatures: the first is 1.
        label_logprobs_P: float32, log-probability of the label in nats at temperature 1; None if
            not stored.
        tail_token_ids_PM: integer, M ids drawn from the teacher's distribution outside the kept
            ids, -1 where none were kept; None without tail samples. Each stands for
            `max(tail_mass_PT[:, 0], SMALLEST_SAMPLED_TAIL) / M`.
    """

    positions_P: ArrayT
    topk_logits_PK: ArrayT
    topk_token_ids_PK: ArrayT
    log_sum_exp_logits_P: ArrayT
    tail_mass_PT: ArrayT
    temperatures: tuple[float, ...] = (1.0,)
    label_logprobs_P: ArrayT | None = None
    tail_token_ids_PM: ArrayT | None = None

    def __len__(self) -> int:
        return len(self.positions_P)

    def column_of(self, temperature: float) -> int | None:
        """Return the place of a temperature, if present; one cache format rounds to float32."""
        for place, known in enumerate(self.temperatures):
            if math.isclose(known, temperature, rel_tol=1e-4):
                return place
        return None

    def at(self, places: Any) -> TeacherRows[ArrayT]:
        """Select rows by a slice, a mask or row numbers."""
        return self.map(lambda values: values[places])

    def arrays(self) -> dict[str, ArrayT]:
        """Return all arrays that are there, by the names of their fields."""
        return {
            name: value
            for name, value in vars(self).items()
            if hasattr(value, "dtype")
        }

    def map(self, change: Callable[[ArrayT], Any]) -> TeacherRows[Any]:
        """Apply `change` to every array."""
        changed: Any = {name: change(array) for name, array in self.arrays().items()}
        return replace(self, **changed)


def join_rows(parts: Sequence[TeacherRows[ArrayT]]) -> TeacherRows[ArrayT]:
    """Put rows that have the same fields one after the other."""
    is_torch = isinstance(parts[0].positions_P, torch.Tensor)
    concatenate: Any = torch.cat if is_torch else np.concatenate
    joined = {
        name: concatenate([getattr(part, name) for part in parts])
        for name in parts[0].arrays()
    }
    return replace(parts[0], **joined)


@dataclass(frozen=True)
class CachedExample:
    """An example with teacher targets, at least of all its positions in the loss.

    Attributes:
        is_selected: on purpose the cache holds targets of some of these positions only.
    """

    example: Example
    teacher: TeacherRows[np.ndarray]
    is_selected: bool = False

    def loss_rows(self) -> TeacherRows[np.ndarray]:
        """Return the targets of the positions whose label counts in the loss."""
        counts_P = self.example.loss_mask_S[self.teacher.positions_P] > 0
        return self.teacher if counts_P.all() else self.teacher.at(counts_P)


ON_CPU = ("lengths_B", "loss_lengths_B", "kd_lengths_B", "cu_seqlens")
"""Fields of a batch that stay on the CPU."""

NO_TARGET = {
    "topk_logits_PK": -math.inf,
    "topk_token_ids_PK": -1,
    "log_sum_exp_logits_P": 0,
    "tail_mass_PT": 1,
    "label_logprobs_P": 0,
    "tail_token_ids_PM": -1,
}
"""Values of a row that is no target."""


def spread(
    teacher: TeacherRows[torch.Tensor], name: str, places_P: torch.Tensor, size: int
) -> torch.Tensor:
    """Put a field's rows at their places among `size`; the others are no targets."""
    values_P = getattr(teacher, name)
    values_N = values_P.new_full((size, *values_P.shape[1:]), NO_TARGET[name])
    values_N[places_P] = values_P
    return values_N


def _everywhere(name: str) -> functools.cached_property[torch.Tensor | None]:
    """Define a field of the teacher at every position of a batch."""

    def values(batch: Batch) -> torch.Tensor | None:
        teacher = batch.teacher
        if teacher is None or getattr(teacher, name) is None:
            return None
        shape = batch.tokens_BS.shape
        values_A = spread(teacher, name, teacher.positions_P, shape.numel())
        if not values_A.is_floating_point():
            values_A = values_A.long()
        return values_A.unflatten(0, shape)

    return functools.cached_property(values)


@dataclass
class Batch:
    """Examples as tensors: one micro-batch, or one data-parallel rank's part of a global batch.

    One example a row, padded on the right, so causal attention needs no mask; or packed: a single
    row of examples end to end, each with its own positions and attention. Padded positions and
    filler rows have loss mask 0.

    A custom loss also finds the teacher's fields at every position: `topk_logits_BSK` and the other
    properties whose names end in BS, BSK, BSM and BST. They are built on first use and hold an
    unused entry where there is no target.

    Attributes:
        indices_B: int64, dataset index of each row, or of each packed example; -1 marks a filler
            row.
        sources_B: int64, `Example.source` of the same; 0 for filler.
        lengths_B: int64, `Example.num_tokens` of the same, 0 for filler; always on the CPU.
        loss_lengths_B: int64, `Example.num_loss_tokens` of the same, over all context-parallel ranks;
            always on the CPU.
        kd_lengths_B: int64, positions of the same that the KD term has; otherwise alike.
        tokens_BS, labels_BS, position_ids_BS: int64.
        loss_mask_BS: float32.
        teacher: rows of the positions in `loss_positions_N`, in this order; with `every_target`
            of `collate` of all positions that have any. None without a cache.
        in_kd_N: bool, positions in `loss_positions_N` that the KD term has; None: all of them.
        cu_seqlens: int32, where packed sequences start and the last one ends, always on the CPU.
            One entry more than examples, or two more: positions that fill the row up are a sequence
            at its end, without an index. None: one example a row.
        loss_positions_N: int64, b * S + s of every position in the loss, ascending; with
            `distill_on_prompt` of `collate` every position of an example. Found on the CPU
            when the batch is made: on a GPU this would wait for the device.
    """

    indices_B: torch.Tensor
    sources_B: torch.Tensor
    lengths_B: torch.Tensor
    tokens_BS: torch.Tensor
    labels_BS: torch.Tensor
    loss_mask_BS: torch.Tensor
    position_ids_BS: torch.Tensor
    teacher: TeacherRows[torch.Tensor] | None = None
    cu_seqlens: torch.Tensor | None = None
    loss_positions_N: torch.Tensor = field(default=None)  # type: ignore[assignment]
    loss_lengths_B: torch.Tensor = field(default=None)  # type: ignore[assignment]
    kd_lengths_B: torch.Tensor = field(default=None)  # type: ignore[assignment]
    in_kd_N: torch.Tensor | None = None

    topk_logits_BSK = _everywhere("topk_logits_PK")
    topk_token_ids_BSK = _everywhere("topk_token_ids_PK")
    log_sum_exp_logits_BS = _everywhere("log_sum_exp_logits_P")
    tail_mass_BST = _everywhere("tail_mass_PT")
    label_logprobs_BS = _everywhere("label_logprobs_P")
    tail_token_ids_BSM = _everywhere("tail_token_ids_PM")

    def __post_init__(self) -> None:
        if self.loss_positions_N is None:
            self.loss_positions_N = self.loss_mask_BS.flatten().nonzero()[:, 0]
        if self.loss_lengths_B is None:
            examples_N = self.examples_of(self.loss_positions_N).cpu()
            size = len(self.indices_B)
            self.loss_lengths_B = torch.bincount(examples_N, minlength=size)
        if self.kd_lengths_B is None:
            self.kd_lengths_B = self.loss_lengths_B

    def examples_of(self, positions_N: torch.Tensor) -> torch.Tensor:
        """Return the place in `indices_B` of the example at each position b * S + s, not of
        filler."""
        if self.cu_seqlens is None:
            return positions_N // self.tokens_BS.shape[1]
        starts = to_device(self.cu_seqlens[1:-1], positions_N.device)
        return torch.bucketize(positions_N, starts, right=True)

    def sources_of(self, positions_N: torch.Tensor) -> torch.Tensor:
        """Return the source of the example at each position b * S + s, not of filler."""
        return self.sources_B[self.examples_of(positions_N)]

    def to(self, device: torch.device | str) -> Batch:
        """Copy the batch to `device`, except `ON_CPU`."""
        return self._map(lambda tensor: to_device(tensor, device))

    def pin_memory(self) -> Batch:
        """Copy the batch into page-locked memory, which a GPU reads asynchronously."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        moved: dict[str, Any] = {}
        for name in (one.name for one in fields(self)):
            value = getattr(self, name)
            if isinstance(value, TeacherRows):
                moved[name] = value.map(change)
            elif value is not None and name not in ON_CPU:
                moved[name] = change(value)
        return replace(self, **moved)

    def context_part(self, rank: int, size: int) -> Batch:
        """Return the columns of a context-parallel rank."""
        if size == 1:
            return self
        assert self.cu_seqlens is None
        num_positions = self.tokens_BS.shape[1]
        columns_s = context_positions(num_positions, rank, size)
        place_S = torch.full((num_positions,), -1)
        place_S[columns_s] = torch.arange(len(columns_s))

        def moved(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """Return positions in these columns, and True at those that are there."""
            places = place_S[positions % num_positions]
            return positions // num_positions * len(columns_s) + places, places >= 0

        teacher = self.teacher
        if teacher is not None:
            moved_P, is_here_P = moved(teacher.positions_P)
            teacher = replace(teacher, positions_P=moved_P).at(is_here_P)
        names = ("tokens_BS", "labels_BS", "loss_mask_BS", "position_ids_BS")
        changed: dict[str, Any] = {
            name: getattr(self, name)[:, columns_s] for name in names
        }
        moved_N, is_here_N = moved(self.loss_positions_N)
        changed["loss_positions_N"] = moved_N[is_here_N]
        if self.in_kd_N is not None:
            changed["in_kd_N"] = self.in_kd_N[is_here_N]
        return replace(self, teacher=teacher, **changed)


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Return the tensor on `device`; the CPU does not wait for work that a GPU has queued."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def context_positions(num_positions: int, rank: int, size: int) -> torch.Tensor:
    """Return the columns of a batch that a context-parallel rank holds, ascending, int64.

    Of 2 * size chunks, rank r holds r, which sees few positions, and 2 * size - 1 - r, which sees
    many: all ranks have the same work. Megatron and Transformer Engine expect this order.
    """
    if size == 1:
        return torch.arange(num_positions)
    parts = torch.arange(num_positions).chunk(2 * size)
    return torch.cat([parts[rank], parts[2 * size - 1 - rank]])
