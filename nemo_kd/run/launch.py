"""Start a command once per device, if neither torchrun nor srun did, and watch the processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType

from nemo_kd.config.errors import ConfigError
from nemo_kd.config.shared import TrainerConfig
from nemo_kd.run.interruption import REQUEUE, end_with_parent, hold_back_warning_signal
from nemo_kd.run.ranks import (
    LOOPBACK,
    Ranks,
    check_world_size,
    find_ranks,
    listen_on_loopback,
)

GRACE_S = {signal.SIGTERM: 600.0, signal.SIGINT: 30.0, signal.SIGHUP: 30.0}
"""Signals that end a run, and the time that ranks then have to finish."""

LEAVING_S = 60.0
"""Longest time between the first and the last rank to leave, if all leave together."""

AFTER_FAILURE_S = 5.0
"""Time for the other ranks to end once one has failed."""

POLL_S = 0.05

STORE_TIMEOUT = timedelta(minutes=15)

NVIDIA_DRIVER = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg")
"""One of these exists on a machine that may have a GPU; the last is WSL's."""

LAUNCHER = "NEMO_KD_LAUNCHER_PID"


def needs_launch(trainer: TrainerConfig) -> bool:
    """Return True if this process has to start the others; make `trainer.devices` a number.

    Raises:
        ConfigError: several machines, where only srun or torchrun can start processes, or a
            launcher that started another number of them.
    """
    ranks = find_ranks()
    trainer.devices = _num_devices(trainer, ranks)
    if ranks.launcher:
        check_world_size(
            ranks.size, trainer.num_nodes, trainer.num_devices, ranks.found_by
        )
        return False
    if trainer.num_nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes: {trainer.num_nodes} machines need a launcher: run the command "
            "under srun (see scripts/slurm) or torchrun"
        )
    return trainer.num_devices > 1


def _num_devices(trainer: TrainerConfig, ranks: Ranks) -> int:
    """Return `trainer.devices`; for auto and -1 the launcher's ranks per machine, else the GPUs."""
    if isinstance(trainer.devices, int) and trainer.devices > 0:
        return trainer.devices
    if ranks.launcher:
        return max(1, ranks.size // trainer.num_nodes)
    if trainer.accelerator == "cpu" or not any(
        Path(path).exists() for path in NVIDIA_DRIVER
    ):
        return 1
    # Another process imports torch, which takes seconds and memory; this one only starts ranks.
    code = "import torch; print(torch.cuda.device_count())"
    counted = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    if counted.returncode != 0:
        raise ConfigError(
            f"trainer.devices: {trainer.devices}, but torch cannot count the GPUs "
            f"({counted.stderr.strip().splitlines()[-1:]}); give their number"
        )
    return max(1, int(counted.stdout))


def launch(num_processes: int, subcommand: str = "") -> int:
    """Run this command line in `num_processes` processes.

    Signals are passed on, and the ranks have GRACE_S to finish; a second one ends the run at once.
    The ranks meet in a store of this process, which outlives them.

    Args:
        subcommand: word to insert before the keys.

    Returns:
        The exit status of the first process that failed, or 0.
    """
    store = listen_on_loopback(0, None, STORE_TIMEOUT)
    line = [sys.executable, "-u", sys.argv[0], *subcommand.split(), *sys.argv[1:]]
    environment = _environment(num_processes, store.port)
    with _received_signals() as received:
        hold_back_warning_signal()  # in the ranks, until they are ready for it
        ranks = [
            subprocess.Popen(
                line,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                start_new_session=True,  # else a terminal's Ctrl-C would reach the ranks twice
            )
            for rank in range(num_processes)
        ]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
        return _Ranks(ranks, received).wait()


def _environment(world_size: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun would set, without the rank's number."""
    return {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": uuid.uuid4().hex,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        LAUNCHER: str(os.getpid()),
    }


def follow_launcher() -> None:
    """End with the launcher if this process is a rank of `launch`."""
    if LAUNCHER in os.environ:
        end_with_parent(int(os.environ[LAUNCHER]))


@contextlib.contextmanager
def _received_signals() -> Iterator[list[signal.Signals]]:
    """Collect signals in a list, so that they do not end this process."""
    received: list[signal.Signals] = []

    def append(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))

    before = {
        number: signal.signal(number, append)
        for number in (*GRACE_S, signal.SIGUSR1)
        if signal.getsignal(number) != signal.SIG_IGN  # nohup ignores SIGHUP
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Ranks:
    """The processes of a run, from start to end."""

    def __init__(
        self, processes: list[subprocess.Popen[bytes]], received: list[signal.Signals]
    ) -> None:
        self.processes = processes
        self.received = received
        self.failure: tuple[int, int] | None = (
            None  # (rank, exit status) of the first to fail
        )
        self.ending: signal.Signals | None = None  # the signal that ends the run
        self.deadline_s = float("inf")

    def wait(self) -> int:
        """Return the run's exit status once all ranks have ended."""
        while None in [process.poll() for process in self.processes]:
            while self.received:
                self._pass_on(self.received.pop(0))
            self._look_for_failure()
            if time.monotonic() > self.deadline_s:
                self._kill("did not end in time")
            time.sleep(POLL_S)
        self._look_for_failure()
        return self._exit_status()

    def _pass_on(self, number: signal.Signals) -> None:
        if number in GRACE_S:
            if self.ending is not None:
                self._kill(f"ended at once by a second {number.name}")
                return
            self.ending = number
            self.deadline_s = min(self.deadline_s, time.monotonic() + GRACE_S[number])
        self._send(number)

    def _look_for_failure(self) -> None:
        failed = [
            (rank, process.returncode)
            for rank, process in enumerate(self.processes)
            if process.returncode
        ]
        if self.failure is not None or not failed:
            return
        # Among several, the killed rank is the cause, one that lost its connection the effect.
        self.failure = min(
            failed,
            key=lambda failure: (failure[1] > 0, failure[1] == REQUEUE, failure[0]),
        )
        statuses = [REQUEUE] + ([] if self.ending is None else [128 + self.ending])
        if self.failure[1] in statuses:
            # The others leave too, and one of them reports where the run stopped.
            self.deadline_s = min(self.deadline_s, time.monotonic() + LEAVING_S)
        else:
            self.deadline_s = min(self.deadline_s, time.monotonic() + AFTER_FAILURE_S)
            self._send(signal.SIGTERM)

    def _send(self, number: signal.Signals) -> None:
        for process in self.processes:
            process.send_signal(number)  # does nothing to one that has ended

    def _kill(self, why: str) -> None:
        left = [
            rank for rank, process in enumerate(self.processes) if process.poll() is None
        ]
        if left and self.failure is None:
            print(
                f"error: ranks {', '.join(map(str, left))}: {why}",
                file=sys.stderr,
                flush=True,
            )
            self.failure = (left[0], -signal.SIGKILL)
        self._send(signal.SIGKILL)

    def _exit_status(self) -> int:
        if self.failure is None:
            return 0
        rank, status = self.failure
        if status > 0:
            return status
        if self.ending is not None and -status in (self.ending, signal.SIGKILL):
            return 128 + self.ending
        name = signal.Signals(-status).name
        hint = (
            " (SIGKILL is what a machine out of memory sends)"
            if name == "SIGKILL"
            else ""
        )
        print(
            f"error: rank {rank} was ended by {name}{hint}", file=sys.stderr, flush=True
        )
        return 1
