"""`logit_cache verify` and `repair` see past damage: whatever is whole stays, is counted and keeps its line's number."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from nemo_kd.cache.index import ChunkIndex
from nemo_kd.cache.layout import CacheError, CacheLayout, TornError, lines_of
from nemo_kd.cache.manifest import Manifest
from nemo_kd.cache.reader import CacheReader
from nemo_kd.files import FileError, Lock
from nemo_kd.tools.repair import repair
from nemo_kd.tools.verify import Chunk, verify, verify_chunk
from tests.tiny_cache import as_format_2, edit_index, same_places, write

ROOT = Path(__file__).resolve().parents[2]
ONE_FILE = {"codec": "packed", "n_examples_per_chunk": None}


def problems(path: Path) -> list[str]:
    return [problem for report in verify(str(path)) for problem in report.problems]


def frames(path: Path) -> list[bytes]:
    """The lines of a chunk by its index."""
    raw, index = (
        path.read_bytes(),
        ChunkIndex.parse(path.with_name(path.name + ".idx").read_bytes()),
    )
    assert index is not None
    return [
        raw[start:end]
        for start, end in zip(index.starts[:-1], index.starts[1:], strict=True)
    ]


def forget_index(path: Path) -> None:
    path.with_name(path.name + ".idx").unlink()


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.zst"])
def test_a_flip_of_any_byte_is_found_and_costs_a_plain_line_only(tmp_path, name):
    path = write(tmp_path, name, **ONE_FILE)
    manifest, whole = Manifest.load(tmp_path / "t.manifest.json"), path.read_bytes()
    chunk = Chunk(CacheLayout(str(path)), 0, manifest)
    for position in range(0, len(whole), 11):
        raw = bytearray(whole)
        raw[position] ^= 1 << position % 8
        path.write_bytes(raw)
        report = verify_chunk(chunk)
        assert report.problems
        if name.endswith("jsonl"):  # a flipped line break makes one line of two
            assert report.found.examples >= (8 if whole[position] == 10 else 9), (
                position
            )


def test_damage_that_looks_like_a_torn_end_is_not_cut(tmp_path):
    """A damaged frame can announce more bytes than the file has."""
    path, zst = tmp_path / "t.jsonl.zst", zstandard.ZstdCompressor(write_checksum=True)
    digits = random.Random(0).randbytes(50_000).hex()
    lines = [
        zst.compress(f'{{"text": "{text}"}}\n'.encode())
        for text in ("a", digits, "b", "c")
    ]
    swallowed = 0
    for position in range(len(lines[0]), len(lines[0]) + 30):
        for bit in range(8):
            raw = bytearray(b"".join(lines))
            raw[position] ^= 1 << bit
            path.write_bytes(raw)
            try:
                with path.open("rb") as file:
                    list(lines_of(path).split(file, "t"))
            except TornError:
                swallowed += 1
                assert all(
                    text.startswith("not repaired: ") for text in repair(str(path))
                )
                assert path.read_bytes() == raw
            except CacheError:
                pass
    assert swallowed > 0
    assert not list(tmp_path.glob("*.torn*"))


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.zst"])
def test_a_file_cut_anywhere_loses_its_last_line_only(tmp_path, name):
    path = write(tmp_path, name, **ONE_FILE)
    (tmp_path / "t.manifest.json").unlink()
    lines, torn = frames(path), path.with_name(path.name + ".torn")
    whole = b"".join(lines)
    for length in range(len(lines[0]), len(whole), 97):
        path.write_bytes(whole[:length])
        repair(str(path))
        kept = CacheReader(str(path))
        assert whole.startswith(b"".join(lines[: len(kept)]))
        left = torn.read_bytes() if torn.exists() else b""
        assert path.read_bytes() + left in (whole[:length], whole[:length] + b"\n")
        assert sum(map(len, lines[: len(kept) + 1])) > length
        torn.unlink(missing_ok=True)


@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_whole_last_line_without_its_line_break_is_kept(tmp_path, with_manifest):
    path = write(tmp_path, "t.jsonl", **ONE_FILE)
    whole = path.read_bytes()
    if not with_manifest:
        (tmp_path / "t.manifest.json").unlink()
    path.write_bytes(whole[:-1])
    assert any(
        "the last line has no line break" in problem for problem in problems(path)
    )
    assert "the break was added" in repair(str(path), dry_run=True)[0]
    assert path.read_bytes() == whole[:-1]
    assert "the break was added" in repair(str(path))[0]
    assert path.read_bytes() == whole
    assert problems(path) == []
    assert repair(str(path)) == []


def test_what_dead_processes_left_is_told_and_removed(tmp_path):
    path = write(tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folder = tmp_path / ".train_1.jsonl.segments"
    folder.mkdir()
    left = [
        tmp_path / f".train_1.jsonl.{socket.gethostname()}-{dead.pid}.tmp",
        folder / f".0-1.{socket.gethostname()}-{dead.pid}.tmp",
    ]
    for temporary in left:
        temporary.write_bytes(b"half")
    expected = [f"{temporary}: removed, a dead process left it" for temporary in left]
    assert repair(str(path), dry_run=True) == expected
    assert all(temporary.exists() for temporary in left)
    assert repair(str(path)) == expected
    assert not any(temporary.exists() for temporary in left)


def test_a_cache_that_is_being_written_is_not_repaired(tmp_path):
    write(tmp_path, "t_0.jsonl", n_examples_per_chunk=None)
    for path in ("t_0.jsonl", "t_CHUNK_ID.jsonl"):
        lock = Lock(CacheLayout(str(tmp_path / path)).lock_path)
        with pytest.raises(
            FileError, match=f"process {os.getpid()} on .* is writing this cache"
        ):
            repair(str(tmp_path / path))
        lock.release()
        assert repair(str(tmp_path / path)) == []


def test_files_of_other_programs_without_index_and_indices_are_whole(tmp_path):
    path = write(tmp_path)
    for chunk in range(3):
        file = tmp_path / f"train_{chunk}.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line in lines:
            del line["index"]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        forget_index(file)
    (tmp_path / "train_manifest.json").unlink()
    assert problems(path) == []
    assert [report.found.last_index for report in verify(str(path))] == [3, 3, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": -1}, "tokens, but its summary says -1"),
        (
            {"skipped": {"too long": 1}},
            "its summary says 5 records, 4 to 7",
        ),
        ({"last_index": 8}, r"4 to 8; the manifest, \(4, 7\)"),
        ({"kept_tokens": 7}, "kept_tokens, but its summary says 7"),
        ({"label_in_topk": 99}, "label_in_topk, but its summary says 99"),
    ],
)
@pytest.mark.parametrize("format_version", [2, 3])
def test_a_wrong_summary_is_named(tmp_path, changes, message, format_version):
    path = write(tmp_path)
    if format_version == 3:
        edit_index(tmp_path / "train_1.jsonl", **changes)
    else:
        as_format_2(path)
        manifest_path = tmp_path / "train_manifest.json"
        manifest = json.loads(manifest_path.read_bytes())
        manifest["chunks"]["1"] |= changes
        manifest_path.write_text(json.dumps(manifest))
    reports = verify(str(path))
    assert any(
        re.search(message, problem)
        for report in reports
        for problem in report.problems
    )
    assert sum(report.found.examples for report in reports) == 10


def test_a_flip_of_any_byte_of_an_index_is_found(tmp_path):
    path = write(tmp_path, "t.jsonl.zst", **ONE_FILE)
    manifest, index = (
        Manifest.load(tmp_path / "t.manifest.json"),
        path.with_name("t.jsonl.zst.idx"),
    )
    whole = index.read_bytes()
    for position in range(len(whole)):
        if 48 <= position < 56:  # the time, which means nothing beside a manifest
            continue
        raw = bytearray(whole)
        raw[position] ^= 4
        index.write_bytes(raw)
        (problem,) = verify_chunk(Chunk(CacheLayout(str(path)), 0, manifest)).problems
        assert "`logit_cache repair`" in problem
    index.unlink()
    assert repair(str(path)) == [
        f"{path}: index made again"
    ]  # since all records are there
    assert same_places(ChunkIndex.parse(index.read_bytes()), ChunkIndex.parse(whole))
    assert problems(path) == []


@pytest.mark.parametrize("value", ["text", None, 1.5, True, [1]])
@pytest.mark.parametrize(
    "field",
    ["vocab_size", "top_k", "n_examples_per_chunk", "dataset.end_at_idx", "teacher"],
)
def test_a_value_of_another_type_in_the_manifest_is_named(tmp_path, field, value):
    path, manifest_path = write(tmp_path), tmp_path / "train_manifest.json"
    payload = json.loads(manifest_path.read_bytes())
    *parents, name = field.split(".")
    (payload[parents[0]] if parents else payload)[name] = value
    manifest_path.write_text(json.dumps(payload))
    if (field, value) == ("n_examples_per_chunk", None):
        Manifest.load(manifest_path)
        return
    message = re.escape(
        f"{manifest_path}: not a cache manifest ({field}: found {value!r}"
    )
    with pytest.raises(CacheError, match=message):
        CacheReader(str(path))
    with pytest.raises(CacheError, match=message):
        verify(str(path))
