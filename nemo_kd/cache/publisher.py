"""Encode and publish segments in another process, so that the one that computes never waits.

Encoding is Python work for the CPU. In a thread it would delay the thread that feeds a GPU.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any

from nemo_kd.cache.index import ChunkSummary
from nemo_kd.cache.layout import CacheError, CacheLayout
from nemo_kd.cache.manifest import Manifest
from nemo_kd.cache.segment import Record, Segment, publish_segment
from nemo_kd.run.interruption import follow_the_main_process


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
    follow_the_main_process(0)
    gc.freeze()  # garbage of the parent may own GPU memory, which this process must not free
