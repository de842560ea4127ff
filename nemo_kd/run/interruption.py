"""Why and when a run must stop early: a scheduler's signal, or the end of its time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil

from nemo_kd.config import ConfigError
from nemo_kd.run.processes import end_with_parent

if TYPE_CHECKING:
    from torch.distributed import Store

REQUEUE = 75
"""Exit status (EX_TEMPFAIL) of a run that stopped early with everything saved: the same command continues."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
CHECK_INTERVAL_S = 1.0
KEY = "nemo_kd/interruption"


class Requeue(Exception):
    """The run stops early, with everything saved; the message says why. Ends a command with the status REQUEUE."""


class Interruption:
    """From `with` on, SIGTERM and SIGUSR1 end nothing: they become a `reason` to stop, as does the end of `max_time`.

    `max_time` counts from the start of the process: loading a large teacher takes its part of the job's time as well.
    Outside the main thread, where Python takes no signals, only the time counts. Handlers are restored at the end,
    unless that is a Requeue: schedulers send SIGTERM to the ranks that leave last, which may still have to clean up.

    Raises:
        ConfigError: `max_time` is not DD:HH:MM:SS.
    """

    def __init__(self, max_time: str | None = None) -> None:
        self._max_time = max_time
        self._max_time_s = float("inf") if max_time is None else parse_max_time(max_time)
        self._started_s = time.monotonic() - (time.time() - psutil.Process().create_time())
        self._signal: signal.Signals | None = None
        self._reason: str | None = None
        self._store: Store | None = None
        self._rank = 0
        self._next_check_s = 0.0
        self._before: dict[signal.Signals, Any] = {}
        self._mask_before: set[int] = set()

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in SIGNALS}
            self._mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
            self.take_signals()
        return self

    def take_signals(self) -> None:
        """Takes them back from whoever set other handlers since; in the main thread only, as `with`."""
        if self._before:
            for number in SIGNALS:
                signal.signal(number, self._on_signal)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def __exit__(self, error_type: object, error: object, traceback: object) -> None:
        if self._before and not isinstance(error, Requeue):
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask_before)
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def share(self, store: Store, rank: int) -> None:
        """From now on a reason of any rank that shares `store` is every rank's, within a second or two."""
        self._store, self._rank = store, rank

    @property
    def reason(self) -> str | None:
        """Why to stop, or None. Once given it stays.

        Cheap enough for every batch; every rank has to ask now and then. Ranks learn of it one after the other: what
        several do together must follow the answer that one of them got.

        Raises:
            torch.distributed.DistError: the store is gone.
        """
        if self._reason is None:
            self._reason = self._own_reason()
            if self._store is not None:
                if self._reason is not None:
                    self._store.set(KEY, self._reason)
                elif time.monotonic() >= self._next_check_s:
                    self._next_check_s = time.monotonic() + CHECK_INTERVAL_S
                    if self._store.check([KEY]):
                        self._reason = self._store.get(KEY).decode()
        return self._reason

    def agreed_reason(self) -> str:
        """The reason of the rank that has one, for ranks that were told in another way that there is one."""
        if self._reason is None:
            assert self._store is not None
            self._reason = self._store.get(KEY).decode()
        return self._reason

    def _own_reason(self) -> str | None:
        if self._signal is not None:
            return f"rank {self._rank} on {os.uname().nodename} received {self._signal.name}"
        if time.monotonic() - self._started_s >= self._max_time_s:
            return f"max_time_per_run={self._max_time} is over"
        return None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Nothing but this: Python runs it between any two instructions of the main thread, in the middle of a store
        # operation too.
        self._signal = signal.Signals(number)


@contextlib.contextmanager
def explained_ctrl_c(where: Callable[[], str]) -> Iterator[None]:
    """From here on Ctrl-C ends the block with a KeyboardInterrupt whose text is `where()`.

    Without this a library may turn it into an exit status of its own, as Lightning does, and ranks that stop one after
    the other into errors of each other's collectives. Does nothing where SIGINT is ignored, or not in the main thread.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    received = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    except BaseException:
        if not received:
            raise
        for number in (
            *SIGNALS,
            signal.SIGINT,
        ):  # launchers send the first when another rank has left
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt(where()) from None
    finally:
        if not received:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def hold_back_warning_signal() -> None:
    """SIGUSR1, which by default ends a process, waits from now on until an `Interruption` takes it.

    The same in processes that this one starts.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])


def follow_the_main_process(worker: int) -> None:
    """Make a process that reads data, forked by the main one, end with it and not before.

    Schedulers and terminals signal all processes of a job; the main process decides, and a run that stops in order still
    needs its readers.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        end_with_parent(parent.pid)
    for number in (*SIGNALS, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def parse_max_time(max_time: str) -> float:
    """Return DD:HH:MM:SS in seconds.

    Raises:
        ConfigError: it has another form.
    """
    match = re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", max_time)
    if match is None:
        raise ConfigError(
            f"exp_manager.max_time_per_run: {max_time!r} is not DD:HH:MM:SS, for example 00:03:50:00; in a YAML file "
            "it needs quotes"
        )
    days, hours, minutes, seconds = map(int, match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds
