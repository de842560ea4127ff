"""A hang becomes an error: a rank that makes no progress tells what it was doing, and ends."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import sys
import threading
from collections.abc import Iterator

TICKS = 20
"""How often the time-out is looked at before it is over."""

STDERR = 2

COLLECTIVE_ERRORS = re.compile(r"gloo|nccl|connection (closed|reset) by peer", re.IGNORECASE)
"""In the texts of the plain RuntimeErrors that torch raises where a collective cannot go on."""


class CollectiveError(RuntimeError):
    """The ranks lost each other; the message says which rank noticed, at what, and what torch said."""


class Watchdog:
    """Ends this process (exit status 1) when no `step` came for `timeout_s`, from `with` on.

    What it writes to stderr: rank, machine, the last step, and the stacks of all threads; after twice the time the
    stacks alone, should something hold Python's lock. The time-out of torch's collectives should be longer, for torch
    tells less.
    """

    def __init__(self, timeout_s: float, rank: int) -> None:
        self.timeout_s, self.rank = timeout_s, rank
        self._last: tuple[str, tuple[object, ...]] = ("start", ())
        self._paused = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def step(self, what: str, *details: object) -> None:
        """A sign of life; `what % details`, put together only when it is shown, is what happens next.

        For example step("batch %d of segment %s: examples %s: forward", 12, segment, indices).
        """
        self._last = (what, details)

    @contextlib.contextmanager
    def pause(self, what: str) -> Iterator[None]:
        """Nothing is expected for a while, in which `what` happens."""
        self.step(what)
        self._paused += 1
        try:
            yield
        finally:
            self.step("after: " + what)
            self._paused -= 1

    @contextlib.contextmanager
    def explain_collective_errors(self) -> Iterator[None]:
        """What torch says when another rank is gone becomes a CollectiveError that tells what this rank was doing."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, CollectiveError) or not _is_collective(error):
                raise
            said = str(error).strip().splitlines()[0]
            raise CollectiveError(
                f"{self._where()} lost the other ranks; its last step: {self._last_step()}. Another rank has probably "
                f"ended, see its own message. torch says: {said}"
            ) from error

    def _watch(self) -> None:
        tick_s = self.timeout_s / TICKS
        ticks, seen = 0, self._last
        # Time is counted in ticks of this thread: a suspended process does not tick.
        while not self._closed.wait(tick_s):
            faulthandler.dump_traceback_later(2 * self.timeout_s, exit=True, file=STDERR)
            ticks = ticks + 1 if self._last is seen and not self._paused else 0
            seen = self._last
            if ticks >= TICKS:
                self._end()

    def _end(self) -> None:
        message = (
            f"error: {self._where()} made no progress for {self.timeout_s:g} s (trainer.distributed_timeout_minutes)\n"
            f"last step: {self._last_step()}\n"
            "The cause may be another rank that died or hangs, or a file system that hangs. What the threads do:\n"
        )
        sys.stderr.flush()
        os.write(STDERR, message.encode())
        faulthandler.dump_traceback(STDERR, all_threads=True)
        os._exit(1)

    def _where(self) -> str:
        return f"rank {self.rank} on {os.uname().nodename}"

    def _last_step(self) -> str:
        what, details = self._last
        return what % details if details else what


def _is_collective(error: RuntimeError) -> bool:
    from torch.distributed import DistError

    return isinstance(error, DistError) or COLLECTIVE_ERRORS.search(str(error)) is not None
