"""What a teacher said about one example, as a blob of bytes: a tenth of the numbers written out.

Shape legend: S positions of the example, P stored positions, N kept entries of all stored positions one after the other,
T temperatures, M tail samples. docs/cache_format.md specifies the blob for other readers.

Every position keeps its own number of tokens, likeliest first. Log-probabilities are rounded to 256 levels and ids lose
their leading bit; what follows a skewed distribution is Huffman coded.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from nemo_kd.batch import CachedExample, Example, TeacherTopK
from nemo_kd.cache.entropy_coding import (
    bit_lengths,
    huffman,
    level_nats,
    levels,
    pack_bits,
    unhuffman,
    unpack_bits,
)
from nemo_kd.config.cache import MAX_TOP_K, MAX_VOCAB_SIZE

BLOB_VERSION = 1
FINE_STEPS_PER_NAT, COARSE_STEPS_PER_NAT = 64, 8
RANK_CLASSES = (1, 4, 16)
"""Steps between levels are coded apart for ranks 1-3, 4-15 and from 16 on: the likelier, the wider they are."""
TAIL_STEPS_PER_UNIT = 8
"""Resolution of a tail's log-odds."""
_ALL_POSITIONS, _LABELS, _WIDE_COUNTS = 1, 2, 4
_FLAGS = _ALL_POSITIONS | _LABELS | _WIDE_COUNTS
_HEADER = struct.Struct("<BBBBBBHII")


class Kept(NamedTuple):
    """Where the kept entries of all stored positions lie: `row_N` is the stored position of each, `rank_N` its rank."""

    starts_P: np.ndarray
    row_N: np.ndarray
    rank_N: np.ndarray

    @classmethod
    def of(cls, counts_P: np.ndarray) -> Kept:
        starts = np.cumsum(counts_P) - counts_P
        row = np.repeat(np.arange(len(counts_P)), counts_P)
        return cls(starts, row, np.arange(len(row)) - starts.take(row))


def pack(row: CachedExample, positions: str = "loss") -> bytes:
    """The blob of a row.

    Args:
        positions: loss stores the positions that count in the loss; all, every position.

    Raises:
        ValueError: a stored position keeps no token, or values are out of order or outside what the format holds.
    """
    example, teacher = row.example, row.teacher
    stored = np.flatnonzero(example.loss_mask_S) if positions == "loss" else np.arange(example.num_tokens)
    used_PK = teacher.topk_token_ids_SK[stored] >= 0
    counts_P = used_PK.sum(axis=1)
    if (used_PK[:, 1:] > used_PK[:, :-1]).any() or counts_P.min(initial=1) < 1 or counts_P.max(initial=1) > MAX_TOP_K:
        raise ValueError(f"a position must keep 1 to {MAX_TOP_K} tokens, unused entries last")
    kept = Kept.of(counts_P)
    ids_N = teacher.topk_token_ids_SK[stored][used_PK]
    logprobs_N = teacher.topk_logits_SK[stored][used_PK] - teacher.log_sum_exp_logits_S[stored][kept.row_N]
    wide = counts_P.max(initial=1) > 256
    flags = _ALL_POSITIONS * (positions == "all") | _WIDE_COUNTS * bool(wide)
    streams = [huffman((counts_P - 1).astype("<u2" if wide else np.uint8))]
    streams += [huffman(_tail_levels(teacher.tail_mass_TS[:, stored]))]
    streams += _level_streams(_finite_levels(logprobs_N), kept)
    streams += _id_streams(ids_N)
    if teacher.label_logprobs_S is not None:
        flags |= _LABELS
        outside_P = np.ones(len(stored), dtype=bool)
        outside_P[kept.row_N[ids_N == example.labels_S[stored][kept.row_N]]] = False
        streams += [huffman(_finite_levels(teacher.label_logprobs_S[stored][outside_P]))]
    num_samples = 0
    if teacher.tail_token_ids_SM is not None:
        num_samples = teacher.tail_token_ids_SM.shape[1]
        streams += _sample_streams(teacher.tail_token_ids_SM[stored])
    header = _HEADER.pack(
        BLOB_VERSION, flags, FINE_STEPS_PER_NAT, COARSE_STEPS_PER_NAT, len(teacher.temperatures), num_samples,
        len(streams), len(stored), len(ids_N),
    )  # fmt: skip
    temperatures = np.array(teacher.temperatures, dtype="<f4").tobytes()
    lengths = np.array([len(stream) for stream in streams], dtype="<u4").tobytes()
    blob = b"".join([header, temperatures, lengths, *streams])
    return blob + zlib.crc32(blob).to_bytes(4, "little")


def unpack(blob: bytes, example: Example) -> TeacherTopK:
    """What `pack` stored about `example`, whose probabilities inside and outside the kept ids sum to 1 again.

    Raises:
        ValueError: the blob is damaged, of another version, or of another example.
    """
    header, temperatures, streams = _open(blob)
    stored = np.arange(example.num_tokens) if header.flags & _ALL_POSITIONS else np.flatnonzero(example.loss_mask_S)
    if len(stored) != header.num_stored:
        raise ValueError(f"the teacher's part has {header.num_stored} positions, the example {len(stored)}")
    wide = bool(header.flags & _WIDE_COUNTS)
    counts_P = unhuffman(next(streams), header.num_stored * (1 + wide)).view("<u2" if wide else np.uint8) + np.int64(1)
    tail_TP = _tail_mass(unhuffman(next(streams), header.num_stored * len(temperatures)), len(temperatures))
    if len(counts_P) != len(stored) or tail_TP.shape[1] != len(stored) or counts_P.sum() != header.num_kept:
        raise ValueError("the teacher's part holds fewer numbers than it says")
    kept = Kept.of(counts_P)
    nats = level_nats(header.fine, header.coarse)
    logprobs_N = -nats.take(_read_levels(streams, kept))
    ids_N = _read_ids(streams, header.num_kept)
    # Rounding has moved the sum over the kept ids: it is brought back to what the tail leaves.
    head_P = np.add.reduceat(np.exp(logprobs_N), kept.starts_P) if header.num_kept else np.empty(0, dtype=np.float32)
    shift_P = np.log1p(-tail_TP[0]) - np.log(head_P)
    first_P = logprobs_N[kept.starts_P]

    num_tokens, k = example.num_tokens, int(counts_P.max(initial=1))
    logits_SK = np.full((num_tokens, k), -np.inf, dtype=np.float32)
    ids_SK = np.full((num_tokens, k), -1, dtype=np.int32)
    flat_N = (stored * k).take(kept.row_N) + kept.rank_N
    logits_SK.reshape(-1)[flat_N] = logprobs_N - first_P.take(kept.row_N)
    ids_SK.reshape(-1)[flat_N] = ids_N
    labels_P = None
    if header.flags & _LABELS:
        labels_P = np.full(len(stored), np.nan, dtype=np.float32)
        hits = np.flatnonzero(ids_N == example.labels_S[stored].take(kept.row_N))
        labels_P[kept.row_N[hits]] = logprobs_N[hits] + shift_P[kept.row_N[hits]]
        outside_P = np.isnan(labels_P)
        labels_P[outside_P] = -nats[_exactly(unhuffman(next(streams), len(stored)), int(outside_P.sum()))]
    samples_PM = _read_samples(streams, len(stored), header.num_samples) if header.num_samples else None
    return TeacherTopK(
        topk_logits_SK=logits_SK,
        topk_token_ids_SK=ids_SK,
        log_sum_exp_logits_S=_at(stored, -(first_P + shift_P), np.zeros(num_tokens, dtype=np.float32)),
        tail_mass_TS=_at(stored, tail_TP, np.ones((len(temperatures), num_tokens), dtype=np.float32)),
        temperatures=temperatures,
        label_logprobs_S=None if labels_P is None else _at(stored, labels_P, np.zeros(num_tokens, dtype=np.float32)),
        tail_token_ids_SM=None
        if samples_PM is None
        else _at(stored, samples_PM.T, np.full((header.num_samples, num_tokens), -1, dtype=np.int32)).T,
    )


class _Header(NamedTuple):
    version: int
    flags: int
    fine: int
    coarse: int
    num_temperatures: int
    num_samples: int
    num_streams: int
    num_stored: int
    num_kept: int


def _open(blob: bytes) -> tuple[_Header, tuple[float, ...], Iterator[memoryview]]:
    view = memoryview(blob)
    if len(view) < _HEADER.size + 4 or zlib.crc32(view[:-4]) != int.from_bytes(view[-4:], "little"):
        raise ValueError("the checksum of the teacher's part is wrong: its bytes are damaged")
    header = _Header(*_HEADER.unpack_from(view))
    if header.version != BLOB_VERSION or header.flags & ~_FLAGS:
        raise ValueError(
            f"version {header.version} of the teacher's part with flags {header.flags} is not read here, only version "
            f"{BLOB_VERSION} with flags up to {_FLAGS}"
        )
    first = _HEADER.size + 4 * header.num_temperatures
    temperatures = np.frombuffer(view[_HEADER.size : first], dtype="<f4")
    num_streams = 8 + bool(header.flags & _LABELS) + 3 * bool(header.num_samples)
    if header.num_streams != num_streams or temperatures[:1].tolist() != [1] or not 1 <= header.coarse <= header.fine:
        raise ValueError(f"the header of the teacher's part contradicts itself: {header}")
    lengths = np.frombuffer(view[first : first + 4 * header.num_streams], dtype="<u4").tolist()
    ends = [first + 4 * header.num_streams + total for total in itertools.accumulate(lengths)]
    if not ends or ends[-1] != len(view) - 4:
        raise ValueError("the lengths of the teacher's streams do not add up")
    streams = [view[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    return header, tuple(temperatures.tolist()), iter(streams)


def _finite_levels(logprobs: np.ndarray) -> np.ndarray:
    if not np.isfinite(logprobs).all():
        raise ValueError("a log-probability is not finite")
    return levels(logprobs, FINE_STEPS_PER_NAT, COARSE_STEPS_PER_NAT)


def _tail_levels(tail_mass: np.ndarray) -> np.ndarray:
    """Log-odds in steps of 1/8 from -16 to 15.875, as 0 to 255."""
    mass = np.clip(tail_mass.astype(np.float64), 1e-9, 1 - 1e-9)
    steps = np.rint(TAIL_STEPS_PER_UNIT * np.log(mass / (1 - mass)))
    return (np.clip(steps, -128, 127) + 128).astype(np.uint8)


def _tail_mass(tail_levels: np.ndarray, num_temperatures: int) -> np.ndarray:
    log_odds = (tail_levels.astype(np.float32) - 128) / TAIL_STEPS_PER_UNIT
    return (1 / (1 + np.exp(-log_odds))).reshape(num_temperatures, -1)


def _rank_classes(kept: Kept) -> np.ndarray:
    classes_N = np.zeros(len(kept.rank_N), dtype=np.uint8)
    for first in RANK_CLASSES:
        classes_N += kept.rank_N >= first
    return classes_N


def _level_streams(levels_N: np.ndarray, kept: Kept) -> list[bytes]:
    steps_N = np.diff(levels_N.astype(np.int16), prepend=np.int16(0))
    steps_N[kept.starts_P] = levels_N[kept.starts_P]
    if steps_N.min(initial=0) < 0:
        raise ValueError("the kept logits of a position do not descend")
    class_N = _rank_classes(kept)
    return [huffman(steps_N[class_N == number].astype(np.uint8)) for number in range(len(RANK_CLASSES) + 1)]


def _read_levels(streams: Iterator[memoryview], kept: Kept) -> np.ndarray:
    class_N = _rank_classes(kept)
    steps_N = np.empty(len(class_N), dtype=np.int32)
    for number in range(len(RANK_CLASSES) + 1):
        mine = class_N == number
        steps_N[mine] = _exactly(unhuffman(next(streams), len(class_N)), int(mine.sum()))
    running_N = np.cumsum(steps_N, dtype=np.int32)
    before_P = running_N[kept.starts_P] - steps_N[kept.starts_P]
    levels_N = running_N - before_P.take(kept.row_N)
    if levels_N.max(initial=0) > 255:
        raise ValueError("a level lies above 255")
    return levels_N


def _id_streams(ids_N: np.ndarray) -> list[bytes]:
    """Classes floor(log2(id + 1)), Huffman coded, and the bits below the leading one."""
    if ids_N.max(initial=0) >= MAX_VOCAB_SIZE - 1:
        raise ValueError(f"token id {ids_N.max()} exceeds what the format holds ({MAX_VOCAB_SIZE - 2})")
    values = ids_N.astype(np.uint32) + np.uint32(1)
    widths = bit_lengths(values)
    return [huffman(widths.astype(np.uint8)), pack_bits(values ^ (np.uint32(1) << widths), widths)]


def _read_ids(streams: Iterator[memoryview], count: int) -> np.ndarray:
    widths = _exactly(unhuffman(next(streams), count), count).astype(np.uint32)
    if widths.max(initial=0) > 23:
        raise ValueError("a token id has more than 24 bits")
    return ((np.uint32(1) << widths) + unpack_bits(next(streams), widths)).astype(np.int32) - np.int32(1)


def _sample_streams(samples_PM: np.ndarray) -> list[bytes]:
    """Which positions have samples, and their ids: each row ascending, as differences."""
    sampled_P = samples_PM[:, 0] >= 0
    ids_QM = np.sort(samples_PM[sampled_P], axis=1)
    return [huffman(sampled_P.astype(np.uint8)), *_id_streams(np.diff(ids_QM, axis=1, prepend=0).ravel())]


def _read_samples(streams: Iterator[memoryview], num_stored: int, num_samples: int) -> np.ndarray:
    sampled_P = _exactly(unhuffman(next(streams), num_stored), num_stored) > 0
    samples_PM = np.full((num_stored, num_samples), -1, dtype=np.int32)
    steps = _read_ids(streams, int(sampled_P.sum()) * num_samples).reshape(-1, num_samples)
    samples_PM[sampled_P] = np.cumsum(steps, axis=1)
    return samples_PM


def _exactly(symbols: np.ndarray, count: int) -> np.ndarray:
    if len(symbols) != count:
        raise ValueError(f"a stream holds {len(symbols)} numbers where {count} are called for")
    return symbols


def _at(stored: np.ndarray, values: np.ndarray, background: np.ndarray) -> np.ndarray:
    background[..., stored] = values
    return background
