"""Chunks are listed in a journal first: with constant cost, seen by every reader, and gone from a finished cache."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import pytest

from nemo_kd.cache import journal
from nemo_kd.cache.layout import CacheError, CacheLayout
from nemo_kd.cache.listing import ChunkList
from nemo_kd.cache.manifest import ChunkSummary, Manifest
from nemo_kd.cache.reader import CacheReader
from nemo_kd.cache.writer import CacheWriter
from nemo_kd.tools.merge import merge
from nemo_kd.tools.repair import repair
from nemo_kd.tools.verify import verify
from tests.tiny_cache import chunks_of, manifest, write, write_segment

NAME = "train_CHUNK_ID.jsonl"
JOURNAL = "train_manifest.json.journal"


def open_writer(folder: Path, shard=(0, 1)) -> CacheWriter:
    description = manifest()
    return CacheWriter(CacheLayout(str(folder / NAME)), description, chunks_of(description), shard)


def killed(folder: Path) -> Path:
    """A cache of which chunks 0, 1 and 2 are written but not yet in the manifest; returns the journal."""
    writer = open_writer(folder)
    for segment in writer.missing_segments():
        write_segment(writer.layout, writer.manifest, segment)
        writer.assemble_complete(up_to=segment[0])
    writer.close()
    return folder / JOURNAL


def chunks_in_the_file(folder: Path) -> list[str]:
    return sorted(Manifest.parse((folder / "train_manifest.json").read_bytes(), "").chunks)


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and path.suffix != ".lock"
    }


def test_listing_does_not_rewrite_the_manifest_and_every_reader_sees_the_chunk(tmp_path):
    killed(tmp_path / "cache")
    assert chunks_in_the_file(tmp_path / "cache") == []
    path = str(tmp_path / "cache" / NAME)
    assert len(CacheReader(path)) == 10
    assert len(CacheReader(path, partial=True)) == 10
    assert not [problem for report in verify(path) for problem in report.problems]
    assert len(merge([path], str(tmp_path / "merged" / NAME)).chunks) == 3
    assert repair(path, dry_run=True) == []
    assert chunks_in_the_file(tmp_path / "cache") == []
    assert repair(path) == []
    assert chunks_in_the_file(tmp_path / "cache") == ["0", "1", "2"]
    write(tmp_path / "straight", NAME)
    assert content(tmp_path / "cache") == content(tmp_path / "straight")


def test_the_next_job_goes_on_from_the_journal(tmp_path):
    path = killed(tmp_path / "cache")
    writer = open_writer(tmp_path / "cache", (1, 2))
    assert writer.missing == []
    writer.assemble_complete()
    assert not path.exists()
    write(tmp_path / "straight", NAME)
    assert content(tmp_path / "cache") == content(tmp_path / "straight")


@pytest.mark.parametrize("shard", [(0, 1), (0, 2)])
def test_a_torn_last_line_is_ignored_and_cut_by_the_next_addition(tmp_path, shard):
    path = killed(tmp_path)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for end in range(len(whole) - len(lines[-1]), len(whole)):
        path.write_bytes(whole[:end])
        assert sorted(Manifest.load(tmp_path / "train_manifest.json").chunks) == ["0", "1"]
    path.write_bytes(b"".join(lines[:-1]) + b"\0" * 40 + b"\n")  # what a power failure may leave
    listed = ChunkList(tmp_path / "train_manifest.json")
    assert sorted(listed.chunks) == ["0", "1"]
    listed.add(2, ChunkSummary(8, 9))
    assert journal.parse(path.read_bytes(), "").end == path.stat().st_size
    path.write_bytes(lines[0][:20])  # not even the first line
    listed = ChunkList(tmp_path / "train_manifest.json")
    assert listed.chunks == {}
    listed.add(2, ChunkSummary(8, 9))
    assert sorted(Manifest.load(tmp_path / "train_manifest.json").chunks) == ["2"]


def test_several_writers_see_what_the_others_list_and_fold(tmp_path):
    description = manifest()
    description.save(tmp_path / "train_manifest.json")
    one, other = (ChunkList(tmp_path / "train_manifest.json") for _ in range(2))
    for round_ in range(3):
        one.add(3 * round_, ChunkSummary(0, 0))
        assert other.read_new() == [str(3 * round_)]
        other.add(3 * round_ + 1, ChunkSummary(1, 1))
        assert one.read_new() == [str(3 * round_ + 1)]
        if round_ < 2:
            one.fold()
            assert other.read_new() == []
            assert not (tmp_path / JOURNAL).exists()
        one.read_new()
        assert one.chunks == other.chunks == Manifest.load(tmp_path / "train_manifest.json").chunks
    assert len(one.chunks) == 6


def test_a_look_and_an_addition_cost_the_same_in_a_large_cache(tmp_path, monkeypatch):
    """Counted in bytes that are read and written, not in seconds."""
    sizes = []
    read, write_lines = journal.parse, journal.append
    monkeypatch.setattr(
        journal, "parse", lambda content, path: (sizes.append(len(content)), read(content, path))[1]
    )
    monkeypatch.setattr(
        journal, "append", lambda path, start, lines, note: (sizes.append(sum(map(len, lines))), write_lines(path, start, lines, note))[1]
    )  # fmt: skip
    chunks = {str(number): ChunkSummary(number, number) for number in range(1000)}
    dataset = manifest().dataset | {"end_at_idx": 1999}
    manifest(n_examples_per_chunk=1, dataset=dataset, chunks=chunks).save(
        tmp_path / "train_manifest.json"
    )
    one, other = (ChunkList(tmp_path / "train_manifest.json") for _ in range(2))
    sizes.clear()
    monkeypatch.setattr(Manifest, "parse", None)  # the manifest is not read again
    for number in range(1000, 1050):
        one.read_new()
        one.add(number, ChunkSummary(number, number))
        assert other.read_new() == [str(number)]
    assert max(sizes) < 500


def test_listing_looks_at_no_other_chunk(tmp_path):
    """Counted in calls of functions, not in seconds."""
    description = manifest(
        n_examples_per_chunk=1, segment_examples=1, dataset=manifest().dataset | {"end_at_idx": 59}
    )
    writer = CacheWriter(CacheLayout(str(tmp_path / NAME)), description, chunks_of(description))
    counts = []

    def count(*_):
        counts[-1] += 1

    for segment in writer.missing_segments():
        write_segment(writer.layout, writer.manifest, segment)
        counts.append(0)
        sys.setprofile(count)
        writer.assemble_complete(up_to=segment[0])
        sys.setprofile(None)
    assert sum(counts[-10:]) < 1.2 * sum(counts[10:20])


def test_a_kill_between_the_manifest_and_the_end_of_its_journal_leaves_chunks_twice(tmp_path):
    path = killed(tmp_path)
    journaled = path.read_bytes()
    open_writer(tmp_path).assemble_complete()
    path.write_bytes(journaled)
    assert len(CacheReader(str(tmp_path / NAME))) == 10
    listed = ChunkList(tmp_path / "train_manifest.json")
    assert listed.read_new() == []
    listed.add(0, listed.chunks["0"])  # replaces the journal of the older manifest
    assert len(path.read_bytes().splitlines()) == 2


def test_a_chunk_that_repair_takes_off_the_list_does_not_come_back(tmp_path):
    path = killed(tmp_path)
    chunk = tmp_path / "train_1.jsonl"
    chunk.write_bytes(chunk.read_bytes().replace(b"1", b"2"))
    assert "no longer listed" in " ".join(repair(str(tmp_path / NAME)))
    assert not path.exists()
    assert chunks_in_the_file(tmp_path) == ["0", "2"]


def line_of(chunk: object, **changes) -> bytes:
    return journal.chunk_line(chunk, dataclasses.asdict(ChunkSummary(0, 3)) | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([line_of("0", examples=-1)], "journal: chunks.0.examples: found -1"),
        ([line_of("00")], "journal: chunks: found '00'"),
        ([line_of("1" * 5000)], "journal: chunks: found"),
        ([line_of("0", skipped=[])], "not the journal of a manifest"),
        ([line_of("0", kept_mass_sum="x")], "not the journal of a manifest"),
        ([journal.chunk_line("0", [1])], "journal:2: the line is damaged"),  # type: ignore[arg-type]
        ([line_of(["0"])], "journal:2: the line is damaged"),
        ([b"[" * 100_000 + b"\n", line_of("0")], "journal:2: the line is damaged .wrong checksum"),
        ([b"00000000 {}\n", line_of("0")], "journal:2: the line is damaged .wrong checksum"),
        (
            [journal.first_line("another"), line_of("0")],
            "lists chunk 0, but belongs to another manifest",
        ),
    ],
)
def test_hostile_journals_end_in_one_error(tmp_path, lines, message):
    path = killed(tmp_path)
    first = path.read_bytes().splitlines(keepends=True)[0]
    path.write_bytes(b"".join([first, *lines, line_of("1")]))
    with pytest.raises(CacheError, match=message) as error:
        CacheReader(str(tmp_path / NAME))
    assert "\n" not in str(error.value)
    with pytest.raises(CacheError, match=message):
        ChunkList(tmp_path / "train_manifest.json")


@pytest.mark.parametrize("kind", ["fifo", "folder", "link"])
def test_a_journal_that_is_not_a_file_is_one_error(tmp_path, kind):
    path = killed(tmp_path)
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="not a regular file"):
        CacheReader(str(tmp_path / NAME))
    with pytest.raises(ValueError, match="not a regular file"):
        open_writer(tmp_path)
