"""Starting ranks and ending them: signals, failures and hangs, with real processes and without a model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from nemo_kd.run.interruption import REQUEUE

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "distributed" / "rank_program.py"
KEYS = [
    f"pretrained_checkpoint.restore_from_path={ROOT}",
    f"data.data.file_path={PROGRAM}",
    "output_path=o.jsonl",
    "trainer.precision=32",
]
"""What is there passes the checks before the start; the program reads none of it."""
TIMEOUT_S = 180


class Run:
    """The program in a process of its own, with `devices` ranks."""

    def __init__(self, folder: Path, mode: str, devices: int = 2, **env: str) -> None:
        self.folder, self.devices = folder, devices
        variables = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM_", "TORCHELASTIC"))
        }
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            variables.pop(name, None)
        variables |= {
            "MODE": mode,
            "FOLDER": str(folder),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            **env,
        }
        line = [sys.executable, str(PROGRAM), *KEYS, f"trainer.devices={devices}"]
        self.process = subprocess.Popen(
            line,
            stderr=subprocess.PIPE,
            text=True,
            env=variables,
            start_new_session=True,
        )

    def ready(self) -> list[int]:
        """The ranks' process ids, once all are ready."""
        files = [self.folder / f"ready.{rank}" for rank in range(self.devices)]
        limit_s = time.monotonic() + TIMEOUT_S
        while not all(file.exists() and file.read_text() for file in files):
            assert self.process.poll() is None, self.process.stderr.read()
            assert time.monotonic() < limit_s
            time.sleep(0.02)
        return [int(file.read_text()) for file in files]

    def end(self) -> tuple[int, str]:
        """(exit status, stderr behind its first line); no rank is left."""
        _, stderr = self.process.communicate(timeout=TIMEOUT_S)
        for file in self.folder.glob("ready.*"):
            assert not _alive(int(file.read_text()))
        first = f"loading libraries; ranks: {self.devices}\n"
        return self.process.returncode, stderr.removeprefix(first)

    def saved(self) -> set[str]:
        return {file.name for file in self.folder.glob("saved.*")}


def _alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def start_one(mode: str, devices: int = 2, **env: str) -> Run:
        runs.append(Run(tmp_path, mode, devices, **env))
        return runs[-1]

    yield start_one
    for run in runs:
        if run.process.poll() is None:
            run.process.kill()
        for file in tmp_path.glob("ready.*"):
            if _alive(int(file.read_text())):
                os.kill(int(file.read_text()), signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_ranks_finish_after_a_signal_to_the_launcher(start, number):
    run = start("finish")
    run.ready()
    run.process.send_signal(number)
    status, stderr = run.end()
    assert status == REQUEUE == 75
    assert run.saved() == {"saved.0", "saved.1"}
    (line,) = stderr.splitlines()
    assert line.startswith("rank 0 on ")
    assert line.endswith(
        f" received {number.name}; the same command continues (exit status 75)"
    )


def test_a_single_process_finishes_after_a_signal(start):
    run = start("finish", devices=1)
    run.ready()
    run.process.send_signal(signal.SIGTERM)
    assert run.end()[0] == REQUEUE
    assert run.saved() == {"saved.0"}


def test_a_signal_to_one_rank_ends_all_of_them_together(start):
    run = start("finish_together")
    os.kill(run.ready()[1], signal.SIGUSR1)
    status, stderr = run.end()
    assert status == REQUEUE, stderr
    assert run.saved() == {"saved.0", "saved.1"}
    assert stderr.startswith("rank 1 on ")
    assert "received SIGUSR1; the same command continues" in stderr


def test_a_signal_to_launcher_and_ranks_at_once_counts_once(start):
    run = start("finish")
    for pid in [*run.ready(), run.process.pid]:
        os.kill(pid, signal.SIGTERM)
    assert run.end()[0] == REQUEUE
    assert run.saved() == {"saved.0", "saved.1"}


def test_nobody_leaves_and_nothing_disturbs_while_one_rank_cleans_up(start):
    run = start("finish_together", CLEAN_UP="1.5")
    pids = run.ready()
    run.process.send_signal(signal.SIGUSR1)
    while not (run.folder / "cleaning.0").exists():
        time.sleep(0.02)
    time.sleep(0.5)
    assert all(_alive(pid) for pid in pids)
    os.kill(pids[0], signal.SIGTERM)
    assert run.end()[0] == REQUEUE
    assert (run.folder / "clean.0").exists()


def test_a_warning_that_comes_before_the_run_is_ready_is_not_lost(start):
    run = start("early")
    assert run.end()[0] == REQUEUE
    assert run.saved() == {"saved.0", "saved.1"}


def test_the_end_of_the_time_is_a_reason(start):
    run = start("finish", MAX_TIME="00:00:00:05")
    status, stderr = run.end()
    assert status == REQUEUE
    assert stderr.startswith(
        "max_time_per_run=00:00:00:05 is over; the same command continues"
    )


def test_before_there_is_anything_to_save_sigterm_ends_the_run(start):
    run = start("before")
    run.ready()
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == (128 + signal.SIGTERM, "")


def test_ctrl_c(start):
    run = start("ignore")
    run.ready()
    run.process.send_signal(signal.SIGINT)
    assert run.end() == (128 + signal.SIGINT, "interrupted\n")


def test_a_second_signal_ends_at_once(start):
    run = start("ignore")
    run.ready()
    run.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert run.process.poll() is None
    started_s = time.monotonic()
    run.process.send_signal(signal.SIGTERM)
    status, stderr = run.end()
    assert (
        time.monotonic() - started_s < 60
    )  # and not the ten minutes that a first one gives
    assert (status, stderr) == (
        143,
        "error: ranks ended at once by a second SIGTERM\n",
    )


@pytest.mark.parametrize("devices", [1, 2])
def test_nothing_listens_on_other_addresses_than_loopback(start, devices):
    run = start("meet", devices)
    pids = {run.process.pid, *run.ready()}
    sockets = [
        each
        for pid in pids
        for each in psutil.Process(pid).net_connections("inet")
        if each.status == "LISTEN"
    ]
    assert {each.laddr.ip for each in sockets} <= {"127.0.0.1", "::1"}
    assert sockets or devices == 1
    run.process.kill()


def test_a_killed_rank_is_named_and_takes_the_others_along(start):
    run = start("dies")
    status, stderr = run.end()
    assert status == 1
    assert stderr == "error: rank 1 was ended by SIGKILL\n"


def test_ranks_end_with_their_launcher(start):
    run = start("ignore")
    pids = run.ready()
    run.process.kill()
    limit_s = time.monotonic() + 5
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < limit_s
        time.sleep(0.02)


def test_a_rank_that_loses_the_others_tells_what_it_was_doing(start):
    run = start("lose_the_other")
    status, stderr = run.end()
    assert status == 1
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2, stderr
    assert lines[0].startswith("error: rank 0 on ")
    assert (
        "its last step: batch 12 of segment 640-703: examples [641, 650]: forward. Another rank"
        in lines[0]
    )
    assert "torch says: " in lines[0]
    assert "rank 1 was ended by SIGKILL" in lines[1]


def test_a_hanging_rank_ends_the_run_with_its_last_step_and_stack(start):
    status, stderr = start("hang").end()
    assert status == 1
    assert stderr.startswith("error: rank 1 on ")
    assert "made no progress for 1 s" in stderr
    assert "last step: batch 3: reading examples [7, 8]\n" in stderr
    assert 'rank_program.py", line ' in stderr
    assert " in hang" in stderr


def test_exit_statuses(start):
    status, stderr = start("refuses").end()
    assert (status, stderr) == (2, "error: top_k: not today\n")
    assert start("trains", devices=1).end()[0] == 128 + signal.SIGTERM
    assert start("fails").end()[0] == 3
    assert start("succeeds").end()[0] == 0
