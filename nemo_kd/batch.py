"""The containers that travel through nemo_kd. Read this file first.

Shape legend: B examples, S positions, K kept teacher logits, T temperatures, M tail samples. Position s of `labels`, `loss_mask` and of every
teacher field belongs to the logits that `tokens[:s + 1]` produce: labels are already shifted by one.
"""

from __future__ import annotations

from collections.abc import Callable
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
    """

    index: int
    tokens_S: np.ndarray
    labels_S: np.ndarray
    loss_mask_S: np.ndarray
    source: int = 0

    @property
    def num_tokens(self) -> int:
        """Positions of the example, prompt included."""
        return len(self.tokens_S)

    @property
    def num_loss_tokens(self) -> int:
        """Positions whose label counts in the loss."""
        return int(np.count_nonzero(self.loss_mask_S))


SMALLEST_SAMPLED_TAIL = 2.0**-11
"""Below this tail mass t, tail samples are kept with probability t / SMALLEST_SAMPLED_TAIL and stand for this mass:
unbiased, and most positions of a certain teacher cost nothing."""


ArrayT = TypeVar("ArrayT", np.ndarray, torch.Tensor)


@dataclass(frozen=True)
class TeacherRows(Generic[ArrayT]):
    """Teacher targets: the largest logits of each of P positions, and the probability outside them.

    Numpy arrays for one example, tensors for a batch. Prompts and padding mostly have no targets and no row here.
    Logits are shifted: the largest of a position is 0, and the log-sum-exp is that of the shifted logits over the
    whole real vocabulary, so `topk_logits - log_sum_exp_logits` are log-probabilities in nats. A position that keeps
    fewer than K logits has logit -inf and id -1 in its last entries; a row without any entry is no target.

    Attributes:
        positions_P: int64, ascending: positions of the example, in a batch b * S + s.
        topk_logits_PK: float32, all <= 0, descending.
        topk_token_ids_PK: integer, distinct within a position.
        log_sum_exp_logits_P: float32, >= 0.
        tail_mass_PT: float32, probability outside the kept ids at each of `temperatures`: the tail of
            softmax(logits / T).
        temperatures: the first is 1.
        label_logprobs_P: float32, log-probability of the label in nats at temperature 1; None if not stored.
        tail_token_ids_PM: integer, M ids drawn from the teacher's distribution outside the kept ids, -1 where none
            were kept; None without tail samples. Each stands for `max(tail_mass_PT[:, 0], SMALLEST_SAMPLED_TAIL) / M`.
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

    def at(self, places: Any) -> TeacherRows[ArrayT]:
        """Select rows by a slice, a mask or row numbers."""
        return self.map(lambda values: values[places])

    def map(self, change: Callable[[ArrayT], ArrayT]) -> TeacherRows[ArrayT]:
        """Apply `change` to every array."""
        arrays = {name: value for name, value in vars(self).items() if name != "temperatures"}
        changed: dict[str, Any] = {
            name: change(array) for name, array in arrays.items() if array is not None
        }
        return replace(self, **changed)


@dataclass(frozen=True)
class CachedExample:
    """An example with its teacher targets, which cover at least the positions whose label counts in the loss."""

    example: Example
    teacher: TeacherRows[np.ndarray]

    def loss_rows(self) -> TeacherRows[np.ndarray]:
        """Return the targets of the positions whose label counts in the loss."""
        counts_P = self.example.loss_mask_S[self.teacher.positions_P] > 0
        return self.teacher if counts_P.all() else self.teacher.at(counts_P)


ALWAYS_ON_CPU = ("lengths_B", "cu_seqlens")
"""Fields of a batch that the device has no use for."""

TEACHER_FIELDS = (
    "topk_logits_BSK",
    "topk_token_ids_BSK",
    "log_sum_exp_logits_BS",
    "tail_mass_BST",
    "label_logprobs_BS",
    "tail_token_ids_BSM",
)
"""Fields of a batch that only a loss has use for."""


@dataclass
class Batch:
    """Examples as tensors: one micro-batch, or one data-parallel rank's part of a global batch.

    One example a row, padded on the right, so causal attention needs no mask; or packed: a single row of examples end
    to end, each with positions and attention of its own. Padded positions and filler rows have loss mask 0.

    Attributes:
        indices_B: int64, dataset index of each row, of each example where they are packed; -1 marks a filler row that
            stands for no example.
        sources_B: int64, `Example.source` of the same; 0 for filler.
        lengths_B: int64, `Example.num_tokens` of the same, 0 for filler; always on the CPU.
        tokens_BS, labels_BS, position_ids_BS: int64.
        loss_mask_BS: float32.
        topk_logits_BSK, topk_token_ids_BSK, log_sum_exp_logits_BS, tail_mass_BST, label_logprobs_BS, tail_token_ids_BSM:
            the fields of `TeacherRows`; None without a cache, the last two also where a row lacks them. Padded
            positions are positions about which nothing is known.
        temperatures: those of `tail_mass_BST`, in its order; what all rows have in common.
        cu_seqlens: int32, where packed sequences start and the last one ends, always on the CPU. One entry more than
            examples, or two more: positions that fill the row up are a sequence of their own at its end, without an
            index. None: one example a row.
        loss_positions_N: int64, b * S + s of every position in the loss, ascending. Found when the batch is made, on
            the CPU: a GPU would have to be waited for.
    """

    indices_B: torch.Tensor
    sources_B: torch.Tensor
    lengths_B: torch.Tensor
    tokens_BS: torch.Tensor
    labels_BS: torch.Tensor
    loss_mask_BS: torch.Tensor
    position_ids_BS: torch.Tensor
    topk_logits_BSK: torch.Tensor | None = None
    topk_token_ids_BSK: torch.Tensor | None = None
    log_sum_exp_logits_BS: torch.Tensor | None = None
    tail_mass_BST: torch.Tensor | None = None
    label_logprobs_BS: torch.Tensor | None = None
    tail_token_ids_BSM: torch.Tensor | None = None
    temperatures: tuple[float, ...] = (1.0,)
    cu_seqlens: torch.Tensor | None = None
    loss_positions_N: torch.Tensor = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.loss_positions_N is None:
            self.loss_positions_N = self.loss_mask_BS.flatten().nonzero()[:, 0]

    @property
    def num_examples(self) -> int:
        """Examples in the batch, filler rows not counted."""
        return int((self.indices_B >= 0).sum())

    def sources_of(self, positions_N: torch.Tensor) -> torch.Tensor:
        """The source of the example at each position b * S + s, none of them of a packed row's filler."""
        if self.cu_seqlens is None:
            return self.sources_B[positions_N // self.tokens_BS.shape[1]]
        starts = to_device(self.cu_seqlens[1:-1], positions_N.device)
        return self.sources_B[torch.bucketize(positions_N, starts, right=True)]

    def to(self, device: torch.device | str) -> Batch:
        """A copy of the batch on `device`, apart from what is always on the CPU."""
        return self._with_each(lambda tensor: to_device(tensor, device))

    def pin_memory(self) -> Batch:
        """A copy in memory that a GPU fetches from while the CPU goes on."""
        return self._with_each(torch.Tensor.pin_memory)

    def without_teacher(self) -> Batch:
        """The batch without `TeacherRows`'s fields, most of its bytes."""
        return replace(self, **dict.fromkeys(TEACHER_FIELDS))  # type: ignore[arg-type]

    def columns(self, columns_s: torch.Tensor) -> Batch:
        """The batch with these positions of every row only: what a context-parallel rank holds of it."""
        assert self.cu_seqlens is None
        named = {
            entry.name: getattr(self, entry.name) for entry in fields(self) if "_BS" in entry.name
        }
        parts: dict[str, Any] = {
            name: value[:, columns_s] for name, value in named.items() if value is not None
        }
        return replace(self, **parts | {"loss_positions_N": None})

    def _with_each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        tensors: dict[str, Any] = {
            entry.name: change(value)
            for entry in fields(self)
            if entry.name not in ALWAYS_ON_CPU
            and isinstance(value := getattr(self, entry.name), torch.Tensor)
        }
        return replace(self, **tensors)


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The tensor on `device`; the host does not wait until a GPU has done what it was asked before."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
