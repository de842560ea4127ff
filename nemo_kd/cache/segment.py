"""A segment: a fixed run of records of one chunk, computed and published by one process."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from pathlib import Path
from typing import Any

import orjson

from nemo_kd.batch import CachedExample
from nemo_kd.cache.index import ChunkBuilder, ChunkSummary, LineFacts
from nemo_kd.cache.layout import CacheError, CacheLayout
from nemo_kd.cache.lines import lines_of
from nemo_kd.cache.manifest import Manifest
from nemo_kd.cache.record import encode, trimmed
from nemo_kd.files import explained, read_file, write_atomically

log = logging.getLogger(__name__)

PUBLISHED_STAYS = "; what is published stays and is not computed again"

Segment = tuple[int, range]
"""(number of the chunk, record indices)."""


class SegmentWriter:
    """The rows of one segment in the order of their indices; `publish` makes them part of the
    cache.

    Args:
        computed_with: what rounding depends on, for the summary.
    """

    def __init__(
        self,
        layout: CacheLayout,
        manifest: Manifest,
        segment: Segment,
        computed_with: dict[str, Any],
    ) -> None:
        chunk, self.indices = segment
        self.path = segment_path(layout, chunk, self.indices)
        self.codec = manifest.codec["name"]
        self.positions = manifest.codec.get("positions", "all")
        self.top_k = manifest.top_k
        self._builder = ChunkBuilder(
            ChunkSummary(self.indices[0], self.indices[-1], computed_with=[computed_with])
        )
        self.summary = self._builder.summary
        self._lines = lines_of(layout.chunk_name(chunk))
        self._payload: list[bytes] = []
        self._last_index = self.indices[0] - 1

    def write(self, row: CachedExample) -> None:
        """Append a row.

        Raises:
            CacheError: its index does not follow the last one's, or it holds more tokens per
                position than the cache.
        """
        index = row.example.index
        k = row.teacher.topk_logits_PK.shape[1]
        if k > self.top_k:
            raise CacheError(
                f"example {index} has {k} logits per position in a cache of top_k={self.top_k}"
            )
        if not self._last_index < index <= self.indices[-1]:
            raise CacheError(
                f"example {index} came after example {self._last_index} in the segment of "
                f"{self.indices[0]} to {self.indices[-1]}"
            )
        self._last_index = index
        raw = self._lines.write(encode(row, self.codec, self.positions))
        self._payload.append(raw)
        self._builder.add(trimmed(row), len(raw), self.positions)  # as a reader gets it

    def skip(self, reason: str) -> None:
        """Count a record that makes no row."""
        self.summary.skip(reason)

    def publish(self) -> None:
        """Make the segment appear, whole.

        Raises:
            CacheError: records of its range are neither written nor skipped; or the file system
                refuses.
        """
        found = self.summary.examples + sum(self.summary.skipped.values())
        if found != len(self.indices):
            raise CacheError(
                f"the segment of examples {self.indices[0]} to {self.indices[-1]} got {found} of "
                f"{len(self.indices)} records"
            )
        payload = b"".join(self._payload)
        header = dataclasses.asdict(self._builder) | {
            "sha256": hashlib.sha256(payload).hexdigest()
        }
        with explained(self.path.parent, PUBLISHED_STAYS):
            self.path.parent.mkdir(exist_ok=True)
        write_atomically(
            self.path, [orjson.dumps(header), b"\n", payload], PUBLISHED_STAYS
        )


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
