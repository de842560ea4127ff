"""Start a command once per device, if neither torchrun nor srun did, and watch the processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from datetime import timedelta

from nemo_kd.config import ConfigError
from nemo_kd.config.shared import TrainerConfig
from nemo_kd.files import print_error
from nemo_kd.run.interruption import REQUEUE, end_with_parent, hold_back_warning_signal
from nemo_kd.run.ranks import LOOPBACK, find_ranks, listen_on_loopback

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GRACE_S = 600.0
"""Time that ranks have to finish after a signal that ends the run."""

AFTER_FAILURE_S = 5.0
"""Time for the other ranks to end once one has failed."""

POLL_S = 0.05

STORE_TIMEOUT = timedelta(minutes=15)

LAUNCHER = "NEMO_KD_LAUNCHER"


def needs_launch(trainer: TrainerConfig) -> bool:
    """Return True if this process has to start the others; make `trainer.devices` a number.

    For auto and -1 it is the launcher's ranks per machine, else the GPUs.

    Raises:
        ConfigError: several machines, where only srun or torchrun can start processes.
    """
    ranks = find_ranks()
    if trainer.devices in ("auto", -1):
        num_devices = ranks.size // trainer.num_nodes
        if not ranks.launcher and trainer.accelerator != "cpu":
            import torch

            num_devices = torch.cuda.device_count()
        trainer.devices = max(1, num_devices)
    if ranks.launcher:
        return False
    if trainer.num_nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes: {trainer.num_nodes} machines need a launcher: run the command "
            "under srun (see scripts/slurm) or torchrun"
        )
    return trainer.num_devices > 1


def launch(num_processes: int) -> int:
    """Run this command line in `num_processes` processes.

    Signals are passed on, and the ranks have GRACE_S to finish; a second one ends the run at once.
    The ranks meet in a store of this process, which outlives them.

    Returns:
        The exit status of the first process that failed, or 0.
    """
    store = listen_on_loopback(0, None, STORE_TIMEOUT)
    line = [sys.executable, "-u", *sys.argv]
    environment = {  # as torchrun sets it, without the rank's number
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "GROUP_RANK": "0",
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RUN_ID": uuid.uuid4().hex,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        LAUNCHER: "1",
    }
    received: list[signal.Signals] = []
    for number in (*ENDING, signal.SIGUSR1):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(
                number, lambda found, _: received.append(signal.Signals(found))
            )
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
    return _wait(ranks, received)


def follow_launcher() -> None:
    """End with the launcher if this process is a rank of `launch`."""
    if LAUNCHER in os.environ:
        end_with_parent()


def _wait(ranks: list[subprocess.Popen[bytes]], received: list[signal.Signals]) -> int:
    """Pass on signals until all ranks have ended; return the run's exit status."""
    ending: signal.Signals | None = None
    failure: int | None = None
    deadline_s = float("inf")

    def send(number: signal.Signals) -> None:
        for process in ranks:
            process.send_signal(number)  # does nothing to one that has ended

    while True:
        statuses = [process.poll() for process in ranks]
        # Among several, the killed rank is the cause, one that lost its connection the effect.
        failed = [(status, rank) for rank, status in enumerate(statuses) if status]
        if failure is None and failed:
            failure, failed_rank = min(failed)
            # Otherwise the others leave too, and one of them reports where the run stopped.
            if failure not in (REQUEUE, 128 + (ending or 0)):
                deadline_s = time.monotonic() + AFTER_FAILURE_S
                send(signal.SIGTERM)
        if None not in statuses:
            break
        while received:
            number = received.pop(0)
            if number in ENDING and ending is not None:
                print_error(f"ranks ended at once by a second {number.name}")
                number = signal.SIGKILL
            elif number in ENDING:
                ending = number
                deadline_s = time.monotonic() + GRACE_S
            send(number)
        if time.monotonic() > deadline_s:
            send(signal.SIGKILL)
        time.sleep(POLL_S)
    if failure is None or failure > 0:
        return failure or 0
    if ending is not None and -failure in (ending, signal.SIGKILL):
        return 128 + ending
    name = signal.Signals(-failure).name
    print_error(f"rank {failed_rank} was ended by {name}")
    return 1
