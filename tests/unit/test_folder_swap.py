"""A folder that replaces another one, under kills at every step."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_kd import files


class Killed(BaseException):
    pass


def content(folder: Path) -> list[str]:
    return sorted(path.read_text() for path in folder.iterdir())


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_kill_at_any_step_leaves_the_old_or_the_new_folder(
    tmp_path, monkeypatch, can_exchange
):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    seen = set()
    for survived in range(20):
        parent = tmp_path / str(survived)
        folder, new = (
            parent / "model",
            parent / f".model.{socket.gethostname()}-{child.pid}.tmp",
        )
        for path, text in ((folder, "old"), (new, "new")):
            path.mkdir(parents=True)
            for name in ("a", "b"):
                (path / name).write_text(text)
        left = [survived]

        def counted(act, left=left):
            def step(*arguments):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return act(*arguments)

            return step

        was_killed = False
        with monkeypatch.context() as patch:
            exchange = files._exchange if can_exchange else (lambda *_: False)
            patch.setattr(files, "_exchange", counted(exchange))
            patch.setattr(os, "rename", counted(os.rename))
            for name in ("remove", "sync"):
                patch.setattr(files, name, counted(getattr(files, name)))
            try:
                files.replace_folder(new, folder)
            except Killed:
                was_killed = True
        if can_exchange:
            assert content(folder) in (["old"] * 2, ["new"] * 2)
        files.remove(files.new_folder(folder))
        assert content(folder) in (["old"] * 2, ["new"] * 2)
        assert [path.name for path in parent.iterdir()] == ["model"]
        seen.add((was_killed, content(folder)[0]))
        if not was_killed:
            break
    assert seen == {(True, "old"), (True, "new"), (False, "new")}
