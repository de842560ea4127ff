"""Damaged and hostile caches: right rows or one error, within bounds of memory and time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import orjson
import pytest

from nemo_kd.cache.index import ChunkIndex
from nemo_kd.cache.layout import CacheError, CacheLayout
from nemo_kd.cache.manifest import Manifest
from nemo_kd.cache.reader import CacheReader
from nemo_kd.cache.record import decode
from nemo_kd.cache.segment import segment_path
from nemo_kd.config import UserInputError
from nemo_kd.tools.merge import merge
from nemo_kd.tools.repair import repair
from nemo_kd.tools.salvage import file_sha256, stretches
from nemo_kd.tools.verify import verify
from tests.tiny_cache import CacheWriter, chunks_of, manifest, write_segment

ROOT = Path(__file__).resolve().parents[2]
CASES = 250
MOST_BYTES = 6 << 30


def write(folder: Path, name: str = "c_CHUNK_ID.jsonl.zst") -> str:
    layout, description = CacheLayout(str(folder / name)), manifest()
    writer = CacheWriter(layout, description, chunks_of(description))
    for segment in writer.missing_segments():
        write_segment(layout, description, segment)
    writer.assemble_complete()
    writer.close()
    return layout.output_path


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tail_mass", [[1.5]], "field tail_mass: found 1.5"),
        ("tail_mass", [[-0.5]], "field tail_mass: found -0.5"),
        ("temperatures", [1, 0], "field temperatures: found 0"),
        ("temperatures", [1, -2], "field temperatures: found -2"),
        ("label_logprobs", [0.5], "field label_logprobs: found 0.5"),
        ("topk_token_ids", [[-1, 3]], "field topk_token_ids: found -1"),
        ("topk_token_ids", [[3, 3]], "distinct ids; position 0 has not"),
    ],
)
def test_values_of_the_json_codec_out_of_range_are_refused(field, value, message):
    fields = {
        "tokens": [1],
        "labels": [2],
        "loss_mask": [1],
        "topk_logits": [[0, -1]],
        "topk_token_ids": [[2, 3]],
    }
    fields |= {
        "log_sum_exp_logits": [0.4],
        "temperatures": [1],
        "tail_mass": [[0.1]],
        "label_logprobs": [-0.4],
    }
    decode(orjson.dumps(fields), "file:1", index=0)
    fields[field] = value
    if field == "temperatures":
        fields["tail_mass"] = [[0.1], [0.1]]
    with pytest.raises(CacheError, match=message):
        decode(orjson.dumps(fields), "file:1", index=0)


@pytest.mark.parametrize(
    "change",
    [
        {
            "dataset": {"start_from_idx": 0, "end_at_idx": 10**9},
            "n_examples_per_chunk": 1,
        },
        {"merged_chunks": 10**9},
        {"merged_chunks": 2**63},
        {"top_k": "8"},
        {"codec": []},
        {"teacher": 3},
        {"dataset": None},
        {"format_version": 2, "chunks": {"9" * 5000: {}}},
        {"format_version": 2, "chunks": 7},
        {"seq_length": -1, "vocab_size": -5},
    ],
)
def test_a_manifest_of_absurd_values_is_one_error_at_once(tmp_path, change):
    path = write(tmp_path)
    manifest_path = CacheLayout(path).manifest_path
    manifest_path.write_bytes(
        orjson.dumps(orjson.loads(manifest_path.read_bytes()) | change)
    )
    with pytest.raises(UserInputError):
        CacheReader(path)
    assert any(report.problems for report in verify(path))


def test_a_manifest_nested_deeply_is_one_error(tmp_path):
    deep = b"[" * 500 + b"]" * 500
    with pytest.raises(CacheError, match="nested more than 32 deep"):
        Manifest.parse(b'{"format_version":3,"codec":' + deep + b"}", "m.json")


def test_an_index_with_places_outside_the_file_is_not_used(tmp_path):
    path = write(tmp_path)
    index_path = tmp_path / "c_0.jsonl.zst.idx"
    whole = index_path.read_bytes()
    index = ChunkIndex.parse(whole)
    assert index is not None
    starts = index.starts.copy()
    starts[1] = 1 << 60
    index_path.write_bytes(
        ChunkIndex(
            index.facts, index.sha256, starts, index.num_positions, index.summary
        ).to_bytes()
    )
    with pytest.raises(CacheError, match="the chunk is not complete"):
        CacheReader(path)


KINDS = ["pipe", "folder", "loop", "device"]


def replace_by(kind: str, place: Path) -> None:
    """Put something that is no file in the place of one."""
    place.unlink()
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to("/dev/zero" if kind == "device" else place.name)


@pytest.fixture
def soon():
    """Fail the test, with its child processes, after 20 seconds: it waits for what never comes."""

    def stop(*_):
        for child in multiprocessing.active_children():
            child.kill()
        raise TimeoutError("something that is no file was waited for")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    "name", ["c_0.jsonl.zst.idx", "c_manifest.json", "c_0.jsonl.zst"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_a_file_is_one_error_and_never_waited_for(tmp_path, name, kind, soon):
    path = write(tmp_path)
    replace_by(kind, tmp_path / name)
    with pytest.raises(UserInputError):
        CacheReader(path)[0]
    with pytest.raises(UserInputError):
        merge([path], str(tmp_path / "merged" / "m_CHUNK_ID.jsonl.zst"))
    assert any(report.problems for report in verify(path))
    with contextlib.suppress(
        UserInputError
    ):  # it makes an index anew, and passes over a chunk that is none
        repair(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_or_segment_that_becomes_something_else_is_one_error(
    tmp_path, kind, soon
):
    layout, description = CacheLayout(str(tmp_path / "c_CHUNK_ID.jsonl")), manifest()
    writer = CacheWriter(layout, description, chunks_of(description))
    todo = writer.missing_segments()
    for segment in todo:
        write_segment(layout, description, segment)
    place = segment_path(layout, *todo[0])
    replace_by(kind, place)
    for use in (
        lambda: list(stretches(place)),
        lambda: file_sha256(place),
        writer.assemble_complete,
    ):
        with pytest.raises(UserInputError, match=place.name):
            use()
    writer.close()
    with pytest.raises(UserInputError, match=place.name):
        CacheWriter(layout, description, chunks_of(description)).missing_segments()


def test_chunks_behind_links_are_merged_as_files(tmp_path):
    path = write(tmp_path)
    place = tmp_path / "c_0.jsonl.zst"
    place.symlink_to(place.rename(tmp_path / "elsewhere").name)
    target = tmp_path / "merged" / "m_CHUNK_ID.jsonl.zst"
    merge([path], str(target))
    assert not target.with_name("m_0.jsonl.zst").is_symlink()
    assert not any(report.problems for report in verify(str(target)))


def test_a_path_with_5000_digits_is_one_error(tmp_path):
    path = write(tmp_path)
    with pytest.raises(UserInputError):
        CacheReader(f"{path}[:{'9' * 5000}]")


def fuzz(folder: Path) -> None:
    """Change bytes of a cache's files, and read and verify it: only right rows or errors of the user's input may come."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    generator = random.Random(7)
    for name in ("a_CHUNK_ID.jsonl", "a_CHUNK_ID.jsonl.zst"):
        whole, damaged = folder / f"whole{len(name)}", folder / "damaged"
        whole.mkdir()
        write(whole, name)
        files = sorted(
            path.name for path in whole.iterdir() if not path.name.startswith(".")
        )
        for case in range(CASES):
            shutil.rmtree(damaged, ignore_errors=True)
            shutil.copytree(whole, damaged)
            path = damaged / generator.choice(files)
            content = bytearray(path.read_bytes())
            place = generator.randrange(len(content))
            kind = case % 4
            if kind == 0:
                content[place] ^= 1 << generator.randrange(8)
            elif kind == 1:
                del content[place:]
            elif kind == 2:
                content[place:place] = generator.choice(
                    [b"9" * 5000, b"-1", b"1e308", b"\xff" * 8, b"[" * 2000, b"null"]
                )
            else:
                content[place : place + 8] = (1 << generator.randrange(62)).to_bytes(
                    8, "little"
                )
            path.write_bytes(content)
            if case % 2:  # no manifest and no index protect the lines
                for other in files:
                    if other.endswith((".idx", "manifest.json")) and other != path.name:
                        (damaged / other).unlink()
            try:
                reader = CacheReader(str(damaged / name))
                for position in range(len(reader)):
                    row = reader[position]
                    assert np.isfinite(row.teacher.log_sum_exp_logits_P).all()
                    assert (row.teacher.tail_mass_PT >= 0).all()
                    assert (row.teacher.tail_mass_PT <= 1).all()
            except UserInputError:
                pass


def test_changed_bytes_give_right_rows_or_an_error(tmp_path):
    code = f"from pathlib import Path; from tests.unit.test_hostile_caches import fuzz; fuzz(Path({str(tmp_path)!r}))"
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]


def test_the_same_name_with_another_suffix_does_not_share_a_manifest(tmp_path):
    write(tmp_path, "c_CHUNK_ID.jsonl")
    with pytest.raises(
        CacheError,
        match="c_manifest.json belongs to the cache .*c_CHUNK_ID.jsonl; two caches cannot",
    ):
        write(tmp_path, "c_CHUNK_ID.jsonl.zst")
    write(tmp_path, "c_CHUNK_ID.jsonl")
