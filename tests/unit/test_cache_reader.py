"""Reading a cache: by index, from any process, from anywhere; damage and mismatches between files are named."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import zstandard

from nemo_kd.batch import CachedExample
from nemo_kd.cache import reader as reader_module
from nemo_kd.cache.index import ChunkIndex, scan_chunk
from nemo_kd.cache.layout import CacheError
from nemo_kd.cache.manifest import Manifest
from nemo_kd.cache.reader import CacheBlend, CacheReader
from nemo_kd.cache.record import encode
from tests.tiny_cache import as_format_2, row, same, same_places, write

NAMES = ("train_CHUNK_ID.jsonl", "train_CHUNK_ID.jsonl.zst")


def dataset(count: int) -> dict[str, object]:
    return {
        "path": "d",
        "fingerprint": "f",
        "start_from_idx": 0,
        "end_at_idx": count - 1,
    }


def indices(reader) -> list[int]:
    return [reader[position].example.index for position in range(len(reader))]


@pytest.mark.parametrize("name", NAMES)
def test_rows_come_back_by_index_from_uneven_chunks(tmp_path, name):
    path = write(tmp_path / "a folder with ünïcode", name)
    reader = CacheReader(str(path))
    assert (len(reader), reader.chunk_sizes()) == (10, [4, 4, 2])
    for index in (9, 0, 5):
        assert same(reader[index], row(index, 3 + index % 4))
        assert reader[index].example.index == index
    assert same(pickle.loads(pickle.dumps(reader))[7], row(7, 6))
    assert reader.max_token_id == max(
        max(
            row(i, 3 + i % 4).example.tokens_S.max(),
            row(i, 3 + i % 4).example.labels_S.max(),
        )
        for i in range(10)
    )
    assert [m.vocab_size for m in reader.manifests] == [50]
    assert indices(CacheReader(str(path), n_chunks=2)) == list(range(8))
    for position in (-1, 10):
        with pytest.raises(IndexError, match=f"row {position} of 10"):
            reader[position]


def test_rows_without_their_manifest_are_those_of_plain_json(tmp_path):
    """Lines that another tool wrote: no manifest, no index, fields in any order."""
    lines = []
    for index in range(3):
        found = row(index, 4)
        lines.append(
            {
                "log_sum_exp_logits": found.teacher.log_sum_exp_logits_P.tolist(),
                "topk_token_ids": found.teacher.topk_token_ids_PK.tolist(),
                "topk_logits": found.teacher.topk_logits_PK.tolist(),
                "loss_mask": found.example.loss_mask_S.tolist(),
                "labels": found.example.labels_S.tolist(),
                "tokens": found.example.tokens_S.tolist(),
            }
        )
    (tmp_path / "x.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    reader = CacheReader(str(tmp_path / "x.jsonl"))
    assert reader.manifests == []
    assert all(same(reader[index], row(index, 4)) for index in range(3))
    assert reader[2].example.index == 2


@pytest.mark.parametrize("name", NAMES)
def test_reading_a_row_touches_its_own_bytes_only(tmp_path, monkeypatch, name):
    path = write(tmp_path, name)
    reader = CacheReader(str(path))
    reader[4]  # chunk 1's index is in memory from here on
    reads = []
    pread = os.pread
    monkeypatch.setattr(
        os,
        "pread",
        lambda fd, size, offset: (
            reads.append((size, offset)) or pread(fd, size, offset)
        ),
    )
    reader[6]
    assert len(reads) == 1
    size, offset = reads[0]
    raw = (tmp_path / name.replace("CHUNK_ID", "1")).read_bytes()[
        offset : offset + size
    ]
    if name.endswith(".zst"):
        raw = zstandard.ZstdDecompressor().decompress(raw)
    assert json.loads(raw)["index"] == 6


def test_long_rows_are_left_out_and_counted(tmp_path):
    path = write(tmp_path)
    reader = CacheReader(str(path), seq_length=5)
    assert (reader.dropped_too_long, reader.chunk_sizes()) == (2, [3, 3, 2])
    assert indices(reader) == [0, 1, 2, 4, 5, 6, 8, 9]
    assert indices(CacheReader(f"{path}[2:5]", seq_length=5)) == [2, 4, 5]
    whole = CacheReader(str(path)).fingerprint()
    assert (
        CacheReader(str(path), seq_length=9).fingerprint() == whole
    )  # nothing is left out
    assert reader.fingerprint() != whole


@pytest.mark.parametrize(
    ("subset", "expected", "sizes"),
    [
        ("[2:5]", [2, 3, 4], [2, 1]),
        ("[:3]", [0, 1, 2], [3]),
        ("[-3:]", [7, 8, 9], [1, 2]),
        ("[:50%]", [0, 1, 2, 3, 4], [4, 1]),
        ("[80%:]", [8, 9], [2]),
        ("[-20%:-1]", [8], [1]),
        ("[4:8]", [4, 5, 6, 7], [4]),
        ("[7:99]", [7, 8, 9], [1, 2]),
        ("[5:5]", [], []),
    ],
)
def test_subsets(tmp_path, subset, expected, sizes):
    path = write(tmp_path)
    reader = CacheReader(f"{path}{subset}")
    assert (indices(reader), reader.chunk_sizes()) == (expected, sizes)
    assert reader.path == str(path)
    assert reader.fingerprint() != CacheReader(str(path)).fingerprint()
    assert (
        CacheReader(f"{path}[0:100%]").fingerprint()
        == CacheReader(str(path)).fingerprint()
    )


def test_a_missing_or_damaged_index_makes_a_chunk_incomplete(tmp_path):
    path = write(tmp_path)
    index = tmp_path / "train_0.jsonl.idx"
    written = index.read_bytes()
    for content in (None, b"", written[:-8], b"\0" * len(written)):
        index.unlink() if content is None else index.write_bytes(content)
        with pytest.raises(
            CacheError, match="train_0.jsonl: the chunk is not complete: .*idx is"
        ):
            CacheReader(str(path))
    index.unlink()
    assert indices(CacheReader(str(path), partial=True)) == list(range(4, 10))
    index.write_bytes(written)
    # Without its manifest a cache is a set of plain files, and their indexes keep their summaries.
    manifest = (tmp_path / "train_manifest.json").rename(tmp_path / "elsewhere")
    assert indices(CacheReader(str(path))) == list(range(10))
    assert index.read_bytes() == written
    manifest.rename(tmp_path / "train_manifest.json")
    assert indices(CacheReader(str(path))) == list(range(10))


def test_a_missing_damaged_or_stale_index_of_format_2_is_built_again(tmp_path):
    path = write(tmp_path)
    as_format_2(path)
    index = tmp_path / "train_0.jsonl.idx"
    written = index.read_bytes()
    for content in (None, b"", written[:-8], b"\0" * len(written)):
        index.unlink() if content is None else index.write_bytes(content)
        assert indices(CacheReader(str(path))) == list(range(10))
        assert same_places(
            ChunkIndex.parse(index.read_bytes()), ChunkIndex.parse(written)
        )
    foreign = tmp_path / "foreign_0.jsonl"
    foreign.write_bytes(encode(row(0), "json"))
    assert len(CacheReader(str(tmp_path / "foreign_CHUNK_ID.jsonl"))) == 1
    foreign.write_bytes(encode(row(0), "json") + encode(row(1), "json"))
    assert len(CacheReader(str(foreign))) == 2


def test_a_stale_index_is_built_again_once(tmp_path, monkeypatch):
    path = write(tmp_path)
    as_format_2(path)
    index = tmp_path / "train_1.jsonl.idx"
    index.write_bytes(b"\0" * index.stat().st_size)
    scanned = []
    monkeypatch.setattr(
        reader_module,
        "scan_chunk",
        lambda storage, name, *args: (
            scanned.append(name) or scan_chunk(storage, name, *args)
        ),
    )
    reader = CacheReader(str(path))
    assert [reader[position].example.index for position in (5, 0, 6, 9, 4)] == [
        5,
        0,
        6,
        9,
        4,
    ]
    assert scanned == ["train_1.jsonl"]


def test_an_edited_file_is_noticed(tmp_path):
    data, path = tmp_path / "train_0.jsonl", write(tmp_path)
    as_format_2(path)
    content = data.read_bytes()
    lines = content.splitlines(keepends=True)
    data.write_bytes(
        b"".join([lines[1], lines[0], *lines[2:]])
    )  # same size, other order
    (tmp_path / "train_0.jsonl.idx").unlink()
    with pytest.raises(
        CacheError,
        match=r"train_0\.jsonl: its bytes are not those that the manifest lists",
    ):
        CacheReader(str(path))
    # Without a manifest there is nothing that the edit contradicts: the index is made anew.
    (tmp_path / "train_manifest.json").unlink()
    assert CacheReader(str(path))[0].example.index == 1
    tokens = json.loads(lines[0])["tokens"]
    changed = lines[0].replace(
        str(tokens).replace(" ", "").encode(),
        str([tokens[0] ^ 1, *tokens[1:]]).replace(" ", "").encode(),
    )
    assert changed != lines[0]
    data.write_bytes(b"".join([changed, *lines[1:]]))
    with pytest.raises(CacheError, match=r"train_0\.jsonl:1: field hash: found"):
        CacheReader(str(path))


def test_a_file_that_changes_while_it_is_open_is_noticed(tmp_path):
    path = write(tmp_path)
    reader = CacheReader(str(path))
    data = tmp_path / "train_0.jsonl"
    first, second = data.read_bytes().splitlines(keepends=True)[:2]
    data.write_bytes(second + first)
    with pytest.raises(CacheError, match=r"train_0\.jsonl:1: "):
        reader[0]


def test_damage_is_found(tmp_path):
    path = write(tmp_path)
    for chunk in (1, 2):
        (tmp_path / f"train_{chunk}.jsonl").rename(tmp_path / "elsewhere")
        with pytest.raises(
            CacheError, match=rf"train_{chunk}\.jsonl: the chunk is missing \(2 of 3"
        ):
            CacheReader(str(path))
        (tmp_path / "elsewhere").rename(tmp_path / f"train_{chunk}.jsonl")
    with pytest.raises(CacheError, match="there is no chunk 1"):
        CacheReader(str(tmp_path / "train_0.jsonl"), n_chunks=2)
    with pytest.raises(CacheError, match=r"train_3\.jsonl: the chunk is missing"):
        CacheReader(str(path), n_chunks=4)
    with pytest.raises(CacheError, match="is missing"):
        CacheReader(str(tmp_path / "nothing.jsonl"))
    whole = (tmp_path / "train_2.jsonl").read_bytes()
    (tmp_path / "train_2.jsonl").write_bytes(whole[:-10])
    with pytest.raises(
        CacheError, match=r"train_2\.jsonl: .* bytes, but its index says"
    ):
        CacheReader(str(path))
    torn = tmp_path / "torn.jsonl"
    torn.write_bytes(whole[:-10])
    with pytest.raises(
        CacheError, match=r"torn\.jsonl:2: the last line has no line break"
    ):
        CacheReader(str(torn))
    torn.write_bytes(b"")
    with pytest.raises(CacheError, match=r"torn\.jsonl: the file is empty"):
        CacheReader(str(torn))


def test_a_flipped_bit_of_a_compressed_row_is_found_when_it_is_read(tmp_path):
    path = write(tmp_path, NAMES[1])
    data = tmp_path / "train_1.jsonl.zst"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    reader = CacheReader(str(path))  # size and index agree with the manifest
    found = []
    for position in range(10):
        try:
            reader[position]
        except CacheError as error:
            found.append(str(error))
    assert len(found) == 1
    assert "train_1.jsonl.zst:" in found[0]


@pytest.mark.parametrize(("codec", "name"), [("json", NAMES[0]), ("packed", NAMES[1])])
def test_fewer_teacher_tokens_join_the_tail(tmp_path, codec, name):
    path = write(tmp_path, name, codec=codec)
    full, fewer = CacheReader(str(path)), CacheReader(str(path), top_k=2)
    for position in range(10):
        ours, theirs = fewer[position].teacher, full[position].teacher
        assert ours.topk_token_ids_PK.shape[1] <= 2
        for s in range(len(ours.log_sum_exp_logits_P)):
            kept = ours.topk_token_ids_PK[s] >= 0
            if kept.any():
                mass = (
                    np.exp(ours.topk_logits_PK[s][kept] - ours.log_sum_exp_logits_P[s])
                    .astype(np.float64)
                    .sum()
                )
                assert mass + ours.tail_mass_PT[s, 0] == pytest.approx(1, abs=2e-3)
                assert (
                    ours.topk_token_ids_PK[s][kept].tolist()
                    == theirs.topk_token_ids_PK[s, : kept.sum()].tolist()
                )


def test_ids_outside_a_smaller_vocabulary_join_the_tail(tmp_path):
    path = write(tmp_path)
    reader = CacheReader(str(path), vocab_size=30)
    assert CacheReader(str(path)).max_topk_id >= 30
    dropped = 0
    for position in range(10):
        ours, original = (
            reader[position].teacher,
            row(position, 3 + position % 4).teacher,
        )
        for s in range(len(ours.log_sum_exp_logits_P)):
            ids = original.topk_token_ids_PK[s]
            expected = [int(i) for i in ids if i < 30]
            assert [int(i) for i in ours.topk_token_ids_PK[s] if i >= 0] == expected
            probabilities = np.exp(
                original.topk_logits_PK[s].astype(np.float64)
                - original.log_sum_exp_logits_P[s]
            )
            kept = probabilities[ids < 30].sum()
            assert ours.tail_mass_PT[s, 0] == pytest.approx(1 - kept, abs=1e-5)
            if expected:
                found = np.exp(
                    ours.topk_logits_PK[s][: len(expected)].astype(np.float64)
                    - ours.log_sum_exp_logits_P[s]
                )
                assert found.sum() == pytest.approx(kept, rel=1e-5)
            dropped += len(ids) - len(expected)
    assert dropped > 0


def test_tail_samples_outside_a_smaller_vocabulary_are_nobody(tmp_path):
    """They are drawn from the whole vocabulary, so one may lie outside though every kept token is inside."""
    found = row(0, 4)  # positions 2 and 3 are stored; they keep ids up to 45
    samples = np.array([[-1, -1], [-1, -1], [1, 48], [2, 3]])
    found = CachedExample(
        found.example, replace(found.teacher, tail_token_ids_PM=samples)
    )
    (tmp_path / "x.jsonl").write_bytes(encode(found, "packed"))
    reader = CacheReader(str(tmp_path / "x.jsonl"))
    assert reader.max_topk_id == 48
    assert np.sort(reader[0].teacher.tail_token_ids_PM).tolist() == [[1, 48], [2, 3]]
    smaller = CacheReader(str(tmp_path / "x.jsonl"), vocab_size=47)[0].teacher
    assert np.sort(smaller.tail_token_ids_PM).tolist() == [[-1, 1], [2, 3]]
    assert (smaller.topk_token_ids_PK == reader[0].teacher.topk_token_ids_PK).all()


def test_a_blend_has_the_rows_of_all(tmp_path):
    first, second = (
        write(tmp_path / "a"),
        write(tmp_path / "b", teacher={"name": "u", "weights": "v"}, top_k=9),
    )
    blend = CacheBlend([CacheReader(f"{first}[8:]"), CacheReader(str(second))])
    assert indices(blend) == [8, 9, *range(10)]
    assert blend.source_chunks() == [[2], [4, 4, 2]]
    description = blend.description()
    assert description["paths"] == [f"{first}[8:]", str(second)]
    assert [cache["teacher"]["name"] for cache in description["caches"]] == ["t", "u"]
    assert (
        description["caches"][0]["manifest"]
        == Manifest.load(tmp_path / "a" / "train_manifest.json").digest
    )
    assert json.loads(json.dumps(description)) == description
    # Content decides, not the place; order counts.
    moved = (tmp_path / "a").rename(tmp_path / "moved")
    again = CacheBlend(
        [CacheReader(f"{moved / first.name}[8:]"), CacheReader(str(second))]
    )
    assert again.fingerprint() == blend.fingerprint()
    assert CacheBlend(again.readers[::-1]).fingerprint() != blend.fingerprint()


def test_a_damaged_index_of_a_file_without_manifest_is_made_again(tmp_path):
    path = write(tmp_path)
    (tmp_path / "train_manifest.json").unlink()
    (tmp_path / "train_1.jsonl.idx").unlink()
    CacheReader(str(path))
    index = tmp_path / "train_1.jsonl.idx"
    whole = index.read_bytes()
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        index.write_bytes(damaged)
        assert same(CacheReader(str(path))[5], row(5, 4))
        assert index.read_bytes() == whole
    index.write_bytes(whole[:-3])
    assert len(CacheReader(str(path), seq_length=5)) == 8


def test_a_file_compressed_as_one_frame_says_what_to_do(tmp_path):
    path = write(tmp_path, "t.jsonl", n_examples_per_chunk=None)
    (tmp_path / "u.jsonl.zst").write_bytes(zstandard.compress(path.read_bytes()))
    with pytest.raises(
        CacheError, match=r"u\.jsonl\.zst:1: one zstd frame holds several lines"
    ):
        CacheReader(str(tmp_path / "u.jsonl.zst"))


def test_a_damaged_manifest_does_not_cost_the_chunks(tmp_path):
    path = write(tmp_path)
    manifest_path = tmp_path / "train_manifest.json"
    manifest_path.write_bytes(manifest_path.read_bytes()[:-30])
    with pytest.raises(
        CacheError,
        match="restore it from a copy, or move it away: the chunks can be read without it",
    ):
        CacheReader(str(path))
    manifest_path.unlink()
    assert same(CacheReader(str(path))[5], row(5, 4))


def test_a_packed_chunk_tells_without_a_manifest_that_it_is_packed(tmp_path):
    for codec in ("packed", "json"):
        write(tmp_path / codec, codec=codec)
        (tmp_path / codec / "train_manifest.json").unlink()
        reader = CacheReader(str(tmp_path / codec / "train_0.jsonl"))
        assert reader.manifests == []
        assert reader.has_packed_rows() == (codec == "packed")


@pytest.mark.parametrize("codec", ["packed", "json"])
def test_ids_beyond_the_manifests_vocabulary_are_refused(tmp_path, codec):
    write(tmp_path, codec=codec)
    path = tmp_path / "train_manifest.json"
    path.write_bytes(
        path.read_bytes().replace(b'"vocab_size": 50', b'"vocab_size": 20')
    )
    reader = CacheReader(str(tmp_path / "train_CHUNK_ID.jsonl"))
    with pytest.raises(
        CacheError,
        match=r"train_0.jsonl:1: field tokens: found id \d+, outside the vocabulary of 20",
    ):
        reader[0]
