"""Numbers of a packed record as bytes: Huffman codes, bit fields, and a table of log-probabilities.

All of it is lossless but the table. docs/cache_format.md describes every step for other readers.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator

import numpy as np

LEVEL_RANGE_NATS = 10.0
LEVEL_TAIL_STEP_NATS = 0.5
_CELLS_PER_NAT = 1024
_CELLS = 64 * _CELLS_PER_NAT


def huffman(symbols: np.ndarray) -> bytes:
    """Encode bytes as a raw deflate stream without matches, so Huffman codes only; zlib reads it
    everywhere.
    """
    compressor = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return compressor.compress(symbols.tobytes()) + compressor.flush()


def unhuffman(stream: bytes | memoryview, count: int) -> np.ndarray:
    """Decode the `count` uint8 symbols of a deflate stream.

    Raises:
        ValueError: the stream is damaged, or of another length.
    """
    decompressor = zlib.decompressobj(-15)
    try:
        symbols = decompressor.decompress(stream, int(count) + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(symbols) != count or not decompressor.eof:
        raise ValueError(f"a stream does not end after {count} symbols")
    return np.frombuffer(symbols, dtype=np.uint8)


def pack_numbers(
    values: np.ndarray, classes: np.ndarray, num_classes: int
) -> list[bytes]:
    """Encode integers from 1 to 2^24 - 1: floor(log2(value)), and the bits below the leading one.

    Args:
        classes: of every number; each class has its own Huffman codes.
    """
    values = values.astype(np.uint32)
    widths = (values.astype(np.float32).view(np.uint32) >> 23) - 127
    symbols = widths.astype(np.uint8)
    streams = [huffman(symbols[classes == number]) for number in range(num_classes)]
    return [*streams, pack_bits(values ^ (np.uint32(1) << widths), widths)]


def unpack_numbers(
    streams: Iterator[memoryview], classes: np.ndarray, num_classes: int
) -> np.ndarray:
    """Return the uint32 values of `pack_numbers`, from its streams."""
    widths = np.empty(len(classes), dtype=np.uint32)
    for number in range(num_classes):
        is_class = classes == number
        widths[is_class] = unhuffman(next(streams), is_class.sum())
    return (np.uint32(1) << widths) + unpack_bits(next(streams), widths)


def pack_bits(values: np.ndarray, widths: np.ndarray) -> bytes:
    """Join the low `widths[i]` (at most 24) bits of each value, least significant bit first."""
    starts = np.cumsum(widths, dtype=np.int64) - widths
    num_bits = int(widths.sum(dtype=np.int64))
    words = starts >> 5
    shifted = values.astype(np.uint64) << (starts & 31).astype(np.uint64)
    num_words = (num_bits >> 5) + 2
    # Every bit is set once at most, so sums of float64 below 2^32 are exact unions.
    low = np.bincount(
        words, weights=shifted & np.uint64(0xFFFFFFFF), minlength=num_words
    )
    high = np.bincount(words, weights=shifted >> np.uint64(32), minlength=num_words)
    low[1:] += high[:-1]
    return low.astype("<u4").tobytes()[: (num_bits + 7) >> 3]


def unpack_bits(packed: bytes | memoryview, widths: np.ndarray) -> np.ndarray:
    """Return the uint32 values of `pack_bits`."""
    starts = np.cumsum(widths, dtype=np.int64) - widths
    padded = np.frombuffer(bytes(packed) + bytes(4), dtype=np.uint8)
    words = np.ndarray((len(padded) - 3,), dtype="<u4", buffer=padded, strides=(1,))
    words = words.take(starts >> 3) >> (starts & 7).astype(np.uint32)
    return words & ((np.uint32(1) << widths) - np.uint32(1))


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
