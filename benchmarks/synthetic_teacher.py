"""A teacher made of formulas: the likeliest tokens of 4,096 positions over a vocabulary of 128,256, and exact totals.

Each position draws an entropy of 0.05 + 5.95 Beta(0.8, 2.2) nats (1.6 on average). The token of rank r has the logit
-a ln r - ln(1 + r / 100) + N(0, 1/4), with `a` chosen to give that entropy; its id is the r-th of successive draws without
replacement from Zipf's law, whose order the ids follow roughly, as byte-pair vocabularies do. What a real teacher repeats
inside a document is missing: real ids compress better than these.

Shape legend: N positions, K likeliest tokens, M tail samples, V vocabulary.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nemo_kd.batch import SMALLEST_SAMPLED_TAIL

VOCAB_SIZE, NUM_POSITIONS, SEQ_LENGTH, TOP_K = 128_256, 4_096, 512, 256
FIRST_TOKEN = 128_000
HEAD_K, HEAD_TOP_P, TAIL_SAMPLES = 16, 0.95, 4
"""The kept tokens to which the tail samples belong: as few as hold 0.95 together, 16 at most."""
_NOISE, _BEND, _SEED = 0.25, 100.0, 2


class SyntheticTeacher(NamedTuple):
    """Sums over the vocabulary are float64 sums of the very logits stored as float32.

    Attributes:
        logits_NK, ids_NK: the likeliest tokens, descending.
        log_sum_exp_N: over the whole vocabulary.
        labels_N, label_logprobs_N: a token drawn from the teacher.
        tail_ids_NM: drawn outside the first `head_counts_N` tokens as stage 1 draws them, -1 where thinning drops them.
    """

    logits_NK: np.ndarray
    ids_NK: np.ndarray
    log_sum_exp_N: np.ndarray
    entropies_N: np.ndarray
    labels_N: np.ndarray
    label_logprobs_N: np.ndarray
    tail_ids_NM: np.ndarray
    head_counts_N: np.ndarray


def synthetic_teacher(
    folder: Path, num_positions: int = NUM_POSITIONS, vocab_size: int = VOCAB_SIZE
) -> SyntheticTeacher:
    """The teacher's positions; they are made once and then read from `folder`."""
    path = folder / f"synthetic_{num_positions}_{vocab_size}.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        teacher = _generate(num_positions, vocab_size)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, **teacher._asdict())
        partial.rename(path)
    with np.load(path) as arrays:
        return SyntheticTeacher(
            **{name: arrays[name] for name in SyntheticTeacher._fields}
        )


def _generate(num_positions: int, vocab_size: int) -> SyntheticTeacher:
    random = np.random.default_rng(_SEED)
    ranks_V = np.arange(1, vocab_size + 1, dtype=np.float64)
    log_ranks_V, bend_V = (
        np.log(ranks_V).astype(np.float32),
        np.log1p(ranks_V / _BEND).astype(np.float32),
    )
    id_of_place_V = np.argsort(
        np.argsort(ranks_V * np.exp(random.normal(0, 1, vocab_size)))
    )
    frequency_V = (1 / (ranks_V + 1.7)).astype(np.float32)
    slopes_N = _slopes(0.05 + 5.95 * random.beta(0.8, 2.2, num_positions), vocab_size)
    rows = []
    for slope in slopes_N.astype(np.float32):
        logits_V = (
            -slope * log_ranks_V
            - bend_V
            + np.float32(_NOISE) * random.standard_normal(vocab_size, np.float32)
        )
        # Exponential arrival times with the frequencies as rates: their order is that of draws without replacement.
        times_V = random.standard_exponential(vocab_size, np.float32) / frequency_V
        rows.append(_position(logits_V, times_V, id_of_place_V, random))
    return SyntheticTeacher(*(np.array(column) for column in zip(*rows, strict=True)))


def _position(
    logits_V: np.ndarray,
    times_V: np.ndarray,
    id_of_place_V: np.ndarray,
    random: np.random.Generator,
) -> tuple[np.ndarray | float, ...]:
    k = min(TOP_K, len(logits_V))
    top_K = np.argpartition(logits_V, -k)[-k:]
    top_K = top_K[np.argsort(-logits_V[top_K])]
    logits64_V = logits_V.astype(np.float64)
    log_sum_exp = logits64_V[top_K[0]] + math.log(
        np.exp(logits64_V - logits64_V[top_K[0]]).sum()
    )
    p_V = np.exp(logits64_V - log_sum_exp)
    label = min(int(np.searchsorted(p_V.cumsum(), random.random())), len(p_V) - 1)
    before_K = np.cumsum(p_V[top_K]) - p_V[top_K]
    head = int((before_K[:HEAD_K] < HEAD_TOP_P).sum())
    tail_mass = 1 - p_V[top_K[:head]].sum()
    uniforms = random.random(TAIL_SAMPLES + 1)
    tail_ids_M = np.full(TAIL_SAMPLES, -1)
    if uniforms[-1] * SMALLEST_SAMPLED_TAIL < tail_mass:
        place_of_rank_V = np.argsort(times_V)
        ids_V = id_of_place_V[place_of_rank_V]
        tail_V = np.empty_like(p_V)
        tail_V[ids_V] = p_V
        tail_V[ids_V[top_K[:head]]] = 0
        running_V = tail_V.cumsum()
        wanted_M = (
            (np.arange(TAIL_SAMPLES) + uniforms[:-1]) / TAIL_SAMPLES * running_V[-1]
        )
        tail_ids_M = np.searchsorted(running_V, wanted_M, side="right")
    else:  # the order of the ranks in use is enough
        ranks = np.unique(np.append(top_K, label))
        ids_V = id_of_place_V[np.argpartition(times_V, ranks)]
    entropy = log_sum_exp - float(p_V @ logits64_V)
    return (
        logits_V[top_K], ids_V[top_K].astype(np.int32), log_sum_exp, entropy, ids_V[label],
        logits64_V[label] - log_sum_exp, tail_ids_M, head,
    )  # fmt: skip


def _slopes(entropies_N: np.ndarray, vocab_size: int) -> np.ndarray:
    """The `a` that gives each entropy without noise, by interpolation in a table."""
    ranks_V = np.arange(1, vocab_size + 1, dtype=np.float64)
    table = np.geomspace(0.3, 14, 300)
    found = []
    for slope in table:
        logits_V = -slope * np.log(ranks_V) - np.log1p(ranks_V / _BEND)
        weights_V = np.exp(logits_V)
        total = weights_V.sum()
        found.append(math.log(total) - float(weights_V @ logits_V) / total)
    return np.interp(-entropies_N, -np.array(found), table)
