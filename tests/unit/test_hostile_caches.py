"""Damaged and hostile caches: right rows or one error, within bounds of memory and time."""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import orjson
import pytest

from nemo_kd.cache.layout import CacheError, CacheLayout
from nemo_kd.cache.reader import CacheReader
from nemo_kd.cache.record import decode
from nemo_kd.config import UserInputError
from nemo_kd.tools.merge import merge
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
        {"codec": []},
        {"top_k": -1},
        {"vocab_size": 0},
        {"dataset": None},
        {"format_version": 2, "chunks": {"9" * 5000: {}}},
        {"format_version": 2, "chunks": 7},
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


def test_chunks_behind_links_are_merged_as_files(tmp_path):
    path = write(tmp_path)
    place = tmp_path / "c_0.jsonl.zst"
    place.symlink_to(place.rename(tmp_path / "elsewhere").name)
    target = tmp_path / "merged" / "m_CHUNK_ID.jsonl.zst"
    merge([path], str(target))
    assert not target.with_name("m_0.jsonl.zst").is_symlink()
    assert not any(report.problems for report in verify(str(target)))


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
                    if (
                        other.endswith((".idx", "manifest.json"))
                        and other != path.name
                    ):
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


def test_a_manifest_beside_other_caches_is_not_replaced(tmp_path):
    write(tmp_path, "c_CHUNK_ID.jsonl")
    layout = CacheLayout(str(tmp_path / "c_CHUNK_ID.jsonl.zst"))
    other = manifest("packed")
    with pytest.raises(CacheError, match="was written with other settings"):
        CacheWriter(layout, other, chunks_of(other))
