"""Bits of integers below their leading one, end to end."""

from __future__ import annotations

import numpy as np


def pack_bits(values: np.ndarray, widths: np.ndarray) -> bytes:
    """Join the `widths[i]` bits below each value's leading one, least significant bit first."""
    starts = np.cumsum(widths, dtype=np.int64) - widths
    num_bits = int(widths.sum(dtype=np.int64))
    words = starts >> 5
    bits = values ^ _leading_ones(widths)
    shifted = bits.astype(np.uint64) << (starts & 31).astype(np.uint64)
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
    wide = widths.astype(np.int64)
    starts = np.cumsum(wide) - wide
    padded = np.frombuffer(bytes(packed) + bytes(4), dtype=np.uint8)
    words = np.ndarray((len(padded) - 3,), dtype="<u4", buffer=padded, strides=(1,))
    values = words.take(starts >> 3)
    values >>= (starts & 7).astype(np.uint32)
    leading = _leading_ones(widths)
    values &= leading - np.uint32(1)
    return values | leading


def _leading_ones(widths: np.ndarray) -> np.ndarray:
    # Before NumPy 2, `np.uint32(1) << widths` has the type of the widths.
    return np.left_shift(1, widths, dtype=np.uint32)
