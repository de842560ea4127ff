"""Checkpoints of a run where one is damaged, the disk is full, or another archive is wanted."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemo_kd.config.exp_manager import CheckpointParams
from nemo_kd.files import FileError
from nemo_kd.run.interruption import Watchdog
from nemo_kd.student import checkpoints as student_checkpoints
from nemo_kd.student.checkpoint_folder import check_whole
from nemo_kd.student.checkpoints import Checkpoints
from tests.unit.test_checkpoint_folder import write


def checkpoints_of(parent: Path, **params: bool) -> Checkpoints:
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
