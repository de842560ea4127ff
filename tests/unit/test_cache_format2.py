"""Caches of format 2 are read, checked, repaired, merged and continued; nothing of them is computed again."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from nemo_kd.cache.index import MAGIC
from nemo_kd.cache.layout import CacheError, CacheLayout
from nemo_kd.cache.manifest import Manifest
from nemo_kd.cache.reader import CacheReader
from nemo_kd.cache.segment import segment_path
from nemo_kd.cache.writer import CacheWriter
from nemo_kd.tools.merge import merge
from nemo_kd.tools.repair import repair
from nemo_kd.tools.verify import verify
from tests.tiny_cache import (
    as_format_2,
    chunks_of,
    manifest,
    summaries,
    write,
    write_segment,
)
from tests.unit.test_cache_writer import content, die_after, statuses

NAME = "train_CHUNK_ID.jsonl"


def open_writer(folder: Path, part=(0, 1)) -> CacheWriter:
    return CacheWriter(
        CacheLayout(str(folder / NAME)), manifest(), chunks_of(manifest()), part
    )


def problems(path: Path) -> list[str]:
    return [problem for report in verify(str(path)) for problem in report.problems]


@pytest.mark.parametrize("journaled", [0, 1, 3])
def test_every_tool_takes_a_cache_of_format_2(tmp_path, journaled):
    path = write(tmp_path / "old", NAME)
    expected = summaries(path)
    as_format_2(path, journaled)
    before = content(tmp_path / "old")
    assert summaries(path) == expected
    assert len(CacheReader(str(path))) == 10
    assert problems(path) == []
    assert repair(str(path), dry_run=True) == []
    merged = tmp_path / "merged" / NAME
    assert len(merge([str(path)], str(merged)).chunks) == 3
    assert problems(merged) == []
    assert Manifest.load(merged.with_name("train_manifest.json")).format_version == 3
    assert content(tmp_path / "old") == before
    assert repair(str(path)) == []
    write(tmp_path / "new", NAME)
    old, new = (CacheReader(str(tmp_path / name / NAME)) for name in ("old", "new"))
    assert old.fingerprint() == new.fingerprint()
    assert old.manifests[0].differences(new.manifests[0]) == []
    assert content(tmp_path / "old") == content(tmp_path / "new")


def test_a_job_continues_a_cache_of_format_2(tmp_path):
    write(tmp_path / "straight", NAME)
    path = write(tmp_path / "old", NAME)
    as_format_2(path, 1)
    (tmp_path / "old" / "train_1.jsonl").unlink()
    writer = open_writer(tmp_path / "old")
    assert writer.missing == [1]
    assert (tmp_path / "old" / "train_0.jsonl.idx").read_bytes().startswith(MAGIC)
    for segment in writer.missing_segments():
        write_segment(writer.layout, writer.manifest, segment)
    writer.assemble_complete()
    writer.close()
    assert content(tmp_path / "old") == content(tmp_path / "straight")


def test_segments_of_a_killed_job_of_an_older_version_are_used(tmp_path):
    writer = open_writer(tmp_path)
    for segment in writer.missing_segments()[:3]:
        write_segment(writer.layout, writer.manifest, segment)
    writer.close()
    path = tmp_path / "train_manifest.json"
    path.write_bytes(
        path.read_bytes().replace(
            b'"format_version": 3', b'"format_version": 2, "chunks": {}'
        )
    )
    writer = open_writer(tmp_path)
    assert len(writer.missing_segments()) == 2
    header = segment_path(writer.layout, 0, range(2)).read_bytes().partition(b"\n")[0]
    assert header.startswith(b'{"summary":{"first_index":0,"last_index":1,')


def test_a_killed_upgrade_loses_nothing(tmp_path):
    write(tmp_path / "straight", NAME)
    expected = content(tmp_path / "straight")
    for steps in range(60):
        folder = tmp_path / f"after_{steps}"
        as_format_2(write(folder, NAME), 2)
        process = os.fork()
        if not process:
            try:
                die_after(steps)
                open_writer(folder).close()
                os._exit(0)
            finally:
                os._exit(1)
        status = statuses([process])
        assert status in ([0], [-signal.SIGKILL])
        assert len(CacheReader(str(folder / NAME))) == 10
        if status == [0]:
            break
        writer = open_writer(folder)
        assert writer.missing == []
        writer.close()
        assert content(folder) == expected
    assert steps > 5


def test_a_journal_is_read_up_to_a_torn_line_and_ignored_beside_another_manifest(
    tmp_path,
):
    path = write(tmp_path, NAME)
    as_format_2(path, 2)
    journal = tmp_path / "train_manifest.json.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-5])
    assert sorted(summaries(path)) == [0, 1]
    journal.write_bytes(b"\0" * 40 + b"\n" + whole)
    assert sorted(summaries(path)) == [0]
    journal.write_bytes(whole)
    place = tmp_path / "train_manifest.json"
    place.write_bytes(place.read_bytes() + b" ")
    with pytest.raises(CacheError, match="train_1.jsonl: the chunk is not complete"):
        CacheReader(str(path))
