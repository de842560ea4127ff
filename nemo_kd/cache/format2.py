"""Read the list of complete chunks of a format 2 manifest; in format 3 the indexes have the
summaries.

While a job wrote, its manifest had a journal. Each line is the CRC-32 of its JSON in eight hex
digits, a space and the JSON; the first line names the manifest by the SHA-256 of its content, every
other line lists one chunk.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from typing import Any

import orjson

from nemo_kd.cache.index import ChunkSummary
from nemo_kd.cache.layout import CacheError

VERSION = 2
JOURNAL_SUFFIX = ".journal"


def listed_chunks(
    manifest: dict[str, Any], content: bytes, journal: bytes, path: str
) -> dict[int, ChunkSummary]:
    """Return the summaries of the chunks that a manifest and its journal list.

    Args:
        manifest: the object in `content`, which is the manifest's file.
        journal: content of its journal, read before the manifest; empty if there is none.

    Raises:
        CacheError: a summary is damaged.
        TypeError, AttributeError: `chunks` is not an object.
    """
    listed: dict[int, ChunkSummary] = {}
    for key, payload in [*manifest["chunks"].items(), *_journaled(content, journal)]:
        try:
            if not re.fullmatch("0|[1-9][0-9]{0,17}", key):
                raise ValueError("the key is not the number of a chunk")
            listed[int(key)] = ChunkSummary.parse(payload)
        except (ValueError, TypeError, AttributeError) as error:
            raise CacheError(
                f"{path}: chunks.{str(key)[:20]}: {error}; the manifest was edited or damaged: "
                "restore it"
            ) from error
    return listed


def _journaled(content: bytes, journal: bytes) -> list[tuple[str, Any]]:
    """Return (key, summary) for each line, up to one that a kill left incomplete."""
    chunks: list[tuple[str, Any]] = []
    for number, line in enumerate(journal.split(b"\n")[:-1]):
        checksum, _, fields = line.partition(b" ")
        if checksum != b"%08x" % zlib.crc32(fields):
            break
        entry = orjson.loads(fields)
        if number:
            chunks.append((entry["chunk"], entry["summary"]))
        elif entry["manifest"] != hashlib.sha256(content).hexdigest():
            break  # the journal of an older manifest: this one has its chunks
    return chunks
