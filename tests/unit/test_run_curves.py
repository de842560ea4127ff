"""plot_runs: what is read from runs, and pictures of it."""

from __future__ import annotations

import json
import sys

import pytest

from nemo_kd.cli import plot_runs as command
from nemo_kd.tools.run_curves import RunError, plot_runs, read_curves


@pytest.fixture(autouse=True)
def other_processes_stay(monkeypatch):
    """A command ends its process's children, which here are the ranks of other tests."""
    monkeypatch.setattr("nemo_kd.run.endings.end_children", lambda: None)
    # Another test may have joined ranks in this process, which would then end.
    monkeypatch.setattr("nemo_kd.run.endings._process_group", lambda: None)


def write_run(folder, rows, end=""):
    file = folder / "metrics" / "metrics.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return folder


COUNTS = {"epoch": 0.5, "consumed_samples": 8.0, "train_step": 1.0, "eval_step": 1.0}


def steps(count, loss):
    rows = [
        {"step": step, "time": 1.0, "train/loss": loss / step, "lr": 0.1, **COUNTS}
        for step in range(1, count + 1)
    ]
    return [
        *rows,
        {
            "step": count,
            "time": 2.0,
            "validation/loss": loss,
            "perf/tokens_per_s": 5.0,
        },
    ]


def test_a_resumed_run_repeats_steps_and_a_killed_one_leaves_half_a_line(tmp_path):
    rows = [
        {"step": 1, "train/loss": 3.0},
        {"step": 2, "train/loss": 2.0},
        {"step": 2, "train/loss": 1.5},
    ]
    run = write_run(tmp_path / "run", rows, '{"step": 3, "tra')
    assert read_curves(run) == {"train/loss": {1: 3.0, 2: 1.5}}
    assert read_curves(run / "metrics" / "metrics.jsonl") == read_curves(run)


def test_every_section_is_a_picture_of_all_runs(tmp_path, monkeypatch, capsys):
    first, second = (
        write_run(tmp_path / "a", steps(3, 4.0)),
        write_run(tmp_path / "b", steps(500, 9.0)),
    )
    arguments = [
        "plot_runs",
        str(first),
        str(second),
        "--output-dir",
        str(tmp_path / "out" / "pictures"),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    command.main()
    written = sorted((tmp_path / "out" / "pictures").iterdir())
    assert [path.name for path in written] == [
        "perf.png",
        "train.png",
        "validation.png",
    ]
    assert capsys.readouterr().out.split() == [str(path) for path in written]
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for path in written)
    assert len({path.stat().st_size for path in written}) == 3


def test_curves_hold_what_the_runs_measured(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = {}
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda figure, path, **_: drawn.update(
            {
                axes.get_title(): {
                    line.get_label(): line.get_xydata().tolist() for line in axes.lines
                }
                for axes in figure.axes
            }
        ),
    )
    first, second = (
        write_run(tmp_path / "x" / "a", steps(2, 4.0)),
        write_run(tmp_path / "x" / "b", steps(3, 9.0)),
    )
    plot_runs([first, second], tmp_path)
    assert set(drawn) >= {"train/loss", "lr"}
    assert not {"epoch", "consumed_samples", "train_step", "eval_step"} & set(drawn)
    drawn.clear()
    plot_runs([first, second], tmp_path, "epoch")
    assert list(drawn) == ["epoch"]
    drawn.clear()
    plot_runs([first, second], tmp_path, "loss")
    assert drawn == {
        "train/loss": {
            str(first): [[1, 4], [2, 2]],
            str(second): [[1, 9], [2, 4.5], [3, 3]],
        },
        "validation/loss": {str(first): [[2, 4]], str(second): [[3, 9]]},
    }


def test_what_cannot_be_drawn(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run", steps(3, 4.0))
    with pytest.raises(
        RunError,
        match=r"none: not a run: there is no .*none; give a run's exp_manager.explicit_log_dir",
    ):
        read_curves(tmp_path / "none")
    with pytest.raises(RunError, match=r"metrics.jsonl:2: not an object with a step"):
        read_curves(write_run(tmp_path / "torn", steps(1, 1.0)[:1], "[3]\n{}\n"))
    with pytest.raises(RunError, match="no metric of these runs contains 'nonsense'"):
        plot_runs([run], tmp_path, "nonsense")
    monkeypatch.setattr(sys, "argv", ["plot_runs", str(run), "--metrics", "("])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 2
    assert (
        "error: --metrics: '(' is not a regular expression" in capsys.readouterr().err
    )
