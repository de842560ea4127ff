"""The bundled word problems: the same for a seed, right where they say so, and no split in another."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_kd.answers.checkers import judge_of
from nemo_kd.answers.outcomes import Outcome
from nemo_kd.config.answers import AnswerConfig

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "reasoning_dataset.py"
STEP = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)\.")
OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}


def write(folder, *options):
    command = [sys.executable, SCRIPT, "--output-dir", folder, *options]
    subprocess.run(command, check=True, capture_output=True)
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in folder.iterdir()
    }


def question(record):
    return record["messages"][0]["content"]


def response(record):
    return record["messages"][1]["content"]


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data"))


def test_a_seed_gives_one_dataset(splits, tmp_path):
    assert {split: len(found) for split, found in splits.items()} == {
        "train": 4000,
        "validation": 400,
        "test": 400,
    }
    assert write(tmp_path / "again", "--seed", "1234") == splits
    assert write(tmp_path / "other", "--seed", "1235") != splits


def test_right_solutions_are_right(splits):
    """By the calculations in their text, and by the numbers of their questions in order."""
    for record in splits["validation"] + splits["test"]:
        steps = STEP.findall(response(record))
        for left, symbol, right, result in steps:
            assert OPERATIONS[symbol](int(left), int(right)) == int(result)
        for step, following in itertools.pairwise(steps):
            assert step[3] == following[0]
        assert response(record).endswith(f"{steps[-1][3]}.\n#### {record['answer']}")
        assert steps[-1][3] == record["answer"]
        used = [steps[0][0], *(step[2] for step in steps)]
        assert re.findall(r"\d+", question(record)) == used


def test_a_share_of_the_training_solutions_is_wrong(splits, tmp_path):
    ends = [
        response(record).endswith(f"#### {record['answer']}")
        for record in splits["train"]
    ]
    assert 0.67 < sum(ends) / len(ends) < 0.73
    judge = judge_of(AnswerConfig())
    for record, is_right in zip(splits["train"][:300], ends, strict=False):
        outcome = judge(response(record), record["answer"])
        assert (outcome is Outcome.CORRECT) == is_right, record
    for record in write(tmp_path / "right", "--wrong-share", "0", "--train", "100")[
        "train"
    ]:
        assert response(record).endswith(f"#### {record['answer']}")


def test_no_problem_occurs_twice(splits):
    questions = [question(record) for found in splits.values() for record in found]
    assert len({*questions}) == len(questions)
    numbers = {}
    for split, found in splits.items():
        right = [r for r in found if response(r).endswith(f"#### {r['answer']}")]
        numbers[split] = {tuple(STEP.findall(response(record))) for record in right}
    assert not numbers["train"] & numbers["test"]
    assert not numbers["train"] & numbers["validation"]
    assert not numbers["validation"] & numbers["test"]
