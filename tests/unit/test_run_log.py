"""Stage 2's metrics where the disk is full."""

from __future__ import annotations

import contextlib
import resource
from types import SimpleNamespace

import pytest

from nemo_kd.files import FileError
from nemo_kd.student.reports import RunLog


@contextlib.contextmanager
def files_of_at_most(num_bytes: int):
    """A full disk that needs no privileges: writing fails at this length."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_cannot_grow_is_named(tmp_path):
    trainer = SimpleNamespace(loggers=[], log_every_n_steps=1)
    run_log = RunLog(tmp_path, 1000, 1.0, trainer)
    file = tmp_path / "metrics" / "metrics.jsonl"
    with (
        files_of_at_most(4096),
        pytest.raises(FileError, match=f"{file}: cannot be written"),
    ):
        for step in range(1000):
            run_log.step(step, {"train/loss": 1.0, "lr": 0.5}, {})
