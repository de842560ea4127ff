"""The cache on disk: lines any JSON library reads, chunks that are whole or absent, access by index."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nemo_kd.batch import CachedExample, Example, TeacherTopK
from nemo_kd.cache.json_codec import decode, encode
from nemo_kd.cache.layout import CacheError, CacheLayout
from nemo_kd.cache.manifest import Manifest
from nemo_kd.cache.reader import CacheReader
from nemo_kd.cache.writer import CacheWriter

ROOT = Path(__file__).resolve().parents[2]


def row(index: int, length: int = 5, k: int = 4, vocab_size: int = 50) -> CachedExample:
    random = np.random.default_rng(index)
    logits = random.normal(size=(length, vocab_size)).astype(np.float32) * 3
    order = np.argsort(-logits, axis=1)[:, :k]
    top = np.take_along_axis(logits, order, 1)
    log_sum_exp = np.log(np.exp(logits - top[:, :1]).sum(1)).astype(np.float32)
    mask = np.ones(length, dtype=np.float32)
    mask[: length // 2] = 0
    example = Example(index, random.integers(50, size=length), random.integers(50, size=length), mask)
    return CachedExample(example, TeacherTopK(top - top[:, :1], order.astype(np.int64), log_sum_exp))


def manifest(**changes) -> Manifest:
    fields = {
        "codec": "json", "top_k": 4, "vocab_size": 50, "seq_length": 64, "teacher": {"name": "t", "weights": "w"}, "tokenizer": "tok",
        "chat_template": None, "dataset": {"path": "d", "fingerprint": "f", "start_from_idx": 0, "end_at_idx": 9}, "n_examples_per_chunk": 4,
    }  # fmt: skip
    return Manifest(**{**fields, **changes})


def write(folder: Path, counts=(4, 4, 2)) -> Path:
    path = folder / "train_CHUNK_ID.jsonl"
    writer = CacheWriter(CacheLayout(str(path)), manifest())
    start = 0
    for chunk, count in enumerate(counts):
        with writer.chunk(chunk, start, start + count - 1) as chunk_writer:
            for index in range(start, start + count):
                chunk_writer.write(row(index, 3 + index % 4))
        start += count
    return path


def same(a: CachedExample, b: CachedExample) -> bool:
    return all(
        np.array_equal(getattr(getattr(a, part), name), getattr(getattr(b, part), name))
        for part, names in (("example", ("tokens_S", "labels_S", "loss_mask_S")), ("teacher", ("topk_logits_SK", "topk_token_ids_SK", "log_sum_exp_logits_S")))
        for name in names
    )  # fmt: skip


def test_plain_json_reads_a_line_and_float32_survives():
    original = row(3)
    payload = json.loads(encode(original))
    assert payload.keys() == {
        "index",
        "tokens",
        "labels",
        "loss_mask",
        "topk_logits",
        "topk_token_ids",
        "log_sum_exp_logits",
    }
    assert payload["index"] == 3
    assert np.array_equal(np.array(payload["topk_logits"], dtype=np.float32), original.teacher.topk_logits_SK)
    assert same(decode(encode(original), "x:1"), original)


def test_nemo_aligners_padded_lines_with_other_fields_are_read():
    original, padding = row(0), 3
    line = json.loads(encode(original))
    for name, filler in (("tokens", 2), ("labels", 2), ("loss_mask", 0.0), ("log_sum_exp_logits", 1.5)):
        line[name] += [filler] * padding
    line["topk_logits"] += [[0.0, -1.0, -2.0, -3.0]] * padding
    line["topk_token_ids"] += [[1, 2, 3, 4]] * padding
    line |= {"contexts": [1, 2], "context_lengths": 2, "answers": [3], "metadata": {"id": 1}}
    assert same(decode(json.dumps(line).encode(), "x:1"), original)
    del line["index"]
    assert decode(json.dumps(line).encode(), "x:1", index=8).example.index == 8


def test_logits_that_are_not_shifted_give_the_same_probabilities():
    original = row(0)
    line = json.loads(encode(original))
    line["topk_logits"] = [[value + 7.25 for value in position] for position in line["topk_logits"]]
    line["log_sum_exp_logits"] = [value + 7.25 for value in line["log_sum_exp_logits"]]
    decoded = decode(json.dumps(line).encode(), "x:1")
    np.testing.assert_allclose(decoded.teacher.topk_logits_SK, original.teacher.topk_logits_SK, atol=1e-6)
    np.testing.assert_allclose(decoded.teacher.log_sum_exp_logits_S, original.teacher.log_sum_exp_logits_S, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": None}, "field tokens"),
        ({"labels": [1]}, "field labels: found 1 positions, expected 5"),
        ({"topk_logits": [[0.0, -2.0, -1.0, -3.0]] * 5}, "not in descending order"),
        ({"topk_token_ids": [[1, 1, 2, 3]] * 5}, "an id twice at position 0"),
        ({"topk_token_ids": [[1, 2, 3]] * 5}, "found 3 ids a position, expected 4"),
        ({"topk_logits": [[0.0], [0.0, -1.0], [0.0], [0.0], [0.0]]}, "lists of different lengths"),
        ({"loss_mask": [0, 1, 2, 1, 1]}, "expected only 0 and 1"),
        ({"log_sum_exp_logits": [-5.0] * 5}, "the kept probabilities sum to"),
        ({"log_sum_exp_logits": [1e39] * 5}, "expected finite numbers"),
        ({"tokens": [1, 2, -3, 4, 5]}, "found -3, expected token ids of at least 0"),
    ],
)
def test_contradictions_in_a_line_are_named(change, message):
    line = {**json.loads(encode(row(0))), **change}
    with pytest.raises(CacheError, match=message) as error:
        decode(json.dumps(line).encode(), "file.jsonl:7")
    assert str(error.value).startswith("file.jsonl:7: ")


def test_top_k_takes_the_largest_and_not_more_than_there_are():
    assert (
        decode(encode(row(0)), "x:1", top_k=2).teacher.topk_token_ids_SK.tolist()
        == row(0).teacher.topk_token_ids_SK[:, :2].tolist()
    )
    with pytest.raises(CacheError, match="found 4 logits a position, expected at least top_k=5"):
        decode(encode(row(0)), "x:1", top_k=5)


def test_rows_come_back_by_index_from_uneven_chunks(tmp_path):
    path = write(tmp_path / "a folder with ünïcode")
    reader = CacheReader([str(path)])
    assert len(reader) == 10
    for index in (9, 0, 5):
        assert same(reader[index], row(index, 3 + index % 4))
        assert reader[index].example.index == index
    assert same(pickle.loads(pickle.dumps(reader))[7], row(7, 6))
    assert reader.max_token_id < 50
    assert [m.vocab_size for m in reader.manifests] == [50]
    assert len(CacheReader([str(path)], n_chunks=2)) == 8
    assert len(CacheReader([str(path), str(path)])) == 20


def test_reading_a_row_touches_its_own_bytes_only(tmp_path, monkeypatch):
    path = write(tmp_path)
    reader = CacheReader([str(path)])
    reads = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: reads.append(size) or pread(fd, size, offset))
    reader[6]
    assert reads == [len(encode(row(6, 5)))]


def test_long_rows_are_left_out_and_counted(tmp_path):
    reader = CacheReader([str(write(tmp_path))], seq_length=5)
    assert reader.dropped_too_long == 2
    assert [reader[i].example.index for i in range(len(reader))] == [0, 1, 2, 4, 5, 6, 8, 9]


def test_a_missing_or_stale_index_is_built_again(tmp_path):
    path = write(tmp_path)
    (tmp_path / "train_0.jsonl.idx").unlink()
    assert len(CacheReader([str(path)])) == 10
    foreign = tmp_path / "foreign_0.jsonl"
    foreign.write_bytes(encode(row(0)))
    assert len(CacheReader([str(tmp_path / "foreign_CHUNK_ID.jsonl")])) == 1
    foreign.write_bytes(encode(row(0)) + encode(row(1)))
    assert len(CacheReader([str(foreign)])) == 2


def test_an_edited_file_is_noticed(tmp_path):
    path = write(tmp_path)
    data = tmp_path / "train_0.jsonl"
    content = data.read_bytes()
    tokens = json.loads(content.splitlines()[0])["tokens"]
    data.write_bytes(
        content.replace(
            json.dumps(tokens).replace(" ", "").encode(), json.dumps([99, *tokens[1:]]).replace(" ", "").encode(), 1
        )
    )
    if data.stat().st_size == len(content):
        assert CacheReader([str(path)]).max_token_id == 99
    lines = content.splitlines(keepends=True)
    data.write_bytes(b"".join([lines[1], lines[0], *lines[2:]]))
    assert CacheReader([str(path)])[0].example.index == 1  # the index was built again


def test_caches_with_different_numbers_of_logits_need_a_common_one(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(encode(row(0, k=4)))
    (tmp_path / "b.jsonl").write_bytes(encode(row(1, k=2)))
    paths = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    with pytest.raises(CacheError, match="hold 2 to 4 logits a position; set model.data.top_k=2"):
        CacheReader(paths)
    with pytest.raises(CacheError, match="model.data.top_k: 3 exceeds the 2 logits"):
        CacheReader(paths, top_k=3)
    assert [CacheReader(paths, top_k=2)[i].teacher.topk_logits_SK.shape[1] for i in (0, 1)] == [2, 2]
    assert CacheReader(paths[:1]).fingerprint() != CacheReader(paths[1:]).fingerprint()


def test_forked_readers_read_the_same_rows(tmp_path):
    reader = CacheReader([str(write(tmp_path))])
    reader[0]  # a descriptor that the children must not share
    with multiprocessing.get_context("fork").Pool(3) as pool:
        rows = pool.map(reader.__getitem__, [index % 10 for index in range(60)])
    assert all(same(found, row(index % 10, 3 + index % 10 % 4)) for index, found in enumerate(rows))


def test_damage_is_found(tmp_path):
    path = write(tmp_path)
    (tmp_path / "train_1.jsonl").rename(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match=r"train_1\.jsonl: the chunk is missing \(2 of 3"):
        CacheReader([str(path)])
    (tmp_path / "elsewhere").rename(tmp_path / "train_1.jsonl")
    (tmp_path / "train_2.jsonl").rename(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match=r"train_2\.jsonl: the chunk is missing \(2 of 3"):
        CacheReader([str(path)])
    (tmp_path / "elsewhere").rename(tmp_path / "train_2.jsonl")
    with pytest.raises(CacheError, match="a path without CHUNK_ID is one chunk"):
        CacheReader([str(tmp_path / "train_0.jsonl")], n_chunks=2)
    with pytest.raises(CacheError, match=r"train_3\.jsonl: the chunk is missing"):
        CacheReader([str(path)], n_chunks=4)
    whole = (tmp_path / "train_2.jsonl").read_bytes()
    (tmp_path / "train_2.jsonl").write_bytes(whole[:-10])
    with pytest.raises(CacheError, match=r"train_2\.jsonl: .* bytes, but the manifest says"):
        CacheReader([str(path)])
    torn = tmp_path / "torn.jsonl"
    torn.write_bytes(whole[:-10])
    with pytest.raises(CacheError, match=r"torn\.jsonl:2: the last line has no line break"):
        CacheReader([str(torn)])
    with pytest.raises(CacheError, match="is missing"):
        CacheReader([str(tmp_path / "nothing.jsonl")])


def test_an_error_in_a_chunk_leaves_nothing(tmp_path):
    writer = CacheWriter(CacheLayout(str(tmp_path / "c.jsonl")), manifest())
    with pytest.raises(CacheError, match="example 0 came after example 3"), writer.chunk(0, 0, 9) as chunk:
        chunk.write(row(3))
        chunk.write(row(0))
    assert [path.name for path in tmp_path.iterdir()] == ["c.manifest.json"]
    assert not writer.is_complete(0)
    with pytest.raises(CacheError, match="got 1 of 10 records"), writer.chunk(0, 0, 9) as chunk:
        chunk.write(row(3))
    with (
        pytest.raises(CacheError, match="has 3 logits a position in a cache of top_k=4"),
        writer.chunk(0, 0, 9) as chunk,
    ):
        chunk.write(row(3, k=3))
    assert [path.name for path in tmp_path.iterdir()] == ["c.manifest.json"]
    CacheWriter(CacheLayout(str(tmp_path / "c.jsonl")), manifest(top_k=9))  # nothing was written: nothing to protect


def test_a_killed_writer_leaves_no_chunk_and_the_next_one_cleans_up(tmp_path):
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from tests.unit.test_cache import CacheLayout, CacheWriter, manifest, row
with CacheWriter(CacheLayout({str(tmp_path / "c_CHUNK_ID.jsonl")!r}), manifest()).chunk(0, 0, 0) as chunk:
    chunk.write(row(0)); chunk.file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == -signal.SIGKILL
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".tmp"]
    writer = CacheWriter(CacheLayout(str(tmp_path / "c_CHUNK_ID.jsonl")), manifest())
    with writer.chunk(0, 0, 0) as chunk:
        chunk.write(row(0))
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_chunk_whose_writer_was_killed_before_the_manifest_is_written_again(tmp_path):
    path = write(tmp_path)
    listed = (tmp_path / "train_manifest.json").read_text()
    unlisted = json.loads(listed)
    del unlisted["chunks"]["0"]
    (tmp_path / "train_manifest.json").write_text(json.dumps(unlisted))
    writer = CacheWriter(CacheLayout(str(path)), manifest())
    assert [writer.is_complete(chunk) for chunk in range(3)] == [False, True, True]
    with writer.chunk(0, 0, 3) as chunk:
        for index in range(4):
            chunk.write(row(index, 3 + index % 4))
    assert json.loads((tmp_path / "train_manifest.json").read_text()) == json.loads(listed)


def test_continuing_with_other_settings_lists_every_difference(tmp_path):
    path = write(tmp_path)
    writer = CacheWriter(CacheLayout(str(path)), manifest())
    assert all(writer.is_complete(chunk) for chunk in range(3))
    with pytest.raises(CacheError) as error:
        CacheWriter(CacheLayout(str(path)), manifest(top_k=8, teacher={"name": "t", "weights": "other"}))
    assert "teacher.weights: 'w' in the cache, 'other' now" in str(error.value)
    assert "top_k: 4 in the cache, 8 now" in str(error.value)


def test_files_of_unknown_origin_are_not_overwritten(tmp_path):
    (tmp_path / "c_0.jsonl").write_text("precious")
    with pytest.raises(CacheError, match="there is no manifest"):
        CacheWriter(CacheLayout(str(tmp_path / "c_CHUNK_ID.jsonl")), manifest())
    assert (tmp_path / "c_0.jsonl").read_text() == "precious"


def test_manifest_of_another_format_is_refused(tmp_path):
    write(tmp_path)
    path = tmp_path / "train_manifest.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(CacheError, match="format_version 99 is not read"):
        Manifest.load(path)


def test_statistics_in_the_manifest(tmp_path):
    write(tmp_path)
    summary = Manifest.load(tmp_path / "train_manifest.json").chunks["0"]
    rows = [row(index, 3 + index % 4) for index in range(4)]
    assert summary.tokens == sum(r.example.num_tokens for r in rows)
    mass = sum(
        np.exp(r.teacher.topk_logits_SK - r.teacher.log_sum_exp_logits_S[:, None])
        .sum(1)[r.example.loss_mask_S > 0]
        .sum()
        for r in rows
    )
    assert summary.kept_mass_sum == pytest.approx(mass, rel=1e-6)
    hits = sum(
        label in ids for r in rows for label, ids, mask in zip(r.example.labels_S, r.teacher.topk_token_ids_SK, r.example.loss_mask_S, strict=True) if mask
    )  # fmt: skip
    assert summary.label_in_topk == hits
    assert summary.bytes == (tmp_path / "train_0.jsonl").stat().st_size


@pytest.mark.parametrize(
    ("path", "chunk", "manifest_name"),
    [
        ("a/train_CHUNK_ID.jsonl", "a/train_3.jsonl", "a/train_manifest.json"),
        ("train.v1_CHUNK_ID.jsonl", "train.v1_3.jsonl", "train.v1_manifest.json"),
        ("CHUNK_ID-x.jsonl", "3-x.jsonl", "manifest-x.json"),
    ],
)
def test_names(path, chunk, manifest_name):
    layout = CacheLayout(path)
    assert (str(layout.chunk_path(3)), str(layout.manifest_path)) == (chunk, manifest_name)
    assert str(CacheLayout("b/train_0.jsonl").manifest_path) == "b/train_0.manifest.json"
    with pytest.raises(CacheError, match="stands in the folder"):
        CacheLayout("CHUNK_ID/x.jsonl")
