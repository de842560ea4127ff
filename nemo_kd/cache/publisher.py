"""Temporary: publishes in the calling process."""

from __future__ import annotations

from typing import Any

from nemo_kd.batch import CachedExample
from nemo_kd.cache.layout import CacheLayout
from nemo_kd.cache.manifest import ChunkSummary, Manifest
from nemo_kd.cache.writer import Segment, SegmentWriter


class SegmentPublisher:
    def __init__(
        self, layout: CacheLayout, manifest: Manifest, computed_with: dict[str, Any], max_waiting: int = 2
    ) -> None:
        self.layout, self.manifest, self.computed_with = layout, manifest, computed_with
        self.done: list[ChunkSummary] = []
        self.waited_s = 0.0

    def __enter__(self) -> SegmentPublisher:
        return self

    def __exit__(self, *error: object) -> None: ...

    def publish(self, segment: Segment, records: list[CachedExample | str]) -> None:
        sink = SegmentWriter(self.layout, self.manifest, segment, self.computed_with)
        for record in records:
            if isinstance(record, str):
                sink.skip(record)
            else:
                sink.write(record)
        sink.publish()
        self.done.append(sink.summary)

    def close(self) -> None: ...
