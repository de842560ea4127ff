"""Teacher targets of one example as a blob of bytes, a tenth of the size of numbers written out.

Shape legend: S positions of the example, P stored positions, N kept entries of all stored positions
one after the other, T temperatures, M tail samples. docs/cache_format.md specifies the blob for
other readers.

Every position keeps its own number of tokens. They are stored in the order of their ids, so that an
id costs no more than its distance from the one before; their log-probabilities are rounded to 256
levels, which sort them again. What follows a skewed distribution is Huffman coded.
"""

from __future__ import annotations

import functools
import itertools
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from nemo_kd.batch import CachedExample, Example, TeacherRows
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
FINE_STEPS_PER_NAT = 64
COARSE_STEPS_PER_NAT = 8
FLAT_COARSE_STEPS_PER_NAT = 16
MOST_ROUNDING_KL_NATS = 1.5e-4
"""Records whose rounding would add more KL divergence per position get the finer steps. This
happens if the teacher is uncertain, with much probability on unlikely tokens."""
ID_CLASSES = 4
SMALLEST_FOR_CLASSES = 1024
"""Each quarter of a position's ids has its own code for distances, since low ids are frequent tokens
and lie closer. In a record with fewer entries the codes would cost more than they save."""
_TAIL_STEPS = np.arange(256) - 136
TAIL_LOG_ODDS = (2 * _TAIL_STEPS - np.clip(_TAIL_STEPS, -48, 48)).astype(np.float32) / 16
"""Of the 256 levels of a tail: -14 to 11.875 in steps of 1/8, of 1/16 between -3 and 3."""
_ALL_POSITIONS = 1
_LABELS = 2
_WIDE_COUNTS = 4
_FLAGS = _ALL_POSITIONS | _LABELS | _WIDE_COUNTS
_HEADER = struct.Struct("<BBBBBBBHII")
_UNUSED = np.uint32(0xFFFFFFFF)

MAX_CELLS = 1 << 27
"""Positions times the most tokens that one of them keeps, of a row: 131,072 positions of 1,024."""


class Kept(NamedTuple):
    """Places of the kept entries of all stored positions.

    Attributes:
        starts_P: the first entry of each position; row_N: the stored position of each entry.
        k, cells_N: the place of each entry in an array [P, k] whose unused entries stand last,
            flattened.
    """

    counts_P: np.ndarray
    starts_P: np.ndarray
    row_N: np.ndarray
    k: int
    cells_N: np.ndarray

    @classmethod
    def of(cls, counts_P: np.ndarray, k: int) -> Kept:
        starts_P = np.cumsum(counts_P) - counts_P
        rows_P = np.arange(len(counts_P))
        row_N = np.repeat(rows_P, counts_P)
        return cls(
            counts_P,
            starts_P,
            row_N,
            k,
            np.repeat(rows_P * k - starts_P, counts_P) + np.arange(len(row_N)),
        )


def pack(row: CachedExample, positions: str = "loss") -> bytes:
    """Encode a row as a blob.

    Args:
        positions: loss stores the positions that count in the loss; all, every position.

    Raises:
        ValueError: a stored position keeps no token, or values are out of order or outside what the
            format holds.
    """
    example = row.example
    teacher = row.loss_rows() if positions == "loss" else row.teacher
    num_stored = example.num_loss_tokens if positions == "loss" else example.num_tokens
    used_PK = teacher.topk_token_ids_PK >= 0
    counts_P = used_PK.sum(axis=1)
    if (
        len(teacher) != num_stored
        or (used_PK[:, 1:] > used_PK[:, :-1]).any()
        or counts_P.min(initial=1) < 1
        or counts_P.max(initial=1) > MAX_TOP_K
    ):
        raise ValueError(
            f"a position must keep 1 to {MAX_TOP_K} tokens, unused entries last"
        )
    _check_size(counts_P)
    kept = Kept.of(counts_P, used_PK.shape[1])
    coarse, ids_N, levels_N = _by_id(teacher, kept)
    wide = counts_P.max(initial=1) > 256
    flags = _ALL_POSITIONS * (positions == "all") | _WIDE_COUNTS * bool(wide)
    num_classes = ID_CLASSES if len(ids_N) >= SMALLEST_FOR_CLASSES else 1
    streams = [huffman((counts_P - 1).astype("<u2" if wide else np.uint8))]
    streams += [
        huffman(_tail_levels(np.ascontiguousarray(teacher.tail_mass_PT.T))),
        huffman(levels_N),
    ]
    streams += _id_streams(_distances(ids_N, kept), *_coding_order(kept, num_classes))
    if teacher.label_logprobs_P is not None:
        flags |= _LABELS
        labels_P = example.labels_S[teacher.positions_P]
        outside_P = np.ones(len(teacher), dtype=bool)
        outside_P[kept.row_N[ids_N == labels_P[kept.row_N]]] = False
        streams += [huffman(_finite_levels(teacher.label_logprobs_P[outside_P], coarse))]
    num_samples = 0
    if teacher.tail_token_ids_PM is not None:
        num_samples = teacher.tail_token_ids_PM.shape[1]
        streams += _sample_streams(teacher.tail_token_ids_PM)
    header = _HEADER.pack(
        BLOB_VERSION, flags, FINE_STEPS_PER_NAT, coarse, len(teacher.temperatures), num_samples,
        num_classes, len(streams), len(teacher), len(ids_N),
    )  # fmt: skip
    temperatures = np.array(teacher.temperatures, dtype="<f4").tobytes()
    lengths = np.array([len(stream) for stream in streams], dtype="<u4").tobytes()
    blob = b"".join([header, temperatures, lengths, *streams])
    return blob + zlib.crc32(blob).to_bytes(4, "little")


def unpack(blob: bytes, example: Example) -> TeacherRows[np.ndarray]:
    """Decode a blob; the probabilities inside and outside the kept ids sum to 1 again.

    Raises:
        ValueError: the blob is damaged, of another version, or of another example.
    """
    header, temperatures, streams = _open(blob)
    stored = (
        np.arange(example.num_tokens)
        if header.flags & _ALL_POSITIONS
        else np.flatnonzero(example.loss_mask_S)
    )
    if len(stored) != header.num_stored:
        raise ValueError(
            f"the teacher's blob has {header.num_stored} positions, the example {len(stored)}"
        )
    wide = bool(header.flags & _WIDE_COUNTS)
    counts = _exactly(
        unhuffman(next(streams), len(stored) * (1 + wide)), len(stored) * (1 + wide)
    )
    counts_P = counts.view("<u2" if wide else np.uint8) + np.int64(1)
    num_tails = len(stored) * len(temperatures)
    tail_TP = _tail_mass(
        _exactly(unhuffman(next(streams), num_tails), num_tails), len(temperatures)
    )
    if counts_P.sum() != header.num_kept:
        raise ValueError("the teacher's blob holds fewer numbers than its header states")
    # Levels first: a stream inflates a thousandfold at most, so this proves the stated number
    # before memory is allocated for it.
    levels_N = _exactly(unhuffman(next(streams), header.num_kept), header.num_kept)
    _check_size(counts_P)
    kept = Kept.of(counts_P, int(counts_P.max(initial=1)))
    nats = level_nats(header.fine, header.coarse)
    ids_N = _from_distances(
        _read_ids(streams, *_coding_order(kept, header.num_classes)), kept
    )
    # Rounding has moved the sum over the kept ids; scale it back to 1 - tail.
    p_N = np.exp(-nats).take(levels_N)
    head_P = (
        np.add.reduceat(p_N, kept.starts_P)
        if header.num_kept
        else np.empty(0, dtype=np.float32)
    )
    shift_P = np.log1p(-tail_TP[0]) - np.log(head_P)
    sorted_levels_N, sorted_ids_N = _by_level(levels_N, ids_N, kept)
    first_P = -nats.take(sorted_levels_N[kept.starts_P])
    logits_PK = np.full((len(stored), kept.k), -np.inf, dtype=np.float32)
    ids_PK = np.full((len(stored), kept.k), -1, dtype=np.int32)
    logits_PK.reshape(-1)[kept.cells_N] = -nats.take(sorted_levels_N) - first_P.take(
        kept.row_N
    )
    ids_PK.reshape(-1)[kept.cells_N] = sorted_ids_N

    label_logprobs_P = None
    if header.flags & _LABELS:
        labels_N = example.labels_S[stored].astype(np.int32).take(kept.row_N)
        hits = np.flatnonzero(ids_N == labels_N)
        rows = kept.row_N[hits]
        label_logprobs_P = np.full(len(stored), np.nan, dtype=np.float32)
        label_logprobs_P[rows] = shift_P[rows] - nats[levels_N[hits]]
        outside_P = np.isnan(label_logprobs_P)
        label_levels = _exactly(
            unhuffman(next(streams), len(stored)), int(outside_P.sum())
        )
        label_logprobs_P[outside_P] = -nats[label_levels]
    samples_PM = (
        _read_samples(streams, len(stored), header.num_samples)
        if header.num_samples
        else None
    )
    return TeacherRows(
        positions_P=stored,
        topk_logits_PK=logits_PK,
        topk_token_ids_PK=ids_PK,
        log_sum_exp_logits_P=-(first_P + shift_P).astype(np.float32),
        tail_mass_PT=np.ascontiguousarray(tail_TP.T, dtype=np.float32),
        temperatures=temperatures,
        label_logprobs_P=label_logprobs_P,
        tail_token_ids_PM=samples_PM,
    )


class _Header(NamedTuple):
    version: int
    flags: int
    fine: int
    coarse: int
    num_temperatures: int
    num_samples: int
    num_classes: int
    num_streams: int
    num_stored: int
    num_kept: int


def _open(blob: bytes) -> tuple[_Header, tuple[float, ...], Iterator[memoryview]]:
    view = memoryview(blob)
    if len(view) < _HEADER.size + 4 or zlib.crc32(view[:-4]) != int.from_bytes(
        view[-4:], "little"
    ):
        raise ValueError(
            "the checksum of the teacher's blob is wrong: its bytes are damaged"
        )
    header = _Header(*_HEADER.unpack_from(view))
    if header.version != BLOB_VERSION or header.flags & ~_FLAGS:
        raise ValueError(
            f"version {header.version} of the teacher's blob with flags {header.flags} is not "
            f"read here, only version {BLOB_VERSION} with flags up to {_FLAGS}"
        )
    first = _HEADER.size + 4 * header.num_temperatures
    temperatures = np.frombuffer(view[_HEADER.size : first], dtype="<f4")
    num_streams = (
        4
        + header.num_classes
        + bool(header.flags & _LABELS)
        + 3 * bool(header.num_samples)
    )
    counts_fit = header.num_streams == num_streams and header.num_classes > 0
    if (
        not counts_fit
        or temperatures[:1].tolist() != [1]
        or not 1 <= header.coarse <= header.fine
    ):
        raise ValueError(f"the header of the teacher's blob contradicts itself: {header}")
    lengths = np.frombuffer(
        view[first : first + 4 * header.num_streams], dtype="<u4"
    ).tolist()
    ends = [
        first + 4 * header.num_streams + total for total in itertools.accumulate(lengths)
    ]
    if not np.isfinite(temperatures).all() or temperatures.min() <= 0:
        raise ValueError(
            f"temperatures {temperatures.tolist()} are not all finite and above 0"
        )
    if not ends or ends[-1] != len(view) - 4:
        raise ValueError("the lengths of the teacher's streams do not add up")
    streams = [
        view[end - length : end] for end, length in zip(ends, lengths, strict=True)
    ]
    return header, tuple(temperatures.tolist()), iter(streams)


def _finite_levels(logprobs: np.ndarray, coarse: int) -> np.ndarray:
    if not np.isfinite(logprobs).all():
        raise ValueError("a log-probability is not finite")
    return levels(logprobs, FINE_STEPS_PER_NAT, coarse)


@functools.cache
def _rounding_kl(coarse: int) -> np.ndarray:
    """Of a token of each level, its part of the KL divergence that rounding is expected to add: p *
    step^2 / 24.
    """
    nats = level_nats(FINE_STEPS_PER_NAT, coarse).astype(np.float64)
    return (np.exp(-nats) * np.gradient(nats) ** 2 / 24).astype(np.float32)


def _by_id(
    teacher: TeacherRows[np.ndarray], kept: Kept
) -> tuple[int, np.ndarray, np.ndarray]:
    """Return coarse steps per nat, and ids [N] and levels [N] of the kept entries.

    The entries of every position are in ascending order of their ids.
    """
    ids_N = teacher.topk_token_ids_PK.reshape(-1).take(kept.cells_N)
    log_sum_exp_N = teacher.log_sum_exp_logits_P.take(kept.row_N)
    logprobs_N = teacher.topk_logits_PK.reshape(-1).take(kept.cells_N) - log_sum_exp_N
    coarse = COARSE_STEPS_PER_NAT
    levels_N = _finite_levels(logprobs_N, coarse)
    if _rounding_kl(coarse).take(levels_N).sum() > MOST_ROUNDING_KL_NATS * len(teacher):
        coarse = FLAT_COARSE_STEPS_PER_NAT
        levels_N = _finite_levels(logprobs_N, coarse)
    rises_N = levels_N[1:] >= levels_N[:-1]
    rises_N[kept.starts_P[1:] - 1] = True
    if not rises_N.all():
        raise ValueError("the kept logits of a position do not descend")
    if ids_N.max(initial=0) >= MAX_VOCAB_SIZE - 1:
        raise ValueError(
            f"token id {ids_N.max()} exceeds what the format holds ({MAX_VOCAB_SIZE - 2})"
        )
    # Ids will order what has one level: the likeliest token gets another level, so that it
    # stays the first.
    seconds = kept.starts_P[kept.counts_P > 1] + 1
    tied = seconds[(levels_N[seconds] == levels_N[seconds - 1]) & (levels_N[seconds] > 0)]
    levels_N[tied - 1] -= 1
    keys_N = _sorted(ids_N.astype(np.uint32) << np.uint32(8) | levels_N, kept)
    return coarse, (keys_N >> np.uint32(8)).astype(np.int64), keys_N.astype(np.uint8)


def _by_level(
    levels_N: np.ndarray, ids_N: np.ndarray, kept: Kept
) -> tuple[np.ndarray, np.ndarray]:
    """Return levels [N] and ids [N] of the kept entries, every position's likeliest first."""
    keys_N = _sorted(
        levels_N.astype(np.uint32) << np.uint32(24) | ids_N.view(np.uint32), kept
    )
    return (keys_N >> np.uint32(24)).astype(np.uint8), (
        keys_N & np.uint32(0xFFFFFF)
    ).view(np.int32)


def _sorted(keys_N: np.ndarray, kept: Kept) -> np.ndarray:
    """uint32 keys, every position's in ascending order."""
    keys_PK = np.full((len(kept.counts_P), kept.k), _UNUSED)
    keys_PK.reshape(-1)[kept.cells_N] = keys_N
    keys_PK.sort(axis=1)
    return keys_PK.reshape(-1).take(kept.cells_N)


def _tail_levels(tail_mass: np.ndarray) -> np.ndarray:
    mass = np.clip(tail_mass.astype(np.float64), 1e-9, 1 - 1e-9)
    return np.searchsorted(
        (TAIL_LOG_ODDS[1:] + TAIL_LOG_ODDS[:-1]) / 2, np.log(mass / (1 - mass))
    ).astype(np.uint8)


def _tail_mass(tail_levels: np.ndarray, num_temperatures: int) -> np.ndarray:
    log_odds = TAIL_LOG_ODDS.take(tail_levels).astype(
        np.float64
    )  # float64: 1 - mass may be tiny
    return (1 / (1 + np.exp(-log_odds))).reshape(num_temperatures, -1)


def _distances(ids_N: np.ndarray, kept: Kept) -> np.ndarray:
    """Return the distance of each id from the one before it, of a position's first from -1."""
    distances_N = np.diff(ids_N, prepend=-1)
    distances_N[kept.starts_P] = ids_N[kept.starts_P] + 1
    if distances_N.min(initial=1) < 1:
        raise ValueError("a position holds an id twice")
    return distances_N


def _from_distances(distances_N: np.ndarray, kept: Kept) -> np.ndarray:
    # The sum over all positions may wrap at 2^32; what it grows by within a position does not.
    running_N = np.cumsum(distances_N, dtype=np.uint32)
    before_P = running_N[kept.starts_P] - distances_N[kept.starts_P] + np.uint32(1)
    ids_N = running_N - before_P.take(kept.row_N)
    if ids_N.max(initial=0) >= MAX_VOCAB_SIZE - 1:
        raise ValueError("a token id has more than 24 bits")
    return ids_N.view(np.int32)


def _coding_order(kept: Kept, num_classes: int) -> tuple[np.ndarray, list[int]]:
    """Return the place of each entry in the order of the classes, and the sizes of the classes.

    The class of the i-th of n entries of a position, from 0, is floor(i * num_classes / n).
    """
    bounds_PC = -(-kept.counts_P[:, None] * np.arange(num_classes + 1) // num_classes)
    lengths_PC = np.diff(bounds_PC, axis=1)
    by_class_CP = lengths_PC.T
    starts_CP = (np.cumsum(by_class_CP.ravel()) - by_class_CP.ravel()).reshape(
        by_class_CP.shape
    )
    moves_PC = starts_CP.T - kept.starts_P[:, None] - bounds_PC[:, :-1]
    order_N = np.repeat(moves_PC.ravel(), lengths_PC.ravel()) + np.arange(len(kept.row_N))
    return order_N, lengths_PC.sum(axis=0).tolist()


def _id_streams(
    values_N: np.ndarray, order_N: np.ndarray, class_sizes: list[int]
) -> list[bytes]:
    """floor(log2(value)) of values of at least 1, Huffman coded by class, and the bits below the
    leading one.
    """
    values_N = values_N.astype(np.uint32)
    widths_N = bit_lengths(values_N)
    symbols_N = np.empty(len(widths_N), dtype=np.uint8)
    symbols_N[order_N] = widths_N
    classes = np.split(symbols_N, np.cumsum(class_sizes)[:-1])
    return [
        *map(huffman, classes),
        pack_bits(values_N ^ (np.uint32(1) << widths_N), widths_N),
    ]


def _read_ids(
    streams: Iterator[memoryview], order_N: np.ndarray, class_sizes: list[int]
) -> np.ndarray:
    classes = [_exactly(unhuffman(next(streams), size), size) for size in class_sizes]
    widths_N = np.concatenate(classes).take(order_N).astype(np.uint32)
    if widths_N.max(initial=0) > 23:
        raise ValueError("a number has more than 24 bits")
    return (np.uint32(1) << widths_N) + unpack_bits(next(streams), widths_N)


def _sample_streams(samples_PM: np.ndarray) -> list[bytes]:
    """Encode which positions have samples, and their ids: each row ascending, as differences."""
    sampled_P = samples_PM[:, 0] >= 0
    ids_QM = np.sort(samples_PM[sampled_P], axis=1)
    values = np.diff(ids_QM, axis=1, prepend=0).ravel() + 1
    return [
        huffman(sampled_P.astype(np.uint8)),
        *_id_streams(values, np.arange(len(values)), [len(values)]),
    ]


def _read_samples(
    streams: Iterator[memoryview], num_stored: int, num_samples: int
) -> np.ndarray:
    sampled_P = _exactly(unhuffman(next(streams), num_stored), num_stored) > 0
    samples_PM = np.full((num_stored, num_samples), -1, dtype=np.int32)
    count = int(sampled_P.sum()) * num_samples
    values_QM = _read_ids(streams, np.arange(count), [count]).reshape(-1, num_samples)
    ids_QM = np.cumsum(values_QM.astype(np.int64) - 1, axis=1)
    if ids_QM.max(initial=0) >= MAX_VOCAB_SIZE - 1:
        raise ValueError("a sampled token id has more than 24 bits")
    samples_PM[sampled_P] = ids_QM
    return samples_PM


def _check_size(counts_P: np.ndarray) -> None:
    """Refuse a row that a few bytes describe but no memory holds."""
    cells = len(counts_P) * int(counts_P.max(initial=1))
    if cells > MAX_CELLS:
        raise ValueError(
            f"{len(counts_P)} positions of up to {counts_P.max()} tokens are more than a row may "
            f"hold ({MAX_CELLS})"
        )


def _exactly(symbols: np.ndarray, count: int) -> np.ndarray:
    if len(symbols) != count:
        raise ValueError(
            f"a stream holds {len(symbols)} numbers where {count} are called for"
        )
    return symbols
