"""Turn a hang into an error: a rank without progress reports its last step and ends."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import sys
import threading
from collections.abc import Iterator

TICKS = 20
"""Number of checks within one timeout."""

STDERR = 2

COLLECTIVE_ERRORS = re.compile(
    r"gloo|nccl|connection (closed|reset) by peer", re.IGNORECASE
)
"""Found in the plain RuntimeErrors that torch raises if a collective cannot go on."""


class CollectiveError(RuntimeError):
    """The ranks lost each other; the message has the rank, its last step and torch's error."""


class Watchdog:
    """Ends this process (exit status 1) if no `step` comes for `timeout_s`, within `with`.

    It writes rank, machine, last step and the stacks of all threads to stderr. The timeout of
    torch's collectives should be longer, because torch's error says less.

    Raises:
        CollectiveError: the block ends with torch's error about a lost rank.
    """

    def __init__(self, timeout_s: float, rank: int) -> None:
        self.timeout_s = timeout_s
        self.rank = rank
        self._last = "start"
        self._num_steps = 0
        self._paused = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._closed.set()
        self._thread.join()
        if not isinstance(error, RuntimeError):
            return
        from torch.distributed import DistError

        text = str(error).strip()
        if isinstance(error, DistError) or COLLECTIVE_ERRORS.search(text):
            raise CollectiveError(
                f"{self._where()} lost the other ranks; its last step: {self._last}. "
                "Another rank has probably ended, see its own message. torch says: "
                f"{text.splitlines()[0]}"
            ) from error

    def step(self, what: str) -> None:
        """Report progress; `what` describes the next step, for example with its examples."""
        self._last = what
        self._num_steps += 1

    @contextlib.contextmanager
    def pause(self, what: str) -> Iterator[None]:
        """Suspend the timeout during `what`."""
        self.step(what)
        self._paused += 1
        try:
            yield
        finally:
            self.step("after: " + what)
            self._paused -= 1

    def _watch(self) -> None:
        ticks = 0
        seen = 0
        # Time is counted in ticks of this thread: a suspended process does not tick.
        while not self._closed.wait(self.timeout_s / TICKS):
            ticks = ticks + 1 if self._num_steps == seen and not self._paused else 0
            seen = self._num_steps
            if ticks >= TICKS:
                self._end()

    def _end(self) -> None:
        message = (
            f"error: {self._where()} made no progress for {self.timeout_s:g} s "
            "(trainer.distributed_timeout_minutes)\n"
            f"last step: {self._last}\n"
            "The cause may be another rank that died or hangs, or a file system that hangs. "
            "Stacks of all threads:\n"
        )
        sys.stderr.flush()
        os.write(STDERR, message.encode())
        faulthandler.dump_traceback(STDERR, all_threads=True)
        os._exit(1)

    def _where(self) -> str:
        return f"rank {self.rank} on {os.uname().nodename}"
