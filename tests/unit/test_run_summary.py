"""The summary at the end of a run of stage 2."""

from __future__ import annotations

from types import SimpleNamespace

from nemo_kd.student.reports import _files


def test_archives_and_folders_are_listed_with_the_command_that_converts(tmp_path):
    archive, folder = tmp_path / "kd.nemo", tmp_path / "kd-hf"
    archive.write_bytes(b"archive")
    folder.mkdir()
    (tmp_path / "kd--val_loss=1.0-step=2").mkdir()
    facts = _files(SimpleNamespace(archive=archive, dirpath=tmp_path))
    assert [name for name, _ in facts] == ["weights", "weights", "next"]
    written = [text for name, text in facts if name == "weights"]
    assert written == [str(folder), str(archive)]
    assert f"input_path={archive} " in facts[-1][1]
