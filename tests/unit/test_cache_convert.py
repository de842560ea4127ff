"""Other programs' files become caches, and caches become one: what no manifest tells, and what vLLM writes."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nemo_kd.cache.layout import CacheError
from nemo_kd.cache.manifest import Manifest
from nemo_kd.cache.reader import CacheReader
from nemo_kd.cache.record import encode
from nemo_kd.config.data import CacheConfig
from nemo_kd.data.tokenizer import tokenizer_fingerprint
from nemo_kd.tools.merge import merge
from nemo_kd.tools.recode import convert
from nemo_kd.tools.verify import verify
from nemo_kd.tools.vllm_files import VllmRows
from tests.tiny_cache import row, write
from tests.tiny_tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
ALL = CacheConfig(min_probability=0)


def problems(path: Path) -> list[str]:
    return [problem for report in verify(str(path)) for problem in report.problems]


def aligner_lines(indices: range) -> str:
    """NeMo-Aligner's own fields, which have no index."""
    lines = []
    for index in indices:
        line = json.loads(encode(row(index), "json"))
        for name in ("index", "hash", "tail_mass", "temperatures", "label_logprobs"):
            del line[name]
        lines.append(json.dumps(line) + "\n")
    return "".join(lines)


def test_chunks_without_indices_are_numbered_through(tmp_path):
    for chunk, indices in enumerate((range(4), range(4, 7), range(7, 9))):
        (tmp_path / f"a_{chunk}.jsonl").write_text(aligner_lines(indices))
    source, target = (
        CacheReader(str(tmp_path / "a_CHUNK_ID.jsonl")),
        tmp_path / "new" / "c_CHUNK_ID.jsonl.zst",
    )
    tokenizer = train_tokenizer(300)
    written = convert(
        source,
        str(target),
        ALL,
        vocab_size=50,
        n_examples_per_chunk=5,
        tokenizer=tokenizer,
    )
    found = CacheReader(str(target))
    assert [found[position].example.index for position in range(len(found))] == list(
        range(9)
    )
    for position in range(9):
        expected = row(position)
        assert np.array_equal(
            found[position].example.tokens_S, expected.example.tokens_S
        )
        ours, theirs = found[position].loss_rows(), expected.loss_rows()
        p, q = (
            np.exp(t.topk_logits_PK - t.log_sum_exp_logits_P[:, None]).sum(1)
            for t in (ours, theirs)
        )
        np.testing.assert_allclose(p, q, atol=0.01)
    assert (written.tokenizer, written.tokenizer_size, written.teacher["name"]) == (
        tokenizer_fingerprint(tokenizer),
        len(tokenizer),
        "unknown",
    )
    assert problems(target) == []


def test_ids_beyond_the_vocabulary_are_refused_and_a_manifest_is_not_overruled(
    tmp_path,
):
    (tmp_path / "a.jsonl").write_text(aligner_lines(range(3)))
    with pytest.raises(
        CacheError,
        match=r"found id \d+, outside the vocabulary of 20 that the manifest \(or --vocab-size",
    ):
        convert(
            CacheReader(str(tmp_path / "a.jsonl")),
            str(tmp_path / "c.jsonl.zst"),
            ALL,
            vocab_size=20,
        )
    source = CacheReader(str(write(tmp_path / "cache")))
    with pytest.raises(
        CacheError, match="its manifest records vocabulary and tokenizer"
    ):
        convert(source, str(tmp_path / "d.jsonl.zst"), ALL, vocab_size=50)
    with pytest.raises(CacheError, match="is the source; give another target"):
        convert(source, source.path, ALL)
    with pytest.raises(
        CacheError,
        match="e.zst: ends in none of .jsonl.zst, .jsonl, .json, which choose",
    ):
        convert(source, str(tmp_path / "e.zst"), ALL)


def test_a_stopped_conversion_goes_on(tmp_path, monkeypatch):
    source, target = (
        CacheReader(str(write(tmp_path / "source"))),
        tmp_path / "t_CHUNK_ID.jsonl.zst",
    )
    convert(source, str(tmp_path / "straight" / target.name), ALL)
    read = CacheReader.__getitem__

    def stop(self: CacheReader, position: int) -> object:
        if position == 6:
            raise KeyboardInterrupt
        return read(self, position)

    with monkeypatch.context() as patch:
        patch.setattr(CacheReader, "__getitem__", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(source, str(target), ALL)
    assert (tmp_path / "t_0.jsonl.zst").exists()
    assert not (tmp_path / "t_1.jsonl.zst").exists()
    convert(source, str(target), ALL)
    for path in (tmp_path / "straight").glob("t_*"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def entries(
    k: int, label: int, probabilities: dict[int, float]
) -> dict[str, dict[str, float]]:
    """One entry of `prompt_logprobs` as vLLM makes it: the label first, then the k likeliest, each id once."""
    ranked = sorted(probabilities, key=lambda token: -probabilities[token])
    told = dict.fromkeys([label, *ranked[:k]])
    return {
        str(t): {
            "logprob": math.log(probabilities[t]),
            "rank": ranked.index(t) + 1,
            "decoded_token": "x",
        }
        for t in told
    }


def distributions(length: int, vocab_size: int = 30) -> list[dict[int, float]]:
    random = np.random.default_rng(0)
    return [
        dict(enumerate(random.dirichlet(np.full(vocab_size, 0.3)) + 1e-9))
        for _ in range(length)
    ]


@pytest.mark.parametrize("with_ranks", [True, False])
def test_what_vllm_tells_of_the_label_does_not_decide_what_is_kept(
    tmp_path, with_ranks
):
    told, labels = distributions(40), np.random.default_rng(1).integers(30, size=40)
    labels[:3] = [max(told[s], key=told[s].get) for s in range(3)]
    found = [entries(5, int(label), p) for label, p in zip(labels, told, strict=True)]
    if not with_ranks:
        found = [
            {token: {"logprob": facts["logprob"]} for token, facts in entry.items()}
            for entry in found
        ]
    line = {
        "prompt_token_ids": [7, *labels.tolist()],
        "prompt_logprobs": [None, *found],
    }
    (tmp_path / "v.jsonl").write_text(json.dumps(line) + "\n")
    teacher = VllmRows(str(tmp_path / "v.jsonl"))[0].teacher
    for s, p in enumerate(told):
        likeliest = sorted(p, key=lambda token: -p[token])[:5]
        assert teacher.topk_token_ids_PK[s].tolist() == likeliest
        np.testing.assert_allclose(
            np.exp(teacher.topk_logits_PK[s] - teacher.log_sum_exp_logits_P[s]),
            [p[token] for token in likeliest],
            rtol=1e-5,
        )
        np.testing.assert_allclose(
            teacher.tail_mass_PT[s, 0],
            1 - sum(p[token] for token in likeliest),
            atol=1e-6,
        )
        np.testing.assert_allclose(
            teacher.label_logprobs_P[s], math.log(p[labels[s]]), rtol=1e-5
        )


def test_a_short_prompt_whose_labels_are_all_unlikely(tmp_path):
    entry = {
        "4": {"logprob": math.log(0.01), "rank": 9},
        "8": {"logprob": math.log(0.6), "rank": 1},
    }
    (tmp_path / "v.jsonl").write_text(
        json.dumps({"prompt_token_ids": [3, 4], "prompt_logprobs": [None, entry]})
        + "\n"
    )
    assert VllmRows(str(tmp_path / "v.jsonl"))[
        0
    ].teacher.topk_token_ids_PK.tolist() == [[8]]


LINE = {
    "prompt_token_ids": [3, 9],
    "prompt_logprobs": [
        None,
        {"9": {"logprob": -0.5, "rank": 1}, "4": {"logprob": -9999.0, "rank": 2}},
    ],
}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(LINE),
        json.dumps(LINE).replace("-9999.0", "-Infinity"),
        json.dumps(LINE).replace("-9999.0", "null"),
        json.dumps(
            {
                "object": "text_completion",
                "choices": [{"index": 0, "text": "", **LINE}],
            }
        ),
        json.dumps(
            {
                "object": "chat.completion",
                "choices": [{"index": 0, "message": {}}],
                **LINE,
            }
        ),
        json.dumps(
            {
                "custom_id": "1",
                "response": {
                    "status_code": 200,
                    "body": {"choices": [{"index": 0, **LINE}]},
                },
            }
        ),
    ],
    ids=["clamped", "python", "null", "completion", "chat", "batch"],
)
def test_every_form_that_vllm_writes_is_read(tmp_path, text):
    (tmp_path / "v.jsonl").write_text(f"{text}\n\n{text}\n")
    rows = VllmRows(str(tmp_path / "v.jsonl"))
    assert [rows[position].example.index for position in range(len(rows))] == [0, 1]
    teacher = rows[1].teacher
    assert teacher.topk_token_ids_PK.tolist() == [[9]]
    assert teacher.log_sum_exp_logits_P.tolist() == [0.5]
    np.testing.assert_allclose(teacher.tail_mass_PT, [[1 - math.exp(-0.5)]], rtol=1e-6)
    assert teacher.label_logprobs_P is not None
    assert teacher.label_logprobs_P.tolist() == [-0.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(LINE).replace("-9999.0", "NaN"), "expected an object"),
        (
            json.dumps(LINE).replace("-9999.0", "3.5"),
            "and log-probabilities .* raw_logprobs",
        ),
        (
            json.dumps(
                {"custom_id": "1", "response": {"status_code": 500, "body": None}}
            ),
            "prompt_logprobs: expected lists; ask vLLM",
        ),
        (
            json.dumps({**LINE, "loss_mask": [0, 0.5]}),
            "field loss_mask: found 0.5, expected only 0 and 1",
        ),
        (
            json.dumps(
                {**LINE, "prompt_logprobs": [None, {"9": {"logprob": -9999.0}}]}
            ),
            "found 0 to 0 tokens of a position, expected equally many everywhere, at least 1",
        ),
        (
            json.dumps(
                {
                    "prompt_token_ids": [3, 9, 4],
                    "prompt_logprobs": [
                        None,
                        {"9": {"logprob": -0.5, "rank": 1}},
                        {
                            token: {"logprob": -1.5, "rank": 1}
                            for token in ("4", "5", "6")
                        },
                    ],
                }
            ),
            "found 1 to 3 tokens of a position, expected equally many",
        ),
        ('{"prompt_token_ids": [', "not valid JSON"),
        (
            json.dumps({"prompt_logprobs": LINE["prompt_logprobs"]}),
            "fields prompt_token_ids and prompt_logprobs: expected lists",
        ),
    ],
)
def test_lines_of_vllm_that_mean_nothing_are_named(tmp_path, text, message):
    (tmp_path / "v.jsonl").write_text(f"\n{text}\n")
    with pytest.raises(CacheError, match=message) as error:
        VllmRows(str(tmp_path / "v.jsonl"))[0]
    assert str(error.value).startswith(f"{tmp_path / 'v.jsonl'}:2: ")


def test_vllms_files_without_vocabulary_or_tokenizer(tmp_path):
    (tmp_path / "v.jsonl").write_text(json.dumps(LINE) + "\n")
    line = [
        sys.executable,
        "-m",
        "nemo_kd.cli.logit_cache",
        "convert",
        "v.jsonl",
        "c.jsonl.zst",
        "--from",
        "vllm",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for more, message in (
        ([], "give --vocab-size"),
        (["--vocab-size", "10"], "training cannot check"),
    ):
        result = subprocess.run(
            [*line, *more],
            check=False,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert message in result.stderr
    assert result.returncode == 0
    assert Manifest.load(tmp_path / "c.manifest.json").tokenizer == "unknown"


def parts(folder: Path) -> list[str]:
    """Two caches of ten records, as two array jobs leave them."""
    names = []
    for number, first in enumerate((0, 10)):
        dataset = {
            "path": "d",
            "fingerprint": "f",
            "start_from_idx": first,
            "end_at_idx": first + 9,
        }
        names.append(
            str(
                write(
                    folder / str(number),
                    "p_CHUNK_ID.jsonl",
                    codec="packed",
                    dataset=dataset,
                )
            )
        )
    return names


@pytest.mark.parametrize("links", [True, False])
def test_merging_links_or_copies(tmp_path, links, monkeypatch):
    names = parts(tmp_path)
    if not links:

        def refuse(*_: object) -> None:
            raise OSError(errno.EXDEV, "another file system")

        monkeypatch.setattr(os, "link", refuse)
    target = tmp_path / "all" / "m_CHUNK_ID.jsonl"
    assert len(merge(names[::-1], str(target)).chunks) == 6
    assert (
        os.path.samefile(tmp_path / "0" / "p_0.jsonl", tmp_path / "all" / "m_0.jsonl")
        is links
    )
    merged = CacheReader(str(target))
    assert [merged[position].example.index for position in range(20)] == list(
        range(20)
    )
    assert problems(target) == []


def test_a_stopped_merge_goes_on_and_is_no_cache_until_then(tmp_path, monkeypatch):
    names, target = parts(tmp_path), tmp_path / "all" / "m_CHUNK_ID.jsonl"
    link, calls = os.link, []

    def stop(*paths: str) -> None:
        calls.append(paths)
        if len(calls) == 6:
            raise KeyboardInterrupt
        link(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", stop)
        with pytest.raises(KeyboardInterrupt):
            merge(names, str(target))
    with pytest.raises(CacheError, match="the chunk is missing"):
        CacheReader(str(target))
    with pytest.raises(CacheError, match="exists; give another target"):
        merge(names[:1], str(target))
    merge(names, str(target))
    assert problems(target) == []


def test_containers_are_not_mixed(tmp_path):
    names = parts(tmp_path)
    with pytest.raises(
        CacheError,
        match=r"ends in another suffix than the target .* merging changes no file",
    ):
        merge(names, str(tmp_path / "m_CHUNK_ID.jsonl.zst"))
    shutil.rmtree(tmp_path / "1")
    with pytest.raises(CacheError, match="there is no such file"):
        merge(names, str(tmp_path / "m_CHUNK_ID.jsonl"))


def test_converted_parts_are_merged_and_merged_ones_converted(tmp_path):
    names = []
    for number, name in enumerate(parts(tmp_path)):
        names.append(str(tmp_path / f"c{number}" / "c_CHUNK_ID.jsonl.zst"))
        convert(CacheReader(name), names[-1], ALL)
    merged = merge(names, str(tmp_path / "m_CHUNK_ID.jsonl.zst"))
    hashes = [
        Manifest.load(tmp_path / str(number) / "p_manifest.json").digest
        for number in (0, 1)
    ]
    assert merged.teacher["converted_from"] == hashes
    target = tmp_path / "again" / "a_CHUNK_ID.jsonl.zst"
    again = convert(
        CacheReader(str(tmp_path / "m_CHUNK_ID.jsonl.zst")),
        str(target),
        ALL,
        n_examples_per_chunk=6,
    )
    assert (again.num_chunks, [chunk.examples for chunk in again.chunks.values()]) == (
        4,
        [6, 6, 6, 2],
    )
    assert problems(target) == []
