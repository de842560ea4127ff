"""What a split's examples are read through, also by the data loader's worker processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch.utils.data import Dataset

from nemo_kd.batch import CachedExample, Example

Row = Example | CachedExample


class Rows(Protocol):
    """Random access to the examples of one or several sources, which lie one after the other."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> Row: ...

    def num_tokens(self, position: int, /) -> int:
        """Positions of an example, without reading it."""

    def will_read(self, positions: Sequence[int], /) -> None:
        """A hint that these are asked for next."""

    def source_chunks(self) -> list[list[int]]:
        """Rows of every chunk, one list a source, in the order of the positions."""

    def description(self) -> dict[str, Any]:
        """`paths`, `fingerprint` of the content, and `caches`: what their manifests say about their origin."""


Share = Callable[[Sequence[int], Callable[[int], int]], list[list[int]]]
"""(positions of a global batch, number of tokens of a position) -> positions of this rank's micro-batches."""


class MicroBatchRows(Dataset[Row]):
    """The rows of this rank's micro-batches, asked for by all positions of a global batch.

    Loader workers cut and read: they have the indexes that tell how long examples are.
    """

    def __init__(self, rows: Rows, share: Share) -> None:
        self.rows, self.share = rows, share

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, positions: list[int]) -> list[list[Row]]:
        """Lists of rows; storage may fetch all of them while the first ones are decoded."""
        micro_batches = self.share(positions, self.rows.num_tokens)
        self.rows.will_read([position for batch in micro_batches for position in batch])
        return [[self.rows[position] for position in batch] for batch in micro_batches]
