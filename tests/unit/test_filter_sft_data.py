"""filter_sft_data: which records are kept, what is counted, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_kd.config import ConfigError, DataError
from nemo_kd.config.answers import AnswerConfig
from nemo_kd.evaluation.filter import filter_records

ROOT = Path(__file__).resolve().parents[2]


def chat(*contents, **fields):
    roles = ["user", "assistant"] * len(contents)
    messages = [
        {"role": role, "content": content}
        for role, content in zip(roles, contents, strict=False)
    ]
    return json.dumps({"messages": messages, **fields}).encode()


def nemo(*values, **fields):
    names = ["User", "Assistant"] * len(values)
    turns = [
        {"from": name, "value": value}
        for name, value in zip(names, values, strict=False)
    ]
    return json.dumps({"conversations": turns, "mask": "User", **fields}).encode()


KEPT = [
    chat("2 + 3?", "2 + 3 = 5\n#### 5", answer="5"),
    b'{"messages" : [ {"role":"user","content":"\\u00e9"},'
    b' {"role":"assistant","content":"so \\\\boxed{1/2}"}],"answer":0.5}  \r',
    chat("2 + 3?", "6", "Sure?", "No, 5.", answer=5),
    nemo("2 + 3?", "It is 5", answer="... #### 5"),
    b'{"input": "2 + 3?", "output": "5", "answer": "5.0"}',
    json.dumps(
        {
            "conversations": [
                {"from": "User", "value": "rate", "label": None},
                {"from": "Judge", "value": "7", "label": "5"},
            ],
            "type": "TEXT_TO_VALUE",
            "answer": 5,
        }
    ).encode(),
]
DROPPED = {
    "wrong answer": [
        chat("2 + 3?", "#### 6", answer="5"),
        chat("2 + 3?", "5", "Sure?", "No, 6.", answer="5"),
        nemo("5", "It is 6", "5", answer="5"),
    ],
    "no answer found in the response": [
        chat("2 + 3?", "I do not know", answer="5"),
        b'{"input": "5", "output": "", "answer": "5"}',
    ],
    "no usable right answer in the record": [
        chat("2 + 3?", "#### 5"),
        chat("2 + 3?", "#### 5", answer=None),
        chat("2 + 3?", "#### 5", answer=" "),
    ],
    "comparison exceeded its limits": [chat("?", "$9^{9^{9^{9}}}$", answer="5")],
    "no response in the record": [
        chat("2 + 3 = 5?", answer="5"),
        b'{"question": "2 + 3?", "answer": "5"}',
    ],
}


@pytest.fixture
def source(tmp_path):
    """All records, a wrong one after a right one, with blank lines and no final line break."""
    wrong = [line for lines in DROPPED.values() for line in lines]
    lines = []
    for number, line in enumerate(wrong):
        lines += [line, *KEPT[number : number + 1], b""]
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join([*lines, KEPT[0]]))
    return path


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "nemo_kd.cli.filter_sft_data", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_correct_records_are_kept_byte_for_byte(source, tmp_path):
    target = tmp_path / "new" / "out.jsonl"
    result = run(source, target, "--answer-field", "answer", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert target.read_bytes() == b"\n".join([*KEPT, KEPT[0]])
    statistics = json.loads((tmp_path / "new" / "out.stats.json").read_text())
    assert statistics["original"] == 18
    assert statistics["kept"] == 7
    assert statistics["retention"] == 7 / 18
    assert statistics["reasons"] == {
        reason: len(lines) for reason, lines in DROPPED.items()
    }
    assert statistics["answer_field"] == "answer"
    assert statistics["checker"] == "math"
    assert [line.split() for line in result.stdout.splitlines()[:3]] == [
        ["original", "18"],
        ["kept", "7"],
        ["retention", "38.9%"],
    ]
    assert sorted(os.listdir(target.parent)) == ["out.jsonl", "out.stats.json"]


def filter_with(source, target, **settings):
    return filter_records(
        source, target, AnswerConfig(**{"answer_field": "answer"} | settings)
    )


def test_other_checkers(source, tmp_path):
    target = tmp_path / "out.jsonl"
    assert filter_with(source, target, checker="exact")["kept"] == 1
    found = filter_with(source, target, checker="regex", pattern=r"(\d)\.$")
    assert target.read_bytes() == KEPT[2] + b"\n"
    assert found["pattern"] == r"(\d)\.$"


def test_the_field_of_plain_records_can_be_named(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"question": "2 + 3?", "response": "5", "answer": "5"}\n')
    settings = AnswerConfig(answer_field="answer")
    assert filter_records(source, tmp_path / "a", settings)["kept"] == 0
    assert filter_records(source, tmp_path / "b", settings, "response")["kept"] == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "in.jsonl:3: not valid JSON"),
        (b"[1]", "in.jsonl:3: found a JSON list; every record must be a JSON object"),
        (
            b'{"answer": [5]}',
            "in.jsonl:3: the field `answer` must be a text or a number",
        ),
        (b'{"answer": 5, "messages": 5}', "in.jsonl:3: `messages` must be a list of"),
    ],
)
def test_a_bad_record_is_named_and_nothing_is_written(line, message, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(KEPT[0] + b"\n\n" + line + b"\n")
    (tmp_path / "out.jsonl").write_text("old")
    with pytest.raises(DataError, match=message):
        filter_with(source, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


def test_refusals(source, tmp_path):
    before = source.read_bytes()
    (tmp_path / "link.jsonl").hardlink_to(source)
    for target in (
        source,
        tmp_path / "x" / ".." / "in.jsonl",
        tmp_path / "link.jsonl",
    ):
        with pytest.raises(ConfigError, match="would replace the input; give another"):
            filter_with(source, target)
    statistics = tmp_path / "a.stats.json"
    statistics.write_bytes(before)
    with pytest.raises(ConfigError, match=r"a\.stats\.json: would replace the input"):
        filter_with(statistics, tmp_path / "a.jsonl")
    with pytest.raises(
        DataError, match="no record has the field 'anser' .* answer, con"
    ):
        filter_with(source, tmp_path / "out.jsonl", answer_field="anser")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="the file has no records"):
        filter_with(tmp_path / "empty.jsonl", tmp_path / "out.jsonl")
    assert source.read_bytes() == before
    result = run("none.jsonl", "out.jsonl", "--answer-field", "a", cwd=tmp_path)
    assert (
        result.stderr
        == "error: input: none.jsonl: expected a regular file, found none; check the path\n"
    )
    assert result.returncode == 2


def test_nothing_kept_is_said(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(DROPPED["wrong answer"][0])
    result = run("in.jsonl", "out.jsonl", "--answer-field", "answer", cwd=tmp_path)
    assert result.returncode == 0
    assert "warning: out.jsonl is empty: no response is correct" in result.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_a_slice_of_a_file_is_filtered_and_its_file_never_replaced(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join(KEPT) + b"\n")
    found = filter_with(f"{source}@[:2]", tmp_path / "out.jsonl")
    assert found["original"] == 2
    with pytest.raises(ConfigError, match="would replace the input; give another"):
        filter_with(f"{source}@[:2]", source)
    assert source.read_bytes() == b"\n".join(KEPT) + b"\n"
