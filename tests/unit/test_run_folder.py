"""A folder belongs to one run at a time, and nothing starts over in one that holds a run."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path

import pytest

from nemo_kd.config import UserInputError
from nemo_kd.config.exp_manager import CheckpointParams, ExpManagerConfig
from nemo_kd.files import abandoned
from nemo_kd.student import run_folder as run_folder
from nemo_kd.student.checkpoint_folder import (
    UNFINISHED,
    Contents,
    publish,
    seal,
    unfinished_folder,
)
from nemo_kd.student.run_folder import own_run_folder


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(run_folder, "WAIT_S", 0.3)
    monkeypatch.setattr(run_folder, "WAIT_AFTER_REQUEUE_S", 20.0)


def settings(log_dir: Path | None, dirpath: Path | None = None, **changed):
    params = CheckpointParams(dirpath=None if dirpath is None else str(dirpath))
    folder = None if log_dir is None else str(log_dir)
    return ExpManagerConfig(
        explicit_log_dir=folder, checkpoint_callback_params=params, **changed
    )


def write_checkpoint(target: Path, resumable: bool = True) -> Path:
    folder = unfinished_folder(target)
    folder.mkdir(parents=True)
    seal(folder, Contents(2, resumable, {}, {}, {}))
    publish(folder, [target])
    return target


def attempt(*args, **changed) -> str:
    try:
        with contextlib.ExitStack() as stack:
            own_run_folder(settings(*args, **changed), "kd", stack)
            return ""
    except UserInputError as error:
        return str(error)


@pytest.mark.parametrize("shared", ["log_dir", "dirpath", "default"])
def test_a_second_run_is_refused(tmp_path, monkeypatch, shared):
    monkeypatch.chdir(tmp_path)
    first, second = (tmp_path / "a", None), (tmp_path / "a", None)
    if shared == "dirpath":
        first, second = (
            (tmp_path / "a", tmp_path / "c"),
            (tmp_path / "b", tmp_path / "c"),
        )
    if shared == "default":
        first = second = (None, None)
    with contextlib.ExitStack() as stack:
        own_run_folder(settings(*first), "kd", stack)
        message = attempt(*second)
    assert f"process {os.getpid()} on {socket.gethostname()}" in message
    assert (
        "is training there; two runs in one folder would destroy each other's checkpoints"
        in message
    )
    assert "another exp_manager.explicit_log_dir" in message
    assert attempt(*second) == ""


def test_a_requeued_job_waits_for_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    path = tmp_path / run_folder.LOCK
    path.parent.mkdir()
    child = os.fork()
    if child == 0:
        file = path.open("w")
        fcntl.flock(file, fcntl.LOCK_EX)
        (tmp_path / "locked").touch()
        time.sleep(1.5)
        os._exit(0)
    while not (tmp_path / "locked").exists():
        time.sleep(0.01)
    assert attempt(tmp_path) == ""
    os.waitpid(child, 0)


def test_nothing_is_trained_over(tmp_path):
    log_dir, parent = tmp_path / "run", tmp_path / "run" / "checkpoints"
    (log_dir / "metrics").mkdir(parents=True)
    (log_dir / "metrics" / "metrics.jsonl").write_text("{}\n")
    assert attempt(log_dir) == "", (
        "a run that was killed before its first checkpoint starts over"
    )
    message = attempt(log_dir, resume_if_exists=False)
    assert "exp_manager.resume_if_exists: False" in message
    assert "metrics.jsonl belongs to a run that this one would not resume" in message
    assert "explicit_log_dir, move the files away, or resume that run" in message
    parent.mkdir()
    (parent / "kd.nemo").touch()
    assert f"{parent / 'kd.nemo'} belongs to a run" in attempt(log_dir)
    weights = write_checkpoint(parent / "kd-step=2", resumable=False)
    assert "not resume but overwrite" in attempt(log_dir)
    write_checkpoint(parent / "kd-step=3-last")
    assert attempt(log_dir) == ""
    assert "belongs to a run" in attempt(log_dir, resume_if_exists=False)
    assert weights.exists()


def test_only_abandoned_checkpoints_are_unfinished(tmp_path):
    mine = unfinished_folder(tmp_path / "a-last")
    machine = socket.gethostname()
    dead = tmp_path / f".a-last.12345678.{machine}-999999999{UNFINISHED}"
    alive = tmp_path / f".a-last.12345678.{machine}-{os.getppid()}{UNFINISHED}"
    elsewhere = tmp_path / f".a-last.12345678.other-7{UNFINISHED}"
    old = tmp_path / f".b-last.12345678.other-8{UNFINISHED}"
    for folder in (mine, dead, alive, elsewhere, old):
        folder.mkdir()
    os.utime(old, (0, 0))
    assert abandoned(tmp_path, UNFINISHED) == [dead, old]
