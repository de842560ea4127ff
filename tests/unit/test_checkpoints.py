"""Checkpoints of a run where one is damaged, the disk is full, or another archive is wanted."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_kd.config.exp_manager import CheckpointParams
from nemo_kd.files import FileError
from nemo_kd.run.interruption import Watchdog
from nemo_kd.student import checkpoints as student_checkpoints
from nemo_kd.student.checkpoint_folder import check_whole
from nemo_kd.student.checkpoints import Checkpoints
from tests.unit.test_checkpoint_folder import write


def checkpoints_of(parent: Path, **params: Any) -> Checkpoints:
    return Checkpoints(
        CheckpointParams(**params), "run", parent, {"data": 1}, {}, Watchdog(60, 0)
    )


@pytest.mark.parametrize("content", [b"weighty", b"weight"])
def test_a_damaged_best_checkpoint_is_not_exported(tmp_path, caplog, content):
    write(tmp_path, 2, "best")
    found = checkpoints_of(tmp_path)
    found.scores[tmp_path / "best"] = 1.0
    student = SimpleNamespace(global_step=2)
    assert found._load_best(student) == 2
    (tmp_path / "best" / "__0_0.distcp").write_bytes(content)
    assert found._load_best(student) is None
    assert (
        f"{tmp_path / 'best'}, the best checkpoint, is damaged (__0_0" in caplog.text
    )


@pytest.mark.parametrize("fails_at_once", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError("No space left on device"),  # torch's text alone
    ],
)
def test_a_full_disk(tmp_path, monkeypatch, error, fails_at_once):
    class FullDisk:
        def __init__(self, state: object, folder: Path) -> None:
            self.folder = folder
            folder.mkdir()
            (folder / "__0_0.distcp").write_bytes(b"part")
            if fails_at_once:
                raise error

        def finish(self) -> None:
            raise error

    monkeypatch.setattr(student_checkpoints, "CheckpointWrite", FullDisk)
    write(tmp_path, 2, "run-last")
    found = checkpoints_of(tmp_path)
    found._names = [tmp_path / "run-step=4-last"]
    text = "run-step=4-last: cannot be written .No space left on device"
    with pytest.raises(FileError, match=text):
        found.write({"global_step": 4})
        found.finish()
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["run-last"]
    # The disk is freed at once. A failure before any weight is written leaves a few bytes.
    assert bool(list(tmp_path.glob(".*"))) == fails_at_once
    assert check_whole(tmp_path / "run-last")


@pytest.mark.parametrize(
    ("measured", "state"),
    [
        ({"eval/accuracy": 0.5}, ""),  # ranked at the next validation
        ({"val_loss": 1.0, "validation/loss": 1.0}, "not measured"),
        ({"validation/mine": math.nan}, "not finite"),
    ],
)
def test_a_metric_that_ranks_nothing_is_told(tmp_path, caplog, measured, state):
    found = checkpoints_of(tmp_path, monitor="validation/mine")
    names: list[str] = []
    found._save = lambda student, paths: names.extend(path.name for path in paths)
    student = SimpleNamespace(
        measured=measured,
        global_step=3,
        trainer=SimpleNamespace(callback_metrics={}, should_stop=False),
        data=SimpleNamespace(training=SimpleNamespace(consumed_samples=24)),
    )
    found.rank(student)
    assert names == ["run--step=3-consumed_samples=24.0-last"]
    told = f"validation/mine is {state} after step 3; no checkpoint is ranked by it"
    assert caplog.messages == [told] * bool(state)
