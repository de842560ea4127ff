"""Paths of the training data with their weights."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple


class Source(NamedTuple):
    """An entry of `model.data.data_prefix`.

    Attributes:
        weight: share of the samples, in proportion to the others'; None: every row counts once.
        sft_weight, kd_weight: multiply the losses of its tokens in both terms.
    """

    path: str
    weight: float | None = None
    sft_weight: float = 1.0
    kd_weight: float = 1.0


def read_sources(entries: list[Any]) -> Iterator[Source]:
    """
    Raises:
        TypeError, ValueError: the entries do not have one of the forms of data_prefix.
    """
    if any(isinstance(entry, dict) for entry in entries):
        sources = [Source(**entry) for entry in entries]
    elif any(map(_is_weight, entries)):
        pairs = zip(entries[::2], entries[1::2], strict=True)
        sources = [Source(path, weight) for weight, path in pairs]
    else:
        sources = [Source(path) for path in entries]
    has_weights = any(source.weight is not None for source in sources)
    for source in sources:
        of_terms = (source.sft_weight, source.kd_weight)
        if (
            not (isinstance(source.path, str) and source.path)
            or (has_weights and not _is_weight(source.weight))
            or not all(weight == 0 or _is_weight(weight) for weight in of_terms)
            or not any(of_terms)
        ):
            raise ValueError(source)
        yield source._replace(path=os.path.expanduser(source.path))


def _is_weight(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf
