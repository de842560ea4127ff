"""Files that appear whole, never through a planted link, and locks."""

from __future__ import annotations

import os
import socket

import pytest

from nemo_kd import files
from nemo_kd.files import (
    FileError,
    Lock,
    abandoned,
    atomic_file,
    open_for_append,
    remove_abandoned,
    write_atomically,
)
from nemo_kd.run.metrics import MetricsFile


def plant(path, kind, victim):
    """Put something that is not a regular file where a process is about to write."""
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))


@pytest.mark.parametrize("kind", ["link", "loop", "pipe", "folder", "socket"])
@pytest.mark.parametrize("opened", [Lock, open_for_append, MetricsFile])
def test_a_lock_or_log_that_is_no_regular_file_is_refused_at_once(
    tmp_path, monkeypatch, kind, opened
):
    monkeypatch.chdir(tmp_path)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    plant(tmp_path / "file", kind, victim)
    with pytest.raises(
        FileError,
        match=f"file: is {'a symbolic link' if kind in ('link', 'loop') else 'not a regular'}",
    ):
        opened((tmp_path / "file").relative_to(tmp_path))
    assert victim.read_text() == "precious"


def test_a_link_in_place_of_a_temporary_file_is_replaced_and_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    files.temporary_path(tmp_path / "file").symlink_to(victim)
    write_atomically(tmp_path / "file", b"content")
    assert victim.read_text() == "precious"
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_link_planted_after_the_look_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.unlink", lambda *_, **__: None)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    files.temporary_path(tmp_path / "file").symlink_to(victim)
    with (
        pytest.raises(FileError, match="something else has this name"),
        atomic_file(tmp_path / "file"),
    ):
        pass
    assert victim.read_text() == "precious"


def test_folders_of_dead_processes_are_removed_with_what_they_hold_but_links_are_not_followed(
    tmp_path,
):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("precious")
    machine = files._machine()
    dead, linked = (
        tmp_path / f".{name}.{machine}-{2**22 + 1}.tmp" for name in ("dead", "linked")
    )
    dead.mkdir()
    (dead / "inner").write_text("")
    linked.symlink_to(kept)
    alive, nobody = (
        tmp_path / f".alive.{machine}-{os.getpid()}.tmp",
        tmp_path / f".long.{machine}-{'9' * 200}.tmp",
    )
    alive.mkdir()
    nobody.write_text("")
    assert abandoned(tmp_path) == [dead, linked, nobody]
    remove_abandoned(tmp_path)
    assert sorted(tmp_path.iterdir()) == [alive, kept]
    assert (kept / "file").read_text() == "precious"


def test_a_lock_tells_a_refused_process_what_the_caller_chose(tmp_path):
    with (
        Lock(tmp_path / "lock"),
        pytest.raises(
            FileError, match=rf"lock: process {os.getpid()} on .* trains here; wait"
        ),
    ):
        Lock(tmp_path / "lock", "trains here; wait")
    (tmp_path / "lock").write_bytes(b"\xff" * 10_000_000)
    held = files.open_lock_file(tmp_path / "lock")
    assert len(files.read_holder(held)) == files.LONGEST_HOLDER
    held.close()
