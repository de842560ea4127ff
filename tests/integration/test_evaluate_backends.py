"""`evaluate_gpt` with other backends gives the same responses; its page of samples."""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from nemo_kd.config import ConfigError
from nemo_kd.config.evaluation import EvaluationConfig
from tests.integration.test_evaluate import run_evaluation, samples_in
from tests.tiny_data import write_chat_dataset
from tests.tiny_models import save_hf_model
from tests.unit.test_answer_backends import serving

SETTINGS = {
    "evaluate__answer_field": "answer",
    "evaluate__checker": "exact",
    "evaluate__max_new_tokens": 8,
    "evaluate__batch_size": 3,
    "evaluate__num_examples": 5,
}


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("backends")
    return save_hf_model("llama3.1", folder / "student", 300)


@pytest.fixture(scope="module")
def dataset(student) -> Path:
    path = write_chat_dataset(student.parent / "data.jsonl", 8)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [json.dumps({**record, "answer": 7}) + "\n" for record in records]
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def run(ranks, student, dataset):
    def run(name: str, num_ranks: int = 1, **overrides: Any) -> Any:
        output = student.parent / name
        overrides = {**SETTINGS, "trainer__devices": num_ranks, **overrides}
        model = overrides.pop("model", student)
        found = ranks(num_ranks).run(run_evaluation, model, dataset, output, overrides)
        assert all(one == found[0] for one in found)
        if isinstance(found[0], str):
            return found[0]
        return found[0], samples_in(output), (output / "samples.html").read_text()

    return run


@pytest.fixture(scope="module")
def megatron(run) -> Any:
    return run("megatron")


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_transformers_give_the_same_evaluation(run, megatron, num_ranks):
    result, samples, _ = run(f"hf {num_ranks}", num_ranks, evaluate__backend="hf")
    expected_result, expected_samples, _ = megatron
    assert result["sampling"].pop("backend") == "hf"
    for name, value in result.items():
        expected = expected_result[name]
        if name == "sampling":
            expected = {**expected, "backend": "megatron"}
            value = {**value, "backend": "megatron"}
        if isinstance(value, float):
            expected = pytest.approx(expected, rel=1e-5)
        assert value == expected, name
    for ours, theirs in zip(samples, expected_samples, strict=True):
        expected = pytest.approx(theirs["mean_entropy"], rel=1e-4)
        assert ours == {**theirs, "mean_entropy": expected}


def test_samples_are_the_same_too(run):
    settings = {"evaluate__temperature": 1.3, "evaluate__top_p": 0.9}
    _, ours, _ = run("hf sampled", evaluate__backend="hf", **settings)
    _, theirs, _ = run("megatron sampled", **settings)
    assert [one["response"] for one in ours] == [one["response"] for one in theirs]


def test_a_server_gives_the_same_responses_without_entropies(run, megatron, student):
    model = AutoModelForCausalLM.from_pretrained(student)
    with serving(model) as server:
        url = server.url("good")
        result, samples, _ = run(
            "served", 2, evaluate__backend="vllm", evaluate__url=url
        )
        message = run(
            "cut", 2, evaluate__backend="vllm", evaluate__url=server.url("cut")
        )
        narrow = run(
            "narrow",
            evaluate__backend="vllm",
            evaluate__url=url,
            evaluate__max_new_tokens=99,
        )
    expected_result, expected_samples, _ = megatron
    assert result["entropy"] is None
    assert result["ce"] == pytest.approx(expected_result["ce"], rel=1e-6)
    assert samples == [{**one, "mean_entropy": None} for one in expected_samples]
    assert message.startswith(f"ServerError: evaluate.url: {server.url('cut')}")
    assert "has room for 100 tokens" in narrow
    assert not (student.parent / "cut").exists()


def test_the_page_shows_another_evaluation_beside(run, megatron, student):
    output = student.parent / "megatron"
    settings = {"evaluate__temperature": 1.3, "evaluate__compare": str(output)}
    result, samples, page = run("compared", **settings)
    content = json.loads(re.search('id="data">(.*?)</script>', page)[1])
    assert content["other"] == "megatron"
    for shown, ours, theirs in zip(
        content["samples"], samples, megatron[1], strict=True
    ):
        assert shown == {**ours, "theirs": theirs}
    by_name = {one["name"]: one for one in content["figures"]}
    assert by_name["ce"] == {
        "name": "ce",
        "value": f"{result['ce']:.4f}",
        "theirs": f"{megatron[0]['ce']:.4f}",
    }


def test_what_cannot_work_is_refused(run, student, dataset):
    archive = student.parent / "student.nemo"
    with tarfile.open(archive, "w") as tar:
        tar.add(student, arcname=".")
    assert run("refused", model=archive, evaluate__backend="hf") == (
        f"ConfigError: evaluate.backend=hf: {archive} is no Hugging Face folder; give the one that "
        f"this command writes: convert_checkpoint input_path={archive} output_path=FOLDER"
    )
    url = "http://127.0.0.1:9/v1"
    served = run("refused", evaluate__backend="vllm", evaluate__url=url)
    assert served.startswith(f"ServerError: evaluate.url: {url}/models: ")
    library = run("refused", 2, evaluate__backend="vllm")
    assert "the package vllm cannot be imported" in library
    compared = run("refused", evaluate__compare=str(student))
    assert f"evaluate.compare: {student} holds no evaluation with samples" in compared
    assert not (student.parent / "refused").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "http://h/v1"}, "url: http://h/v1 has no effect with evaluate.backend=meg"),
        ({"compare": "x"}, "compare: x has responses, but this evaluation generates none"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        EvaluationConfig(output_dir="o", **settings)
