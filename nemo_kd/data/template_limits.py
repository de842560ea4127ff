"""Limits for chat templates, which are programs from anywhere: an endless loop or a huge value becomes an error."""

from __future__ import annotations

import contextlib
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_kd.data.records import DataError

TIME_LIMIT_S = 10.0
"""CPU time of one render; a conversation takes milliseconds."""
MEMORY_LIMIT_BYTES = 2 << 30
"""Address space that one render may add; the text of a conversation needs a few megabytes."""
_TICK_S = 0.5


class _OutOfTime(BaseException):
    """Not an Exception: filters of Jinja such as `int` would take that for a wrong value and go on."""


# transformers renders in Jinja's sandbox, which keeps templates from the machine but lets them run for ever. A render
# in a child process would cost more than rendering itself, several times a turn; a timer's signal and the kernel's limit
# of address space cost microseconds. The signal also ends a single `10 ** (10 ** 8)`, since Python's long arithmetic
# looks for signals; what does not (making one huge string) is stopped by the limit of memory.
@contextlib.contextmanager
def limited(what: str) -> Iterator[None]:
    """Run a block that renders a template; only the main thread of a process can.

    The time is this thread's own, so that a suspended or crowded machine ends no render.

    Raises:
        DataError: the block took too much time or memory, or recursed without end; names `what`.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "chat templates are rendered in a process's main thread, where a signal can end them"
        )
    started_s = time.thread_time()
    is_running = True

    def check(*_: Any) -> None:
        if is_running and time.thread_time() - started_s > TIME_LIMIT_S:
            raise _OutOfTime

    earlier_handler = signal.signal(signal.SIGALRM, check)
    earlier_timer = signal.setitimer(signal.ITIMER_REAL, _TICK_S, _TICK_S)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (_memory_limit(soft), hard))
        yield
    except _OutOfTime:
        raise DataError(
            f"{what} did not end within {TIME_LIMIT_S:g} s; look for an endless loop in it"
        ) from None
    except (MemoryError, RecursionError) as error:
        found = (
            "recurses without end"
            if isinstance(error, RecursionError)
            else "needs more than 2 GiB of memory"
        )
        raise DataError(
            f"{what} {found}; use the template that the model was published with"
        ) from None
    finally:
        is_running = False  # a late tick must not end this block before the limits are back
        signal.setitimer(signal.ITIMER_REAL, *earlier_timer)
        signal.signal(signal.SIGALRM, earlier_handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _memory_limit(soft: int) -> int:
    with Path("/proc/self/statm").open(encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    limit = used + MEMORY_LIMIT_BYTES
    return limit if soft == resource.RLIM_INFINITY else min(soft, limit)
