"""The comparison of student and teacher against transformers in float64."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from examples.compare_models import compare_with_teacher
from nemo_kd.config import ConfigError
from nemo_kd.config.data import DataConfig, DatasetConfig
from nemo_kd.data.dataset import TokenizedDataset
from tests.tiny_data import write_chat_dataset
from tests.tiny_models import save_hf_model
from tests.tiny_tokenizer import train_tokenizer


def compare(student, teacher, examples, micro_batch_size=3):
    try:
        return compare_with_teacher(
            str(student), str(teacher), iter(examples), micro_batch_size
        )
    except ConfigError as error:
        return str(error)


def test_agreement_matches_transformers(ranks, tmp_path):
    student = save_hf_model("llama2", tmp_path / "student", 300)
    teacher = save_hf_model("qwen3", tmp_path / "teacher", 300, seed=5)
    data = DataConfig(
        data=DatasetConfig(file_path=str(write_chat_dataset(tmp_path / "d.jsonl", 8)))
    )
    dataset = TokenizedDataset(data, train_tokenizer(300), 512, 300)
    examples = [
        example
        for i in range(len(dataset))
        if not isinstance(example := dataset[i], str)
    ]
    ours = ranks(1).run(compare, student, teacher, examples)[0]

    models = [
        AutoModelForCausalLM.from_pretrained(path).double().eval()
        for path in (student, teacher)
    ]
    sums = torch.zeros(4, dtype=torch.float64)
    for example in examples:
        mask = torch.tensor(example.loss_mask_S) > 0
        labels = torch.tensor(example.labels_S)[mask]
        with torch.no_grad():
            log_q, log_p = (
                model(torch.tensor(example.tokens_S)[None])
                .logits[0][mask]
                .log_softmax(-1)
                for model in models
            )
        sums += torch.stack(
            [
                torch.nn.functional.nll_loss(log_q, labels, reduction="sum"),
                torch.nn.functional.nll_loss(log_p, labels, reduction="sum"),
                torch.nn.functional.kl_div(
                    log_q, log_p, log_target=True, reduction="sum"
                ),
                (log_q.argmax(-1) == log_p.argmax(-1)).sum().double(),
            ]
        )
    count = sum(example.num_loss_tokens for example in examples)
    expected = (sums / count).tolist()
    assert ours.num_tokens == count
    assert [ours.student_ce, ours.teacher_ce, ours.forward_kl] == pytest.approx(
        expected[:3], rel=1e-5
    )
    assert ours.top1_agreement == pytest.approx(expected[3], abs=1.5 / count)

    in_one_go = ranks(1).run(compare, student, teacher, examples, 50)[0]
    assert in_one_go.forward_kl == pytest.approx(ours.forward_kl, rel=1e-5)
    itself = ranks(1).run(compare, teacher, teacher, examples)[0]
    assert itself.forward_kl == pytest.approx(0, abs=1e-6)
    assert itself.top1_agreement == 1.0


def test_what_cannot_be_compared_is_refused(ranks, tmp_path):
    teacher = save_hf_model("qwen3", tmp_path / "teacher", 300)
    fewer = save_hf_model("llama2", tmp_path / "fewer", 290)
    assert (
        "different tokenizers or vocabularies (of 290 and 300 ids)"
        in ranks(1).run(compare, fewer, teacher, [])[0]
    )

    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = ranks(1).run(compare, other, teacher, [])[0]
    assert f"{other} and {teacher} have different tokenizers" in message

    assert (
        "the examples have no loss token"
        in ranks(1).run(compare, teacher, teacher, [])[0]
    )
