"""Nothing that is published is lost or half there, whatever happens to the writer."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_kd import files
from nemo_kd.cache.layout import CacheError, CacheLayout
from nemo_kd.cache.manifest import Manifest
from nemo_kd.cache.reader import CacheReader
from nemo_kd.cache.segment import publish_segment, read_segment, segment_path
from nemo_kd.cache.writer import CacheWriter
from nemo_kd.files import FileError
from tests.tiny_cache import (
    COMPUTED_WITH,
    chunks_of,
    manifest,
    row,
    same,
    summaries,
    write,
    write_segment,
)

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("open", "fsync", "replace", "mkdir", "rmtree", "unlink")
"""What a writer asks of the file system; a kill before or after any of them must lose nothing."""


def content(folder: Path) -> dict[str, bytes]:
    """All files that are not the lock's."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    }


def die_after(steps: int) -> None:
    """Makes this process kill itself, without any clean-up, right after so many of the writer's steps."""
    remaining = [steps]

    def counted(function):
        def call(*args, **kwargs):
            if remaining[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            remaining[0] -= 1
            return function(*args, **kwargs)

        return call

    files.os = type(
        "os",
        (),
        {
            **vars(os),
            **{name: counted(getattr(os, name)) for name in ("fsync", "replace")},
        },
    )
    files.open = counted(open)  # type: ignore[attr-defined]
    Path.mkdir = counted(Path.mkdir)  # type: ignore[method-assign]
    Path.unlink = counted(Path.unlink)  # type: ignore[method-assign]
    shutil.rmtree = counted(shutil.rmtree)


def run_process(
    folder: Path, name: str, rank: int, num_ranks: int, die_after_steps: int | None
) -> int:
    """A writing process as one of several ranks; rank 0 holds the lock. Returns its wait status."""
    process = os.fork()
    if process:
        return process
    try:
        if die_after_steps is not None:
            die_after(die_after_steps)
        layout, description = CacheLayout(str(folder / name)), manifest("packed")
        writer = (
            CacheWriter(layout, description, chunks_of(description))
            if rank == 0
            else None
        )
        planner = writer or CacheWriter.__new__(CacheWriter)
        if writer is None:
            planner.layout, planner.manifest = layout, description
            planner.chunks = chunks_of(description)
            planner._part = (0, 1)
        for segment in planner.missing_segments()[rank::num_ranks]:
            write_segment(layout, description, segment)
            if writer is not None:
                writer.assemble_complete()
        if writer is not None:
            writer.assemble_complete()
        os._exit(0)
    finally:
        os._exit(1)


def statuses(processes: list[int]) -> list[int]:
    return [
        os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes
    ]


@pytest.mark.parametrize("name", ["train_CHUNK_ID.jsonl", "train_CHUNK_ID.jsonl.zst"])
def test_killed_at_every_step_and_continued_the_files_are_the_same(tmp_path, name):
    write(tmp_path / "straight", name, codec="packed")
    expected, steps, kills = content(tmp_path / "straight"), 0, 0
    while True:
        folder = tmp_path / f"after_{steps}"
        folder.mkdir()
        if statuses([run_process(folder, name, 0, 1, steps)]) == [0]:
            break
        kills += 1
        for path in folder.glob(
            "train_?.jsonl*"
        ):  # whatever is there under its own name is whole
            assert path.suffix == ".idx" or path.read_bytes() == expected[path.name]
        assert statuses([run_process(folder, name, 0, 1, None)]) == [0]
        assert content(folder) == expected
        steps += 1
    assert kills > 40


def test_several_ranks_killed_again_and_again_the_files_are_the_same(tmp_path):
    name = "train_CHUNK_ID.jsonl.zst"
    write(tmp_path / "straight", name, codec="packed")
    expected, dice = content(tmp_path / "straight"), random.Random(0)
    kills = 0
    for attempt in range(20):
        folder = tmp_path / f"attempt_{attempt}"
        folder.mkdir()
        for _ in range(
            3
        ):  # each time another number of ranks, each of which dies at its own instant
            num_ranks = dice.randint(1, 4)
            ranks = [
                run_process(folder, name, rank, num_ranks, dice.randint(1, 18))
                for rank in range(num_ranks)
            ]
            kills += sum(status == -signal.SIGKILL for status in statuses(ranks))
        assert statuses([run_process(folder, name, 0, 1, None)]) == [0]
        assert content(folder) == expected
    assert kills >= 50


def test_damaged_segments_are_computed_again(tmp_path, caplog):
    layout, description = CacheLayout(str(tmp_path / "c_CHUNK_ID.jsonl")), manifest()
    writer = CacheWriter(layout, description, chunks_of(description))
    missing = writer.missing_segments()
    for segment in missing[:2]:
        write_segment(layout, description, segment)
    path = segment_path(layout, *missing[0])
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 4
    path.write_bytes(raw)
    with pytest.raises(CacheError, match="the segment is damaged .wrong checksum."):
        read_segment(path)
    assert writer.missing_segments() == [missing[0], *missing[2:]]
    assert "is damaged and is computed again" in caplog.text


def test_only_missing_chunks_are_written_again(tmp_path):
    path = write(tmp_path)
    before = content(tmp_path)
    (tmp_path / "train_1.jsonl").unlink()
    description = manifest()
    writer = CacheWriter(CacheLayout(str(path)), description, chunks_of(description))
    assert writer.missing_segments() == [(1, range(4, 6)), (1, range(6, 8))]
    writer.close()
    write(tmp_path)
    assert content(tmp_path) == before


def test_another_batch_size_is_recorded_not_refused(tmp_path):
    layout, description = CacheLayout(str(tmp_path / "c_CHUNK_ID.jsonl")), manifest()
    writer = CacheWriter(layout, description, chunks_of(description))
    for number, segment in enumerate(writer.missing_segments()):
        settings = {"micro_batch_size": 1 + number % 2}
        publish_segment(
            layout, description, segment, [*map(row, segment[1])], settings
        )
    writer.assemble_complete()
    assert summaries(layout.output_path)[0].computed_with == [
        {"micro_batch_size": 1},
        {"micro_batch_size": 2},
    ]


def test_continuing_with_other_settings_lists_every_difference(tmp_path):
    path = write(tmp_path)
    layout = CacheLayout(str(path))
    CacheWriter(layout, manifest(), chunks_of(manifest())).close()
    other = manifest("packed", top_k=8, teacher={"name": "t", "weights": "other"})
    with pytest.raises(CacheError) as error:
        CacheWriter(layout, other, chunks_of(other))
    for line in (
        "teacher.weights: 'w' in the cache, 'other' now",
        "top_k: 4 in the cache, 8 now",
        "codec.name: 'json' in the cache, 'packed' now",
        "codec.positions: None in the cache, 'loss' now",
    ):
        assert line in str(error.value)


def test_segments_of_other_settings_are_not_thrown_away(tmp_path):
    layout, description = CacheLayout(str(tmp_path / "c_CHUNK_ID.jsonl")), manifest()
    writer = CacheWriter(layout, description, chunks_of(description))
    writer.close()
    other = manifest(top_k=8)
    CacheWriter(
        layout, other, chunks_of(other)
    ).close()  # nothing was computed: nothing to protect
    writer = CacheWriter(layout, description, chunks_of(description))
    write_segment(layout, description, writer.missing_segments()[0])
    writer.close()
    with pytest.raises(CacheError, match="top_k: 4 in the cache, 8 now"):
        CacheWriter(layout, other, chunks_of(other))


def test_files_of_unknown_origin_are_not_overwritten(tmp_path):
    (tmp_path / "c_0.jsonl").write_text("precious")
    with pytest.raises(CacheError, match="there is no manifest"):
        CacheWriter(
            CacheLayout(str(tmp_path / "c_CHUNK_ID.jsonl")),
            manifest(),
            chunks_of(manifest()),
        )
    assert (tmp_path / "c_0.jsonl").read_text() == "precious"


def test_a_second_job_on_the_same_output_is_told_who_is_writing(tmp_path):
    layout = CacheLayout(str(tmp_path / "c_CHUNK_ID.jsonl"))
    first = CacheWriter(layout, manifest(), chunks_of(manifest()))
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from tests.tiny_cache import *
CacheWriter(CacheLayout({layout.output_path!r}), manifest(), chunks_of(manifest()))
"""
    second = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert f"process {os.getpid()} on " in second.stderr
    assert "is writing this cache; wait until it ends" in second.stderr
    # Jobs of an array write different chunks.
    one = manifest(n_examples_per_chunk=None)
    CacheWriter(CacheLayout(str(tmp_path / "c_7.jsonl")), one, chunks_of(one)).close()
    first.close()
    assert (
        subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode
        == 0
    )


def test_records_out_of_order_missing_or_too_wide_are_refused(tmp_path):
    layout, description = (
        CacheLayout(str(tmp_path / "c.jsonl")),
        manifest(n_examples_per_chunk=None),
    )
    CacheWriter(layout, description, chunks_of(description))

    def publish(*records):
        publish_segment(layout, description, (0, range(2, 6)), records, COMPUTED_WITH)

    with pytest.raises(CacheError, match="example 2 came in the place of example 3"):
        publish(row(2), row(2), row(4), row(5))
    with pytest.raises(CacheError, match="got 1 of 4 records"):
        publish(row(2))
    publish("too long", row(3), row(4), row(5))
    assert [path.name for path in layout.segments_folder(0).iterdir()] == [
        "000000000002-000000000005"
    ]


def test_statistics_in_the_manifest(tmp_path):
    write(tmp_path)
    summary = summaries(tmp_path / "train_CHUNK_ID.jsonl")[0]
    rows = [row(index, 3 + index % 4) for index in range(4)]
    in_loss = [r.example.loss_mask_S > 0 for r in rows]
    assert summary.tokens == sum(r.example.num_tokens for r in rows)
    assert summary.loss_tokens == sum(int(mask.sum()) for mask in in_loss)
    assert summary.kept_tokens == 4 * summary.loss_tokens
    mass = sum(
        (1 - r.teacher.tail_mass_PT[mask, 0].astype(float)).sum()
        for r, mask in zip(rows, in_loss, strict=True)
    )
    assert summary.kept_mass_sum == pytest.approx(mass, rel=1e-6)
    hits = sum(
        label in ids for r, mask in zip(rows, in_loss, strict=True) for label, ids in zip(r.example.labels_S[mask], r.teacher.topk_token_ids_PK[mask], strict=True)
    )  # fmt: skip
    assert summary.label_in_topk == hits
    assert summary.bytes == (tmp_path / "train_0.jsonl").stat().st_size


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "the disk is full: free some space"),
        (errno.EDQUOT, "your quota is used up"),
        (errno.EROFS, "the file system is read-only"),
        (errno.ESTALE, "check the path and its file system"),
    ],
)
def test_a_refusing_file_system_is_explained_and_nothing_is_damaged(
    tmp_path, monkeypatch, code, message
):
    layout, description = CacheLayout(str(tmp_path / "c_CHUNK_ID.jsonl")), manifest()
    writer = CacheWriter(layout, description, chunks_of(description))
    missing = writer.missing_segments()
    write_segment(layout, description, missing[0])
    before = content(tmp_path)

    def refuse(*args):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(FileError, match=message) as error:
            write_segment(layout, description, missing[1])
    assert "run the same command again" in str(error.value)
    assert content(tmp_path) == before
    for segment in missing[1:]:
        write_segment(layout, description, segment)
    writer.assemble_complete()
    assert len(CacheReader(str(tmp_path / "c_CHUNK_ID.jsonl"))) == 10


def test_a_file_that_cannot_grow(tmp_path):
    """The operating system itself refuses to let the file grow."""
    code = f"""
import resource, signal, sys; sys.path.insert(0, {str(ROOT)!r})
from tests.tiny_cache import *
layout, description = CacheLayout({str(tmp_path / "c.jsonl")!r}), manifest(n_examples_per_chunk=None)
writer = CacheWriter(layout, description, chunks_of(description))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
write_segment(layout, description, writer.missing_segments()[0])
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "FileError" in result.stderr
    assert "cannot be written (File too large)" in result.stderr
    assert not list((tmp_path / ".c.jsonl.segments").iterdir())


def test_a_vanished_folder_is_explained(tmp_path):
    layout, description = (
        CacheLayout(str(tmp_path / "sub" / "c_CHUNK_ID.jsonl")),
        manifest(),
    )
    writer = CacheWriter(layout, description, chunks_of(description))
    segment = writer.missing_segments()[0]
    shutil.rmtree(tmp_path / "sub")
    with pytest.raises(FileError, match="check the path, or restore its folder"):
        write_segment(layout, description, segment)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_folder_of_another_owner_is_explained(tmp_path):
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if str(parent).startswith("/tmp/pytest"):
            parent.chmod(0o755)
    write(tmp_path / "cache")
    before = content(tmp_path / "cache")
    process = os.fork()
    if not process:
        try:
            os.setuid(65534)
            CacheWriter(
                CacheLayout(str(tmp_path / "cache" / "train_CHUNK_ID.jsonl")),
                manifest(),
                chunks_of(manifest()),
            )
        except FileError as error:
            os._exit(0 if "have its owner permit it" in str(error) else 2)
        finally:
            os._exit(1)
    assert statuses([process]) == [0]
    assert content(tmp_path / "cache") == before


def test_what_dead_processes_left_is_removed(tmp_path):
    path = write(tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    machine = socket.gethostname()
    (tmp_path / "train_1.jsonl").unlink()
    folder = tmp_path / ".train_1.jsonl.segments"
    folder.mkdir()
    left = [
        tmp_path / f".train_1.jsonl.{machine}-{dead.pid}.tmp",
        tmp_path / f".train_manifest.json.{machine}-{dead.pid}.tmp",
        folder / f".000000000004-000000000005.{machine}-{dead.pid}.tmp",
    ]
    for temporary in left:
        temporary.write_bytes(b"half")
    own = tmp_path / f".train_1.jsonl.{machine}-{os.getppid()}.tmp"
    own.write_bytes(b"being written")
    write(tmp_path)
    assert not any(temporary.exists() for temporary in left)
    assert own.exists()
    assert same(CacheReader(str(path))[5], row(5, 4))


def test_manifest_of_another_format_is_refused(tmp_path):
    write(tmp_path)
    path = tmp_path / "train_manifest.json"
    path.write_text(
        path.read_text().replace('"format_version": 3', '"format_version": 99')
    )
    with pytest.raises(CacheError, match="format_version 99 is not read"):
        Manifest.load(path)
    fields = json.loads(path.read_text()) | {
        "format_version": 3,
        "of a later version": 1,
    }
    path.write_text(json.dumps(fields))
    assert Manifest.load(path).top_k == 4
    path.write_text(json.dumps({"format_version": 3}))
    with pytest.raises(CacheError, match="not a cache manifest"):
        Manifest.load(path)
