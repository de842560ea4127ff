"""`--dry-run` of stage 2: what it shows is what the first step trains on, and nothing else is written."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from transformers import AutoTokenizer

from nemo_kd.cache.reader import CacheReader
from nemo_kd.student.module import StudentModule
from tests.integration.test_stage_1 import run_stage_1
from tests.integration.test_stage_2 import metrics, run_stage_2
from tests.tiny_data import write_chat_dataset
from tests.tiny_models import save_hf_model


@pytest.fixture(scope="module")
def world(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dry_run")
    teacher = save_hf_model("qwen3", folder / "teacher", 300, seed=1)
    student = save_hf_model("llama2", folder / "student", 300, num_hidden_layers=1)
    dataset = write_chat_dataset(folder / "train.jsonl", 16)
    cache = folder / "train_CHUNK_ID.jsonl"
    assert ranks(1).run(run_stage_1, teacher, dataset, cache, {}) == [""]
    return student, cache


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def dry_run_and_run(
    student, cache, log_dir, overrides, said: io.StringIO
) -> tuple[list[str], str, list[int], list[str]]:
    """(errors, stdout, records of this rank's first step, files that the dry run left)."""
    trained: list[int] = []
    step = StudentModule.training_step

    def training_step(self: Any, batch: Any, number: int) -> None:
        if self.global_step == 0:
            trained.extend(index for one in batch for index in one.indices_B.tolist())
        step(self, batch, number)

    with (
        contextlib.redirect_stdout(said),
        mock.patch.object(StudentModule, "training_step", training_step),
    ):
        dry = {**overrides, "dry_run": True}
        errors = [run_stage_2(student, cache, cache, log_dir, dry)]
        files = [str(path) for path in Path(log_dir).rglob("*") if path.is_file()]
        shown = said.getvalue()
        assert trained == []
        errors.append(run_stage_2(student, cache, cache, log_dir, overrides))
    return errors, shown, trained, files


@pytest.mark.parametrize(
    "overrides",
    [
        {"model__data__max_tokens_per_batch": 200},
        {"model__tensor_model_parallel_size": 2},
        {"model__pipeline_model_parallel_size": 2, "model__data__shuffle": False},
        {"model__context_parallel_size": 2},
    ],
    ids=["data", "tensor", "pipeline", "context"],
)
def test_a_dry_run_shows_the_batch_of_the_first_step(
    ranks, world, tmp_path, overrides
):
    student, cache = world
    if overrides.get("model__pipeline_model_parallel_size"):
        save_hf_model("llama2", tmp_path / "student", 300, num_hidden_layers=2)
        student = tmp_path / "student"
    steps = {"trainer__devices": 2, "trainer__knowledge_distillation__max_steps": 1}
    run = tmp_path / "run"
    (errors, shown, trained, files), *_ = ranks(2).run(
        dry_run_and_run, student, cache, run, steps | overrides, io.StringIO()
    )
    assert errors == ["", ""]
    page = run / "dry_run" / "first_batch.html"
    assert files == [str(page)]
    assert page.exists()  # also after the run
    assert len(metrics(run)) > 0
    data = json.loads(
        re.search(r'id="data">(.*)</script>', page.read_text(encoding="utf-8"))[1]
    )
    records = [
        int(re.search(r"record (\d+) ", one["heading"])[1]) for one in data["examples"]
    ]
    assert sorted(records) == sorted(index for index in trained if index >= 0)
    rows = {row.example.index: row.example for row in CacheReader(str(cache))}
    tokenizer = AutoTokenizer.from_pretrained(student)
    for record, example in zip(records, data["examples"], strict=True):
        row = rows[record]
        assert example["ids"][:-1] == row.tokens_S.tolist()
        assert example["mask"] == [0, *row.loss_mask_S.tolist()]
        assert "".join(example["tokens"]) == tokenizer.decode(example["ids"])
        label_ids = np.array(example["ids"])[np.array(example["mask"]) > 0]
        assert label_ids.tolist() == row.labels_S[row.loss_mask_S > 0].tolist()
    first = rows[records[0]]
    trained_text = tokenizer.decode(first.labels_S[first.loss_mask_S > 0])
    assert trained_text
    assert f"«{trained_text}»" in shown
    for line in (
        r"layout: +tensor \d x pipeline \d x context \d x data \d",
        r"memory +\d[\d.]* [MG]B on a rank at the peak of a step",
        r"time +\d+\.\d\d s a step, 0:00:0\d for 1 steps",
        rf"page +{re.escape(str(page))}",
    ):
        assert re.search(f"^{line}", shown, re.MULTILINE), line
        if not line.startswith("page"):
            assert re.search(
                f"^{line.replace(' +', ':? +')}", data["facts"], re.MULTILINE
            )
    assert "\x1b" not in shown


def test_a_terminal_shows_trained_text_in_green(ranks, world, tmp_path):
    student, cache = world
    (errors, shown, _, _), *_ = ranks(1).run(
        dry_run_and_run,
        student,
        cache,
        tmp_path,
        {"trainer__knowledge_distillation__max_steps": 1},
        Terminal(),
    )
    assert errors == ["", ""]
    assert "first batch, trained in green:\n" in shown
    green = re.findall(r"\x1b\[32m(.*?)\x1b\[0m", shown, re.DOTALL)
    assert len(green) == 3
    assert all(text.endswith("<|im_end|>") for text in green)
    assert "«" not in shown


def test_text_from_records_cannot_reach_the_terminal_or_the_page(ranks, tmp_path):
    model = save_hf_model("qwen3", tmp_path / "model", 300)
    turns = ["user \x1b]0;x\x07", "\x1b[31mred</script><b>&amp;"]
    messages = [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant"), turns, strict=True)
    ]
    dataset = tmp_path / "d.jsonl"
    dataset.write_text(json.dumps({"messages": messages}) + "\n")
    overrides = {
        "model__data__data_impl": "dataset",
        "model__knowledge_distillation__kd_loss_weight": 0.0,
        "model__global_batch_size": 1,
        "model__micro_batch_size": 1,
        "trainer__knowledge_distillation__max_steps": 1,
    }
    (errors, shown, _, _), *_ = ranks(1).run(
        dry_run_and_run, model, dataset, tmp_path / "run", overrides, Terminal()
    )
    assert errors == ["", ""]
    assert set(re.findall(r"\x1b..", shown)) == {"\x1b[3", "\x1b[0"}
    assert r"\x1b[31mred</script>" in shown
    page = (tmp_path / "run" / "dry_run" / "first_batch.html").read_text()
    assert "\x1b" not in page
    assert "red</script>" not in page
