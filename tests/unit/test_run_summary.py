"""The summary at the end of a run of stage 2."""

from __future__ import annotations

from types import SimpleNamespace

from nemo_kd.student.report import _files


def test_files_are_listed_and_an_archive_without_a_folder_can_be_converted(tmp_path):
    archive, folder = tmp_path / "kd.nemo", tmp_path / "kd-hf"
    best = tmp_path / "kd-best.nemo"
    kept = SimpleNamespace(
        archive=archive, best_archive=best, dirpath=tmp_path, best=None
    )
    archive.write_bytes(b"archive")
    for paths in ([archive], [archive, folder]):
        for path in paths[1:]:
            path.mkdir()
        facts = _files(kept)
        written = [text.rpartition(",")[0] for name, text in facts if name == "weights"]
        assert written == [str(path) for path in paths]
        assert any(name == "next" for name, _ in facts) == (len(paths) == 1)
