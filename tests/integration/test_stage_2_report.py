"""What stage 2 tells: the report before the first step, and every figure against sums over transformers' logits."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import math
from pathlib import Path
from typing import ClassVar
from unittest import mock

import numpy as np
import pytest
import torch
import wandb
from megatron.core.models.gpt import GPTModel
from transformers import AutoModelForCausalLM

from nemo_kd.cache.reader import CacheReader
from nemo_kd.config import ConfigError
from nemo_kd.ops.token_losses import COMPARED
from nemo_kd.student.job import train_student
from nemo_kd.student.module import StudentModule
from nemo_kd.student.reports import StudentRun
from tests.integration.test_stage_1 import run_stage_1
from tests.integration.test_stage_2 import metrics, run_stage_2
from tests.tiny_cache import everywhere
from tests.tiny_data import aligner_rows, student_config, write_chat_dataset
from tests.tiny_models import save_hf_model

VOCAB_SIZE = 300


@pytest.fixture(scope="module")
def world(ranks, tmp_path_factory):
    """(student, two training caches, validation cache)."""
    folder = tmp_path_factory.mktemp("report")
    teacher = save_hf_model("qwen3", folder / "teacher", VOCAB_SIZE, seed=1)
    student = save_hf_model(
        "llama2", folder / "student", VOCAB_SIZE, num_hidden_layers=1
    )
    caches = []
    for name, count, start in (
        ("first", 6, 0),
        ("second", 10, 20),
        ("validation", 5, 60),
    ):
        dataset = write_chat_dataset(folder / f"{name}.jsonl", count, start)
        caches.append(folder / f"{name}_CHUNK_ID.jsonl")
        assert ranks(1).run(
            run_stage_1, teacher, dataset, caches[-1], {"top_k": 4}
        ) == [""]
    return student, *caches


def expected_means(student: Path, *caches: Path) -> dict[str, float]:
    """Means over the loss tokens of caches, from transformers' float32 logits, a position at a time."""
    model = AutoModelForCausalLM.from_pretrained(student)
    found: dict[str, list[float]] = {name: [] for name in (*COMPARED, "sft_loss")}
    for cache in caches:
        reader = CacheReader(str(cache))
        for index in range(len(reader)):
            row = everywhere(reader[index])
            with torch.no_grad():
                q_SV = torch.softmax(
                    model(torch.tensor(row.example.tokens_S)[None]).logits[0].double(),
                    -1,
                ).numpy()
            for s in np.flatnonzero(row.example.loss_mask_S):
                used = row.teacher.topk_token_ids_PK[s] >= 0
                ids, tail = (
                    row.teacher.topk_token_ids_PK[s][used],
                    float(row.teacher.tail_mass_PT[s, 0]),
                )
                weights = np.exp(
                    row.teacher.topk_logits_PK[s][used].astype(np.float64)
                )
                p = np.append(weights / weights.sum() * (1 - tail), tail)
                q = np.append(q_SV[s, ids], 1 - q_SV[s, ids].sum())
                values = (
                    1 - tail,
                    q[:-1].sum(),
                    q_SV[s].argmax() == ids[0],
                    (p * np.log(p / q)).sum(),
                    -(p * np.log(p)).sum(),
                    -(q * np.log(q)).sum(),
                    -math.log(q_SV[s, row.example.labels_S[s]]),
                )
                for name, value in zip(found, values, strict=True):
                    found[name].append(float(value))
    return {name: float(np.mean(values)) for name, values in found.items()}


def run_and_listen(*args) -> tuple[str, str]:
    """(error, what rank 0 logged, and its lines of progress)."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logger = logging.getLogger("nemo_kd")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with contextlib.redirect_stderr(said):
            return run_stage_2(*args), said.getvalue()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.mark.parametrize("kd_loss_weight", [1.0, 0.0])
def test_every_figure_of_every_source(ranks, world, tmp_path, kd_loss_weight):
    student, first, second, validation = world
    num_examples = len(CacheReader(str(first))) + len(CacheReader(str(second)))
    overrides = {
        "trainer__devices": 2,
        "model__data__data_prefix": {
            "train": [str(first), str(second)],
            "validation": str(validation),
        },
        "model__global_batch_size": num_examples,
        "model__micro_batch_size": num_examples // 2,
        "model__optim__lr": 0.0,
        "model__knowledge_distillation__kd_loss_weight": kd_loss_weight,
        "model__knowledge_distillation__sft_loss_weight": 0.5,
        "model__knowledge_distillation__support": "renormalize",
        "trainer__knowledge_distillation__max_steps": 1,
    }
    (error, said), _ = ranks(2).run(
        run_and_listen, student, first, validation, tmp_path, overrides
    )
    assert error == ""
    rows = metrics(tmp_path)
    trained = next(row for row in rows if "train/loss" in row)
    validated = next(row for row in rows if "val_loss" in row)
    expected = {
        "train/{}": expected_means(student, first, second),
        "train/{}/first": expected_means(student, first),
        "train/{}/second": expected_means(student, second),
    }
    for form, means in expected.items():
        for name, value in means.items():
            assert trained[form.format(name)] == pytest.approx(value, rel=2e-5), (
                form.format(name)
            )
        assert (form.format("kd_loss") in trained) == (kd_loss_weight > 0)
        loss = (
            kd_loss_weight * trained.get(form.format("kd_loss"), 0.0)
            + 0.5 * trained[form.format("sft_loss")]
        )
        assert trained[form.format("loss")] == pytest.approx(loss, rel=1e-6)
    for name, value in expected_means(student, validation).items():
        assert validated[f"validation/{name}"] == pytest.approx(value, rel=2e-5), name
    assert not any(name.startswith("validation/sft_loss/") for name in validated)
    assert trained["train_step"] == validated["eval_step"] == 1

    tokens = sum(
        CacheReader(str(cache))[i].example.num_tokens
        for cache in (first, second)
        for i in range(len(CacheReader(str(cache))))
    )
    assert f"{num_examples} examples, about {tokens:,} tokens" in said
    assert (
        "layout:     tensor 1 x pipeline 1 x context 1 x data 2, experts over 1\n"
        in said
    )
    for line in (
        "GEMM:       torch, torch.float32",
        "fusions:    none",
        "Adam:       torch's, distributed_fused_adam",
        "  1 = (0, 0, 0, 0, 1) on ",
    ):
        assert f"\n{line}" in said
    weights = sum(
        parameter.numel()
        for parameter in AutoModelForCausalLM.from_pretrained(student).parameters()
    )
    assert f"student:    llama, {weights:,} weights" in said
    assert "trained between « and »" in said
    assert "the teacher's likeliest" in said
    means = expected["train/{}"]
    assert (
        f"before training: cross-entropy {means['sft_loss']:.3f} (a uniform guess has ln V = {math.log(300):.3f})"
        in said
    )
    assert f"KL to the teacher {means['teacher_kl']:.3f}" in said


def test_a_step_logs_what_it_measured_and_nothing_of_the_step_before(
    ranks, world, tmp_path
):
    student, *_ = world
    first = aligner_rows(tmp_path / "first.jsonl", [1] * 4)
    second = aligner_rows(tmp_path / "second.jsonl", [0] * 4 + [1] * 4)
    overrides = {
        "model__data__data_prefix": {
            "train": [str(first), str(second)],
            "validation": str(second),
        },
        "model__data__shuffle": False,
        "model__global_batch_size": 4,
        "trainer__knowledge_distillation__limit_val_batches": 1,  # the half without loss tokens
        "exp_manager__log_interval_s": 0.0,
    }
    (error, said), *_ = ranks(1).run(
        run_and_listen, student, first, second, tmp_path / "run", overrides
    )
    assert error == ""
    steps = {row["step"]: row for row in metrics(tmp_path / "run") if "lr" in row}
    means = {
        step: sorted(name for name in row if name.startswith("train/loss"))
        for step, row in steps.items()
    }
    assert means == {
        1: ["train/loss", "train/loss/first"],
        2: [],
        3: ["train/loss", "train/loss/second"],
    }
    assert not any(
        name.startswith(("train/kd", "train/sft", "train/t")) for name in steps[2]
    )
    (validated,) = (row for row in metrics(tmp_path / "run") if "eval_step" in row)
    assert not any("loss" in name for name in validated)
    assert "val_loss is not finite after step 3" in said
    lines = said.splitlines()
    assert [
        line.partition(",")[0] for line in lines if "g: " in line and " steps," in line
    ] == [f"training: {step}/3 steps" for step in (1, 2, 3)]
    assert any(
        line.startswith(
            "training: validation after step 3: no token counts in the loss"
        )
        for line in lines
    )


class LostRun:
    """A run of Weights & Biases whose service has died."""

    config = mock.MagicMock()

    def define_metric(self, *args, **kwargs):
        pass

    def log(self, metrics):
        raise ConnectionResetError(104, "Connection reset by peer")

    def finish(self, exit_code):
        raise BrokenPipeError(32, "Broken pipe")


def with_wandb(init, *args) -> tuple[str, str]:
    """(error, what was logged) of a run of stage 2 with another wandb.init; this process may have had a run before."""
    with mock.patch.object(wandb, "init", init), mock.patch.object(wandb, "run", None):
        return run_and_listen(*args)


def out_of_reach(**arguments):
    raise wandb.errors.CommError(
        "Run initialization has timed out after 90.0 sec.\nPlease try again"
    )


def lost(**arguments):
    return LostRun()


def test_wandb_out_of_reach_is_an_error_of_all_ranks_and_its_loss_a_warning(
    ranks, world, tmp_path
):
    student, first, _, validation = world
    overrides = {
        "model__global_batch_size": 2,
        "model__micro_batch_size": 1,
        "trainer__knowledge_distillation__max_steps": 2,
        "exp_manager__create_wandb_logger": True,
        "exp_manager__wandb_logger_kwargs": {"project": "kd"},
    }
    run = (student, first, validation, tmp_path, {**overrides, "trainer__devices": 2})
    results = ranks(2).run(with_wandb, out_of_reach, *run)
    for error, said in results:
        assert error.startswith(
            "ConfigError: exp_manager.create_wandb_logger: Weights & Biases does not start (Run initialization has timed out "
            "after 90.0 sec.); log in (wandb login, or WANDB_API_KEY), set WANDB_MODE=offline"
        )
        assert "student:" not in said  # it comes before the student is loaded
    ((error, said),) = ranks(1).run(with_wandb, lost, *run[:4], overrides)
    assert error == ""
    assert (
        said.count(
            "Weights & Biases failed (ConnectionResetError: [Errno 104] Connection reset by peer)"
        )
        == 1
    )
    assert [row["step"] for row in metrics(tmp_path) if "lr" in row] == [1, 2]


class RecordedRun:
    """A run of Weights & Biases that records what it gets."""

    started: ClassVar[list[RecordedRun]] = []
    config = mock.MagicMock()

    def __init__(self, **arguments):
        self.folder = arguments["dir"]
        self.steps = []
        self.exit_code = None
        self.started.append(self)
        wandb.run = self

    def define_metric(self, *args, **kwargs):
        pass

    def log(self, metrics):
        self.steps.append(metrics["step"])

    def finish(self, exit_code):
        self.exit_code = exit_code
        wandb.run = None


def calls_in_one_process(student, train, validation, folder, overrides):
    """(result, what Weights & Biases got) of a call of train_student that fails, and of two that do not."""
    results = []
    with (
        mock.patch.object(wandb, "init", RecordedRun),
        mock.patch.object(wandb, "run", None),
    ):
        with mock.patch.object(
            StudentModule, "token_losses", side_effect=ConfigError("stop")
        ):
            results.append(
                run_stage_2(student, train, validation, folder / "0", overrides)
            )
        for number in "12":
            config = student_config(
                student, train, validation, folder / number, **overrides
            )
            results.append(train_student(config))
    return results, [
        (run.folder, run.steps, run.exit_code) for run in RecordedRun.started
    ]


def test_calls_in_one_process_are_separate_runs(ranks, world, tmp_path):
    student, first, _, validation = world
    overrides = {
        "model__global_batch_size": 2,
        "model__micro_batch_size": 1,
        "trainer__knowledge_distillation__max_steps": 1,
        "exp_manager__create_wandb_logger": True,
        "exp_manager__wandb_logger_kwargs": {"project": "kd"},
    }
    arguments = (student, first, validation, tmp_path, overrides)
    ((results, started),) = ranks(1).run(calls_in_one_process, *arguments)
    folders = [tmp_path / number for number in "012"]
    archives = [
        folder / "checkpoints" / "megatron_gpt_knowledge_distillation.nemo"
        for folder in folders
    ]
    assert results == [
        "ConfigError: stop",
        StudentRun(folders[1], 1, archives[1]),
        StudentRun(folders[2], 1, archives[2]),
    ]
    assert all(archive.exists() for archive in archives[1:])
    assert started == [
        (str(folders[0]), [], 1),
        (str(folders[1]), [1, 1], 0),
        (str(folders[2]), [1, 1], 0),
    ]


def models_left(*args) -> int:
    """How many models are still in memory after a run."""
    assert run_stage_2(*args) == ""
    gc.collect()
    return sum(type(one) is GPTModel for one in gc.get_objects())


@pytest.mark.parametrize("optimizer", ["adamw", "distributed_fused_adam"])
def test_nothing_of_a_model_stays_in_memory(ranks, world, tmp_path, optimizer):
    student, first, _, validation = world
    overrides = {
        "trainer__devices": 2,
        "model__optim__name": optimizer,
        "model__global_batch_size": 2,
        "model__micro_batch_size": 1,
        "trainer__knowledge_distillation__max_steps": 1,
    }
    assert ranks(2).run(
        models_left, student, first, validation, tmp_path, overrides
    ) == [
        0,
        0,
    ]


def test_speed_of_a_step(ranks, world, tmp_path):
    student, first, _, validation = world
    rows = [CacheReader(str(first))[i] for i in range(len(CacheReader(str(first))))]
    overrides = {
        "model__global_batch_size": len(rows),
        "model__micro_batch_size": 1,
        "trainer__knowledge_distillation__max_steps": 2,
    }
    assert ranks(1).run(
        run_stage_2, student, first, validation, tmp_path, overrides
    ) == [""]
    lengths = [row.example.num_tokens for row in rows]
    for row in (row for row in metrics(tmp_path) if "perf/step_time_s" in row):
        seconds = row["perf/step_time_s"] / (1 - row["perf/data_wait_percent"] / 100)
        assert row["perf/tokens_per_s"] * seconds == pytest.approx(sum(lengths))
        assert 0 <= row["perf/padding_percent"] < 60
        assert 0.1 < row["perf/peak_memory_gib"] < 20
        assert "perf/mfu_percent" not in row
