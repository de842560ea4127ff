"""Several caches as one: rows one after the other, and the manifests of all."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from nemo_kd.batch import CachedExample
from nemo_kd.cache.layout import CacheError
from nemo_kd.cache.manifest import Manifest
from nemo_kd.cache.reader import CacheReader


class CacheBlend:
    """Rows of several readers by one position. How often each is drawn is the business of the sample order.

    They may have different teachers and different numbers of tokens a position, but one tokenizer.

    Raises:
        CacheError: their tokenizers differ.
    """

    def __init__(self, readers: Sequence[CacheReader]) -> None:
        self.readers = list(readers)
        self._ends = list(accumulate(len(reader) for reader in readers))
        described = [(reader.path, manifest) for reader in readers for manifest in reader.manifests]
        for path, manifest in described[1:]:
            first_path, first = described[0]
            if manifest.tokenizer != first.tokenizer:
                raise CacheError(
                    f"{path} and {first_path} were written with different tokenizers ({manifest.tokenizer} and "
                    f"{first.tokenizer}); read them in separate runs"
                )

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, position: int) -> CachedExample:
        reader, inner = self._locate(position)
        return reader[inner]

    def will_read(self, positions: Sequence[int]) -> None:
        """Asks the operating system to fetch these rows ahead."""
        for position in positions:
            reader, inner = self._locate(position)
            reader.will_read([inner])

    @property
    def manifests(self) -> list[Manifest]:
        return [manifest for reader in self.readers for manifest in reader.manifests]

    def fingerprint(self) -> str:
        """Identifies the content of all."""
        parts = chr(10).join(reader.fingerprint() for reader in self.readers)
        return f"sha256:{hashlib.sha256(parts.encode()).hexdigest()}"

    def _locate(self, position: int) -> tuple[CacheReader, int]:
        if not 0 <= position < len(self):
            raise IndexError(f"row {position} of {len(self)}")
        number = bisect_right(self._ends, position)
        return self.readers[number], position - (self._ends[number - 1] if number else 0)
