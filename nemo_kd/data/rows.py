"""What a split's examples are read through, also by the data loader's worker processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch.utils.data import Dataset

from nemo_kd.batch import CachedExample, Example

Row = Example | CachedExample


class Rows(Protocol):
    """Random access to the examples of one or several sources, which lie one after the other."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> Row: ...

    def will_read(self, positions: Sequence[int], /) -> None:
        """A hint that these are asked for next."""

    def source_chunks(self) -> list[list[int]]:
        """Rows of every chunk, one list a source, in the order of the positions."""

    def description(self) -> dict[str, Any]:
        """`paths`, `fingerprint` of the content, and `caches`: what their manifests say about their origin."""


class RowsWithFiller(Dataset[Row | None]):
    """The rows, and None for a negative position: a row that only fills up a batch."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Row | None:
        return None if position < 0 else self.rows[position]

    def __getitems__(self, positions: list[int]) -> list[Row | None]:
        """A whole batch, which torch's loader asks for; storage may fetch its rows while the first ones are decoded."""
        self.rows.will_read([position for position in positions if position >= 0])
        return [self[position] for position in positions]
