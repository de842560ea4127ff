"""`evaluate_gpt` against transformers, stage 2's validation and itself in other layouts."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_kd.cli.evaluate_gpt import check
from nemo_kd.config import UserInputError
from nemo_kd.config.data import DataConfig, DatasetConfig
from nemo_kd.data.dataset import TokenizedDataset
from nemo_kd.data.tokenizer import load_tokenizer
from nemo_kd.evaluation.job import evaluate_gpt
from tests.integration.test_stage_1 import run_stage_1
from tests.integration.test_stage_2 import run_stage_2
from tests.tiny_data import evaluation_config, write_chat_dataset
from tests.tiny_models import save_hf_model

ROOT = Path(__file__).resolve().parents[2]
NUM_RECORDS = 15  # 14 examples: uneven over two replicas
ANSWERS = {"evaluate__answer_field": "answer", "evaluate__max_new_tokens": 12}
LAYOUTS = {
    "TP": {"model__tensor_model_parallel_size": 2},
    "PP": {"model__pipeline_model_parallel_size": 2},
    "DP": {"evaluate__batch_size": 3},
    "DP padded": {"data__packing": False, "data__max_tokens_per_batch": 100},
}


def run_evaluation(model, dataset, output, overrides) -> dict[str, Any] | str:
    """Runs an evaluation in a rank; its result, or the message of what it refuses."""
    config = evaluation_config(model, dataset, output, **overrides)
    try:
        check(config)
        return evaluate_gpt(config)
    except UserInputError as error:
        return f"{type(error).__name__}: {error}"


def samples_in(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "samples.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def world(ranks, tmp_path_factory):
    """Student, dataset with answers, cache of another model over it."""
    folder = tmp_path_factory.mktemp("evaluate")
    teacher = save_hf_model("qwen3", folder / "teacher", 300, seed=1)
    student = save_hf_model("llama2", folder / "student", 300, num_hidden_layers=2)
    dataset = write_chat_dataset(folder / "data.jsonl", NUM_RECORDS)
    records = [json.loads(line) for line in dataset.read_text().splitlines()]
    lines = [json.dumps({**record, "answer": 7}) + "\n" for record in records]
    dataset.write_text("".join(lines))
    cache = folder / "cache_CHUNK_ID.jsonl"
    overrides = {"n_examples_per_chunk": 8, "top_k": 16}
    assert ranks(1).run(run_stage_1, teacher, dataset, cache, overrides) == [""]
    return student, dataset, cache, folder


@pytest.fixture(scope="module")
def measured(ranks, world) -> tuple[dict[str, Any], Path]:
    """An evaluation on one rank, and its folder."""
    student, dataset, cache, folder = world
    output = folder / "one rank"
    overrides = {**ANSWERS, "evaluate__cache": str(cache)}
    (result,) = ranks(1).run(run_evaluation, student, dataset, output, overrides)
    assert isinstance(result, dict), result
    return result, output


def test_loss_and_responses_are_those_of_transformers(world, measured):
    student, dataset, _, _ = world
    result, output = measured
    tokenizer = load_tokenizer(student)
    rows = TokenizedDataset(
        DataConfig(data=DatasetConfig(file_path=str(dataset))), tokenizer, 256, 300
    )
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64)
    total = 0.0
    num_tokens = 0
    samples = {sample["index"]: sample for sample in samples_in(output)}
    for example in (rows[place] for place in range(len(rows))):
        if isinstance(example, str):
            continue
        with torch.no_grad():
            logits_SV = model(torch.tensor(example.tokens_S)[None]).logits[0]
        places = torch.tensor(example.loss_mask_S) > 0
        labels = torch.tensor(example.labels_S)[places]
        log_q = logits_SV.log_softmax(-1)[places]
        total -= log_q.gather(1, labels[:, None]).sum().item()
        num_tokens += int(places.sum())
        first = int(places.nonzero()[0])
        prompt = torch.tensor(example.tokens_S[: first + 1])[None]
        generated = model.generate(
            prompt,
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=[2],
            pad_token_id=0,
        )
        expected = generated[0, prompt.shape[1] :].tolist()
        stopped = expected[-1] == 2
        sample = samples.pop(example.index)
        text = tokenizer.decode(expected[:-1] if stopped else expected)
        assert (sample["response"], sample["stopped"]) == (text, stopped)
    assert not samples
    assert result["num_loss_tokens"] == num_tokens
    assert result["ce"] == pytest.approx(total / num_tokens, rel=1e-6)
    expected = math.exp(total / num_tokens)
    assert result["perplexity"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_measures_the_same(ranks, world, measured, layout):
    student, dataset, cache, folder = world
    expected, alone = measured
    output = folder / layout
    overrides = {
        **ANSWERS,
        **LAYOUTS[layout],
        "evaluate__cache": str(cache),
        "trainer__devices": 2,
    }
    found = ranks(2).run(run_evaluation, student, dataset, output, overrides)
    assert found[0] == found[1]
    assert isinstance(found[0], dict), found[0]
    for name, value in expected.items():
        if isinstance(value, float):
            assert found[0][name] == pytest.approx(value, rel=1e-5), name
    for ours, theirs in zip(samples_in(output), samples_in(alone), strict=True):
        assert ours.pop("mean_entropy") == pytest.approx(
            theirs.pop("mean_entropy"), rel=1e-5
        )
        assert ours == theirs


def test_without_an_answer_field_only_the_loss_is_measured(ranks, world, measured):
    student, dataset, _, folder = world
    output = folder / "loss"
    overrides = {
        "evaluate__num_examples": 5,
        "model__context_parallel_size": 2,
        "trainer__devices": 2,
    }
    found = ranks(2).run(run_evaluation, student, dataset, output, overrides)[0]
    assert found["num_examples"] == 5
    assert "accuracy" not in found
    assert not (output / "samples.jsonl").exists()
    overrides = {"evaluate__num_examples": 5}
    (alone,) = ranks(1).run(
        run_evaluation, student, dataset, folder / "loss 1", overrides
    )
    assert found["ce"] == pytest.approx(alone["ce"], rel=1e-6)
    assert found["num_loss_tokens"] < measured[0]["num_loss_tokens"]


TRAINED = {
    "plain": {},
    "lora": {
        "model__peft__peft_scheme": "lora",
        "model__peft__lora_tuning": {
            "target_modules": ["all"],
            "layer_selection": [1],
            "adapter_dim": 4,
            "row_init_method": "normal",
        },
    },
}


@pytest.mark.parametrize("kind", TRAINED)
def test_a_training_checkpoint_measures_as_its_archive_and_its_validation(
    ranks, world, kind
):
    student, dataset, cache, folder = world
    run = folder / kind
    overrides = {
        **TRAINED[kind],
        "trainer__knowledge_distillation__max_steps": 1,
        "model__tensor_model_parallel_size": 2,
        "trainer__devices": 2,
    }
    assert ranks(2).run(run_stage_2, student, cache, cache, run, overrides)[0] == ""
    (checkpoint,) = (run / "checkpoints").glob("*-last")
    (archive,) = (run / "checkpoints").glob("*distillation.nemo")
    results = []
    for model in (checkpoint, archive):
        output = folder / f"{kind} {model.name}"
        overrides = {**ANSWERS, "evaluate__cache": str(cache)}
        (result,) = ranks(1).run(run_evaluation, model, dataset, output, overrides)
        assert isinstance(result, dict), result
        results.append(result)
        results.append(samples_in(output))
    origin = results[0].pop("model")
    assert origin["step"] == 1  # an epoch of 14 examples in batches of 8
    assert origin["start"]["name"] == "student"
    results[2].pop("model")
    assert results[:2] == results[2:]
    lines = (run / "metrics" / "metrics.jsonl").read_text().splitlines()
    validation = [
        json.loads(line) for line in lines if '"validation/sft_loss"' in line
    ]
    for ours, theirs in (
        ("ce", "sft_loss"),
        ("kl", "teacher_kl"),
        ("agreement", "top1_agreement"),
        ("teacher_mass", "teacher_mass"),
        ("student_mass", "student_mass"),
    ):
        expected = validation[-1][f"validation/{theirs}"]
        assert results[0][ours] == pytest.approx(expected, rel=1e-6), ours
    overrides = {**LAYOUTS["PP"], "trainer__devices": 2}
    output = folder / f"{kind} PP"
    found = ranks(2).run(run_evaluation, checkpoint, dataset, output, overrides)[0]
    assert isinstance(found, dict), found
    assert found["ce"] == pytest.approx(results[0]["ce"], rel=1e-6)


def refuse(ranks, world, message: str, **overrides: Any) -> None:
    student, dataset, _, folder = world
    model = overrides.pop("model", student)
    dataset = overrides.pop("dataset", dataset)
    (found,) = ranks(1).run(
        run_evaluation, model, dataset, folder / "refused", overrides
    )
    assert isinstance(found, str)
    assert message in found
    assert not (folder / "refused").exists()


def test_wrong_inputs_are_refused_before_the_weights_load(ranks, world, tmp_path):
    student, dataset, cache, _ = world
    records = [json.loads(line) for line in dataset.read_text().splitlines()]
    del records[2]["answer"]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(record) + "\n" for record in records))
    refuse(
        ranks,
        world,
        "other.jsonl:3: the field 'answer', which must hold the right answer, is missing",
        dataset=other,
        **ANSWERS,
    )
    other.write_text("".join(json.dumps(record) + "\n" for record in records[1:]))
    refuse(
        ranks,
        world,
        "cache_0.jsonl:1 holds another example than",
        dataset=other,
        evaluate__cache=str(cache),
    )
    other.write_bytes(dataset.read_bytes() * 2)
    refuse(
        ranks,
        world,
        "give the cache of the same file, or evaluate.num_examples=14",
        dataset=other,
        evaluate__cache=str(cache),
    )
    refuse(
        ranks,
        world,
        "evaluate.cache: there is no file",
        evaluate__cache="none_0.jsonl",
    )
    refuse(
        ranks,
        world,
        "model.tensor_model_parallel_size",
        model__tensor_model_parallel_size=2,
    )
    refuse(
        ranks,
        world,
        "evaluate.base_model: ",
        evaluate__base_model=str(student),
    )


def test_a_checkpoint_without_its_start_is_refused(ranks, world):
    student, dataset, cache, folder = world
    run = folder / "moved"
    overrides = {"trainer__knowledge_distillation__max_steps": 1}
    assert ranks(1).run(run_stage_2, student, cache, cache, run, overrides) == [""]
    (checkpoint,) = (run / "checkpoints").glob("*-last")
    config = run / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace(str(student), str(student) + "-gone"))
    refuse(
        ranks,
        world,
        "student-gone, which is not there). Give that model: evaluate.base_model=PATH",
        model=checkpoint,
    )
    refuse(
        ranks,
        world,
        "started with student, sha256:",
        model=checkpoint,
        evaluate__base_model=str(folder / "teacher"),
    )
    config.unlink()
    refuse(ranks, world, "evaluate.base_model=PATH", model=checkpoint)
    output = folder / "moved evaluation"
    overrides = {"evaluate__base_model": str(student), "evaluate__num_examples": 2}
    (result,) = ranks(1).run(run_evaluation, checkpoint, dataset, output, overrides)
    assert result["model"]["step"] == 1
    part = next(checkpoint.glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-1])
    refuse(
        ranks,
        world,
        f"{part.name} is not as it was written",
        model=checkpoint,
        evaluate__base_model=str(student),
    )


def test_an_evaluation_is_replaced_as_a_whole_or_not_at_all(ranks, world):
    student, dataset, _, folder = world
    output = folder / "twice"
    few = {"evaluate__num_examples": 2}
    first = ranks(1).run(run_evaluation, student, dataset, output, {**ANSWERS, **few})
    (text,) = ranks(1).run(run_evaluation, student, dataset, output, few)
    assert "holds an evaluation; give another folder, or replace it as a whole" in text
    assert json.loads((output / "evaluation.json").read_text()) == first[0]
    again = {**few, "evaluate__overwrite": True}
    (result,) = ranks(1).run(run_evaluation, student, dataset, output, again)
    assert json.loads((output / "evaluation.json").read_text()) == result
    assert sorted(path.name for path in output.iterdir()) == [
        "config.yaml",
        "evaluation.json",
    ]
    (output / "evaluation.json").rename(output / "notes.txt")
    (text,) = ranks(1).run(run_evaluation, student, dataset, output, again)
    assert f"{output} exists and is no evaluation" in text


def test_a_killed_command_leaves_nothing(world, tmp_path):
    student, dataset, _, _ = world
    (tmp_path / "deadly.py").write_text(
        "import os, signal\n"
        "def judge(response, answer):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [
        sys.executable,
        str(ROOT / "examples" / "evaluate_gpt.py"),
        f"model={student}",
        f"data={dataset}",
        "output=results/evaluation",
        "evaluate.answer_field=answer",
        "evaluate.checker=custom",
        "evaluate.custom_checker=deadly.judge",
        "evaluate.max_new_tokens=2",
    ]
    (tmp_path / "results").mkdir()
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert list((tmp_path / "results").iterdir()) == []
