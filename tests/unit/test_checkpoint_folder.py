"""Checkpoints on disk: which names they have at which moment, with and without hard links."""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from pathlib import Path

import pytest

from nemo_kd.mcore.checkpoint_write import file_sum
from nemo_kd.student import checkpoint_folder as checkpoint_folder
from nemo_kd.student.checkpoint_folder import (
    CheckpointError,
    Contents,
    check_whole,
    checkpoints,
    discard,
    publish,
    put_aside,
    seal,
    unfinished_folder,
)


def write(parent: Path, step: int, *names: str, content: bytes = b"weights") -> None:
    folder = unfinished_folder(parent / names[0])
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_bytes(content)
    (folder / "common.pt").write_bytes(b"rest")
    sums = {"__0_0.distcp": file_sum(folder / "__0_0.distcp")}
    seal(folder, Contents(step, True, {"data": 1}, sums, {"seed": 1}))
    publish(folder, [parent / name for name in names])


def names(parent: Path) -> list[str]:
    return [path.name for path in checkpoints(parent)]


def no_links(*args: object, **kwargs: object) -> None:
    raise OSError("the file system has no hard links")


@pytest.mark.parametrize("link", [os.link, no_links])
def test_the_latest_and_the_one_before_are_kept(tmp_path, monkeypatch, link):
    monkeypatch.setattr(os, "link", link)
    write(tmp_path, 2, "a-step=2-last")
    assert names(tmp_path) == ["a-step=2-last"]
    write(tmp_path, 4, "a-loss=1-step=4", "a-loss=1-step=4-last")
    assert names(tmp_path) == [
        "a-loss=1-step=4-last",
        "a-loss=1-step=4",
        "a-step=2-previous",
    ]
    write(tmp_path, 6, "a-step=6-last")
    assert names(tmp_path) == [
        "a-step=6-last",
        "a-loss=1-step=4-previous",
        "a-loss=1-step=4",
    ]
    assert all(map(check_whole, checkpoints(tmp_path)))
    assert not list(tmp_path.glob(".*"))
    discard(tmp_path / "a-loss=1-step=4")
    assert check_whole(tmp_path / "a-loss=1-step=4-previous")


def test_a_name_without_a_step_is_used_again(tmp_path):
    for step in (2, 4, 6):
        write(tmp_path, step, "run-last", content=bytes([step]))
    assert names(tmp_path) == ["run-last", "run-previous"]
    assert [
        (path / "__0_0.distcp").read_bytes()[0] for path in checkpoints(tmp_path)
    ] == [6, 4]


def test_a_checkpoint_of_a_name_is_replaced(tmp_path):
    write(tmp_path, 2, "best", content=b"old")
    write(tmp_path, 3, "best", content=b"new")
    assert [
        (path / "__0_0.distcp").read_bytes() for path in checkpoints(tmp_path)
    ] == [b"new"]


def test_what_is_no_checkpoint_is_left_alone(tmp_path):
    write(tmp_path, 2, "a-step=2-last")
    (tmp_path / "export-hf").mkdir()
    (tmp_path / "export-hf" / "config.json").touch()
    unfinished_folder(tmp_path / "a-step=4-last").mkdir()
    (tmp_path / "run.nemo").touch()
    assert names(tmp_path) == ["a-step=2-last"]
    put_aside({tmp_path / "a-step=2-last": OSError()})
    assert (tmp_path / "a-step=2-last.damaged").is_dir()
    write(tmp_path, 2, "a-step=2-last")
    put_aside({tmp_path / "a-step=2-last": OSError()})
    assert (tmp_path / "a-step=2-last.damaged.damaged").is_dir()
    assert names(tmp_path) == []


def test_contents_are_plain_json(tmp_path):
    write(tmp_path, 2, "a-last")
    contents = json.loads((tmp_path / "a-last" / "contents.json").read_text())
    assert contents == {
        "format_version": 1, "step": 2, "resumable": True, "layout": {"data": 1}, "experiment": {"seed": 1},
        "files": {"__0_0.distcp": [7, zlib.crc32(b"weights")], "common.pt": [4, zlib.crc32(b"rest")]},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            '{"format_version": 2, "step": 2, "resumable": true, "layout": {}, "files": {}, "experiment": {}}',
            "format version 2",
        ),
        ("[]", "contents.json cannot be read"),
        ('{"format_version": 1, "step": 2}', "contents.json cannot be read"),
        ('{"format_version": 1, "st', "contents.json cannot be read"),
    ],
)
def test_contents_that_are_none(tmp_path, content, problem):
    write(tmp_path, 2, "a-last")
    (tmp_path / "a-last" / "contents.json").write_text(content)
    with pytest.raises(CheckpointError, match=problem):
        check_whole(tmp_path / "a-last")


def test_killed_between_any_two_changes_a_whole_checkpoint_is_left(
    tmp_path, monkeypatch
):
    """Every rename and every deletion is one that a kill may prevent."""
    for survived in range(8):
        parent = tmp_path / str(survived)
        write(parent, 2, "a-step=2-last")
        write(parent, 4, "a-step=4-last")
        remaining = [survived]

        def dies(path: Path, remaining: list[int] = remaining) -> None:
            remaining[0] -= 1
            if remaining[0] < 0:
                raise KeyboardInterrupt(str(path))

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(
                Path,
                "rename",
                lambda path, target: (dies(path), os.rename(path, target))[1],
            )
            patch.setattr(
                checkpoint_folder.shutil, "rmtree", lambda path, **kwargs: dies(path)
            )
            write(parent, 6, "a-loss=1-step=6", "a-loss=1-step=6-last")
        first = checkpoints(parent)[0]
        assert "step=4" in first.name or "step=6" in first.name
        assert all(map(check_whole, checkpoints(parent)))
