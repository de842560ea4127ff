"""Random access to the rows of a cache or of several, from any number of processes."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np

from nemo_kd.batch import CachedExample
from nemo_kd.cache.index import ChunkIndex, describes, scan_chunk
from nemo_kd.cache.layout import (
    SUBSET,
    CacheError,
    CacheLayout,
    Range,
    index_name,
    lines_of,
    open_storage,
    path_of,
)
from nemo_kd.cache.manifest import Manifest
from nemo_kd.cache.record import (
    check_selection,
    check_vocabulary,
    decode,
    is_packed,
)
from nemo_kd.cache.reduce import limited

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Chunk:
    name: str
    index: ChunkIndex
    lines: np.ndarray
    """Numbers of the lines that are not too long."""


class CacheReader:
    """The rows of one file or CHUNK_ID template; reading one touches its own bytes only.

    The places of the rows are in memory, 24 bytes each.

    Attributes:
        select: share of the loss positions that have targets, as in `cache.select`; None: all.
        chunk_facts: header of every chunk's index; it counts long rows and rows that are not
            selected too.

    Args:
        path: a file or a template, in a folder or behind a URL; `[a:b]` after it selects rows, by
            number or percent, negative ones from the end, as in `train_CHUNK_ID.jsonl.zst[:10%]`.
        n_chunks: chunks that the template must have; None reads all there are.
        top_k: likeliest teacher tokens to keep per position; None keeps all. The others join the
            tail.
        seq_length: rows with more positions are left out and counted in `dropped_too_long`.
        vocab_size: teacher tokens with ids from here on join the tail; None keeps all.
        partial: reads the chunks that are complete, where a cache is still being written.

    Raises:
        CacheError: a chunk is missing, damaged, or contradicts its manifest.
    """

    def __init__(
        self,
        path: str,
        n_chunks: int | None = None,
        top_k: int | None = None,
        seq_length: int | None = None,
        vocab_size: int | None = None,
        partial: bool = False,
    ) -> None:
        self.source = path
        self.path = path_of(path)
        self.top_k = top_k
        self.seq_length = seq_length
        self.vocab_size = vocab_size
        self.layout = CacheLayout(self.path)
        self.storage = open_storage(os.path.dirname(self.path))
        self._lines = lines_of(self.path)
        self.manifests: list[Manifest] = []
        self._chunks = self._open_chunks(n_chunks, partial)
        selects = [manifest.codec.get("select") for manifest in self.manifests]
        self.select: str | None = next(iter(selects), None)
        self.chunk_facts = facts = [chunk.index.facts for chunk in self._chunks]
        self.max_token_id = max(fact.max_token_id for fact in facts)
        self.max_topk_id = max(fact.max_topk_id for fact in facts)
        self.largest_k = max(fact.largest_k for fact in facts)
        self._ends = np.cumsum([len(chunk.lines) for chunk in self._chunks])
        self.dropped_too_long = sum(fact.num_lines for fact in facts) - int(
            self._ends[-1]
        )
        total = int(self._ends[-1])
        subset = SUBSET.fullmatch(path)
        start, end = subset.group("start", "end") if subset else (None, None)
        self._first = _bound(start, total, 0)
        self._last = max(self._first, _bound(end, total, total))

    def __len__(self) -> int:
        return self._last - self._first

    def __getitem__(self, position: int) -> CachedExample:
        chunk, line, place = self._locate(position)
        where = self.where(position)
        raw = self._lines.read(self.storage.read(*place), where)
        row = decode(raw, where, index=self._first + position)
        if row.example.num_tokens != chunk.index.num_positions[line]:
            raise CacheError(
                f"{where}: the line differs from the one that its index was made for; delete "
                f"{index_name(chunk.name)}"
            )
        check_selection(row, self.select, where)
        if self.manifests:
            check_vocabulary(row, self.manifests[0].vocab_size, where)
        return replace(row, teacher=limited(row.teacher, self.top_k, self.vocab_size))

    def has_packed_rows(self) -> bool:
        """Return True if the first row is of the packed codec; needs no manifest."""
        raw = self.storage.read(*self._locate(0)[2])
        return is_packed(self._lines.read(raw, self.path))

    def num_tokens(self, position: int) -> int:
        """Return the positions of a row."""
        chunk, line, _ = self._locate(position)
        return int(chunk.index.num_positions[line])

    def will_read(self, positions: Sequence[int]) -> None:
        """Fetch these rows ahead, all at once."""
        self.storage.will_read([self._locate(position)[2] for position in positions])

    def where(self, position: int) -> str:
        """`file:line` of a row, for messages."""
        chunk, line, _ = self._locate(position)
        return f"{self.storage.folder}/{chunk.name}:{line + 1}"

    def chunk_sizes(self) -> list[int]:
        """Return the rows of every chunk, in the order of the positions."""
        ends = np.clip(self._ends, self._first, self._last)
        sizes = np.diff(ends, prepend=self._first)
        return [int(size) for size in sizes if size]

    def fingerprint(self) -> str:
        """Return a checksum of all chunks and the selected rows."""
        parts = [chunk.index.sha256.hex() for chunk in self._chunks]
        parts += [
            f"{self._first}:{self._last}:{self.seq_length if self.dropped_too_long else None}"
        ]
        return f"sha256:{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()}"

    def _locate(self, position: int) -> tuple[_Chunk, int, Range]:
        """Return the chunk of a row, the number of its line there, and the line's place."""
        if not 0 <= position < len(self):
            raise IndexError(f"row {position} of {len(self)}")
        row = position + self._first
        number = int(np.searchsorted(self._ends, row, side="right"))
        chunk = self._chunks[number]
        line = int(chunk.lines[row - self._ends[number]])
        start, end = chunk.index.starts[line : line + 2].tolist()
        return chunk, line, (chunk.name, start, end)

    def _open_chunks(self, n_chunks: int | None, partial: bool) -> list[_Chunk]:
        names = set(self.storage.names())
        chunk_ids = self.layout.chunk_ids(names)
        shared = self._manifest(self.layout.manifest_name, names)
        if n_chunks is None:
            n_chunks = (
                shared.num_chunks
                if shared is not None
                else max(chunk_ids, default=0) + 1
            )
        self.storage.will_read(
            [
                (index, 0, None)
                for index in map(index_name, map(self.layout.chunk_name, chunk_ids))
                if index in names
            ]
        )
        chunks = []
        for chunk_id in chunk_ids if partial else range(n_chunks):
            name = self.layout.chunk_name(chunk_id)
            if name not in names:
                raise CacheError(
                    f"{self.storage.folder}/{name}: the chunk is missing ({len(chunk_ids)} of "
                    f"{n_chunks} chunks of {self.path} are there); write it with "
                    "compute_topk_logits, or correct the path (model.data.data_prefix) or n_chunks"
                )
            manifest = shared
            key = chunk_id
            if shared is None:
                own = CacheLayout(str(self.layout.folder / name)).manifest_name
                manifest = self._manifest(own, names)
                key = 0
            index = self._index(name, manifest, key)
            if index is not None:
                longest = self.seq_length or index.facts.max_positions
                lines = np.flatnonzero(index.num_positions <= longest)
                chunks.append(_Chunk(name, index, lines))
            elif not partial:
                raise CacheError(
                    f"{self.storage.folder}/{name}: the chunk is not complete: no manifest lists "
                    f"it, and {index_name(name)} is missing or damaged; run compute_topk_logits "
                    "again, or `logit_cache repair`, which makes an index if all records are there"
                )
        if not chunks:
            raise CacheError(
                f"{self.path}: there is no such file, or no complete chunk; check the path (rows are "
                "selected by [a:b] behind it), or run compute_topk_logits again"
            )
        return chunks

    def _manifest(self, name: str, names: set[str]) -> Manifest | None:
        if name not in names:
            return None
        manifest = Manifest.read(self.storage, name)
        self.manifests.append(manifest)
        if len({(each.tokenizer, each.vocab_size) for each in self.manifests}) > 1:
            raise CacheError(
                f"{self.path}: its chunks differ in tokenizer or vocab_size; read them in separate "
                "runs"
            )
        return manifest

    def _index(
        self, name: str, manifest: Manifest | None, key: int
    ) -> ChunkIndex | None:
        """Return the index of a chunk, made now if need be; None if it is not complete."""
        where = f"{self.storage.folder}/{name}"
        size, mtime_ns = self.storage.stat(name)
        index = None
        with contextlib.suppress(FileNotFoundError):
            index = ChunkIndex.parse(self.storage.read(index_name(name)))
        summary = None
        if manifest is not None:
            summary = manifest.summary_of(key, index)
            if summary is None:
                return None
            manifest.chunks[key] = summary
            covered = (summary.first_index, summary.last_index)
            expected = manifest.records_of(key)
            if manifest.merged_chunks is None and covered != expected:
                raise CacheError(
                    f"{where}: its index covers the records {covered}, the manifest expects "
                    f"{expected}: it is a copy of another chunk; restore it, or delete it and run "
                    "compute_topk_logits again"
                )
            if size != summary.bytes:
                raise CacheError(
                    f"{where}: {size} bytes, but its index says {summary.bytes}; the file is "
                    "damaged: `logit_cache repair` keeps its whole lines; or delete it and run "
                    "compute_topk_logits again"
                )
            if index is not None and index.checksum == summary.sha256:
                return index
        elif index is not None and describes(index, size, mtime_ns):
            return index
        index = scan_chunk(self.storage, name, None if manifest else mtime_ns)
        index = replace(index, summary=summary)
        if summary is not None and index.checksum != summary.sha256:
            raise CacheError(
                f"{where}: its bytes are not those that the manifest lists; restore the file, or "
                "delete it and run compute_topk_logits again"
            )
        if not self.storage.save(index_name(name), index.to_bytes()):
            log.warning(
                "%s has no index and none can be saved there; each run makes it again",
                where,
            )
        return index


def _bound(text: str | None, total: int, default: int) -> int:
    if text is None:
        return default
    number = round(int(text[:-1]) * total / 100) if text.endswith("%") else int(text)
    return min(max(number + total if number < 0 else number, 0), total)


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
