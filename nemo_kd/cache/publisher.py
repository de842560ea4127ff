"""Encode and publish segments in another process, so that the one that computes never waits.

Encoding is Python work for the CPU. In a thread it would delay the thread that feeds a GPU.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from nemo_kd.batch import CachedExample
from nemo_kd.cache.index import ChunkSummary
from nemo_kd.cache.layout import CacheError, CacheLayout
from nemo_kd.cache.manifest import Manifest
from nemo_kd.cache.segment import Segment, SegmentWriter
from nemo_kd.run.interruption import end_with_parent

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Sent to all processes of a job by a user or a cluster; only the one that computes reacts."""

log = logging.getLogger(__name__)


Record = CachedExample | str
"""A row, or the reason why a record makes none."""


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
        self._is_failure_raised = False  # failures after it mostly have the same cause
        self._max_waiting = max_waiting
        self._is_closed = False
        self._pending: deque[Future[ChunkSummary]] = deque()
        self._connection, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("fork").Process(
            target=_serve,
            args=(
                theirs,
                os.getpid(),
                layout,
                replace(manifest, chunks={}),
                computed_with,
            ),
            name="segment-publisher",
        )
        # A process keeps the signals blocked that are blocked in the thread that forks it.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()  # so that the death of the process, which alone has this end, closes it
        self._courier = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="segment-courier"
        )

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
        self._pending.append(
            self._courier.submit(self._deliver, segment, records, changed)
        )

    def close(self) -> None:
        """Wait until everything is on disk, and end the process.

        Raises:
            Exception: as `publish`.
        """
        self._end()
        self._collect(0)

    def __enter__(self) -> SegmentPublisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, *_: object
    ) -> None:
        if raised is None:
            self.close()
            return
        self._end()
        for error in [segment.exception() for segment in self._pending]:
            if (
                error is not None and not self._is_failure_raised
            ):  # the block's error is raised
                log.error("a segment was not published: %s", error)

    def _collect(self, most_pending: int) -> None:
        """Take finished segments off the list, and wait until at most `most_pending` are left."""
        while self._pending and (
            self._pending[0].done() or len(self._pending) > most_pending
        ):
            self._is_failure_raised = self._pending[0].exception() is not None
            self.done.append(self._pending[0].result())
            self._pending.popleft()

    def _end(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        try:
            self._courier.submit(self._dismiss)
            self._courier.shutdown()
        except (
            BaseException
        ):  # a second interruption, while this waits: files stay whole even so
            self._process.kill()
            raise

    def _deliver(
        self, segment: Segment, records: Sequence[Record], changed: dict[str, Any]
    ) -> ChunkSummary:
        """Send a segment to the process, and wait for its answer."""
        try:
            _send(self._connection, (segment, records, changed))
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            raise CacheError(
                f"the segment of examples {segment[1][0]} to {segment[1][-1]} was not published: "
                f"the process that does this has ended ({_how(self._process.exitcode)}); if "
                "no other message gives a reason, memory ran out: give the job more, then run the same "
                "command again; what is published stays and is not computed again"
            ) from error
        if isinstance(answer, ChunkSummary):
            return answer
        failure, remote_traceback = answer
        raise failure from RuntimeError(
            f"in the process that publishes segments:\n{remote_traceback}"
        )

    def _dismiss(self) -> None:
        """Send the process None, unless it has ended."""
        with contextlib.suppress(OSError):
            _send(self._connection, None)
        self._process.join()
        self._connection.close()


def _how(exitcode: int | None) -> str:
    return (
        f"killed by signal {-exitcode}"
        if exitcode is not None and exitcode < 0
        else f"status {exitcode}"
    )


def _send(connection: Connection, message: object) -> None:
    """Send an object of arrays without copying them, which would hold up the other threads."""
    buffers: list[pickle.PickleBuffer] = []
    connection.send_bytes(
        pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    )
    connection.send(len(buffers))
    for buffer in buffers:
        connection.send_bytes(buffer.raw())


def _receive(connection: Connection) -> Any:
    message = connection.recv_bytes()
    buffers = [connection.recv_bytes() for _ in range(connection.recv())]
    return pickle.loads(message, buffers=buffers)


def _serve(
    connection: Connection,
    parent: int,
    layout: CacheLayout,
    manifest: Manifest,
    computed_with: dict[str, Any],
) -> None:
    """Serve segments in the process until None comes."""
    end_with_parent(parent)
    gc.freeze()  # garbage of the parent may own GPU memory, which this process must not free
    while (task := _receive(connection)) is not None:
        answer: ChunkSummary | tuple[Exception, str]
        try:
            segment, records, changed = task
            sink = SegmentWriter(layout, manifest, segment, computed_with | changed)
            for record in records:
                if isinstance(record, str):
                    sink.skip(record)
                else:
                    sink.write(record)
            sink.publish()
            answer = sink.summary
        except Exception as error:  # noqa: BLE001 - raised again in the caller
            answer = error, traceback.format_exc()
        connection.send(answer)
