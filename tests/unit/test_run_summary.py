"""The summary at the end of a run of stage 2."""

from __future__ import annotations

import os
from types import SimpleNamespace

from nemo_kd.student.report import _files


def test_a_hugging_face_folder_of_an_earlier_part_is_not_listed(tmp_path):
    archive, folder = tmp_path / "kd.nemo", tmp_path / "kd-hf"
    archive.write_bytes(b"archive")
    folder.mkdir()
    checkpoint = SimpleNamespace(
        archive=archive, dirpath=tmp_path, params=SimpleNamespace(save_best_model=False)
    )
    os.utime(archive, (100, 100))
    for written_s, paths in ((200, [archive, folder]), (50, [archive])):
        os.utime(folder, (written_s, written_s))
        facts = _files(checkpoint)
        assert [
            text.rpartition(",")[0] for name, text in facts if name == "last weights"
        ] == [str(p) for p in paths]
        assert any(name == "next" for name, _ in facts) == (written_s == 50)
