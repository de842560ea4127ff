"""Reasons to stop early, and the processes that end with this one.

A run stops early for a scheduler's signal or at the end of its time. Processes that it started
ignore signals: the run decides when they end, and they never outlive it.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import psutil

from nemo_kd.config.errors import ConfigError

REQUEUE = 75
"""Exit status (EX_TEMPFAIL) of a run that stopped early with everything saved."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
JOB_SIGNALS = (*SIGNALS, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)
"""Signals that schedulers and terminals send to all processes of a job."""

CHILD_GRACE_S = 5.0
"""Time for a killed child process to end."""

PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Requeue(Exception):
    """The run stopped early with everything saved; the message gives the reason.

    Ends a command with the status REQUEUE.
    """


class Interruption:
    """Turns SIGTERM, SIGUSR1 and the end of `max_time` into a `reason` to stop, within `with`.

    `max_time` counts from the start of the process, since loading a large teacher takes its part of
    the job's time. Outside the main thread, where Python receives no signals, only the time counts.
    Handlers are restored at the end, except after a Requeue: schedulers send SIGTERM to the ranks
    that leave last, which may still clean up.

    Raises:
        ConfigError: `max_time` is not DD:HH:MM:SS.
    """

    def __init__(self, max_time: str | None = None, rank: int = 0) -> None:
        self._max_time = max_time
        self._deadline_s = math.inf
        if max_time is not None:
            self._deadline_s = psutil.Process().create_time() + parse_max_time(max_time)
        self._rank = rank
        self._signal: signal.Signals | None = None
        self._handlers_before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if _in_main_thread():
            self._handlers_before = {
                number: signal.getsignal(number) for number in SIGNALS
            }
            self.take_signals()
        return self

    def take_signals(self) -> None:
        """Install the handlers again after a library has set its own; main thread only."""
        if self._handlers_before:
            for number in SIGNALS:
                signal.signal(number, self._on_signal)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def __exit__(self, error_type: object, error: object, traceback: object) -> None:
        if not isinstance(error, Requeue):
            for number, handler in self._handlers_before.items():
                signal.signal(number, handler)

    @property
    def reason(self) -> str | None:
        """Return why to stop, or None; a reason stays. For joint steps ranks must agree on one."""
        if self._signal is not None:
            return (
                f"rank {self._rank} on {os.uname().nodename} received {self._signal.name}"
            )
        if time.time() >= self._deadline_s:
            return f"max_time_per_run={self._max_time} is over"
        return None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number)


@contextlib.contextmanager
def explained_ctrl_c(where: Callable[[], str]) -> Iterator[None]:
    """End the block at Ctrl-C with a KeyboardInterrupt whose text is `where()`.

    Otherwise a library may turn Ctrl-C into its own exit status, as Lightning does, and ranks that
    stop one after the other into errors of each other's collectives. Does nothing where SIGINT is
    ignored, or outside the main thread.
    """
    if (
        not _in_main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
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
        # Launchers send SIGTERM once another rank has left.
        ignore([*SIGNALS, signal.SIGINT])
        raise KeyboardInterrupt(where()) from None
    finally:
        if not received:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def hold_back_warning_signal() -> None:
    """Block SIGUSR1, which would end the process, until an `Interruption` takes it.

    Processes that this one starts inherit the block.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])


def parse_max_time(max_time: str) -> float:
    """Return DD:HH:MM:SS in seconds.

    Raises:
        ConfigError: it has another form.
    """
    match = re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", max_time)
    if match is None:
        raise ConfigError(
            f"exp_manager.max_time_per_run: {max_time!r} is not DD:HH:MM:SS, for example "
            "00:03:50:00; in a YAML file it needs quotes"
        )
    days, hours, minutes, seconds = map(int, match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds


def follow_the_main_process(worker: int) -> None:
    """Make a forked data worker end with the main process and not before.

    Schedulers and terminals signal all processes of a job; a run that stops in order still needs
    its workers.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        end_with_parent(parent.pid)
    ignore(JOB_SIGNALS)


def end_with_parent(parent: int) -> None:
    """Have this process killed when process `parent`, whose main thread started it, ends.

    Otherwise it would keep its parent's memory and stdout, and whoever reads that would wait.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)


def end_children() -> None:
    """Kill this process's data readers and file writers; files appear whole or not at all."""
    for child in multiprocessing.active_children():
        child.kill()
        child.join(CHILD_GRACE_S)


def ignore(numbers: Iterable[signal.Signals]) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
