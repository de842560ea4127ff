"""Stage 2's loggers where the disk is full."""

from __future__ import annotations

import contextlib
import json
import resource
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from nemo_kd.run.endings import user_message
from nemo_kd.student.progress import RunLog, quiet_tensorboard_thread


@contextlib.contextmanager
def files_of_at_most(num_bytes: int):
    """A full disk that needs no privileges: writing fails at this length."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kind", ["metrics", "tensorboard"])
def test_a_file_that_cannot_grow_is_named_without_a_traceback(tmp_path, capsys, kind):
    file = tmp_path / "metrics" / "metrics.jsonl"
    run_log = RunLog(max_steps=1000, every_n_steps=1, interval_s=1.0)
    run_log.log_dir = tmp_path
    on_rank_zero = kind == "metrics"
    loggers = [] if on_rank_zero else [TensorBoardLogger(tmp_path, name="", version="")]
    trainer = SimpleNamespace(loggers=loggers, is_global_zero=on_rank_zero)
    with (
        files_of_at_most(4096),
        quiet_tensorboard_thread(),
        pytest.raises(OSError, match="File too large") as raised,
    ):
        for step in range(1000):
            trainer.global_step = step
            run_log._log(trainer, {"train/loss": 1.0, "lr": 0.5})
    message = user_message(raised.value)
    assert message.startswith(f"{file if kind == 'metrics' else tmp_path}")
    assert (
        "File too large; the file system or a limit (`ulimit -f`) allows no larger file"
        in message
    )
    assert "Traceback" not in capsys.readouterr().err
    if kind == "metrics":
        lines = file.read_text().split("\n")
        assert lines[-1] == ""
        assert [json.loads(line)["step"] for line in lines[:-1]] == list(
            range(len(lines) - 1)
        )  # no half line
