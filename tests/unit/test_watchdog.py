"""What a rank tells before it ends because nothing moves. Whole commands: tests/distributed/test_launch.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from nemo_kd.run.interruption import CollectiveError, Watchdog

ROOT = Path(__file__).resolve().parents[2]


def start(code: str) -> subprocess.Popen[str]:
    code = (
        "import ctypes, threading, time\nfrom nemo_kd.run.interruption import Watchdog\n"
        + textwrap.dedent(code)
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def test_silence_ends_the_process_with_the_last_step_and_all_stacks():
    process = start("""
        def reads_forever(): time.sleep(100)
        threading.Thread(target=reads_forever, daemon=True).start()
        with Watchdog(0.5, rank=3) as watchdog:
            watchdog.step("batch 12 of segment 640-703: examples [641, 650]: forward")
            time.sleep(100)
        """)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    lines = stderr.splitlines()
    where = f"error: rank 3 on {os.uname().nodename} made no progress for 0.5 s (trainer.distributed_timeout_minutes)"
    assert lines[0] == where
    assert (
        lines[1]
        == "last step: batch 12 of segment 640-703: examples [641, 650]: forward"
    )
    assert "in reads_forever" in stderr
    assert "<module>" in stderr


def test_signs_of_life_and_pauses_keep_it_alive():
    process = start("""
        with Watchdog(0.5, rank=0) as watchdog:
            for _ in range(10):
                watchdog.step("busy")
                time.sleep(0.15)
            with watchdog.pause("loading"):
                time.sleep(1.5)
            time.sleep(0.3)
        time.sleep(1)
        """)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (0, "")


def test_silence_after_a_pause_counts_again():
    process = start("""
        with Watchdog(0.5, rank=0) as watchdog:
            with watchdog.pause("loading"):
                pass
            time.sleep(100)
        """)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "last step: after: loading" in stderr


def test_a_suspended_process_does_not_hang():
    process = start("""
        import sys
        with Watchdog(1.5, rank=0) as watchdog:
            for count in range(40):
                watchdog.step("busy")
                print(count, file=sys.stderr, flush=True)
                time.sleep(0.05)
        """)
    assert process.stderr.readline() == "0\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(2)
    process.send_signal(signal.SIGCONT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr


@pytest.mark.parametrize(
    "error",
    [
        torch.distributed.DistBackendError(
            "NCCL error in: NCCLUtils.cpp:94, remote process exited"
        ),
        RuntimeError(
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]"
        ),
        RuntimeError(
            "[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1000ms for recv\nstack\nstack"
        ),
        torch.distributed.DistNetworkError("failed to recv, got 0 bytes"),
    ],
)
def test_errors_of_collectives_tell_rank_and_step(error):
    watchdog = Watchdog(10, rank=5)
    watchdog.step("batch 7")
    with pytest.raises(CollectiveError) as caught, watchdog:
        raise error
    (line,) = str(caught.value).splitlines()
    assert line.startswith(
        f"rank 5 on {os.uname().nodename} lost the other ranks; its last step: batch 7. "
    )
    assert line.endswith("torch says: " + str(error).splitlines()[0])
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("gloo")],
)
def test_other_errors_pass(error):
    with (
        pytest.raises(type(error)) as caught,
        Watchdog(10, rank=0),
    ):
        raise error
    assert caught.value is error


def test_a_real_time_out_of_a_store():
    store = torch.distributed.HashStore()
    store.set_timeout(timedelta(milliseconds=50))
    with (
        pytest.raises(CollectiveError) as caught,
        Watchdog(10, rank=0),
    ):
        store.get("nobody sets this")
    assert "lost the other ranks; its last step: start. " in str(caught.value)
