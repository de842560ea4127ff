"""A segment: a fixed run of records of one chunk, computed and published by one process."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from nemo_kd.batch import CachedExample
from nemo_kd.cache.index import ChunkBuilder, ChunkSummary, LineFacts
from nemo_kd.cache.layout import CacheError, CacheLayout
from nemo_kd.cache.manifest import Manifest
from nemo_kd.cache.record import encode, trimmed
from nemo_kd.cache.storage import lines_of
from nemo_kd.files import explained, read_file, write_atomically

log = logging.getLogger(__name__)

Segment = tuple[int, range]
"""(number of the chunk, record indices)."""


Record = CachedExample | str
"""A row, or the reason why a record makes none."""


def publish_segment(
    layout: CacheLayout,
    manifest: Manifest,
    segment: Segment,
    records: Sequence[Record],
    computed_with: dict[str, Any],
) -> ChunkSummary:
    """Make a segment part of the cache, whole or not at all, and return its counts.

    Args:
        records: one for each of the segment's indices, in their order.
        computed_with: what rounding depends on, for the summary.

    Raises:
        CacheError: the records are not those of the segment; or the file system refuses.
    """
    chunk, indices = segment
    path = segment_path(layout, chunk, indices)
    if len(records) != len(indices):
        raise CacheError(
            f"the segment of examples {indices[0]} to {indices[-1]} got {len(records)} of "
            f"{len(indices)} records"
        )
    codec = manifest.codec["name"]
    positions = manifest.codec.get("positions", "all")
    lines = lines_of(layout.chunk_name(chunk))
    builder = ChunkBuilder(
        ChunkSummary(indices[0], indices[-1], computed_with=[computed_with])
    )
    rows: list[bytes] = []
    for index, record in zip(indices, records, strict=True):
        if isinstance(record, str):
            builder.summary.skip(record)
            continue
        if record.example.index != index:
            raise CacheError(
                f"example {record.example.index} came in the place of example {index}"
            )
        raw = lines.write(encode(record, codec, positions))
        builder.add(trimmed(record), len(raw), positions)  # as a reader gets it
        rows.append(raw)
    payload = b"".join(rows)
    header = dataclasses.asdict(builder) | {
        "sha256": hashlib.sha256(payload).hexdigest()
    }
    with explained(path.parent):
        path.parent.mkdir(exist_ok=True)
    write_atomically(path, [orjson.dumps(header), b"\n", payload])
    return builder.summary


def segments(indices: range, segment_examples: int) -> list[range]:
    """Return the segments of a chunk."""
    return [
        indices[start : start + segment_examples]
        for start in range(0, len(indices), segment_examples)
    ]


def segment_path(layout: CacheLayout, chunk: int, indices: range) -> Path:
    """Return the path of a published segment."""
    return layout.segments_folder(chunk) / f"{indices[0]:012d}-{indices[-1]:012d}"


def read_segment(path: Path) -> tuple[ChunkBuilder, bytes]:
    """Return counts and places of a published segment, and its bytes for the chunk.

    Raises:
        CacheError: it is damaged.
    """
    header, _, payload = read_file(path).partition(b"\n")
    try:
        fields = orjson.loads(header)
        if fields["sha256"] != hashlib.sha256(payload).hexdigest():
            raise ValueError("wrong checksum")
        summary = ChunkSummary.parse(fields["summary"])
        return ChunkBuilder(summary, LineFacts(**fields["facts"])), payload
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(
            f"{path}: the segment is damaged ({error}); run the same command again (for a cache "
            "in parts, the job of this part, or one without `part`): it is computed again"
        ) from error


def is_whole(path: Path) -> bool:
    """Return True if a segment is there and whole; a damaged one is removed."""
    try:
        read_segment(path)
    except FileNotFoundError:
        return False
    except CacheError:
        log.warning("%s is damaged and is computed again", path)
        path.unlink(missing_ok=True)
        return False
    return True
