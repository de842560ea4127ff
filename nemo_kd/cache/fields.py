"""Read fields of a JSON object as arrays; errors name file, line, field and the value found."""

from __future__ import annotations

import reprlib
from typing import Any

import numpy as np

from nemo_kd.cache.layout import CacheError


def array(
    payload: dict[str, Any], field: str, ndim: int, kinds: str, where: str
) -> np.ndarray:
    """Return the field as an array of `ndim` dimensions whose dtype is of one of numpy's `kinds`.

    Raises:
        CacheError: it is missing, empty, ragged, or of another shape or type.
    """
    expected = ("a list of " if ndim == 1 else "a list of equally long lists of ") + (
        "integers" if kinds == "i" else "numbers"
    )
    if field not in payload:
        raise CacheError(f"{where}: field {field}: found nothing, expected {expected}")
    try:
        # Without a dtype: numpy would otherwise read strings as numbers and cut 1.5 down to 1.
        values = np.array(payload[field])
    except ValueError as error:
        raise CacheError(
            f"{where}: field {field}: found lists of different lengths, expected {expected}"
        ) from error
    if values.size == 0 or values.ndim != ndim:
        raise CacheError(
            f"{where}: field {field}: found an array of shape {values.shape}, expected {expected}"
        )
    if values.dtype.kind == "O" and any(value is None for value in values.flat):
        raise CacheError(
            f"{where}: field {field}: found null (how some writers spell NaN), expected {expected}"
        )
    if values.dtype.kind not in kinds:
        raise CacheError(
            f"{where}: field {field}: found values of type {values.dtype}, expected {expected}"
        )
    return values


def ids(
    payload: dict[str, Any], field: str, ndim: int, where: str, smallest: int = 0
) -> np.ndarray:
    """Return the field as token ids (int64).

    Raises:
        CacheError: as `array`; or an id lies below `smallest` or does not fit 31 bits.
    """
    values = array(payload, field, ndim, "i", where)
    if values.min() < smallest or values.max() >= 1 << 31:
        wrong = values.min() if values.min() < smallest else values.max()
        raise CacheError(
            f"{where}: field {field}: found {wrong}, expected token ids of at least 0"
        )
    return values


def floats(payload: dict[str, Any], field: str, ndim: int, where: str) -> np.ndarray:
    """Return the field as finite float32 numbers.

    Raises:
        CacheError: as `array`; or a number does not fit float32.
    """
    with np.errstate(over="ignore"):
        values = array(payload, field, ndim, "if", where).astype(np.float32)
    check_finite(field, values, where)
    return values


def check_finite(field: str, values: np.ndarray, where: str) -> None:
    """Refuse NaN and infinity."""
    finite = np.isfinite(values)
    if not finite.all():
        position = int(np.argwhere(~finite)[0][0])
        raise CacheError(
            f"{where}: field {field}: found {values[~finite][0]} at position {position}, expected "
            "finite numbers"
        )


def example_index(payload: dict[str, Any], default: int | None, where: str) -> int:
    """Return the field `index`, or the default without one."""
    index = payload.get("index", default)
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
        raise CacheError(
            f"{where}: field index: found {reprlib.repr(index)}, expected an integer of at least 0"
        )
    return index
