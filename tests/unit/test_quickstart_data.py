"""The quickstart's dataset: real text, the same every time, nothing shared between the splits."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "docstring_dataset.py"


def test_docstring_dataset(tmp_path):
    spec = importlib.util.spec_from_file_location("docstring_dataset", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    counts = module.write_dataset(tmp_path / "a")
    assert counts["train"] > 3000
    assert counts["validation"] > 200
    module.write_dataset(tmp_path / "b")
    answers = {}
    for split, count in counts.items():
        text = (tmp_path / "a" / f"{split}.jsonl").read_text()
        assert text == (tmp_path / "b" / f"{split}.jsonl").read_text()
        records = [json.loads(line)["messages"] for line in text.splitlines()]
        assert len(records) == count
        assert all([turn["role"] for turn in record] == ["user", "assistant"] for record in records)
        answers[split] = {record[1]["content"] for record in records}
        assert len(answers[split]) == count
        assert all(module.MIN_CHARACTERS <= len(answer) <= module.MAX_CHARACTERS for answer in answers[split])
    assert not answers["train"] & answers["validation"]
    questions = (tmp_path / "a" / "train.jsonl").read_text() + (tmp_path / "a" / "validation.jsonl").read_text()
    assert "What does `json.dumps` do?" in questions
