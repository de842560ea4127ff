"""Examples of a split, and the data loader's view of them as micro-batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch.utils.data import Dataset

from nemo_kd.batch import CachedExample, Example

Row = Example | CachedExample


class Rows(Protocol):
    """Random access to the examples of one or several sources, one source after the other."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> Row: ...

    def num_tokens(self, position: int, /) -> int:
        """Return the length of an example without reading it."""

    def will_read(self, positions: Sequence[int], /) -> None:
        """Prepare to read these examples next."""

    def source_chunks(self) -> list[list[int]]:
        """Return the rows of every chunk, a list per source, in the order of positions."""

    def description(self) -> dict[str, Any]:
        """Return `paths`, `fingerprint` of the content, and the origin of `caches`."""


Share = Callable[[Sequence[int], Callable[[int], int]], list[list[int]]]
"""(positions of a global batch, length of a position) -> positions of this rank's batches."""


class MicroBatchRows(Dataset[Row]):
    """Rows of this rank's micro-batches, requested by all positions of a global batch.

    Loader workers divide the positions and read the rows: they have the indexes with the lengths of
    examples.
    """

    def __init__(self, rows: Rows, share: Share) -> None:
        self.rows = rows
        self.share = share

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, positions: list[int]) -> list[list[Row]]:
        """Return rows per micro-batch; storage may fetch all while the first are decoded."""
        micro_batches = self.share(positions, self.rows.num_tokens)
        self.rows.will_read([position for batch in micro_batches for position in batch])
        return [[self.rows[position] for position in batch] for batch in micro_batches]


class TokenizedRows:
    """Tokenized records in memory, path after path."""

    def __init__(
        self, paths: Sequence[str], examples: Sequence[Sequence[Example]]
    ) -> None:
        self.paths = list(paths)
        self.sizes = [len(of_path) for of_path in examples]
        self.examples = [example for of_path in examples for example in of_path]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, position: int) -> Example:
        return self.examples[position]

    def num_tokens(self, position: int) -> int:
        return self.examples[position].num_tokens

    def will_read(self, positions: Sequence[int]) -> None:
        """Do nothing: all examples are in memory."""

    def source_chunks(self) -> list[list[int]]:
        """Return each path as one chunk."""
        return [[size] if size else [] for size in self.sizes]

    def description(self) -> dict[str, Any]:
        """Return paths and the fingerprint of token ids, labels and loss masks."""
        digest = hashlib.sha256()
        for example in self.examples:
            for values, dtype in (
                (example.tokens_S, "<i4"),
                (example.labels_S, "<i4"),
                (example.loss_mask_S, "u1"),
            ):
                digest.update(values.astype(dtype).tobytes())
        return {
            "paths": self.paths,
            "fingerprint": f"sha256:{digest.hexdigest()}",
            "caches": [],
        }
