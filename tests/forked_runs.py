"""Runs of stage 2 in processes of their own, which can be killed; quick to start, as the modules are loaded once.

The ranks are forked from a server that has imported everything, and end as those of the command do: with its exit
statuses and messages.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from tests.ranks import CONTEXT
from tests.tiny_data import student_config

TIMEOUT_S = 240


class StudentRun:
    """`train_student` on some ranks.

    Args:
        arguments: of `student_config`.
        change: "module:function" that is called in every rank first, to disturb it.
    """

    def __init__(
        self,
        log_dir: Path,
        world_size: int,
        change: str,
        *arguments: Any,
        **overrides: Any,
    ) -> None:
        self.log_dir = log_dir
        log_dir.mkdir(parents=True, exist_ok=True)
        self.messages = log_dir.with_name(
            f"{log_dir.name}.{time.monotonic_ns()}.messages"
        )
        self._lines_before = len(metrics(log_dir))
        self._store = torch.distributed.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )
        overrides = {"trainer__devices": world_size, **overrides}
        self.ranks = [
            CONTEXT.Process(
                target=_rank,
                args=(
                    rank,
                    world_size,
                    self._store.port,
                    self.messages,
                    change,
                    (*arguments, log_dir),
                    overrides,
                ),
            )
            for rank in range(world_size)
        ]
        for rank in self.ranks:
            rank.start()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        limit_s = time.monotonic() + TIMEOUT_S
        while not condition():
            assert all(rank.is_alive() for rank in self.ranks), self.said()
            assert time.monotonic() < limit_s, self.said()
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        """Until this run, not one before it, has completed the step."""
        self.wait_until(
            lambda: any(
                row["step"] == step
                for row in metrics(self.log_dir)[self._lines_before :]
                if "lr" in row
            )
        )

    def send(self, rank: int, number: signal.Signals) -> None:
        pid = self.ranks[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def kill(self) -> None:
        """Kill all ranks; processes that they have started, such as writers of checkpoints, must end with them."""
        children = [child for rank in self.ranks for child in _children(rank.pid)]
        for rank in self.ranks:
            rank.kill()
        self.end()
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive, alive

    def end(self) -> list[int | None]:
        """The exit statuses, in rank order."""
        for rank in self.ranks:
            rank.join(TIMEOUT_S)
            if rank.is_alive():
                rank.kill()
                rank.join()
                raise AssertionError(f"it does not end:\n{self.said()}")
        return [rank.exitcode for rank in self.ranks]

    def said(self) -> str:
        return self.messages.read_text() if self.messages.exists() else ""


def _children(pid: int | None) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def metrics(log_dir: Path) -> list[dict[str, Any]]:
    path = log_dir / "metrics" / "metrics.jsonl"
    if not path.exists():
        return []
    # The last line may be on its way.
    return [
        json.loads(line)
        for line in path.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]


def training_rows(log_dir: Path) -> dict[int, dict[str, Any]]:
    """Step -> what does not depend on the clock; of a step that was repeated, the last time."""
    return _rows(log_dir, "train/loss")


def validation_rows(log_dir: Path) -> dict[int, dict[str, Any]]:
    return _rows(log_dir, "val_loss")


def _rows(log_dir: Path, needed: str) -> dict[int, dict[str, Any]]:
    return {
        row["step"]: {
            key: value
            for key, value in row.items()
            if key != "time" and not key.startswith("perf/")
        }
        for row in metrics(log_dir)
        if needed in row
    }


def _rank(
    rank: int,
    world_size: int,
    port: int,
    messages: Path,
    change: str,
    arguments: tuple[Any, ...],
    overrides: Any,
) -> None:
    file = os.open(messages, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout, sys.stderr = (
        os.fdopen(1, "w", buffering=1),
        os.fdopen(2, "w", buffering=1),
    )
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "GROUP_RANK": "0",
        "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests", "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    torch.set_num_threads(1)
    from nemo_kd.cli.run import configure_logging
    from nemo_kd.run.endings import errors_end_the_process
    from nemo_kd.student.job import train_student

    configure_logging()
    with errors_end_the_process():
        if change:
            module, _, function = change.partition(":")
            getattr(importlib.import_module(module), function)()
        train_student(student_config(*arguments, **overrides))
    os._exit(0)
