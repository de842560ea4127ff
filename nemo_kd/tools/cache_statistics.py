"""What a cache tells of its teacher, measured on a random sample of its rows.

Shape legend: K kept tokens, P loss positions of a row, N those of all measured rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nemo_kd.batch import CachedExample
from nemo_kd.cache.reader import CacheReader

ENTROPY_EDGES = (0.0, 0.02, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, math.inf)
MASS_EDGES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 1.0)
COUNT_EDGES = (1, 2, 3, 5, 9, 17, 33, 65, 129, 257, math.inf)
RANK_EDGES = (1, 2, 3, 4, 6, 11, 21, 51, 101, math.inf)


@dataclass(frozen=True)
class View:
    """What the teacher said at the loss positions of a row of which anything is known.

    Attributes:
        position_P: of the row.
        ids_PK: kept ids, likeliest first; unused entries stand last and are -1.
        probability_PK: of the kept ids; 0 in unused entries.
        tail_mass_P: outside the kept ids.
        entropy_P: nats, of the kept tokens and one bucket for all others: the whole distribution's is not smaller.
        label_rank_P: place of the label among the kept ids, from 1; 0 where it is not kept.
        label_logprob_P: nats; NaN where it is neither stored nor kept.
    """

    position_P: np.ndarray
    ids_PK: np.ndarray
    probability_PK: np.ndarray
    tail_mass_P: np.ndarray
    entropy_P: np.ndarray
    label_rank_P: np.ndarray
    label_logprob_P: np.ndarray

    @property
    def num_kept_P(self) -> np.ndarray:
        return (self.ids_PK >= 0).sum(axis=1)


@dataclass(frozen=True)
class Statistics:
    """The measured rows; one number for each of their loss positions, of which the fields of `View` tell the meaning.

    Attributes:
        num_tokens, num_loss_tokens: positions of the measured rows.
        has_label_logprobs: whether all rows store them.
        rest_nats_N: what the entropy gains at most, were the tail even; NaN where the vocabulary is not known.
    """

    num_rows: int
    num_tokens: int
    num_loss_tokens: int
    has_label_logprobs: bool
    num_kept_N: np.ndarray
    kept_mass_N: np.ndarray
    entropy_N: np.ndarray
    rest_nats_N: np.ndarray
    label_rank_N: np.ndarray
    label_logprob_N: np.ndarray


@dataclass(frozen=True)
class Histogram:
    """Counts of the values in the ranges that `labels` name."""

    title: str
    labels: list[str]
    counts: list[int]

    @property
    def shares(self) -> list[float]:
        return [count / max(1, sum(self.counts)) for count in self.counts]


def view(row: CachedExample) -> View:
    """The loss positions of a row, in float64."""
    teacher, example = row.teacher, row.example
    position_P = np.flatnonzero((example.loss_mask_S > 0) & (teacher.topk_token_ids_SK[:, 0] >= 0))
    ids_PK = teacher.topk_token_ids_SK[position_P]
    used_PK = ids_PK >= 0
    logits_PK = np.where(used_PK, teacher.topk_logits_SK[position_P], 0).astype(np.float64)
    logprob_PK = np.where(used_PK, logits_PK - teacher.log_sum_exp_logits_S[position_P, None], 0)
    probability_PK = np.where(used_PK, np.exp(logprob_PK), 0)
    tail_P = teacher.tail_mass_TS[0, position_P].astype(np.float64)
    is_label_PK = ids_PK == example.labels_S[position_P, None]
    rank_P = np.where(is_label_PK.any(axis=1), is_label_PK.argmax(axis=1) + 1, 0)
    kept_logprob_P = np.where(is_label_PK, logprob_PK, 0).sum(axis=1)
    stored_S = teacher.label_logprobs_S
    otherwise_P = (
        np.full(len(position_P), np.nan)
        if stored_S is None
        else stored_S[position_P].astype(np.float64)
    )
    return View(
        position_P=position_P,
        ids_PK=ids_PK,
        probability_PK=probability_PK,
        tail_mass_P=tail_P,
        # Rounding can put a certain teacher's a little below 0.
        entropy_P=np.maximum(-(probability_PK * logprob_PK).sum(axis=1) + _nats(tail_P), 0),
        label_rank_P=rank_P,
        label_logprob_P=np.where((rank_P > 0) & np.isnan(otherwise_P), kept_logprob_P, otherwise_P),
    )


def text_ids(row: CachedExample) -> list[int]:
    """The tokens of a row and what its last position predicts: position s predicts the one at s + 1."""
    example = row.example
    ids = np.append(example.tokens_S, example.labels_S[-1])
    # Labels outside the loss may be anything.
    return np.where(
        np.append(0, example.loss_mask_S) > 0, np.append(0, example.labels_S), ids
    ).tolist()


def measure(reader: CacheReader, num_rows: int, seed: int = 0) -> Statistics:
    """Figures of at most `num_rows` rows, drawn at random; the same seed draws the same ones."""
    drawn = np.random.default_rng(seed).choice(
        len(reader), min(num_rows, len(reader)), replace=False
    )
    vocab_size = reader.manifests[0].vocab_size if reader.manifests else None
    num_tokens = num_loss_tokens = 0
    has_label_logprobs = True
    columns: list[tuple[np.ndarray, ...]] = []
    for position in sorted(drawn.tolist()):
        row = reader[position]
        num_tokens += row.example.num_tokens
        num_loss_tokens += row.example.num_loss_tokens
        has_label_logprobs &= row.teacher.label_logprobs_S is not None
        seen = view(row)
        kept_P, tail_P = seen.num_kept_P, seen.tail_mass_P
        rest_P = np.full(len(tail_P), np.nan)
        if vocab_size is not None:
            rest_P = tail_P * np.log(np.maximum(vocab_size - kept_P, 1))
        columns.append(
            (kept_P, 1 - tail_P, seen.entropy_P, rest_P, seen.label_rank_P, seen.label_logprob_P)
        )
    arrays = [np.concatenate(column) for column in zip(*columns, strict=True)] or [np.zeros(0)] * 6
    return Statistics(len(drawn), num_tokens, num_loss_tokens, has_label_logprobs, *arrays)


def histograms(found: Statistics) -> list[Histogram]:
    """What is worth a look."""
    ranks = _histogram("rank of the label", found.label_rank_N[found.label_rank_N > 0], RANK_EDGES)
    not_kept = int((found.label_rank_N == 0).sum())
    return [
        _histogram("entropy in nats, at least", found.entropy_N, ENTROPY_EDGES),
        _histogram("probability kept", found.kept_mass_N, MASS_EDGES),
        _histogram("tokens kept", found.num_kept_N, COUNT_EDGES),
        Histogram(ranks.title, [*ranks.labels, "not kept"], [*ranks.counts, not_kept]),
    ]


def _histogram(title: str, values: np.ndarray, edges: Sequence[float]) -> Histogram:
    """Ranges take in their lower edge, not their upper one."""
    place = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    counts = np.bincount(place.astype(np.int64), minlength=len(edges) - 1).tolist()
    return Histogram(title, [_range(low, high) for low, high in itertools.pairwise(edges)], counts)


def _range(low: float, high: float) -> str:
    if isinstance(low, int):  # counts
        return (
            f"{low}"
            if high == low + 1
            else f"{low} and more"
            if high == math.inf
            else f"{low} to {high - 1:g}"
        )
    return f"{low:g} and more" if high == math.inf else f"{low:g} to {high:g}"


def _nats(probability: np.ndarray) -> np.ndarray:
    return -probability * np.log(np.where(probability > 0, probability, 1))
