"""The page of an evaluation's samples: complete in itself, safe, beside another evaluation."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from nemo_kd.answers.samples import Sample
from nemo_kd.config import ConfigError
from nemo_kd.evaluation.page import (
    MOST_SAMPLES,
    OtherEvaluation,
    read_evaluation,
    samples_page,
)

HOSTILE = "</script><script>alert(1)</script>\"'&{{data}}{{page}}<!--\u2028\u202e\x00"
RESULT = {
    "num_examples": 2,
    "accuracy": 0.5,
    "ce": 1.23456,
    "perplexity": None,
    "model": {"name": "student.nemo"},
    "dataset": {"path": "/data/gsm8k.jsonl", "fingerprint": "sha256:1"},
}
SAMPLE = Sample(
    index=3,
    prompt="2 + 2 =",
    response="#### 4",
    answer="4",
    correct=True,
    reward=1.0,
    outcome="correct",
    num_tokens=3,
    mean_entropy=0.25,
    stopped=True,
    reference="Two and two are\n#### 4",
)


def content_of(page: str) -> dict[str, Any]:
    """The data of a page."""
    (data,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', page
    )
    return json.loads(data)


def write_evaluation(
    folder: Path, result: Any = RESULT, lines: Any = (SAMPLE,)
) -> str:
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps(result))
    text = "".join(json.dumps(asdict(line)) + "\n" for line in lines)
    (folder / "samples.jsonl").write_text(text)
    return str(folder)


def test_a_page_holds_every_sample_and_the_numbers():
    cut = replace(SAMPLE, index=4, correct=False, mean_entropy=None, stopped=False)
    content = content_of(samples_page(RESULT, [SAMPLE, cut]))
    assert content["title"] == "student.nemo on gsm8k.jsonl"
    assert content["figures"] == [
        {"name": "num examples", "value": "2", "theirs": None},
        {"name": "accuracy", "value": "0.5000", "theirs": None},
        {"name": "ce", "value": "1.2346", "theirs": None},
    ]
    assert content["other"] is None
    assert content["samples"] == [
        {**asdict(one), "theirs": None} for one in (SAMPLE, cut)
    ]


def test_a_page_stands_beside_another_evaluation(tmp_path):
    theirs = replace(SAMPLE, response=" 4 in all", correct=True)
    folder = write_evaluation(
        tmp_path / "teacher", {**RESULT, "accuracy": 0.9}, [theirs]
    )
    other = read_evaluation(f"{folder}/", "sha256:1")
    page = samples_page(RESULT, [replace(SAMPLE, index=2), SAMPLE], other)
    content = content_of(page)
    assert content["other"] == "teacher"
    assert content["figures"][1]["theirs"] == "0.9000"
    assert [sample["theirs"] for sample in content["samples"]] == [
        None,
        asdict(theirs),
    ]


def test_texts_end_and_start_nothing(tmp_path):
    texts = ("prompt", "response", "answer", "reference")
    hostile = replace(SAMPLE, **dict.fromkeys(texts, HOSTILE))
    other = OtherEvaluation(HOSTILE, RESULT, {3: asdict(hostile)})
    result = {**RESULT, "model": {"name": HOSTILE}, HOSTILE: 1}
    page = samples_page(result, [hostile], other)
    plain = samples_page(RESULT, [SAMPLE])
    for mark in ("<script", "</script", "<!--", "alert"):
        shown = page.replace(content_text(page), "")
        assert shown.count(mark) == plain.count(mark)
    assert "<" not in content_text(page)
    for forbidden in ("http:", "https:", "url(", "@import", "fetch(", "innerHTML"):
        assert forbidden not in page, forbidden
    assert "default-src 'none'" in page
    (sample,) = content_of(page)["samples"]
    assert {sample[name] for name in texts} == {HOSTILE}


def content_text(page: str) -> str:
    start = page.index('id="data">') + len('id="data">')
    return page[start : page.index("</script>", start)]


def test_a_page_has_a_bounded_number_of_samples():
    samples = [replace(SAMPLE, index=index) for index in range(MOST_SAMPLES + 5)]
    content = content_of(samples_page(RESULT, samples))
    assert content["num_samples"] == MOST_SAMPLES + 5
    assert len(content["samples"]) == MOST_SAMPLES
    assert content["samples"][-1]["index"] == MOST_SAMPLES - 1


def test_what_cannot_be_compared_is_refused(tmp_path):
    missing = r"evaluate.compare: .* holds no evaluation with samples \(.*\); give the evaluate.output_dir"
    with pytest.raises(ConfigError, match=missing):
        read_evaluation(str(tmp_path), "sha256:1")
    folder = write_evaluation(tmp_path / "other")
    with pytest.raises(
        ConfigError,
        match="is an evaluation of another file, /data/gsm8k.jsonl; give one of the same file",
    ):
        read_evaluation(folder, "sha256:2")
    for name, damage in (
        ("samples.jsonl", '{"index": 3'),
        ("samples.jsonl", "[3]\n"),
        ("evaluation.json", '{"num_examples": 3}'),
        ("evaluation.json", "[]"),
    ):
        damaged = write_evaluation(tmp_path / f"{name}{len(damage)}")
        (Path(damaged) / name).write_text(damage)
        with pytest.raises(ConfigError, match=missing):
            read_evaluation(damaged, "sha256:1")
