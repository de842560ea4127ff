"""Records of every kind of file against plain `json`, `gzip`, `zstandard`, pyarrow and `datasets`."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import pickle
import subprocess
import sys

import datasets
import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from nemo_kd.config import DataError
from nemo_kd.data import sources
from nemo_kd.data.records import open_records

ROWS = [
    {"messages": [{"role": "user", "content": f"Frage {n} äöü\u2028"}], "n": n}
    for n in range(7)
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def write(folder, kind):
    """Write ROWS as one kind of file or folder, and return its path."""
    path = folder / f"data.{kind}"
    table = pyarrow.Table.from_pylist(ROWS)
    if kind == "jsonl":
        path.write_bytes(LINES)
    elif kind == "bom":
        path.write_bytes(b"\xef\xbb\xbf" + LINES)
    elif kind == "gz":
        path.write_bytes(gzip.compress(LINES[:50]) + gzip.compress(LINES[50:]))
    elif kind == "zst":
        frames = [zstandard.compress(part) for part in (LINES[:50], LINES[50:])]
        path.write_bytes(b"".join(frames))
    elif kind == "json":
        path.write_text("\n " + json.dumps(ROWS, indent=1))
    elif kind == "json.gz":
        path.write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    elif kind == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=2)
    elif kind == "arrow":
        with pyarrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    elif kind == "stream":
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    elif kind == "folder":
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    return path


KINDS = [
    "jsonl", "bom", "gz", "zst", "json", "json.gz", "parquet", "arrow", "stream", "folder"
]  # fmt: skip


@pytest.fixture(autouse=True)
def cache_of_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_same_records(tmp_path, kind):
    path = write(tmp_path, kind)
    records = open_records(str(path))
    assert [records[index] for index in records.indices] == ROWS
    assert [json.loads(records.raw(index)) for index in range(7)] == ROWS
    assert records.where(3).startswith(str(path))
    other_rank = pickle.loads(pickle.dumps(records))
    assert other_rank[5] == ROWS[5]
    assert other_rank.fingerprint == records.fingerprint
    assert open_records(str(path)).fingerprint == records.fingerprint


@pytest.mark.parametrize("kind", ["jsonl", "gz", "parquet", "folder"])
def test_a_file_that_changes_is_noticed(tmp_path, kind):
    path = write(tmp_path, kind)
    records = open_records(str(path))
    changed = next(path.glob("*.arrow")) if path.is_dir() else path
    changed.write_bytes(changed.read_bytes() + b"\n")
    with pytest.raises(DataError, match="the file was changed while it was in use"):
        records[0]


@pytest.mark.parametrize(
    ("slice_", "chosen"),
    [
        ("[2:5]", slice(2, 5)),
        ("[:-3]", slice(None, -3)),
        ("[-2:]", slice(-2, None)),
        ("[:]", slice(None)),
        ("[:100]", slice(None, 100)),
    ],
)
def test_slices_select_and_keep_the_place(tmp_path, slice_, chosen):
    path = write(tmp_path, "jsonl")
    records = open_records(f"{path}@{slice_}")
    assert list(records.indices) == list(range(7))[chosen]
    assert [records[index]["n"] for index in records.indices] == list(range(7))[chosen]
    assert len(records) == 7
    assert records.fingerprint == open_records(str(path)).fingerprint


def test_lists_and_patterns_are_one_dataset(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"name": name}) + "\n")
    table = write(tmp_path, "parquet")
    records = open_records([f"{tmp_path}/?.jsonl@[1:]", f"{table}@[:2]"])
    assert list(records.indices) == [1, 2, 3, 4]
    found = [records[index] for index in records.indices]
    assert found == [{"name": "b"}, {"name": "c"}, *ROWS[:2]]
    assert records.where(2) == f"{tmp_path}/c.jsonl:1"
    assert records.where(3) == f"{table}, row 0"
    gaps = open_records([f"{tmp_path}/a.jsonl", f"{table}@[5:]"])
    assert gaps.indices == [0, 6, 7]
    with pytest.raises(DataError, match="no file matches this pattern"):
        open_records(f"{tmp_path}/*.json")
    with pytest.raises(DataError, match="the slice selects none of 7 records"):
        open_records(f"{table}@[7:]")


def test_urls_of_fsspec_are_read(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe({"/records/one.jsonl": LINES, "/records/two.jsonl": LINES})
    records = open_records("memory://records/*.jsonl")
    assert [records[index] for index in range(14)] == ROWS * 2
    assert "two.jsonl:1" in records.where(7)
    with pytest.raises(DataError, match=r"memory://records/no.jsonl: cannot be read"):
        open_records("memory://records/no.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"PK\x03\x04rest", "this is a zip archive; unpack it"),
        (bz2.compress(LINES), "compressed by bzip2"),
        (LINES.decode().encode("utf-16"), "text in UTF-16; save it as UTF-8"),
        (pickle.dumps(ROWS), "a pickle, which is never loaded"),
        (b"<!DOCTYPE html>", "HTML or XML"),
        (b"PAR1" + bytes(range(128, 255)), "cannot be read as parquet"),
        (gzip.compress(LINES)[:-9], "cannot be unpacked"),
        (gzip.compress(LINES)[:20] + b"x" * 40, "cannot be unpacked"),
        (zstandard.compress(LINES * 9)[:-2], "it ends inside a frame"),
        (zstandard.compress(LINES) + b"x" * 40, "cannot be unpacked"),
        (b"[{},", "begins like a JSON array, but is not one"),
        (b"[]", "the file has no records"),
        (b'{"score": NaN}\n', ":1: not valid JSON"),
    ],
)
def test_files_of_other_kinds_are_named(tmp_path, content, message):
    path = tmp_path / "data"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        open_records(str(path))[0]
    assert str(path) in str(error.value)


def test_splits_of_a_saved_folder_are_listed(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    splits = datasets.DatasetDict({"train": rows, "test": rows})
    splits.save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match=r"holds the splits train, test; give one"):
        open_records(str(tmp_path / "both"))
    assert open_records(str(tmp_path / "both" / "test"))[6] == ROWS[6]


def test_nulls_of_a_table_are_absent(tmp_path):
    rows = [
        {"a": "x", "b": None, "deep": {"p": 1}},
        {"a": None, "b": [None, {"q": 2}], "deep": {"r": 3}},
    ]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "mixed")
    records = open_records(str(tmp_path / "mixed"))
    assert records[0] == {"a": "x", "deep": {"p": 1}}
    assert records[1] == {"b": [None, {"q": 2}], "deep": {"r": 3}}


def test_a_new_table_of_the_same_name_and_time_is_read(tmp_path):
    path = tmp_path / "data.parquet"
    for rows in (ROWS, ROWS[::-1]):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        os.utime(path, (1e9, 1e9))
        assert open_records(str(path))[0] == rows[0]


def test_a_saved_format_hides_nothing_and_foreign_files_do_not_count(tmp_path):
    rows = datasets.Dataset.from_list(ROWS).with_format("numpy", columns=["n"])
    rows.save_to_disk(tmp_path / "saved")
    records = open_records(str(tmp_path / "saved"))
    (tmp_path / "saved" / "cache-1.arrow").write_bytes(b"of another process")
    assert records[3] == ROWS[3]
    assert open_records(str(tmp_path / "saved")).fingerprint == records.fingerprint


def test_other_ranks_read_urls_by_themselves(tmp_path, monkeypatch):
    memory = fsspec.filesystem("memory")
    memory.pipe("/other/rank.jsonl", LINES)
    sent = pickle.dumps(open_records("memory://other/rank.jsonl"))
    there = tmp_path / "there.jsonl"
    monkeypatch.setattr(sources, "_local_copy", lambda url: str(there))
    there.write_bytes(LINES)
    assert pickle.loads(sent)[6] == ROWS[6]
    there.write_bytes(LINES * 2)
    with pytest.raises(DataError, match="the ranks read different content"):
        pickle.loads(sent)


def test_many_compressed_files_share_a_descriptor(tmp_path):
    for number in range(60):
        line = json.dumps({"number": number}).encode()
        (tmp_path / f"{number:02}.gz").write_bytes(gzip.compress(line))
    before = len(os.listdir("/proc/self/fd"))
    records = open_records(f"{tmp_path}/*.gz")
    assert [records[index]["number"] for index in range(60)] == list(range(60))
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_long_integers_stay_exact(tmp_path):
    rows = [
        {"id": 123456789012345678901, "pi": 3.1415926535897932384626},
        {"id": -(2**70)},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for name in ("a.jsonl", "a.json"):
        records = open_records(str(tmp_path / name))
        assert [records[0], records[1]] == rows


def test_records_need_neither_torch_nor_transformers():
    code = "import sys, nemo_kd.data.records\n"
    code += (
        "assert not {'torch', 'transformers', 'datasets', 'pyarrow'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
