"""Files of one cache never pass for those of another, and none is lost where two meet."""

from __future__ import annotations

import shutil

import pytest

from nemo_kd.cache.layout import CacheError, CacheLayout
from nemo_kd.cache.reader import CacheReader
from nemo_kd.cache.writer import CacheWriter
from nemo_kd.config.data import CacheConfig
from nemo_kd.tools.merge import merge
from nemo_kd.tools.recode import convert
from nemo_kd.tools.repair import repair
from nemo_kd.tools.verify import verify
from tests.tiny_cache import as_format_2, chunks_of, manifest, write, write_segment


def problems(path) -> list[str]:
    return [problem for report in verify(str(path)) for problem in report.problems]


def test_chunks_without_their_indexes_are_not_those_of_another_teacher(tmp_path):
    path = write(tmp_path, codec="packed")
    before = {}
    for file in tmp_path.iterdir():
        if file.suffix == ".idx":
            file.unlink()
        else:
            before[file.name] = file.read_bytes()
    other = manifest("packed", teacher={"name": "another", "weights": "other"})
    with pytest.raises(CacheError, match="was written with other settings"):
        CacheWriter(CacheLayout(str(path)), other, chunks_of(other))
    after = {name: (tmp_path / name).read_bytes() for name in before}
    assert after == before


def test_a_complete_chunk_of_other_records_is_computed_again(tmp_path):
    path = write(tmp_path, codec="packed")
    description = manifest("packed")
    for name in ("train_{}.jsonl", "train_{}.jsonl.idx"):
        shutil.copyfile(tmp_path / name.format(0), tmp_path / name.format(1))
    writer = CacheWriter(CacheLayout(str(path)), description, chunks_of(description))
    assert writer.missing == [1]
    writer.close()


def test_a_copy_of_another_chunk_is_not_read(tmp_path):
    path = write(tmp_path, codec="packed")
    for name in ("train_{}.jsonl", "train_{}.jsonl.idx"):
        shutil.copyfile(tmp_path / name.format(0), tmp_path / name.format(1))
    with pytest.raises(CacheError, match="train_1.jsonl: .* copy of another chunk"):
        CacheReader(str(path))


def test_segments_of_a_file_that_is_named_like_a_chunk_are_left_alone(tmp_path):
    alone = CacheLayout(str(tmp_path / "train_7.jsonl"))
    one = manifest("packed", n_examples_per_chunk=None)
    writer = CacheWriter(alone, one, chunks_of(one))
    segment = writer.missing_segments()[0]
    write_segment(alone, one, segment)
    writer.close()
    write(tmp_path, codec="packed")
    assert len(alone.segment_names(0)) == 1


@pytest.mark.parametrize("index", ["missing", "stale"])
def test_merging_makes_an_index_of_format_2_again(tmp_path, index):
    path = write(tmp_path / "source", codec="packed")
    as_format_2(path)
    chunk = tmp_path / "source" / "train_1.jsonl.idx"
    if index == "missing":
        chunk.unlink()
    else:
        shutil.copyfile(tmp_path / "source" / "train_0.jsonl.idx", chunk)
    target = tmp_path / "merged" / "all_CHUNK_ID.jsonl"
    merge([str(path)], str(target))
    assert problems(target) == []
    assert len(CacheReader(str(target))) == len(CacheReader(str(path)))


@pytest.mark.parametrize("extra", [b"\n", b'{"index":99}\n', b"{"])
def test_what_follows_a_whole_chunk_is_cut_off_and_kept(tmp_path, extra):
    path = write(tmp_path, codec="packed")
    chunk = tmp_path / "train_1.jsonl"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole + extra)
    repair(str(path))
    assert chunk.read_bytes() == whole
    assert (tmp_path / "train_1.jsonl.torn").read_bytes() == extra
    assert problems(path) == []


def test_a_conversion_of_other_rows_is_not_taken_for_this_one(tmp_path):
    path = write(tmp_path, codec="packed")
    target = str(tmp_path / "converted_CHUNK_ID.jsonl")
    for rows in ("[:4]", "[:4]"):
        convert(CacheReader(f"{path}{rows}"), target, CacheConfig())
    with pytest.raises(CacheError, match="other settings"):
        convert(CacheReader(f"{path}[4:]"), target, CacheConfig())


def test_a_cache_of_loss_positions_is_right_as_json_too(tmp_path):
    path = write(tmp_path, codec="packed")
    target = str(tmp_path / "converted_CHUNK_ID.jsonl")
    convert(CacheReader(str(path)), target, CacheConfig(codec="json"))
    assert problems(target) == []
