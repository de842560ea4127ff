"""Responses checked during stage 2: figures against transformers, and a training that does not notice."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torchmetrics
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_kd.run.interruption import REQUEUE
from nemo_kd.student.checkpoint_folder import Contents, checkpoints
from nemo_kd.student.evaluate import Evaluation
from nemo_kd.student.module import StudentModule
from tests.forked_runs import StudentRun, metrics, training_rows, validation_rows
from tests.integration.test_stage_2 import run_stage_2
from tests.tiny_models import save_hf_model
from tests.tiny_tokenizer import docstrings

HERE = __name__
STEPS = 6
NUM_QUESTIONS = 7
MAX_NEW_TOKENS = 9
PARAMS = "exp_manager__checkpoint_callback_params__"
LOOP = "trainer__knowledge_distillation__"
SETTINGS = {
    "model__data__data_impl": "dataset",
    "model__knowledge_distillation__kd_loss_weight": 0.0,
    "model__knowledge_distillation__sft_loss_weight": 1.0,
    f"{LOOP}max_steps": STEPS,
    f"{LOOP}max_epochs": 3,
    f"{LOOP}val_check_interval": 4,
    "exp_manager__create_tensorboard_logger": False,
    f"{PARAMS}save_nemo_on_train_end": False,
}


def has_even_length(response: str, answer: str) -> bool:
    """A checker whose verdict depends on every token of an untrained model."""
    torch.rand(3)  # one that draws random numbers must not disturb the training either
    return len(response) % 2 == int(answer)


class Restless:
    """A metric that draws random numbers; rank 0 alone may be asked for it."""

    def reset(self) -> None:
        assert torch.distributed.get_rank() == 0
        torch.rand(3)

    def update(self, batch: dict, generation_output: dict) -> None:
        torch.rand(3)

    def compute(self) -> float:
        return float(torch.rand(1))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(student, training data, validation data, questions)."""
    folder = tmp_path_factory.mktemp("evaluation")
    student = save_hf_model("llama2", folder / "student", 300, num_hidden_layers=2)
    paths = []
    for name, count, start in (
        ("train", 24, 0),
        ("validation", 5, 30),
        ("questions", NUM_QUESTIONS + 2, 40),
    ):
        texts = docstrings()[start : start + count]
        records = [
            {
                "messages": [
                    {
                        "role": "user",
                        "content": f"Say {number}" + " now" * (number % 4),
                    },
                    {"role": "assistant", "content": text[: 20 + 7 * number % 50]},
                ],
                "answer": number % 2,
            }
            for number, text in enumerate(texts)
        ]
        paths.append(folder / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps(one) + "\n" for one in records))
    return student, *paths


def asks(questions: Path, **settings) -> dict:
    """Settings of an evaluation after every step."""
    settings = {
        "interval": 1,
        "data": str(questions),
        "answer_field": "answer",
        "checker": "custom",
        "custom_checker": f"{HERE}.has_even_length",
        "num_examples": NUM_QUESTIONS,
        "max_new_tokens": MAX_NEW_TOKENS,
        "batch_size": 2,
        "log_generations": 3,
        **settings,
    }
    return {f"eval__{name}": value for name, value in settings.items()}


def train(ranks, world, folder: Path, world_size: int, **overrides) -> None:
    settings = {**SETTINGS, "trainer__devices": world_size, **overrides}
    refused = ranks(world_size).run(run_stage_2, *world[:3], folder, settings)
    assert set(refused) == {""}, refused


def evaluation_rows(folder: Path) -> list[dict]:
    return [row for row in metrics(folder) if "eval/accuracy" in row]


def last_files(folder: Path) -> dict:
    """Checksums of weights, optimizer and random states at the end."""
    (last,) = (folder / "checkpoints").glob("*-last")
    contents = Contents.read(last)
    assert contents.step == STEPS
    return {
        name: sums for name, sums in contents.files.items() if name.endswith("distcp")
    }


LORA = {
    "model__peft__peft_scheme": "lora",
    "model__peft__lora_tuning": {
        "target_modules": ["all"],
        "adapter_dim": 4,
        "adapter_dropout": 0.2,
    },
}
TP = {"model__tensor_model_parallel_size": 2, "model__sequence_parallel": True}
LAYOUTS = {
    "bf16, dropout": (1, LORA | {"trainer__precision": "bf16"}),
    "TP": (2, TP),
    "DP, sharded optimizer": (2, {"model__optim__name": "distributed_fused_adam"}),
    "PP, sampled": (
        2,
        {
            "model__pipeline_model_parallel_size": 2,
            "eval__temperature": 1.0,
            "eval__top_p": 0.9,
        },
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_training_is_the_same_to_the_last_bit(ranks, world, tmp_path, name):
    world_size, layout = LAYOUTS[name]
    without = {key: value for key, value in layout.items() if "eval" not in key}
    train(ranks, world, tmp_path / "off", world_size, **without)
    further = {
        f"{LOOP}inference_metrics": {"random": {"_target_": f"{HERE}.Restless"}}
    }
    settings = {**asks(world[3]), **further, **layout}
    train(ranks, world, tmp_path / "on", world_size, **settings)
    assert training_rows(tmp_path / "on") == training_rows(tmp_path / "off")
    assert validation_rows(tmp_path / "on") == validation_rows(tmp_path / "off")
    assert last_files(tmp_path / "on") == last_files(tmp_path / "off")
    rows = evaluation_rows(tmp_path / "on")
    assert [row["eval_step"] for row in rows] == list(range(1, STEPS + 1))
    assert len({row["eval/entropy"] for row in rows}) == STEPS  # of other weights


def expected(student: Path, questions: Path) -> tuple[dict[str, float], list[str]]:
    """Metrics and responses by transformers, a prompt at a time without a cache."""
    model = AutoModelForCausalLM.from_pretrained(student)
    tokenizer = AutoTokenizer.from_pretrained(student)
    lengths: dict[bool, list[int]] = {True: [], False: []}
    entropies = []
    texts = []
    for line in questions.read_text().splitlines()[:NUM_QUESTIONS]:
        record = json.loads(line)
        ids = tokenizer.apply_chat_template(
            record["messages"][:1], add_generation_prompt=True, return_dict=False
        )
        response: list[int] = []
        while len(response) < MAX_NEW_TOKENS:
            with torch.no_grad():
                logits = model(torch.tensor([ids + response])).logits[0, -1].double()
            entropies.append(torch.distributions.Categorical(logits=logits).entropy())
            response.append(int(logits.argmax()))
            if response[-1] == tokenizer.eos_token_id:
                response.pop()
                break
        texts.append(tokenizer.decode(response))
        correct = has_even_length(texts[-1], str(record["answer"]))
        lengths[correct].append(len(response))
    both = lengths[True] + lengths[False]
    assert all(lengths.values())  # else the test shows little
    return {
        "eval/accuracy": len(lengths[True]) / NUM_QUESTIONS,
        "eval/reward": len(lengths[True]) / NUM_QUESTIONS,
        "eval/response_length": sum(both) / NUM_QUESTIONS,
        "eval/response_length_correct": sum(lengths[True]) / len(lengths[True]),
        "eval/response_length_incorrect": sum(lengths[False]) / len(lengths[False]),
        "eval/entropy": float(sum(entropies)) / len(entropies),
    }, texts


class RecordedRun:
    """A run of Weights & Biases that records what it gets."""

    def __init__(self):
        self.rows = []
        self.axes = {}

    def define_metric(self, name, step_metric):
        self.axes[name] = step_metric

    def log(self, row):
        self.rows.append(row)

    def finish(self, exit_code):
        pass


def with_wandb(file: Path, *args) -> str:
    """Run stage 2; write what Weights & Biases gets about generations."""
    run = RecordedRun()
    with mock.patch.object(wandb, "init", return_value=run):
        error = run_stage_2(*args)
    tables = [row for row in run.rows if "eval/generations" in row]
    if tables:
        found = [
            {
                "axes": [row["step"], row["eval_step"], run.axes["eval/*"]],
                "columns": row["eval/generations"].columns,
                "data": row["eval/generations"].data,
            }
            for row in tables
        ]
        file.write_text(json.dumps(found))
    return error


class ExactMatch(torchmetrics.Metric):
    """As a user of NeMo-Aligner writes it."""

    def __init__(self, field: str, **kwargs):
        super().__init__(**kwargs)
        self.field = field
        self.add_state("correct", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, batch, generation_output):
        for number, record in enumerate(batch["metadata"]):
            length = int(batch["context_lengths"][number])
            assert len(record["messages"]) == 2
            assert generation_output["sentences"][number].endswith(
                generation_output["predictions"][number]
            )
            prompt = batch["contexts"][number, :length].tolist()
            assert generation_output["token_ids"][number][:length] == prompt
            text = generation_output["predictions"][number]
            self.correct += has_even_length(text, record[self.field])
            self.total += 1

    def compute(self):
        return self.correct.float() / self.total


class Total(ExactMatch):
    def compute(self):
        return self.total


INFERENCE_METRICS = {
    "match": {"_target_": f"{HERE}.ExactMatch", "field": "output"},
    "seen": {"_target_": f"{HERE}.Total", "field": "answer"},
}


@pytest.mark.parametrize("layout", [{}, TP], ids=["DP", "TP"])
def test_every_figure_and_sample_is_that_of_transformers(
    ranks, world, tmp_path, layout
):
    folder = tmp_path / "run"
    tables = tmp_path / "tables.json"
    overrides = {
        **SETTINGS,
        **asks(world[3]),
        **layout,
        f"{LOOP}max_steps": 2,
        f"{LOOP}inference_metrics": INFERENCE_METRICS,
        "model__optim__lr": 0.0,
        "trainer__devices": 2,
        "exp_manager__create_tensorboard_logger": True,
        "exp_manager__create_wandb_logger": True,
        "exp_manager__wandb_logger_kwargs": {"project": "kd"},
    }
    refused = ranks(2).run(with_wandb, tables, *world[:3], folder, overrides)
    assert set(refused) == {""}, refused
    rows = evaluation_rows(folder)
    assert [row["step"] for row in rows] == [1, 2]
    means, texts = expected(world[0], world[3])
    for row in rows:
        for name, value in means.items():
            assert row[name] == pytest.approx(value, rel=1e-4), name
        assert row["eval/match"] == pytest.approx(means["eval/accuracy"])
        assert row["eval/seen"] == NUM_QUESTIONS

    for step in (1, 2):
        lines = (
            (folder / "generations" / f"step={step}.jsonl").read_text().splitlines()
        )
        samples = [json.loads(line) for line in lines]
        assert [one["index"] for one in samples] == [0, 1, 2]
        assert [one["response"] for one in samples] == texts[:3]
        assert [one["answer"] for one in samples] == ["0", "1", "0"]
        for one in samples:
            assert one["correct"] == has_even_length(one["response"], one["answer"])
            assert one["prompt"].endswith("<|im_start|>assistant\n")
    found = json.loads(tables.read_text())
    assert [one["axes"] for one in found] == [[1, 1, "eval_step"], [2, 2, "eval_step"]]
    for one in found:
        assert one["columns"] == list(samples[0])
        assert one["data"] == [list(sample.values()) for sample in samples]
    (events,) = folder.glob("events.*")
    board = EventAccumulator(str(events))
    board.Reload()
    texts_shown = board.Tensors("eval/generations/text_summary")
    assert [one.step for one in texts_shown] == [1, 2]
    shown = texts_shown[0].tensor_proto.string_val[0].decode()
    assert all(line in shown for text in texts[:3] for line in text.splitlines())
    scalar = board.Scalars("eval/accuracy")[-1]
    assert (scalar.step, scalar.value) == (2, pytest.approx(means["eval/accuracy"]))


def with_slow_answers() -> None:
    original = Evaluation._answer

    def answer(self, student, questions):
        folder = Path(student.config.exp_manager.explicit_log_dir)
        (folder / f"answering after step {student.global_step}").touch()
        time.sleep(1)
        return original(self, student, questions)

    Evaluation._answer = answer


def with_slow_validation() -> None:
    original = StudentModule.validation_step

    def validation_step(self, batch, batch_idx):
        folder = Path(self.config.exp_manager.explicit_log_dir)
        (folder / f"validating after step {self.global_step}").touch()
        time.sleep(1)
        original(self, batch, batch_idx)

    StudentModule.validation_step = validation_step


def nothing() -> None:
    pass


def start(world, folder: Path, change: str) -> StudentRun:
    overrides = {
        **SETTINGS,
        **asks(world[3], interval=2),
        f"{LOOP}val_check_interval": 2,
        f"{LOOP}save_interval": 2,
        f"{PARAMS}monitor": "eval/accuracy",
        f"{PARAMS}mode": "max",
    }
    return StudentRun(folder, 2, f"{HERE}:{change}", *world[:3], **overrides)


def test_told_to_stop_amid_an_evaluation_it_is_done_once(world, tmp_path):
    """Nor is one repeated after a stop in the validation that follows it, or when the finished run starts again."""
    folder = tmp_path / "run"
    run = start(world, folder, "with_slow_answers")
    run.wait_until((folder / "answering after step 2").exists)
    run.send(1, signal.SIGTERM)
    assert run.end() == [REQUEUE, REQUEUE], run.said()
    assert not evaluation_rows(folder)
    assert list(training_rows(folder)) == [1, 2]

    run = start(world, folder, "with_slow_validation")
    run.wait_until((folder / "validating after step 2").exists)
    run.send(0, signal.SIGTERM)
    assert run.end() == [REQUEUE, REQUEUE], run.said()
    assert [row["eval_step"] for row in evaluation_rows(folder)] == [2]
    assert not validation_rows(folder)
    assert "training: eval after step 2: num_examples" in run.said()

    run = start(world, folder, "nothing")
    assert run.end() == [0, 0], run.said()
    assert [row["eval_step"] for row in evaluation_rows(folder)] == [2, 4, 6]
    assert list(validation_rows(folder)) == [2, 4, 6]
    run = start(world, tmp_path / "straight", "nothing")
    assert run.end() == [0, 0], run.said()
    names = [path.name for path in checkpoints(folder / "checkpoints")]
    for row in evaluation_rows(folder):
        score = f"--eval_accuracy={row['eval/accuracy']:.4f}-step={row['step']}-"
        assert any(score in name for name in names), (score, names)
    best = max(evaluation_rows(folder), key=lambda row: row["eval/accuracy"])
    summary = re.search(r"^best eval/accuracy +(\S+)$", run.said(), re.MULTILINE)
    assert f"={best['eval/accuracy']:.4f}-" in summary[1]
    assert training_rows(folder) == training_rows(tmp_path / "straight")
    assert last_files(folder) == last_files(tmp_path / "straight")
    run = start(world, folder, "nothing")
    assert run.end() == [0, 0], run.said()
    assert len(evaluation_rows(folder)) == 3  # a finished run has nothing left to do


def not_a_metric() -> None:
    """Lacks update, compute and reset."""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"eval__answer_field": "solution"},
            r"questions.jsonl:1: the field 'solution', .* is missing or empty; the record has the fields messages, answer",
        ),
        (
            {"eval__custom_checker": f"{HERE}.missing"},
            "eval.custom_checker: .*missing cannot be called as function",
        ),
        (
            {f"{LOOP}inference_metrics": {"mine": {"_target_": f"{HERE}.not_a_metric"}}},
            r"inference_metrics.mine: AttributeError: .*; it must be a class whose objects have update\(",
        ),
        (
            {f"{PARAMS}monitor": "eval/accuracy", "eval__interval": 4, f"{LOOP}save_interval": 5},
            r"monitor: eval/accuracy is measured every 4 steps .* first at step 20 of 6; set",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused_before_the_student_is_loaded(
    ranks, world, tmp_path, overrides, message
):
    settings = {**SETTINGS, **asks(world[3]), **overrides}
    (refused,) = ranks(1).run(run_stage_2, *world[:3], tmp_path / "run", settings)
    assert re.search(message, refused), refused
    assert not (tmp_path / "run" / "config.yaml").exists()
