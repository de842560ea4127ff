"""Makes the index of a chunk from the chunk itself."""

from __future__ import annotations

import hashlib

from nemo_kd.cache.index import ChunkIndex, LineFacts
from nemo_kd.cache.layout import CacheError
from nemo_kd.cache.lines import lines_of
from nemo_kd.cache.record import decode
from nemo_kd.cache.storage import Storage


def scan_chunk(storage: Storage, name: str, mtime_ns: int = 0) -> ChunkIndex:
    """The index of a chunk, by decoding every line once.

    Raises:
        CacheError: a line is damaged or cut off, or there is none.
    """
    facts, digest, lines = LineFacts(), hashlib.sha256(), lines_of(name)
    with storage.open(name) as file:
        for number, raw in enumerate(lines.split(file, f"{storage.folder}/{name}")):
            where = f"{storage.folder}/{name}:{number + 1}"
            facts.add(decode(lines.read(raw, where), where, index=number), len(raw))
            digest.update(raw)
    if not facts.line_bytes:
        raise CacheError(f"{storage.folder}/{name}: the file is empty")
    return facts.index(digest.digest(), mtime_ns)
