"""Several jobs write one cache: no work is done twice or lost, and who would do so is refused."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from nemo_kd.cache import segment as segment_module
from nemo_kd.cache.layout import CacheError, CacheLayout
from nemo_kd.cache.manifest import Manifest
from nemo_kd.cache.reader import CacheReader
from nemo_kd.cache.writer import IS_WRITTEN, CacheWriter
from nemo_kd.config import UserInputError
from nemo_kd.files import FileError, Lock
from tests.tiny_cache import chunks_of, manifest, write, write_segment
from tests.unit.test_cache_writer import content, die_after, statuses

NAME = "train_CHUNK_ID.jsonl.zst"
MISSING = 3
"""Exit status of a part that is done while chunks wait for others."""


def many_segments() -> dict:
    """40 segments of one record in 10 chunks."""
    dataset = {"path": "d", "fingerprint": "f", "start_from_idx": 0, "end_at_idx": 39}
    return {"codec": "packed", "segment_examples": 1, "dataset": dataset}


def open_writer(folder: Path, part=(0, 1), **changes) -> CacheWriter:
    description = manifest(**{"codec": "packed", **changes})
    return CacheWriter(
        CacheLayout(str(folder / NAME)), description, chunks_of(description), part
    )


def compute(writer: CacheWriter, log: Path | None = None) -> None:
    """Computes and publishes what is missing, and puts together what is whole."""
    for segment in writer.missing_segments():
        note(log, f"segment {segment[1][0]}")
        write_segment(writer.layout, writer.manifest, segment)
        writer.assemble_complete()
    writer.assemble_complete()


def note(log: Path | None, text: str) -> None:
    if log is not None:
        with log.open("a") as file:
            file.write(f"{text}\n")


def slow_load(path: Path) -> Manifest:
    """Gives others time to change the manifest between a look at it and the next step."""
    loaded = Manifest.parse(path.read_bytes(), str(path))
    time.sleep(0.02)
    return loaded


def run_part(
    folder: Path,
    part,
    steps: int | None = None,
    delay_s: float = 0,
    log: Path | None = None,
) -> int:
    """A job that writes a part, in a process that kills itself after so many steps. Returns its id."""
    process = os.fork()
    if process:
        return process
    try:
        time.sleep(delay_s)
        if steps is not None:
            die_after(steps)
        assemble = CacheWriter._assemble

        def noted(self: CacheWriter, chunk: int) -> bool:
            is_published = assemble(self, chunk)
            if is_published:
                note(log, f"chunk {chunk}")
            return is_published

        CacheWriter._assemble = noted  # type: ignore[method-assign]
        writer = open_writer(folder, part, **many_segments())
        compute(writer, log)
        os._exit(MISSING if writer.missing else 0)
    finally:
        os._exit(1)


def test_parts_killed_again_and_again_the_files_are_the_same(tmp_path):
    write(tmp_path / "straight", NAME, **many_segments())
    expected, dice, kills = content(tmp_path / "straight"), random.Random(0), 0
    for attempt in range(6):
        folder = tmp_path / f"attempt_{attempt}"
        folder.mkdir()
        for _ in range(3):  # each time in another number of parts
            count = dice.choice([1, 2, 3])
            parts = [
                run_part(
                    folder, (number, count), dice.randint(1, 150), dice.random() / 20
                )
                for number in range(count)
            ]
            found = statuses(parts)
            assert set(found) <= {0, MISSING, -signal.SIGKILL}
            kills += found.count(-signal.SIGKILL)
        count = attempt % 3 + 1
        found = statuses(
            [run_part(folder, (number, count)) for number in range(count)]
        )
        assert 0 in found
        assert set(found) <= {0, MISSING}
        assert content(folder) == expected
    assert kills >= 12


def test_no_segment_is_computed_twice(tmp_path):
    """Parts start while others compute, put chunks together and remove their segments."""
    write(tmp_path / "straight", NAME, **many_segments())
    expected, dice = content(tmp_path / "straight"), random.Random(1)
    for attempt, count in enumerate([2, 3, 3, 3]):
        folder, log = tmp_path / f"attempt_{attempt}", tmp_path / f"log_{attempt}"
        folder.mkdir()
        first = [
            run_part(folder, (number, count), 60 + 30 * number, 0, log)
            for number in range(count)
        ]
        statuses(first)  # all of them were killed somewhere
        parts = [
            run_part(folder, (number, count), None, dice.random() / 5, log)
            for number in range(count)
        ]
        assert 0 in statuses(parts)
        assert content(folder) == expected
        times = Counter(log.read_text().splitlines())
        assert len(times) == 40 + 10
        # A killed part may have been at one segment, which is done again.
        computed = sum(n for text, n in times.items() if text.startswith("segment"))
        assert computed <= 40 + count


def test_jobs_that_put_the_same_chunks_together_at_once_publish_the_same_bytes(
    tmp_path, monkeypatch
):
    write(tmp_path / "straight", NAME, **many_segments())
    monkeypatch.setattr(Manifest, "load", slow_load)
    folder, log = tmp_path / "cache", tmp_path / "log"
    writer = open_writer(folder, (0, 1), **many_segments())
    for segment in writer.missing_segments():
        write_segment(writer.layout, writer.manifest, segment)
    writer.close()
    assert (
        statuses([run_part(folder, (number, 4), None, 0, log) for number in range(4)])
        == [0] * 4
    )
    times = Counter(log.read_text().splitlines())
    assert times.keys() == {f"chunk {chunk}" for chunk in range(10)}
    assert content(folder) == content(tmp_path / "straight")
    assert len(CacheReader(str(folder / NAME))) == 40
    assert not [
        path
        for path in folder.iterdir()
        if path.name.endswith((".segments", ".zst.lock"))
    ]


def test_a_chunk_listed_by_another_part_meanwhile_is_not_missing(
    tmp_path, monkeypatch
):
    """Its segments are removed between a look at the manifest and a look at them."""
    first, second = (
        open_writer(tmp_path, (number, 2), **many_segments()) for number in range(2)
    )
    for writer in (first, second):
        for segment in writer.missing_segments():
            write_segment(writer.layout, writer.manifest, segment)
    listing = CacheLayout.chunks_in_work

    def late(layout: CacheLayout) -> list[int]:
        monkeypatch.setattr(CacheLayout, "chunks_in_work", listing)
        second.assemble_complete()
        return listing(layout)

    monkeypatch.setattr(CacheLayout, "chunks_in_work", late)
    first.assemble_complete()
    assert first.missing == second.missing == []


def test_parts_share_out_all_segments(tmp_path):
    whole = open_writer(tmp_path)
    everything = whole.missing_segments()
    whole.close()
    assert len(everything) == 5  # two, two and one in three chunks
    writers = [open_writer(tmp_path, (number, 3)) for number in range(3)]
    assert [writer.missing_segments() for writer in writers] == [
        everything[number::3] for number in range(3)
    ]
    # What a part has to do does not depend on what is there.
    compute(writers[0])
    assert writers[0].missing == [0, 1, 2]
    assert writers[0].missing_segments() == []
    assert writers[1].missing_segments() == everything[1::3]
    compute(writers[1])
    assert writers[1].missing == [1]
    compute(writers[2])
    assert writers[2].missing == []
    assert writers[0].missing == [0, 1, 2]
    writers[0].assemble_complete()
    assert writers[0].missing == []


def test_segments_that_another_part_removes_meanwhile_are_not_missing(
    tmp_path, monkeypatch
):
    one, other = open_writer(tmp_path, (0, 2)), open_writer(tmp_path, (1, 2))
    for writer in (one, other):
        for segment in writer.missing_segments():
            write_segment(writer.layout, writer.manifest, segment)
    read, looks = segment_module.read_segment, []

    def read_late(path):
        if not looks:  # `one` begins to look for its segments, and `other` puts all chunks together
            looks.append(path)
            monkeypatch.setattr(segment_module, "read_segment", read)
            other.assemble_complete()
            monkeypatch.setattr(segment_module, "read_segment", read_late)
        return read(path)

    monkeypatch.setattr(segment_module, "read_segment", read_late)
    assert one.missing_segments() == []
    assert len(looks) == 1
    assert one.missing == []


def test_work_that_another_job_does_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    me = rf"process {os.getpid()} on \S+, Slurm job 4711"
    writer = open_writer(tmp_path, (1, 2))
    with pytest.raises(
        FileError,
        match=rf"part-1.lock: {me} is writing part 1/2 of this cache; wait until it ends",
    ):
        open_writer(tmp_path, (1, 2))
    written_in_parts = "json.lock: one of 2 parts is writing this cache; wait until"
    for part in ((0, 1), (1, 3)):
        with pytest.raises(UserInputError, match=written_in_parts):
            open_writer(tmp_path, part)
    with pytest.raises(FileError, match=written_in_parts):
        Lock(writer.layout.lock_path, IS_WRITTEN)  # what `repair` and `merge` ask for
    other = open_writer(tmp_path, (0, 2))
    writer.close()
    with pytest.raises(UserInputError, match=written_in_parts):
        open_writer(tmp_path)
    other.close()
    whole = open_writer(tmp_path)
    with pytest.raises(
        CacheError,
        match=rf"{me} is writing this cache; wait until it ends.*part=0/2 and part=1/2",
    ):
        open_writer(tmp_path, (0, 2))
    whole.close()
    open_writer(tmp_path, (2, 3)).close()


def test_parts_of_other_settings_are_refused_even_before_any_work_is_done(tmp_path):
    first = open_writer(tmp_path, (0, 2))
    with pytest.raises(CacheError, match="top_k: 4 in the cache, 8 now"):
        open_writer(tmp_path, (1, 2), top_k=8)
    first.close()
    open_writer(tmp_path, (1, 2), top_k=8).close()
    assert Manifest.load(tmp_path / "train_manifest.json").top_k == 8


@pytest.mark.parametrize("part", [(0, 1), (1, 2)])
def test_a_killed_job_leaves_no_lock_even_if_its_children_live_on(tmp_path, part):
    ours, theirs = os.pipe()
    job = os.fork()
    if not job:
        open_writer(tmp_path, part)
        child = os.fork()
        if child:
            os.write(theirs, str(child).encode())
        time.sleep(600)
        os._exit(0)
    child = int(os.read(ours, 20))
    try:
        with pytest.raises(UserInputError, match=f"process {job} on "):
            open_writer(tmp_path, part)
        os.kill(job, signal.SIGKILL)
        assert statuses([job]) == [-signal.SIGKILL]
        open_writer(tmp_path, part).close()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_lock_given_back_is_not_kept_by_a_process_that_was_forked_meanwhile(
    tmp_path,
):
    """As when processes that read ahead start while a thread puts a chunk together."""
    lock = Lock(tmp_path / "lock")
    child = os.fork()
    if not child:
        time.sleep(600)
        os._exit(0)
    try:
        with pytest.raises(FileError, match=f"process {os.getpid()} on "):
            Lock(tmp_path / "lock")
        lock.release()
        Lock(tmp_path / "lock").release()
    finally:
        os.kill(child, signal.SIGKILL)


def test_without_locks_parts_are_refused_and_a_job_alone_is_warned(
    tmp_path, monkeypatch, caplog
):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(
        CacheError,
        match="this file system keeps no locks .flock., without which jobs cannot",
    ):
        open_writer(tmp_path, (0, 2))
    writer = open_writer(tmp_path)
    assert "make sure that no other job writes there" in caplog.text
    compute(writer)
    writer.close()
    assert len(CacheReader(str(tmp_path / NAME))) == 10
