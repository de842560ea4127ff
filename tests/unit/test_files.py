"""Files of dead processes, and locks."""

from __future__ import annotations

import os
import socket

import pytest

from nemo_kd.files import FileError, Lock, abandoned, remove_abandoned


def test_folders_of_dead_processes_are_removed_with_what_they_hold_but_links_are_not_followed(
    tmp_path,
):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("precious")
    machine = socket.gethostname()
    dead, linked = (
        tmp_path / f".{name}.{machine}-{2**22 + 1}.tmp" for name in ("dead", "linked")
    )
    dead.mkdir()
    (dead / "inner").write_text("")
    linked.symlink_to(kept)
    alive = tmp_path / f".alive.{machine}-{os.getpid()}.tmp"
    alive.mkdir()
    assert abandoned(tmp_path) == [dead, linked]
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
