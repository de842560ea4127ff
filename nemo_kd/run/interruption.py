"""Reasons to stop early, hangs, and the processes that end with this one.

A run stops early for a scheduler's signal or at the end of its time, and ends with an error if
nothing moves. Processes that it started
ignore signals: the run decides when they end, and they never outlive it.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil

from nemo_kd.config import ConfigError

REQUEUE = 75
"""Exit status (EX_TEMPFAIL) of a run that stopped early with everything saved."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
JOB_SIGNALS = (*SIGNALS, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)
"""Signals that schedulers and terminals send to all processes of a job."""

CHILD_GRACE_S = 5.0
"""Time for a killed child process to end."""

PR_SET_PDEATHSIG = 1  # linux/prctl.h

TICKS = 20
"""Number of checks within one timeout."""

STDERR = 2

COLLECTIVE_ERRORS = re.compile(
    r"gloo|nccl|connection (closed|reset) by peer", re.IGNORECASE
)
"""Found in the plain RuntimeErrors that torch raises if a collective cannot go on."""


class Requeue(Exception):
    """The run stopped early with everything saved; the message gives the reason.

    Ends a command with the status REQUEUE.
    """


@dataclass
class Interruption:
    """Turns SIGTERM, SIGUSR1 and the end of `max_time` into a `reason` to stop, within `with`.

    `max_time` counts from the start of the process, since loading a large teacher takes its part of
    the job's time. Outside the main thread, where Python receives no signals, only the time counts.
    Handlers are restored at the end, except after a Requeue: schedulers send SIGTERM to the ranks
    that leave last, which may still clean up.

    Raises:
        ConfigError: `max_time` is not DD:HH:MM:SS.
    """

    max_time: str | None = None
    rank: int = 0

    def __post_init__(self) -> None:
        self._deadline_s = math.inf
        if self.max_time is not None:
            started_s = psutil.Process().create_time()
            self._deadline_s = started_s + parse_max_time(self.max_time)
        self._signal: signal.Signals | None = None
        self._handlers_before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
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
            return f"rank {self.rank} on {os.uname().nodename} received {self._signal.name}"
        if time.time() >= self._deadline_s:
            return f"max_time_per_run={self.max_time} is over"
        return None

    def _on_signal(self, number: int, frame: object) -> None:
        self._signal = signal.Signals(number)


class CollectiveError(RuntimeError):
    """The ranks lost each other; the message has the rank, its last step and torch's error."""


@dataclass
class Watchdog:
    """Ends this process (exit status 1) if no `step` comes for `timeout_s`, within `with`.

    It writes rank, machine, last step and the stacks of all threads to stderr. The timeout of
    torch's collectives should be longer, because torch's error says less.

    Raises:
        CollectiveError: the block ends with torch's error about a lost rank.
    """

    timeout_s: float
    rank: int

    def __post_init__(self) -> None:
        self._last = "start"
        self._num_steps = 0
        self._paused = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._watch, name="watchdog", daemon=True
        )

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


@contextlib.contextmanager
def explained_ctrl_c(where: Callable[[], str]) -> Iterator[None]:
    """End the block at Ctrl-C with a KeyboardInterrupt whose text is `where()`.

    Otherwise a library may turn Ctrl-C into its own exit status, as Lightning does, and ranks that
    stop one after the other into errors of each other's collectives.
    """
    try:
        yield
    except BaseException as error:
        if not is_ctrl_c(error):
            raise
        # Launchers send SIGTERM once another rank has left.
        ignore([*SIGNALS, signal.SIGINT])
        raise KeyboardInterrupt(where()) from None


def is_ctrl_c(error: BaseException | None) -> bool:
    """Return True for Ctrl-C and for an error that was raised while it was handled."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False


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
    end_with_parent()
    ignore(JOB_SIGNALS)


def end_with_parent() -> None:
    """Have this process killed when its parent, whose main thread started it, ends.

    Otherwise it would keep its parent's memory and stdout, and whoever reads that would wait.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end_children() -> None:
    """Kill this process's data readers and file writers; files appear whole or not at all."""
    for child in multiprocessing.active_children():
        child.kill()
        child.join(CHILD_GRACE_S)


def ignore(numbers: Iterable[signal.Signals]) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
