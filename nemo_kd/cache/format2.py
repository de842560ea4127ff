"""Read the list of complete chunks of a format 2 manifest; in format 3 the indexes have the
summaries.

While a job wrote, its manifest had a journal. Each line is the CRC-32 of its JSON in eight hex
digits, a space and the JSON; the first line names the manifest by the SHA-256 of its content, every
other line lists one chunk.
"""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

import orjson

from nemo_kd.cache.index import ChunkSummary

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
