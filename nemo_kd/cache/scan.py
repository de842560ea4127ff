"""Find or make the index of a chunk."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from nemo_kd.cache.index import ChunkBuilder, ChunkIndex, ChunkSummary
from nemo_kd.cache.layout import CacheError, index_name
from nemo_kd.cache.record import decode
from nemo_kd.cache.storage import LocalStorage, Storage, lines_of
from nemo_kd.files import read_file


def read_index(path: Path) -> ChunkIndex | None:
    """Return the index beside a data file; None if there is none, or a damaged one."""
    index_path = path.with_name(index_name(path.name))
    return ChunkIndex.parse(read_file(index_path)) if index_path.exists() else None


def complete_chunk(path: Path) -> ChunkSummary | None:
    """Return the summary of a complete chunk, else None.

    Its index has one, and the data file has the size that it states.
    """
    if not path.is_file():
        return None
    index = read_index(path)
    summary = index.summary if index is not None else None
    return summary if summary and summary.bytes == path.stat().st_size else None


def index_of(path: Path, summary: ChunkSummary) -> ChunkIndex:
    """Return a complete chunk's index with its summary; the file is read if its index is another's.

    Raises:
        CacheError: the file is not the one that `summary` describes.
    """
    index = read_index(path)
    if index is None or index.checksum != summary.sha256:
        index = scan_chunk(LocalStorage(str(path.parent)), path.name)
    if index.checksum != summary.sha256:
        raise CacheError(f"{path}: is not what it was when it was written")
    return replace(index, summary=summary)


def describes(index: ChunkIndex, size: int, mtime_ns: int) -> bool:
    """Return True if an index belongs to the file of this size and time; one with a summary needs
    no time.
    """
    return index.facts.bytes == size and (
        index.summary is not None or index.facts.mtime_ns == mtime_ns
    )


def scan_chunk(storage: Storage, name: str, mtime_ns: int | None = None) -> ChunkIndex:
    """Return the index of a chunk by decoding every line once.

    Its summary lacks what the lines do not hold: the records of the range without a line, and
    `computed_with`.

    Args:
        mtime_ns: modification time of the file, for an index without a summary.

    Raises:
        CacheError: a line is damaged or cut off, or there is none.
    """
    where = f"{storage.folder}/{name}"
    builder = ChunkBuilder(ChunkSummary(0, 0))
    digest = hashlib.sha256()
    lines = lines_of(name)
    indices: list[int] = []
    with storage.open(name) as file:
        for number, raw in enumerate(lines.split(file, where)):
            line = f"{where}:{number + 1}"
            row = decode(lines.read(raw, line), line, index=number)
            builder.add(row, len(raw))
            indices.append(row.example.index)
            digest.update(raw)
    if not indices:
        raise CacheError(f"{where}: the file is empty")
    builder.summary.first_index = indices[0]
    builder.summary.last_index = indices[-1]
    return builder.index(digest.digest(), mtime_ns)
