"""`logit_cache`: damage of every kind is found, what can be repaired is, conversions keep the numbers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nemo_kd.cache.layout import CacheError, CacheLayout
from nemo_kd.cache.manifest import Manifest
from nemo_kd.cache.reader import CacheReader
from nemo_kd.cache.segment import publish_segment
from nemo_kd.cache.writer import CacheWriter
from nemo_kd.config.data import CacheConfig
from nemo_kd.tools.merge import merge
from nemo_kd.tools.recode import convert
from nemo_kd.tools.repair import repair
from nemo_kd.tools.verify import verify
from nemo_kd.tools.vllm_files import VllmRows
from tests.tiny_cache import (
    chunks_of,
    edit_index,
    manifest,
    row,
    same,
    summaries,
    write,
    write_segment,
)

ROOT = Path(__file__).resolve().parents[2]


def problems(path: Path) -> list[str]:
    return [problem for report in verify(str(path)) for problem in report.problems]


def command(*words: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "nemo_kd.cli.logit_cache", *map(str, words)]
    return subprocess.run(line, check=False, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("name", "codec"),
    [("t_CHUNK_ID.jsonl", "json"), ("t_CHUNK_ID.jsonl.zst", "packed")],
)
def test_a_whole_cache_has_no_problem(tmp_path, name, codec):
    path = write(tmp_path, name, codec=codec)
    reports = verify(str(path), num_workers=2)
    assert [problem for report in reports for problem in report.problems] == []
    assert sum(report.found.examples for report in reports) == 10
    assert [report.found.last_index for report in reports] == [3, 7, 9]


@pytest.mark.parametrize("position", [0.05, 0.3, 0.5, 0.7, 0.95])
@pytest.mark.parametrize(
    ("name", "codec"),
    [("t_CHUNK_ID.jsonl", "packed"), ("t_CHUNK_ID.jsonl.zst", "packed")],
)
def test_a_flipped_byte_anywhere_is_found_and_does_not_hide_the_rest(
    tmp_path, name, codec, position
):
    path = write(tmp_path, name, codec=codec)
    chunk = CacheLayout(str(path)).chunk_path(0)
    raw = bytearray(chunk.read_bytes())
    raw[int(position * len(raw))] ^= 8
    chunk.write_bytes(raw)
    (report, *others) = verify(str(path))
    assert any("but its summary says" in problem for problem in report.problems)
    if name.endswith("jsonl"):
        assert report.found.examples >= 3  # of 4
    assert not any(other.problems for other in others)


def test_every_other_damage_is_named(tmp_path):
    path = write(tmp_path)
    layout = CacheLayout(str(path))
    files = {file: file.read_bytes() for file in tmp_path.iterdir()}
    chunk, manifest_path = layout.chunk_path(1), layout.manifest_path
    lines = files[chunk].splitlines(keepends=True)
    edited = json.loads(files[manifest_path])
    index_path = layout.index_path(1)

    def edit(**changes: object) -> bytes:
        edit_index(chunk, **changes)
        return index_path.read_bytes()

    wrong_vocabulary = json.dumps({**edited, "vocab_size": 20}).encode()
    cases = [
        ({chunk: None}, "the chunk is missing"),
        ({chunk: files[chunk][:-20]}, "but its summary says"),
        ({chunk: b"".join([lines[1], lines[0], *lines[2:]])}, "the lines are out of order"),
        ({chunk: b"".join([lines[0], *lines])}, "stands behind example 4"),
        ({index_path: None}, "the chunk is not complete"),
        ({index_path: files[layout.chunk_path(0).with_name("train_0.jsonl.idx")]}, "but its summary says"),
        ({index_path: edit(tokens=1)}, "tokens, but its summary says 1"),
        ({index_path: edit(first_index=6)}, "its summary says 4 records, 6 to 7"),
        ({manifest_path: wrong_vocabulary}, "outside the vocabulary of 20"),
        ({manifest_path: json.dumps({**edited, "top_k": 3}).encode()}, "4 tokens at one position, but the manifest states top_k=3"),
    ]  # fmt: skip
    for changes, message in cases:
        for file, content in {**files, **changes}.items():
            file.unlink() if content is None else file.write_bytes(content)
        assert any(message in problem for problem in problems(path)), message
    for file, content in files.items():
        file.write_bytes(content)
    assert problems(path) == []


def test_probabilities_that_do_not_sum_to_one_and_ids_kept_twice_are_found(tmp_path):
    from nemo_kd.cache.record import encode

    line = json.loads(encode(row(0), "json"))
    line["tail_mass"] = [[0.9] * 5]
    (tmp_path / "c.jsonl").write_text(json.dumps(line) + "\n")
    assert any(
        "kept probabilities and tail sum to" in problem
        for problem in problems(tmp_path / "c.jsonl")
    )


@pytest.mark.parametrize("name", ["t_CHUNK_ID.jsonl", "t_CHUNK_ID.jsonl.zst"])
def test_a_torn_tail_is_cut_kept_and_computed_again(tmp_path, name):
    path = write(tmp_path, name, codec="packed")
    layout = CacheLayout(str(path))
    chunk = layout.chunk_path(2)
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-7])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert any("cut off" in text for text in repair(str(path), dry_run=True))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    done = "\n".join(repair(str(path)))
    assert "the last line is torn" in done
    assert "compute_topk_logits with the same keys computes it again" in done
    assert (
        whole[:-7]
        == chunk.read_bytes() + chunk.with_name(chunk.name + ".torn").read_bytes()
    )
    assert (
        same(CacheReader(str(chunk))[0], CacheReader(str(layout.chunk_path(0)))[0])
        is False
    )
    write(tmp_path, name, codec="packed")
    assert chunk.read_bytes() == whole
    assert problems(path) == []


def test_a_chunk_that_lost_whole_lines_is_computed_again(tmp_path):
    path = write(tmp_path)
    chunk = tmp_path / "train_0.jsonl"
    whole = chunk.read_bytes()
    chunk.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    (done,) = repair(str(path))
    assert "is not what it was when it was written, so its index was deleted" in done
    write(tmp_path)
    assert chunk.read_bytes() == whole
    (tmp_path / "train_1.jsonl.idx").unlink()
    assert repair(str(path)) == [f"{tmp_path / 'train_1.jsonl'}: index made again"]
    assert problems(path) == []


def test_a_chunk_without_any_row_is_whole(tmp_path):
    layout, description = (
        CacheLayout(str(tmp_path / "c_CHUNK_ID.jsonl.zst")),
        manifest("packed"),
    )
    writer = CacheWriter(layout, description, chunks_of(description))
    for segment in writer.missing_segments():
        if segment[0] == 1:
            records = ["no loss tokens"] * len(segment[1])
            publish_segment(layout, description, segment, records, {})
        else:
            write_segment(layout, description, segment)
    writer.assemble_complete()
    writer.close()
    reader = CacheReader(layout.output_path)
    assert [reader[position].example.index for position in range(len(reader))] == [
        0,
        1,
        2,
        3,
        8,
        9,
    ]
    assert problems(tmp_path / "c_CHUNK_ID.jsonl.zst") == []
    assert repair(layout.output_path) == []


def test_a_foreign_file_is_cut_and_indexed(tmp_path):
    path = write(tmp_path, "t.jsonl", n_examples_per_chunk=None)
    (tmp_path / "t.manifest.json").unlink()
    (tmp_path / "t.jsonl.idx").unlink()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"index": 10, "tok')
    assert repair(str(path)) == [
        f"{path}: the last line is torn: 18 bytes cut off and kept as t.jsonl.torn",
        f"{path}: index made again",
    ]
    assert path.read_bytes() == whole
    assert repair(str(path)) == []
    assert problems(path) == []
    with pytest.raises(CacheError, match="there is no such file"):
        repair(str(tmp_path / "nothing.jsonl"))


def test_damage_in_the_middle_is_left_alone(tmp_path):
    path = write(tmp_path, "t.jsonl", n_examples_per_chunk=None)
    raw = bytearray(path.read_bytes())
    raw[50] = 0
    path.write_bytes(raw)
    assert "its index was deleted" in repair(str(path))[0]
    (tmp_path / "t.manifest.json").unlink()
    assert repair(str(path))[0].startswith("not repaired: ")
    assert path.read_bytes() == raw


def test_conversion_there_and_back_keeps_the_numbers(tmp_path):
    source = write(tmp_path / "source")
    for name, codec in (
        ("packed/a_CHUNK_ID.jsonl.zst", "packed"),
        ("json/b_CHUNK_ID.jsonl", "json"),
    ):
        convert(
            CacheReader(str(source)),
            str(tmp_path / name),
            CacheConfig(codec=codec, min_probability=0),
        )
        assert problems(tmp_path / name) == []
    original, packed = (
        CacheReader(str(source)),
        CacheReader(str(tmp_path / "packed" / "a_CHUNK_ID.jsonl.zst")),
    )
    plain = CacheReader(str(tmp_path / "json" / "b_CHUNK_ID.jsonl"))
    for position in range(10):
        assert same(plain[position], original[position])
        ours, theirs = packed[position].loss_rows(), original[position].loss_rows()
        assert np.array_equal(
            np.sort(ours.topk_token_ids_PK), np.sort(theirs.topk_token_ids_PK)
        )
        np.testing.assert_allclose(
            ours.tail_mass_PT[:, 0], theirs.tail_mass_PT[:, 0], atol=0.02
        )
    written = Manifest.load(tmp_path / "packed" / "a_manifest.json")
    assert (
        written.teacher["converted_from"]
        == Manifest.load(tmp_path / "source" / "train_manifest.json").digest
    )
    assert written.codec["name"] == "packed"
    fewer = convert(
        packed, str(tmp_path / "fewer.jsonl"), CacheConfig(min_probability=0.2), 2
    )
    assert fewer.top_k == 2
    small = CacheReader(str(tmp_path / "fewer.jsonl"))
    for position in range(10):
        p = np.exp(
            packed[position].teacher.topk_logits_PK
            - packed[position].teacher.log_sum_exp_logits_P[:, None]
        )
        counts = np.clip((p >= 0.2).sum(1), 1, 2)
        assert (small[position].teacher.topk_token_ids_PK >= 0).sum(
            1
        ).tolist() == counts.tolist()
    one = convert(original, str(tmp_path / "one.jsonl.zst"), CacheConfig())
    assert list(one.chunks) == [0]
    assert one.chunks[0].examples == 10
    with pytest.raises(CacheError, match="put CHUNK_ID into its name for several"):
        convert(
            original,
            str(tmp_path / "two.jsonl.zst"),
            CacheConfig(),
            n_examples_per_chunk=5,
        )
    with pytest.raises(CacheError, match="was written with other settings"):
        convert(packed, str(tmp_path / "fewer.jsonl"), CacheConfig(), 3)


def test_nemo_aligners_files_become_a_packed_cache(tmp_path):
    from nemo_kd.cache.record import encode

    lines = []
    for index in (0, 2, 3):  # NeMo-Aligner's own fields only, padded
        line = json.loads(encode(row(index), "json"))
        for name in ("hash", "tail_mass", "temperatures", "label_logprobs"):
            del line[name]
        for name, filler in (
            ("tokens", 0),
            ("labels", 0),
            ("loss_mask", 0.0),
            ("log_sum_exp_logits", 1.0),
        ):
            line[name].append(filler)
        line["topk_logits"].append([0.0, -1.0, -2.0, -3.0])
        line["topk_token_ids"].append([0, 1, 2, 3])
        lines.append(
            json.dumps(line | {"contexts": [1], "context_lengths": 1, "metadata": {}})
        )
    (tmp_path / "aligner_0.jsonl").write_text("\n".join(lines) + "\n")
    source, target = (
        tmp_path / "aligner_CHUNK_ID.jsonl",
        tmp_path / "new" / "c_CHUNK_ID.jsonl.zst",
    )
    assert "give --vocab-size" in command("convert", source, target).stderr
    result = command("convert", source, target, "--vocab-size", 50)
    assert result.returncode == 0, result.stderr
    assert "3 examples, 15 tokens" in result.stdout
    found = CacheReader(str(target))
    assert [found[position].example.index for position in range(3)] == [0, 2, 3]
    assert found[1].teacher.label_logprobs_P is None
    assert summaries(target)[0].skipped == {"not in the source": 1}
    (tmp_path / "aligner_0.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    assert (
        "sort the lines by index"
        in command("convert", source, tmp_path / "d.jsonl", "--vocab-size", 50).stderr
    )


def vllm_line(with_choices: bool = False) -> dict:
    """Three tokens; k = 2, and the prompt's own token where it is not among the two likeliest."""
    entries = [
        None,
        {
            "7": {"logprob": math.log(0.5), "rank": 1, "decoded_token": "a"},
            "9": {"logprob": math.log(0.2), "rank": 2},
        },
        {
            "4": {"logprob": math.log(0.01), "rank": 30},
            "8": {"logprob": math.log(0.6), "rank": 1},
            "2": {"logprob": math.log(0.3), "rank": 2},
        },
    ]
    line = {"prompt_token_ids": [3, 9, 4], "prompt_logprobs": entries}
    return {"model": "m", "choices": [line]} if with_choices else line


@pytest.mark.parametrize("with_choices", [False, True])
def test_vllms_prompt_logprobs_become_a_cache(tmp_path, with_choices):
    (tmp_path / "v.jsonl").write_text(2 * (json.dumps(vllm_line(with_choices)) + "\n"))
    result = command(
        "convert",
        tmp_path / "v.jsonl",
        tmp_path / "c.jsonl.zst",
        "--from",
        "vllm",
        "--vocab-size",
        10,
    )
    assert result.returncode == 0, result.stderr
    found = CacheReader(str(tmp_path / "c.jsonl.zst"))
    assert len(found) == 2
    example, teacher = found[0].example, found[0].teacher
    assert (example.tokens_S.tolist(), example.labels_S.tolist()) == ([3, 9], [9, 4])
    assert example.loss_mask_S.tolist() == [1, 1]
    assert teacher.topk_token_ids_PK.tolist() == [[7, 9], [8, 2]]
    p = np.exp(teacher.topk_logits_PK - teacher.log_sum_exp_logits_P[:, None])
    np.testing.assert_allclose(p, [[0.5, 0.2], [0.6, 0.3]], rtol=0.03)
    np.testing.assert_allclose(teacher.tail_mass_PT[:, 0], [0.3, 0.1], rtol=0.07)
    np.testing.assert_allclose(
        teacher.label_logprobs_P, np.log([0.2, 0.01]), atol=0.07
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_logprobs": None}, "prompt_logprobs: expected lists"),
        ({"prompt_token_ids": [3, 9, 5]}, "for token 5, expected an object"),
        (
            {"prompt_token_ids": [3, 9]},
            "found 3 entries, expected as many as prompt_token_ids has, 2",
        ),
        (
            {"loss_mask": [1]},
            r"field loss_mask: found \[\] of shape \(0,\), expected numbers of shape \(2,\)",
        ),
    ],
)
def test_vllm_lines_that_contradict_themselves_are_named(tmp_path, change, message):
    (tmp_path / "v.jsonl").write_text(json.dumps(vllm_line() | change) + "\n")
    with pytest.raises(CacheError, match=message) as error:
        VllmRows(str(tmp_path / "v.jsonl"))[0]
    assert str(error.value).startswith(f"{tmp_path / 'v.jsonl'}:1: ")


def part(folder: Path, number: int, first: int, last: int, **changes: object) -> Path:
    """What a task of an array job leaves: one chunk with a manifest of its own."""
    dataset = {
        "path": "d",
        "fingerprint": "f",
        "start_from_idx": first,
        "end_at_idx": last,
    }
    description = manifest(
        "packed", dataset=dataset, n_examples_per_chunk=None, **changes
    )
    layout = CacheLayout(str(folder / f"part_{number}.jsonl.zst"))
    writer = CacheWriter(layout, description, chunks_of(description))
    for segment in writer.missing_segments():
        write_segment(layout, description, segment)
    writer.assemble_complete()
    writer.close()
    return folder / f"part_{number}.jsonl.zst"


def test_parts_become_one_cache(tmp_path):
    part(tmp_path, 1, 4, 9)
    part(tmp_path, 0, 0, 3)
    target = tmp_path / "all" / "c_CHUNK_ID.jsonl.zst"
    result = command("merge", tmp_path / "part_CHUNK_ID.jsonl.zst", "--output", target)
    assert result.stdout == "2 chunks, 10 examples\n", result.stderr
    merged = CacheReader(str(target))
    assert [merged[position].example.index for position in range(10)] == list(
        range(10)
    )
    assert problems(target) == []
    assert (tmp_path / "all" / "c_1.jsonl.zst").read_bytes() == (
        tmp_path / "part_1.jsonl.zst"
    ).read_bytes()
    with pytest.raises(CacheError, match="exists; give another target"):
        merge([str(tmp_path / "part_CHUNK_ID.jsonl.zst")], str(target))


def test_the_folder_of_a_merged_cache_is_checked_first(tmp_path):
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "c_CHUNK_ID.jsonl.zst"
    result = command("merge", tmp_path / "none.jsonl.zst", "--output", target)
    assert result.returncode == 2
    assert result.stderr.startswith(
        f"error: --output: {tmp_path}/file cannot be written"
    )


def test_parts_that_do_not_fit_are_refused(tmp_path):
    first, third = part(tmp_path, 0, 0, 3), part(tmp_path, 2, 6, 9)
    target = str(tmp_path / "c_CHUNK_ID.jsonl.zst")
    with pytest.raises(
        CacheError, match=r"records 4 to 5 are missing between .*part_0.* and .*part_2"
    ):
        merge([str(first), str(third)], target)
    assert (
        merge(
            [str(first), str(third)],
            str(tmp_path / "gap_CHUNK_ID.jsonl.zst"),
            allow_gaps=True,
        ).num_chunks
        == 2
    )
    with pytest.raises(CacheError, match="both hold record 0"):
        merge([str(first), str(first)], target)
    with pytest.raises(CacheError, match="top_k: 4 in the cache, 9 now"):
        merge([str(first), str(part(tmp_path, 1, 4, 5, top_k=9))], target)
    with pytest.raises(CacheError, match="put CHUNK_ID into its name"):
        merge(
            [str(first), str(third)], str(tmp_path / "one.jsonl.zst"), allow_gaps=True
        )
    damaged = bytearray(third.read_bytes())
    damaged[40] ^= 1
    third.write_bytes(damaged)
    with pytest.raises(CacheError, match="but its summary says"):
        merge([str(third)], target)
    assert not Path(
        target.replace("CHUNK_ID", "manifest").replace(".jsonl.zst", ".json")
    ).exists()


def test_exit_statuses(tmp_path):
    path = write(tmp_path)
    result = command("verify", path)
    assert (result.returncode, result.stdout.splitlines()[-1]) == (
        0,
        "no problem found",
    )
    (tmp_path / "train_1.jsonl").unlink()
    result = command("verify", path, "--num-workers", 1)
    assert result.returncode == 1
    assert "train_1.jsonl: the chunk is missing" in result.stdout
    result = command("verify", tmp_path / "nothing.jsonl")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert command("repair", path, "--dry-run").returncode == 0
    assert command("unknown").returncode == 2
