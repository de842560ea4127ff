"""The journal of a manifest: what was listed since the manifest was written, one line a chunk.

Listing a chunk so costs the same however many there are. A line is the CRC-32 of its JSON in eight hex digits, a space,
the JSON and a line break. The first line names the content of the manifest that the others add to: once the manifest is
replaced by one with their chunks, the journal says nothing more.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from nemo_kd.cache.layout import CacheError
from nemo_kd.files import explained, open_without_links, sync_folder

SUFFIX = ".journal"


class JournalPart(NamedTuple):
    """The whole lines of a journal, or of its new bytes.

    Attributes:
        manifest: SHA-256 of the manifest's content, where the part holds the first line.
        chunks: (chunk's number as text, fields of its summary) in the order in which they were listed.
        end: bytes of the part that are whole lines; a line that is torn, as after a kill, may follow.
    """

    manifest: str
    chunks: list[tuple[str, dict[str, Any]]]
    end: int


def journal_path(manifest_path: Path) -> Path:
    """Return the path of the journal beside a manifest."""
    return manifest_path.with_name(manifest_path.name + SUFFIX)


def manifest_digest(content: bytes) -> str:
    """Return what the first line of a journal says of its manifest."""
    return hashlib.sha256(content).hexdigest()


def first_line(manifest: str) -> bytes:
    """Encode the first line; `manifest` is the digest of its content."""
    return _line({"manifest": manifest})


def chunk_line(chunk: str, summary: dict[str, Any]) -> bytes:
    """Encode the line that lists a chunk."""
    return _line({"chunk": chunk, "summary": summary})


def parse(content: bytes, path: str) -> JournalPart:
    """Read the whole lines of a journal; whatever a kill left of the last line is ignored.

    Raises:
        CacheError: a line in front of the last one is damaged.
    """
    lines = content.split(b"\n")
    manifest, chunks, end = "", list[tuple[str, dict[str, Any]]](), 0
    for number, line in enumerate(lines[:-1]):
        try:
            fields = _fields(line)
            if "manifest" in fields:
                manifest = str(fields["manifest"])
            else:
                chunk, summary = fields["chunk"], fields["summary"]
                if not isinstance(chunk, str) or not isinstance(summary, dict):
                    raise TypeError("chunk is not text, or summary not an object")
                chunks.append((chunk, summary))
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) - 2 and not lines[-1]:
                break
            raise CacheError(
                f"{path}:{number + 1}: the line is damaged ({error}); restore the file from a copy, or delete it: chunks "
                "that only it lists are then computed again"
            ) from error
        end += len(line) + 1
    return JournalPart(manifest, chunks, end)


def append(path: Path, start: int, lines: Sequence[bytes], note: str) -> int:
    """Write lines durably behind the first `start` bytes, cutting what a kill left there; return the new end.

    The caller holds the manifest's lock. Errors and `note` are those of `nemo_kd.files.explained`.
    """
    content = b"".join(lines)
    with explained(path, note):
        if start == 0:
            path.unlink(missing_ok=True)  # of an older manifest; whoever reads it keeps what it was
        descriptor = open_without_links(path, os.O_WRONLY if start else os.O_WRONLY | os.O_CREAT)
        with os.fdopen(descriptor, "wb") as journal:
            if os.fstat(descriptor).st_size < start:
                raise CacheError(
                    f"{path}: lost bytes while this job ran; run the same command again"
                )
            journal.truncate(start)
            journal.seek(start)
            journal.write(content)
            journal.flush()
            os.fsync(journal.fileno())
        if start == 0:
            sync_folder(path.parent)
    return start + len(content)


def _line(payload: dict[str, Any]) -> bytes:
    content = orjson.dumps(payload)
    return b"%08x %s\n" % (zlib.crc32(content), content)


def _fields(line: bytes) -> dict[str, Any]:
    checksum, _, content = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(content):
        raise ValueError("wrong checksum")
    fields = orjson.loads(content)
    if not isinstance(fields, dict):
        raise TypeError("not an object")
    return fields
