"""Teacher targets of one example as a blob of bytes, a tenth of the size of numbers written out.

Shape legend: S positions of the example, P stored positions, N kept entries of all stored positions
one after the other, T temperatures, M tail samples. docs/cache_format.md has the format.

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
from nemo_kd.cache.bits import pack_bits, unpack_bits
from nemo_kd.cache.fast_bytes import fast_zlib
from nemo_kd.config.data import MAX_TOP_K, MAX_VOCAB_SIZE

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
_TAIL_SIXTEENTHS = 2 * _TAIL_STEPS - np.clip(_TAIL_STEPS, -48, 48)
TAIL_LOG_ODDS = _TAIL_SIXTEENTHS.astype(np.float32) / 16
"""Of the 256 levels of a tail: -14 to 11.875 in steps of 1/8, of 1/16 between -3 and 3."""
_ALL_POSITIONS = 1
_LABELS = 2
_WIDE_COUNTS = 4
_SELECTED = 8
_HEADER = struct.Struct("<BBBBBBBHII")


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


def pack(row: CachedExample, positions: str = "loss") -> bytes:
    """Encode a row as a blob.

    Args:
        positions: loss stores the positions that count in the loss; selected, those of them that
            have targets; all, every position.

    Raises:
        ValueError: a stored position keeps no token, or an id is larger than the format holds.
    """
    example = row.example
    teacher = row.teacher if positions == "all" else row.loss_rows()
    sizes = {"loss": example.num_loss_tokens, "all": example.num_tokens}
    num_stored = sizes.get(positions, len(teacher))
    used_PK = teacher.topk_token_ids_PK >= 0
    counts_P = used_PK.sum(axis=1)
    is_kept_P = used_PK[:, 0] & (counts_P <= MAX_TOP_K)
    if len(teacher) != num_stored or not is_kept_P.all():
        raise ValueError(f"a position must keep 1 to {MAX_TOP_K} tokens")
    if teacher.topk_token_ids_PK.max(initial=0) >= MAX_VOCAB_SIZE - 1:
        raise ValueError(f"a token id exceeds {MAX_VOCAB_SIZE - 2}")
    starts_P = np.cumsum(counts_P, dtype=np.int64) - counts_P
    coarse, levels_N = _head_levels(teacher, used_PK, starts_P)
    entries_N = teacher.topk_token_ids_PK[used_PK].astype(np.uint32) << 8 | levels_N
    keys_N = _sorted(entries_N, used_PK)
    ids_N = (keys_N >> 8).astype(np.int64)
    levels_N = keys_N.astype(np.uint8)
    distances_N = np.diff(ids_N, prepend=-1)
    distances_N[starts_P] = ids_N[starts_P] + 1
    num_classes = ID_CLASSES if len(ids_N) >= SMALLEST_FOR_CLASSES else 1
    flags = {"loss": 0, "selected": _SELECTED, "all": _ALL_POSITIONS}[positions]
    counts = (counts_P - 1).astype(np.uint8)
    if counts_P.max(initial=1) > 256:
        flags |= _WIDE_COUNTS
        counts = (counts_P - 1).astype("<u2")
    streams = [
        *([_pack_selected(teacher, example)] if positions == "selected" else []),
        huffman(counts),
        huffman(_tail_levels(teacher.tail_mass_PT.T)),
        huffman(levels_N),
        *pack_numbers(distances_N, _class_sizes(counts_P, num_classes)),
    ]
    if teacher.label_logprobs_P is not None:
        flags |= _LABELS
        labels_P = example.labels_S[teacher.positions_P]
        outside_P = (teacher.topk_token_ids_PK != labels_P[:, None]).all(axis=1)
        outside = teacher.label_logprobs_P[outside_P]
        streams.append(huffman(levels(outside, FINE_STEPS_PER_NAT, coarse)))
    num_samples = 0
    if teacher.tail_token_ids_PM is not None:
        num_samples = teacher.tail_token_ids_PM.shape[1]
        streams += _pack_samples(teacher.tail_token_ids_PM)
    temperatures = np.array(teacher.temperatures, dtype="<f4").tobytes()
    header = _Header(
        BLOB_VERSION, flags, FINE_STEPS_PER_NAT, coarse, len(teacher.temperatures), num_samples,
        num_classes, len(streams), num_stored, len(ids_N),
    )  # fmt: skip
    lengths = np.array([len(stream) for stream in streams], dtype="<u4").tobytes()
    blob = b"".join([_HEADER.pack(*header), temperatures, lengths, *streams])
    return blob + zlib.crc32(blob).to_bytes(4, "little")


def unpack(blob: bytes, example: Example) -> TeacherRows[np.ndarray]:
    """Decode a blob; the probabilities inside and outside the kept ids sum to 1 again.

    Raises:
        ValueError: the blob is damaged, of another version, or of another example.
    """
    header, temperatures, streams = _open(blob)
    positions_P = _positions(header, example, streams)
    num_stored = len(positions_P)
    if num_stored != header.num_stored:
        raise ValueError(
            f"the teacher's blob has {header.num_stored} positions, the example {num_stored}"
        )
    width = 2 if header.flags & _WIDE_COUNTS else 1
    counts = unhuffman(next(streams), num_stored * width).view(f"<u{width}")
    counts_P = counts + np.int64(1)
    tails = unhuffman(next(streams), num_stored * len(temperatures))
    log_odds_TP = TAIL_LOG_ODDS[tails].reshape(len(temperatures), num_stored)
    tail_TP = 1 / (1 + np.exp(-log_odds_TP.astype(np.float64)))
    levels_N = unhuffman(next(streams), header.num_kept)
    starts_P = np.cumsum(counts_P, dtype=np.int64) - counts_P
    sizes_CP = _class_sizes(counts_P, header.num_classes)
    distances_N = unpack_numbers(streams, sizes_CP)
    ids_N = np.cumsum(distances_N, dtype=np.uint32)
    before_P = ids_N[starts_P] - distances_N[starts_P] + np.uint32(1)
    ids_N -= np.repeat(before_P, counts_P)
    nats = level_nats(header.fine, header.coarse)
    # Rounding has moved the sum over the kept ids; scale it back to 1 - tail.
    p_N = np.exp(-nats).take(levels_N)
    head_P = np.add.reduceat(p_N, starts_P) if num_stored else p_N
    shift_P = np.log1p(-tail_TP[0]) - np.log(head_P)
    label_logprobs_P = None
    if header.flags & _LABELS:
        labels_P = example.labels_S[positions_P].astype(np.uint32)
        found = np.flatnonzero(ids_N == np.repeat(labels_P, counts_P))
        rows = np.searchsorted(starts_P, found, side="right") - 1
        label_logprobs_P = np.full(num_stored, np.nan, dtype=np.float32)
        label_logprobs_P[rows] = shift_P[rows] - nats[levels_N[found]]
        outside_P = np.isnan(label_logprobs_P)
        label_logprobs_P[outside_P] = -nats[unhuffman(next(streams), outside_P.sum())]
    used_PK = np.arange(counts_P.max(initial=1), dtype=counts.dtype) <= counts[:, None]
    keys_N = _sorted(levels_N.astype(np.uint32) << 24 | ids_N, used_PK)
    nats_N = nats.take(keys_N >> 24)
    first_P = nats_N[starts_P]
    logits_N = np.repeat(first_P, counts_P) - nats_N
    ids_N = (keys_N & 0xFFFFFF).view(np.int32)
    return TeacherRows(
        positions_P=positions_P,
        topk_logits_PK=_spread(logits_N, used_PK, -np.inf),
        topk_token_ids_PK=_spread(ids_N, used_PK, -1),
        log_sum_exp_logits_P=(first_P - shift_P).astype(np.float32),
        tail_mass_PT=np.ascontiguousarray(tail_TP.T, dtype=np.float32),
        temperatures=temperatures,
        label_logprobs_P=label_logprobs_P,
        tail_token_ids_PM=_unpack_samples(streams, num_stored, header.num_samples),
    )


def _pack_selected(teacher: TeacherRows[np.ndarray], example: Example) -> bytes:
    """Encode which of the loss positions are stored."""
    is_stored_S = np.zeros(example.num_tokens, dtype=np.uint8)
    is_stored_S[teacher.positions_P] = 1
    return huffman(is_stored_S[example.loss_mask_S > 0])


def _positions(
    header: _Header, example: Example, streams: Iterator[memoryview]
) -> np.ndarray:
    """Return the stored positions; reads the stream of `_pack_selected`, if there is one."""
    if header.flags & _ALL_POSITIONS:
        return np.arange(example.num_tokens)
    positions = np.flatnonzero(example.loss_mask_S)
    if header.flags & _SELECTED:
        return positions[unhuffman(next(streams), len(positions)) > 0]
    return positions


def _open(blob: bytes) -> tuple[_Header, tuple[float, ...], Iterator[memoryview]]:
    """Return header, temperatures and streams."""
    view = memoryview(blob)
    is_whole = fast_zlib.crc32(view[:-4]) == int.from_bytes(view[-4:], "little")
    if len(view) < _HEADER.size or not is_whole:
        raise ValueError(
            "the checksum of the teacher's blob is wrong: its bytes are damaged"
        )
    header = _Header(*_HEADER.unpack_from(view))
    if header.version != BLOB_VERSION or header.flags > 15:
        raise ValueError(
            f"version {header.version} of the teacher's blob with flags {header.flags} is not "
            f"read here, only version {BLOB_VERSION} with flags up to 15"
        )
    end = _HEADER.size + 4 * header.num_temperatures
    temperatures = np.frombuffer(view[_HEADER.size : end], dtype="<f4")
    first = end + 4 * header.num_streams
    lengths = np.frombuffer(view[end:first], dtype="<u4").tolist()
    ends = itertools.accumulate(lengths, initial=first)
    streams = (view[start:end] for start, end in itertools.pairwise(ends))
    return header, tuple(temperatures.tolist()), streams


def _pack_samples(samples_PM: np.ndarray) -> list[bytes]:
    """Encode which positions have samples, and their ids: each row ascending, as differences."""
    sampled_P = samples_PM[:, 0] >= 0
    ids_QM = np.sort(samples_PM[sampled_P], axis=1)
    distances = np.diff(ids_QM, axis=1, prepend=0).ravel() + 1
    return [
        huffman(sampled_P.astype(np.uint8)),
        *pack_numbers(distances, np.array([[len(distances)]])),
    ]


def _unpack_samples(
    streams: Iterator[memoryview], num_stored: int, num_samples: int
) -> np.ndarray | None:
    if not num_samples:
        return None
    sampled_P = unhuffman(next(streams), num_stored) > 0
    distances = unpack_numbers(streams, np.array([[sampled_P.sum() * num_samples]]))
    distances_QM = distances.astype(np.int64).reshape(-1, num_samples) - 1
    samples_PM = np.full((num_stored, num_samples), -1, dtype=np.int32)
    samples_PM[sampled_P] = np.cumsum(distances_QM, axis=1)
    return samples_PM


def _head_levels(
    teacher: TeacherRows[np.ndarray], used_PK: np.ndarray, starts_P: np.ndarray
) -> tuple[int, np.ndarray]:
    """Return coarse steps per nat, and the levels [N] of the kept entries."""
    logprobs_PK = teacher.topk_logits_PK - teacher.log_sum_exp_logits_P[:, None]
    logprobs_N = logprobs_PK[used_PK]
    coarse = COARSE_STEPS_PER_NAT
    levels_N = levels(logprobs_N, FINE_STEPS_PER_NAT, coarse)
    # A token's part of the KL divergence that rounding is expected to add: p * step^2 / 24.
    nats = level_nats(FINE_STEPS_PER_NAT, coarse).astype(np.float64)
    rounding_kl = (np.exp(-nats) * np.gradient(nats) ** 2 / 24).astype(np.float32)
    if rounding_kl[levels_N].sum() > MOST_ROUNDING_KL_NATS * len(teacher):
        coarse = FLAT_COARSE_STEPS_PER_NAT
        levels_N = levels(logprobs_N, FINE_STEPS_PER_NAT, coarse)
    # Ids will order what has one level: the likeliest token gets another level, so that it
    # stays the first.
    firsts = starts_P[used_PK[:, 1:2].any(axis=1)]
    tied = firsts[(levels_N[firsts] == levels_N[firsts + 1]) & (levels_N[firsts] > 0)]
    levels_N[tied] -= 1
    return coarse, levels_N


def _sorted(keys_N: np.ndarray, used_PK: np.ndarray) -> np.ndarray:
    """Sort the uint32 keys of every position."""
    keys_PK = _spread(keys_N, used_PK, 0xFFFFFFFF)
    keys_PK.sort(axis=1)
    return keys_PK.ravel() if used_PK.all() else keys_PK[used_PK]


def _spread(values_N: np.ndarray, used_PK: np.ndarray, unused: float) -> np.ndarray:
    """Return the values one position a row, with `unused` behind the last one."""
    if len(values_N) == used_PK.size:
        return values_N.reshape(used_PK.shape)
    values_PK = np.full(used_PK.shape, unused, dtype=values_N.dtype)
    values_PK[used_PK] = values_N
    return values_PK


def _tail_levels(tail_mass: np.ndarray) -> np.ndarray:
    mass = np.clip(tail_mass.astype(np.float64), 1e-9, 1 - 1e-9)
    middles = (TAIL_LOG_ODDS[1:] + TAIL_LOG_ODDS[:-1]) / 2
    return np.searchsorted(middles, np.log(mass / (1 - mass))).astype(np.uint8)


def _class_sizes(counts_P: np.ndarray, num_classes: int) -> np.ndarray:
    """Return how many entries [C, P] of each class a position has.

    The i-th of a position's n entries, from 0, is of class floor(i * num_classes / n).
    """
    edges = np.arange(num_classes + 1)[:, None] * counts_P
    return np.diff((edges + (num_classes - 1)) // num_classes, axis=0)


def _interleave(symbols: np.ndarray, sizes_CP: np.ndarray) -> np.ndarray:
    """Return symbols that stand class after class in the order of the entries [N]."""
    size = sizes_CP.max(initial=0)
    if (sizes_CP == size).all():
        return symbols.reshape(*sizes_CP.shape, size).swapaxes(0, 1).ravel()
    sizes = sizes_CP.T.ravel()
    ends_CP = np.cumsum(sizes_CP).reshape(sizes_CP.shape)
    places_N = np.repeat(ends_CP.T.ravel() - np.cumsum(sizes), sizes)
    places_N += np.arange(len(places_N))
    return symbols.take(places_N)


LEVEL_RANGE_NATS = 10.0
LEVEL_TAIL_STEP_NATS = 0.5
_CELLS_PER_NAT = 1024
_CELLS = 64 * _CELLS_PER_NAT


def huffman(symbols: np.ndarray) -> bytes:
    """Encode bytes as a raw deflate stream without matches: Huffman codes only."""
    compressor = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return compressor.compress(symbols.tobytes()) + compressor.flush()


def unhuffman(stream: bytes | memoryview, count: int) -> np.ndarray:
    """Decode the `count` uint8 symbols of a deflate stream.

    Raises:
        ValueError: it is damaged, or of another length.
    """
    try:
        # zlib decodes the last 258 bytes of its room slowly.
        symbols = fast_zlib.decompress(stream, -15, int(count) + 258)
    except fast_zlib.error as error:  # type: ignore[misc]  # isal's stubs
        raise ValueError(str(error)) from error
    if len(symbols) != count:
        raise ValueError(f"a stream does not end after {count} symbols")
    return np.frombuffer(symbols, dtype=np.uint8)


def pack_numbers(values: np.ndarray, sizes_CP: np.ndarray) -> list[bytes]:
    """Encode integers from 1 to 2^24 - 1: floor(log2(value)), and the bits below the leading one.

    Args:
        sizes_CP: of `_class_sizes`; each class has its own Huffman codes.
    """
    values = values.astype(np.uint32)
    widths = ((values.astype(np.float32).view(np.uint32) >> 23) - 127).astype(np.uint8)
    num_classes, num_positions = sizes_CP.shape
    classes = np.tile(np.arange(num_classes), num_positions)
    classes = np.repeat(classes, sizes_CP.T.ravel())
    streams = [huffman(widths[classes == number]) for number in range(num_classes)]
    return [*streams, pack_bits(values, widths)]


def unpack_numbers(streams: Iterator[memoryview], sizes_CP: np.ndarray) -> np.ndarray:
    """Return the uint32 values of `pack_numbers`, from its streams."""
    symbols = [unhuffman(next(streams), size) for size in sizes_CP.sum(axis=1)]
    return unpack_bits(next(streams), _interleave(np.concatenate(symbols), sizes_CP))


@functools.cache
def level_nats(fine: int, coarse: int) -> np.ndarray:
    """Return -log p of each of the 256 levels (float32, ascending from 0).

    The step grows as exp(nats / 2) / fine, in proportion to the inverse root of the probability, so
    that every token adds equally to the KL divergence; up to 1 / coarse nats, which also bounds the
    error at other temperatures. Beyond 10 nats half a nat is enough.
    """
    level = np.arange(256, dtype=np.float64)
    turn = 2 * np.log(fine / coarse)
    at_turn = 2 * fine * (1 - np.exp(-turn / 2))
    at_range = at_turn + (LEVEL_RANGE_NATS - turn) * coarse
    companded = -2 * np.log(np.maximum(1 - level / (2 * fine), 1e-12))
    uniform = turn + (level - at_turn) / coarse
    tail = LEVEL_RANGE_NATS + (level - at_range) * LEVEL_TAIL_STEP_NATS
    return np.where(
        level <= at_turn, companded, np.where(level <= at_range, uniform, tail)
    ).astype(np.float32)


@functools.cache
def _level_of_cell(fine: int, coarse: int) -> np.ndarray:
    nats = level_nats(fine, coarse)
    centres = (np.arange(_CELLS) + 0.5) / _CELLS_PER_NAT
    return np.searchsorted((nats[1:] + nats[:-1]) / 2, centres).astype(np.uint8)


def levels(logprobs: np.ndarray, fine: int, coarse: int) -> np.ndarray:
    """Return the nearest uint8 level of each log-probability; beyond the last level, the last."""
    cells = np.minimum(logprobs * np.float32(-_CELLS_PER_NAT), np.float32(_CELLS - 1))
    return _level_of_cell(fine, coarse).take(np.maximum(cells, 0).astype(np.intp))
