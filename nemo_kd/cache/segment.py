"""A segment: a fixed run of records of one chunk, computed and published by one process.

Encoding is Python work for the CPU; `SegmentPublisher` does it in another process, since in a
thread it would delay the thread that feeds a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import logging
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson

from nemo_kd.batch import CachedExample
from nemo_kd.cache.index import ChunkBuilder, ChunkSummary, LineFacts
from nemo_kd.cache.layout import CacheError, CacheLayout, lines_of
from nemo_kd.cache.manifest import Manifest
from nemo_kd.cache.record import encode, trimmed
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


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise CacheError(
            "the process that publishes segments was killed, mostly because memory ran out: give "
            "the job more, then run the same command again; what is published stays and is not "
            "computed again"
        ) from error


class SegmentPublisher:
    """Publishes segments in order, in one other process; use it in a with block.

    The process is forked: start it early, while this one is small. It uses numpy and files, not
    torch. Signals to the whole job do not reach it. It ends with the block, or with this process.
    Only whole segments appear.

    Attributes:
        done: counts of published segments, in their order, as of the last `publish` or `close`.
        waited_s: seconds for which `publish` made its caller wait.

    Args:
        manifest: identity of the cache, for encoding.
        computed_with: settings that rounding depends on, for the summary.
        max_waiting: segments in memory that wait behind the one being published.
    """

    def __init__(
        self,
        layout: CacheLayout,
        manifest: Manifest,
        computed_with: dict[str, Any],
        max_waiting: int = 2,
    ) -> None:
        self.done: list[ChunkSummary] = []
        self.waited_s = 0.0
        self._layout = layout
        self._manifest = replace(manifest, chunks={})
        self._computed_with = computed_with
        self._max_waiting = max_waiting
        self._pending: deque[Future[ChunkSummary]] = deque()
        self._pool = ProcessPoolExecutor(
            1, multiprocessing.get_context("fork"), initializer=_start
        )
        self._pool.submit(os.getpid).result()  # forks now

    @_explained()
    def publish(
        self, segment: Segment, records: Sequence[Record], **changed: Any
    ) -> None:
        """Queue a segment: one record for each of its indices, in their order.

        Returns at once unless `max_waiting` segments wait already. The arrays must not be changed
        from now on. `changed` is what differs from `computed_with` in this segment.

        Raises:
            Exception: an earlier segment failed; as raised there.
            CacheError: the process was killed.
        """
        started = time.perf_counter()
        self._collect(self._max_waiting)
        self.waited_s += time.perf_counter() - started
        settings = self._computed_with | changed
        self._pending.append(
            self._pool.submit(
                publish_segment,
                self._layout,
                self._manifest,
                segment,
                records,
                settings,
            )
        )

    @_explained()
    def close(self) -> None:
        """Wait until everything is on disk, and end the process.

        Raises:
            Exception: as `publish`.
        """
        self._pool.shutdown()
        self._collect(0)

    def __enter__(self) -> SegmentPublisher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        raised: BaseException | None,
        *_: object,
    ) -> None:
        if raised is None:
            self.close()
        self._pool.shutdown()

    def _collect(self, most_pending: int) -> None:
        """Take finished segments off the list, and wait until at most `most_pending` are left."""
        while self._pending and (
            self._pending[0].done() or len(self._pending) > most_pending
        ):
            self.done.append(self._pending[0].result())
            self._pending.popleft()


def _start() -> None:
    """Prepare the process."""
    from nemo_kd.run.interruption import follow_the_main_process  # it needs psutil

    follow_the_main_process(0)
    gc.freeze()  # garbage of the parent may own GPU memory, which this process must not free
