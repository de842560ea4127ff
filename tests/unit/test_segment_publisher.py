"""Segments are encoded and published in a process beside, whatever happens to either process."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nemo_kd.batch import CachedExample, TeacherRows
from nemo_kd.cache.layout import CacheError, CacheLayout
from nemo_kd.cache.segment import SegmentPublisher, publish_segment, read_segment
from nemo_kd.cache.writer import CacheWriter
from nemo_kd.files import FileError
from tests.tiny_cache import COMPUTED_WITH, chunks_of, everywhere, manifest, row, write
from tests.unit.test_cache_writer import content, statuses

NAME = "train_CHUNK_ID.jsonl"


def publisher_in(folder: Path, max_waiting: int = 2, **changes) -> SegmentPublisher:
    folder.mkdir(exist_ok=True)
    return SegmentPublisher(
        CacheLayout(str(folder / NAME)),
        manifest(**changes),
        COMPUTED_WITH,
        max_waiting,
    )


def processes_beside() -> list[int]:
    """Returns the publishers' processes; ranks that other tests keep are no forks of this one."""
    forked = multiprocessing.get_context("fork").Process
    return [
        child.pid
        for child in multiprocessing.active_children()
        if isinstance(child, forked) and child.pid is not None
    ]


def process_beside() -> int:
    (process,) = processes_beside()
    return process


def rows(segment) -> list[CachedExample]:
    return [row(index, 3 + index % 4) for index in segment[1]]


def all_segments(folder: Path) -> list:
    """What is missing of a cache that is claimed here and let go of again."""
    writer = CacheWriter(
        CacheLayout(str(folder / NAME)), manifest(), chunks_of(manifest())
    )
    segments = writer.missing_segments()
    writer.close()
    return segments


def assemble(folder: Path) -> None:
    writer = CacheWriter(
        CacheLayout(str(folder / NAME)), manifest(), chunks_of(manifest())
    )
    writer.assemble_complete()
    writer.close()


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def has_ended(process: int) -> bool:
    """Whether a process is gone, or only waits to be noticed by its parent."""
    try:
        return (
            Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
            == "Z"
        )
    except (FileNotFoundError, ProcessLookupError):
        return True


def shut(monkeypatch, gate: Path) -> None:
    """Makes processes forked from now on wait before every fsync until the file `gate` is there."""
    fsync = os.fsync

    def wait(descriptor):
        while not gate.exists():
            time.sleep(0.01)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", wait)


@pytest.mark.parametrize("codec", ["json", "packed"])
def test_the_cache_is_that_of_one_process(tmp_path, codec):
    write(tmp_path / "straight", NAME, codec=codec)
    folder = tmp_path / "cache"
    description, layout = manifest(codec), CacheLayout(str(folder / NAME))
    writer = CacheWriter(layout, description, chunks_of(description))
    with SegmentPublisher(layout, description, COMPUTED_WITH) as publisher:
        for segment in writer.missing_segments():
            publisher.publish(segment, rows(segment))
    writer.assemble_complete()
    writer.close()
    assert content(folder) == content(tmp_path / "straight")
    assert [(done.first_index, done.examples) for done in publisher.done] == [
        (0, 2),
        (2, 2),
        (4, 2),
        (6, 2),
        (8, 2),
    ]
    total = sum(done.kept_mass_sum for done in publisher.done)
    assert total == pytest.approx(
        sum(chunk.kept_mass_sum for chunk in writer.manifest.chunks.values())
    )


@pytest.mark.parametrize("codec", ["json", "packed"])
def test_compact_rows_and_reasons(tmp_path, codec):
    """Rows whose prompts are unknown, written whole by this process, and without their prompts by the other."""
    random = np.random.default_rng(0)
    whole, compact, description = [], [], manifest(codec, n_examples_per_chunk=None)
    for index in range(4):
        full = row(index, 7, temperatures=(1.0, 2.0))
        teacher = replace(
            full.teacher, tail_token_ids_PM=random.integers(50, size=(7, 2))
        )
        compact.append(
            replace(full, teacher=replace(full, teacher=teacher).loss_rows())
        )
        whole.append(everywhere(compact[-1]))
        assert len(compact[-1].teacher) == 4
        assert len(whole[-1].teacher) == 7
    (tmp_path / "one").mkdir()
    publish_segment(
        CacheLayout(str(tmp_path / "one" / NAME)),
        description,
        (0, range(5)),
        [*whole, "too long"],
        COMPUTED_WITH,
    )
    with publisher_in(
        tmp_path / "two", codec=codec, n_examples_per_chunk=None
    ) as publisher:
        publisher.publish((0, range(5)), [*compact, "too long"])
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert publisher.done[0].skipped == {"too long": 1}


def test_an_error_is_raised_here_as_it_was_there(tmp_path):
    with (
        pytest.raises(CacheError, match="got 1 of 2 records") as error,
        publisher_in(tmp_path) as publisher,
    ):
        publisher.publish((0, range(2)), [row(0)])
        wait_until(lambda: publisher._pending[0].done())
        publisher.publish((0, range(2, 4)), [row(2), row(3)])
        pytest.fail("the error comes with the next segment")
    assert "Traceback" in str(error.value.__cause__)
    with (
        pytest.raises(AttributeError, match="no attribute 'example'"),
        publisher_in(tmp_path) as publisher,
    ):
        publisher.publish((0, range(2)), [1, 2])
    publisher = publisher_in(tmp_path)
    publisher.publish((0, range(2)), [row(0)])
    publisher.publish((0, range(2, 4)), [row(2), row(3)])
    for _ in range(2):  # it is not forgotten
        with pytest.raises(CacheError, match="got 1 of 2 records"):
            publisher.close()
    assert not processes_beside()
    assert [path.name for path in tmp_path.glob(".*/*")] == [
        "000000000002-000000000003"
    ]


def test_a_full_disk_comes_with_its_remedy(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(FileError, match="the disk is full: free some space"),
        publisher_in(tmp_path) as publisher,
    ):
        publisher.publish((0, range(2)), [row(0), row(1)])
    assert not list(tmp_path.glob(".*/*"))


def test_what_cannot_be_sent_is_an_error_too(tmp_path):
    with pytest.raises(Exception, match="lambda"), publisher_in(tmp_path) as publisher:
        publisher.publish((0, range(2)), [lambda: 0, row(1)])
    assert not processes_beside()


def test_an_error_of_the_block_goes_on_and_whole_segments_are_published(tmp_path):
    with (
        pytest.raises(KeyError, match="of the block"),
        publisher_in(tmp_path) as publisher,
    ):
        publisher.publish((0, range(2)), [row(0), row(1)])
        publisher.publish((0, range(2, 4)), [row(2)])
        raise KeyError("of the block")
    assert not processes_beside()
    assert [path.name for path in tmp_path.glob(".*/*")] == [
        "000000000000-000000000001"
    ]


def test_a_caller_waits_only_when_enough_segments_wait_already(tmp_path, monkeypatch):
    segments, gate = all_segments(tmp_path), tmp_path / "gate"
    shut(monkeypatch, gate)
    with publisher_in(tmp_path, max_waiting=1) as publisher:
        for segment in segments[:2]:  # one is being published, one waits
            publisher.publish(segment, rows(segment))
        assert publisher.waited_s < 1
        third = threading.Thread(
            target=publisher.publish, args=(segments[2], rows(segments[2]))
        )
        third.start()
        third.join(0.3)
        waits, done = third.is_alive(), list(publisher.done)
        gate.touch()
        third.join()
        assert waits
        assert done == []
        assert publisher.waited_s > 0.25
    gate.unlink()
    assert [done.first_index for done in publisher.done] == [0, 2, 4]


def test_the_process_beside_is_killed(tmp_path, monkeypatch):
    segments, gate = all_segments(tmp_path), tmp_path / "gate"
    shut(monkeypatch, gate)
    text = "the process that publishes segments was killed.*give the job more"
    with (
        pytest.raises(CacheError, match=text),
        publisher_in(tmp_path, max_waiting=1) as publisher,
    ):
        for segment in segments[:2]:
            publisher.publish(segment, rows(segment))
        os.kill(process_beside(), signal.SIGKILL)
        publisher.publish(segments[2], rows(segments[2]))
    idle = publisher_in(tmp_path)
    os.kill(process_beside(), signal.SIGKILL)
    wait_until(lambda: not processes_beside())
    idle.close()  # nothing was lost
    gate.touch()
    monkeypatch.undo()
    complete(tmp_path, gate)


def complete(folder: Path, gate: Path) -> None:
    """The next run finds whole segments only, and ends with the files of an undisturbed one."""
    gate.unlink(missing_ok=True)
    write(folder.with_name("straight"), NAME)
    for path in folder.glob(".*.segments/0*"):
        read_segment(path)
    with publisher_in(folder) as publisher:
        for segment in all_segments(folder):
            publisher.publish(segment, rows(segment))
    assemble(folder)
    assert content(folder) == content(folder.with_name("straight"))


def test_the_computing_process_is_killed(tmp_path, monkeypatch):
    folder, gate = tmp_path / "cache", tmp_path / "gate"
    folder.mkdir()
    segments = all_segments(folder)
    shut(monkeypatch, gate)
    ours, theirs = os.pipe()
    job = os.fork()
    if not job:
        try:
            gate.touch()
            publisher = publisher_in(folder)
            publisher.publish(segments[0], rows(segments[0]))
            publisher._pending[0].result()
            gate.unlink()
            # The second one is about to be on disk when this process is killed.
            publisher.publish(segments[1], rows(segments[1]))
            os.write(theirs, str(process_beside()).encode())
            time.sleep(600)
        finally:
            os._exit(1)
    os.close(theirs)
    beside = int(os.read(ours, 20))
    half = lambda: [path.name for path in folder.glob(".*.segments/.*.tmp")]  # noqa: E731
    wait_until(half)
    assert not has_ended(beside)
    os.kill(job, signal.SIGKILL)
    assert statuses([job]) == [-signal.SIGKILL]
    try:
        wait_until(lambda: has_ended(beside), 20)
    finally:
        gate.touch()
    monkeypatch.undo()
    assert len(half()) == 1
    assert [path.name for path in folder.glob(".*.segments/0*")] == [
        "000000000000-000000000001"
    ]
    complete(folder, gate)


def test_signals_to_the_whole_job_do_not_reach_the_process_beside(tmp_path):
    """As Slurm sends them before a job's time is over; the computing process may go on until its segment is done."""
    segments = all_segments(tmp_path)
    caught = []
    job = os.fork()
    if not job:
        try:
            os.setpgid(0, 0)
            with publisher_in(tmp_path) as publisher:
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                    signal.signal(number, lambda number, _: caught.append(number))
                    os.killpg(0, number)
                    os.kill(process_beside(), number)
                for segment in segments:
                    publisher.publish(segment, rows(segment))
            os._exit(
                0 if caught == [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1] else 2
            )
        finally:
            os._exit(1)
    assert statuses([job]) == [0]
    assert all_segments(tmp_path) == []


def test_a_job_that_ends_leaves_neither_its_lock_nor_a_process(tmp_path):
    layout, description = CacheLayout(str(tmp_path / NAME)), manifest()
    writer = CacheWriter(layout, description, chunks_of(description))
    with SegmentPublisher(layout, description, COMPUTED_WITH) as publisher:
        writer.close()
        CacheWriter(
            layout, description, chunks_of(description)
        ).close()  # the process beside does not hold it
    publisher.close()  # again
    assert not processes_beside()


def test_large_segments_arrive_whole(tmp_path):
    """Larger than any buffer of the operating system, and arrays that do not lie in one piece."""
    description = manifest(
        "packed", top_k=128, vocab_size=1000, n_examples_per_chunk=None
    )
    segment = (0, range(4))
    large = [row(index, 800, 128, 1000) for index in segment[1]]
    strided = [
        CachedExample(
            one.example,
            replace(
                one.teacher,
                topk_logits_PK=np.repeat(one.teacher.topk_logits_PK, 2, axis=1)[
                    :, ::2
                ],
            ),
        )
        for one in large
    ]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = CacheLayout(str(tmp_path / "one" / NAME))
    publish_segment(one, description, segment, large, COMPUTED_WITH)
    with SegmentPublisher(
        CacheLayout(str(tmp_path / "two" / NAME)), description, COMPUTED_WITH
    ) as publisher:
        publisher.publish(segment, strided)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert isinstance(strided[0].teacher, TeacherRows)
