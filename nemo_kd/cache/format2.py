"""Read caches of format 2, whose manifest lists the complete chunks, and upgrade them.

While a job wrote, its manifest had a journal. Each line is the CRC-32 of its JSON in eight hex
digits, a space and the JSON; the first line names the manifest by the SHA-256 of its content, every
other line lists one chunk.
"""

from __future__ import annotations

import dataclasses
import hashlib
import zlib
from typing import TYPE_CHECKING, Any

import orjson

from nemo_kd.cache.index import ChunkSummary
from nemo_kd.cache.layout import CacheError, CacheLayout
from nemo_kd.cache.scan import read_index, scan_chunk
from nemo_kd.cache.storage import LocalStorage
from nemo_kd.files import write_atomically

if TYPE_CHECKING:  # it imports this module
    from nemo_kd.cache.manifest import Manifest

VERSION = 2
JOURNAL_SUFFIX = ".journal"


def listed_chunks(chunks: dict[str, Any]) -> dict[int, ChunkSummary]:
    """Return the summaries in the field `chunks` of a manifest."""
    return {int(key): ChunkSummary.parse(summary) for key, summary in chunks.items()}


def journaled_chunks(journal: bytes, manifest: bytes) -> dict[int, ChunkSummary]:
    """Return the summaries in a journal, up to a line that a kill left incomplete.

    The journal of another manifest than the file `manifest` is ignored.
    """
    chunks: dict[str, Any] = {}
    for number, line in enumerate(journal.split(b"\n")[:-1]):
        checksum, _, fields = line.partition(b" ")
        if checksum != b"%08x" % zlib.crc32(fields):
            break
        entry = orjson.loads(fields)
        if number:
            chunks[entry["chunk"]] = entry["summary"]
        elif entry["manifest"] != hashlib.sha256(manifest).hexdigest():
            break
    return listed_chunks(chunks)


def upgrade(layout: CacheLayout, manifest: Manifest) -> None:
    """Make a cache of format 2 one of format 3; others stay as they are.

    Every whole chunk gets an index with a summary. Then the manifest is written without its list,
    and its journal is removed.
    """
    if manifest.format_version == VERSION:
        for chunk, summary in manifest.chunks.items():
            path = layout.chunk_path(chunk)
            if not path.is_file():
                continue
            index = read_index(path)
            if index is None or index.checksum != summary.sha256:
                try:
                    index = scan_chunk(LocalStorage(str(layout.folder)), path.name)
                except CacheError:
                    continue  # a damaged chunk is computed again
            if index.checksum == summary.sha256:
                index = dataclasses.replace(index, summary=summary)
                write_atomically(layout.index_path(chunk), index.to_bytes())
        manifest.save(layout.manifest_path)
    journal = layout.manifest_path.with_name(layout.manifest_name + JOURNAL_SUFFIX)
    journal.unlink(missing_ok=True)
