"""Random access to the rows of a cache, from any number of processes."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nemo_kd.batch import CachedExample
from nemo_kd.cache import format2
from nemo_kd.cache.index import ChunkFacts, ChunkIndex
from nemo_kd.cache.layout import SUBSET, CacheError, CacheLayout, index_name
from nemo_kd.cache.lines import lines_of
from nemo_kd.cache.manifest import Manifest
from nemo_kd.cache.record import check_vocabulary, decode, is_packed
from nemo_kd.cache.reduce import limited
from nemo_kd.cache.scan import scan_chunk
from nemo_kd.cache.storage import Storage, open_storage

log = logging.getLogger(__name__)

INDEX_LINES_IN_MEMORY = 1 << 22
"""Lines whose places are kept in memory (16 bytes each); the chunks read last stay, at least one.
"""
INDEXES_AHEAD = 32
"""Indexes that are fetched together when a cache is opened."""


def is_subset(path: str) -> bool:
    """Return True if a path selects rows, for example `train_CHUNK_ID.jsonl[:10%]`."""
    return SUBSET.fullmatch(path) is not None


@dataclass
class _Chunk:
    name: str
    facts: ChunkFacts
    sha256: bytes
    num_rows: int
    """Lines that are not too long."""


class CacheReader:
    """The rows of one file or CHUNK_ID template; reading one touches its own bytes only.

    Memory does not grow with the cache: indexes are kept of a few chunks at a time.

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
        subset = SUBSET.fullmatch(path)
        self.path = subset["path"] if subset else path
        self.top_k = top_k
        self.seq_length = seq_length
        self.vocab_size = vocab_size
        self.layout = CacheLayout(self.path)
        self.storage: Storage = open_storage(
            self.path.rpartition("/")[0]
            if "://" in self.path
            else str(self.layout.folder)
        )
        self._lines = lines_of(self.path)
        self._indexes: OrderedDict[int, tuple[ChunkIndex, np.ndarray | None]] = (
            OrderedDict()
        )
        self._lines_in_memory = 0
        self.manifests: list[Manifest] = []
        self._chunks = self._open_chunks(n_chunks, partial)
        facts = [chunk.facts for chunk in self._chunks]
        self.max_token_id = max(fact.max_token_id for fact in facts)
        self.max_topk_id = max(fact.max_topk_id for fact in facts)
        self.largest_k = max(fact.largest_k for fact in facts)
        self.dropped_too_long = sum(
            chunk.facts.num_lines - chunk.num_rows for chunk in self._chunks
        )
        self._ends = np.cumsum([chunk.num_rows for chunk in self._chunks])
        total = int(self._ends[-1])
        self._first = _bound(subset["start"], total, 0) if subset else 0
        self._last = (
            max(self._first, _bound(subset["end"], total, total)) if subset else total
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_indexes": OrderedDict(), "_lines_in_memory": 0}

    def __len__(self) -> int:
        return self._last - self._first

    def __getitem__(self, position: int) -> CachedExample:
        chunk_number, line, start, end = self._locate(position)
        chunk = self._chunks[chunk_number]
        row = self._row(chunk, line, self.storage.read(chunk.name, start, end))
        if row.example.num_tokens != self._index(chunk_number)[0].num_positions[line]:
            raise CacheError(
                f"{self._where(chunk, line)}: the line differs from the one that its index was "
                f"made for; delete {index_name(chunk.name)}"
            )
        return row

    def has_packed_rows(self) -> bool:
        """Return True if the first row is of the packed codec; needs no manifest."""
        chunk, _, start, end = self._locate(0)
        name = self._chunks[chunk].name
        return is_packed(self._lines.read(self.storage.read(name, start, end), name))

    def num_tokens(self, position: int) -> int:
        """Return the positions of a row."""
        chunk, line, _, _ = self._locate(position)
        return int(self._index(chunk)[0].num_positions[line])

    def will_read(self, positions: Sequence[int]) -> None:
        """Fetch these rows ahead, all at once."""
        located = [self._locate(position) for position in positions]
        self.storage.will_read(
            [(self._chunks[chunk].name, start, end) for chunk, _, start, end in located]
        )

    def where(self, position: int) -> str:
        """`file:line` of a row, for messages."""
        chunk, line, _, _ = self._locate(position)
        return self._where(self._chunks[chunk], line)

    def chunk_sizes(self) -> list[int]:
        """Return the rows of every chunk, in the order of the positions."""
        ends = np.clip(self._ends, self._first, self._last)
        sizes = np.diff(ends, prepend=self._first)
        return [int(size) for size in sizes if size]

    @property
    def chunk_facts(self) -> list[ChunkFacts]:
        """Header of every chunk's index; it counts long rows and rows that are not selected too."""
        return [chunk.facts for chunk in self._chunks]

    def fingerprint(self) -> str:
        """Return a checksum of all chunks and the selected rows."""
        parts = [chunk.sha256.hex() for chunk in self._chunks]
        parts += [
            f"{self._first}:{self._last}:{self.seq_length if self.dropped_too_long else None}"
        ]
        return f"sha256:{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()}"

    def _locate(self, position: int) -> tuple[int, int, int, int]:
        """Return the number of the chunk, the line in it, and the line's bytes as (start, end)."""
        if not 0 <= position < len(self):
            raise IndexError(f"row {position} of {len(self)}")
        row = position + self._first
        chunk = int(np.searchsorted(self._ends, row, side="right"))
        line = row - (int(self._ends[chunk - 1]) if chunk else 0)
        index, fitting = self._index(chunk)
        if fitting is not None:
            line = int(fitting[line])
        return chunk, line, int(index.starts[line]), int(index.starts[line + 1])

    def _row(self, chunk: _Chunk, line: int, raw: bytes) -> CachedExample:
        where = self._where(chunk, line)
        row = decode(self._lines.read(raw, where), where, index=line)
        if self.manifests:
            check_vocabulary(row, self.manifests[0].vocab_size, where)
        teacher = limited(row.teacher, self.top_k, self.vocab_size)
        return row if teacher is row.teacher else CachedExample(row.example, teacher)

    def _where(self, chunk: _Chunk, line: int) -> str:
        return f"{self.storage.folder}/{chunk.name}:{line + 1}"

    def _open_chunks(self, n_chunks: int | None, partial: bool) -> list[_Chunk]:
        names = set(self.storage.names())
        chunk_ids = self.layout.chunk_ids(list(names))
        shared = self._manifest(
            self.layout.manifest_name, names
        ) or self._manifest_of_template(names)
        if n_chunks is None:
            n_chunks = (
                shared.num_chunks if shared is not None else max(chunk_ids, default=0) + 1
            )
        elif n_chunks < 1:
            raise CacheError(
                f"{self.path}: n_chunks={n_chunks}, but a cache has at least one chunk"
            )
        elif not self.layout.is_template and n_chunks != 1:
            raise CacheError(
                f"{self.path}: n_chunks={n_chunks}, but a path without CHUNK_ID is one chunk"
            )
        if partial and chunk_ids:
            wanted = [
                chunk_id
                for chunk_id in chunk_ids
                if self._may_be_complete(chunk_id, shared, names)
            ]
            if not wanted:
                raise CacheError(
                    f"{self.path}: no chunk is complete yet; wait for compute_topk_logits, or run it again"
                )
        else:
            wanted = [chunk_id for chunk_id in chunk_ids if chunk_id < n_chunks]
            present = set(wanted)
            missing = next((i for i in range(n_chunks) if i not in present), None)
            if missing is not None:
                raise CacheError(
                    f"{self.storage.folder}/{self.layout.chunk_name(missing)}: the chunk is "
                    f"missing ({len(chunk_ids)} of {n_chunks} chunks of {self.path} are there); "
                    "write it with compute_topk_logits, or correct the path "
                    "(model.data.data_prefix) or n_chunks"
                )
        chunks = []
        for number, chunk_id in enumerate(wanted):
            if number % INDEXES_AHEAD == 0:
                ahead = map(
                    self.layout.chunk_name, wanted[number : number + INDEXES_AHEAD]
                )
                self.storage.will_read(
                    [
                        (index, 0, None)
                        for index in map(index_name, ahead)
                        if index in names
                    ]
                )
            name = self.layout.chunk_name(chunk_id)
            manifest = shared
            if shared is None:
                own = CacheLayout(str(self.layout.folder / name)).manifest_name
                manifest = self._manifest(own, names)
            key = chunk_id if shared is not None else 0
            chunks.append(self._open_chunk(name, manifest, key))
        return chunks

    def _may_be_complete(
        self, chunk_id: int, manifest: Manifest | None, names: set[str]
    ) -> bool:
        if manifest is None:
            return True
        if manifest.format_version == format2.VERSION:
            return chunk_id in manifest.chunks
        return index_name(self.layout.chunk_name(chunk_id)) in names

    def _manifest(self, name: str, names: set[str]) -> Manifest | None:
        if name not in names:
            return None
        manifest = self._read_manifest(name, names)
        if self.manifests:
            first = self.manifests[0]
            for field in ("tokenizer", "vocab_size"):
                if getattr(first, field) != getattr(manifest, field):
                    raise CacheError(
                        f"{self.path}: its chunks differ in {field}: {getattr(first, field)!r} "
                        f"and {getattr(manifest, field)!r}; read them in separate runs"
                    )
        self.manifests.append(manifest)
        return manifest

    def _manifest_of_template(self, names: set[str]) -> Manifest | None:
        """Return the manifest of a template that the file is a chunk of, limited to this chunk."""
        name = self.layout.chunk_name(0)
        for layout, number in self.layout.templates():
            if layout.manifest_name not in names or name not in names:
                continue
            manifest = self._read_manifest(layout.manifest_name, names)
            summary = manifest.summary_of(number, self._read_index(name))
            if summary is not None and self.storage.stat(name)[0] == summary.bytes:
                records = {
                    "start_from_idx": summary.first_index,
                    "end_at_idx": summary.last_index,
                }
                of_chunk = replace(
                    manifest,
                    chunks={0: summary},
                    merged_chunks=1,
                    n_examples_per_chunk=None,
                    dataset=manifest.dataset | records,
                )
                of_chunk.format_version = manifest.format_version
                self.manifests.append(of_chunk)
                return of_chunk
        return None

    def _read_manifest(self, name: str, names: set[str]) -> Manifest:
        journal = b""
        if name + format2.JOURNAL_SUFFIX in names:
            # If it is gone meanwhile, its chunks are in the manifest.
            with contextlib.suppress(FileNotFoundError):
                journal = self.storage.read(name + format2.JOURNAL_SUFFIX)
        return Manifest.parse(
            self.storage.read(name), f"{self.storage.folder}/{name}", journal
        )

    def _open_chunk(self, name: str, manifest: Manifest | None, key: int) -> _Chunk:
        where = f"{self.storage.folder}/{name}"
        size, mtime_ns = self.storage.stat(name)
        index = self._read_index(name)
        if manifest is None:
            known = index
            if index is None or not _describes(index, size, mtime_ns):
                index = scan_chunk(self.storage, name, mtime_ns)
                if known is None or known.summary is None:  # else a manifest may need it
                    self._save_index(name, index)
        else:
            summary = manifest.summary_of(key, index)
            if summary is None:
                raise CacheError(
                    f"{where}: the chunk is not complete: {_why(manifest, index_name(name))}; run "
                    "compute_topk_logits again, or `logit_cache repair`, which makes an index if "
                    "all records are there"
                )
            if size != summary.bytes:
                raise CacheError(
                    f"{where}: {size} bytes, but its index says {summary.bytes}; the file is "
                    "damaged: `logit_cache repair` keeps its whole lines; or delete it and run "
                    "compute_topk_logits again"
                )
            if index is None or index.checksum != summary.sha256:
                index = scan_chunk(self.storage, name)
                if index.checksum != summary.sha256:
                    raise CacheError(
                        f"{where}: its bytes are not those that the manifest lists; `logit_cache "
                        "verify` names the damage; restore the file, or delete it and run "
                        "compute_topk_logits again"
                    )
                index = replace(index, summary=summary)
                self._save_index(name, index)
            manifest.chunks[key] = summary
        fits = index.facts.num_lines
        if self.seq_length is not None and index.facts.max_positions > self.seq_length:
            fits = int((index.num_positions <= self.seq_length).sum())
        return _Chunk(name, index.facts, index.sha256, fits)

    def _index(self, number: int) -> tuple[ChunkIndex, np.ndarray | None]:
        """Return the index of a chunk, and its lines that are not too long (None: all)."""
        if number not in self._indexes:
            chunk = self._chunks[number]
            index = self._read_index(chunk.name)
            if index is None or index.sha256 != chunk.sha256:
                index = scan_chunk(self.storage, chunk.name)
            fitting = None
            if chunk.num_rows != chunk.facts.num_lines:
                fitting = np.flatnonzero(index.num_positions <= (self.seq_length or 0))
            self._indexes[number] = (replace(index, summary=None), fitting)
            self._lines_in_memory += len(index)
            while (
                len(self._indexes) > 1 and self._lines_in_memory > INDEX_LINES_IN_MEMORY
            ):
                self._lines_in_memory -= len(self._indexes.popitem(last=False)[1][0])
        self._indexes.move_to_end(number)
        return self._indexes[number]

    def _read_index(self, name: str) -> ChunkIndex | None:
        try:
            return ChunkIndex.parse(self.storage.read(index_name(name)))
        except OSError:
            return None

    def _save_index(self, name: str, index: ChunkIndex) -> None:
        if not self.storage.save(index_name(name), index.to_bytes()):
            log.warning(
                "%s/%s has no index and none can be saved there; each run makes it again",
                self.storage.folder,
                name,
            )


def _describes(index: ChunkIndex, size: int, mtime_ns: int) -> bool:
    """Return True if an index belongs to the file of this size and time; one with a summary needs
    no time.
    """
    return index.facts.bytes == size and (
        index.summary is not None or index.facts.mtime_ns == mtime_ns
    )


def _why(manifest: Manifest, index: str) -> str:
    if manifest.format_version == format2.VERSION:
        return "the manifest does not list it"
    return f"{index} is missing, damaged or of an older version"


def _bound(text: str | None, total: int, default: int) -> int:
    if text is None:
        return default
    number = round(int(text[:-1]) * total / 100) if text.endswith("%") else int(text)
    return min(max(number + total if number < 0 else number, 0), total)
