"""Several caches as one: rows one after the other, and the manifests of all."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from nemo_kd.batch import CachedExample
from nemo_kd.cache.manifest import Manifest
from nemo_kd.cache.reader import CacheReader


class CacheBlend:
    """Rows of several readers, one reader after the other; the sample order weights them.

    Teachers and the number of tokens per position may differ.
    """

    def __init__(self, readers: Sequence[CacheReader]) -> None:
        self.readers = list(readers)
        self._ends = list(accumulate(len(reader) for reader in readers))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, position: int) -> CachedExample:
        number, inner = self._locate(position)
        row = self.readers[number][inner]
        return replace(row, example=replace(row.example, source=number))

    def num_tokens(self, position: int) -> int:
        """Return the positions of a row."""
        number, inner = self._locate(position)
        return self.readers[number].num_tokens(inner)

    def will_read(self, positions: Sequence[int]) -> None:
        """Fetch these rows ahead, all at once."""
        located = [self._locate(position) for position in positions]
        for number, reader in enumerate(self.readers):
            reader.will_read([inner for source, inner in located if source == number])

    def source_chunks(self) -> list[list[int]]:
        """Return the rows of every chunk, one list per reader, in the order of the positions."""
        return [reader.chunk_sizes() for reader in self.readers]

    @property
    def manifests(self) -> list[Manifest]:
        return [manifest for reader in self.readers for manifest in reader.manifests]

    def fingerprint(self) -> str:
        """Return a checksum of the content of all."""
        parts = chr(10).join(reader.fingerprint() for reader in self.readers)
        return f"sha256:{hashlib.sha256(parts.encode()).hexdigest()}"

    def description(self) -> dict[str, Any]:
        """Describe the origin of the rows as plain values."""
        return {
            "paths": [reader.source for reader in self.readers],
            "fingerprint": self.fingerprint(),
            "caches": [
                {
                    "manifest": manifest.digest,
                    "teacher": manifest.teacher,
                    "dataset": manifest.dataset.get("fingerprint"),
                    "tokenizer": manifest.tokenizer,
                    "chat_template": manifest.chat_template,
                }
                for manifest in self.manifests
            ],
        }

    def _locate(self, position: int) -> tuple[int, int]:
        """Return the number of the reader and the position in it."""
        number = bisect_right(self._ends, position)
        return number, position - (self._ends[number - 1] if number else 0)
