"""lm-evaluation-harness on an exported student, as docs/evaluation.md shows it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.parity.test_model_logits import convert_in_rank
from tests.tiny_models import save_hf_model

ROOT = Path(__file__).resolve().parents[2]
NUM_TOKENS = 24


def block(language: str, word: str) -> str:
    """The one block of the page that holds `word`."""
    page = (ROOT / "docs" / "evaluation.md").read_text()
    blocks = re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)
    (found,) = [text for text in blocks if word in text]
    return found


def first_line_of_response(folder: Path, question: str) -> str:
    """By transformers, from the model before it was converted."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    message = {"role": "user", "content": question}
    text = tokenizer.apply_chat_template(
        [message], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    generated = model.generate(**ids, max_new_tokens=NUM_TOKENS, do_sample=False)
    response = generated[0, ids["input_ids"].shape[1] :]
    text = tokenizer.decode(response, skip_special_tokens=True)
    return next(line.strip() for line in text.splitlines() if line)


def test_the_documented_task_runs_on_an_exported_student(ranks, tmp_path):
    original = save_hf_model("llama3.1", tmp_path / "original", 300)
    archive = tmp_path / "kd.nemo"
    student = tmp_path / "results" / "kd" / "student"
    for source, target in ((original, archive), (archive, student)):
        ranks(1).run(convert_in_rank, str(source), str(target))
    questions = ["What is 1 + 1?", "Name a colour.", "Count to three."]
    answers = [first_line_of_response(original, question) for question in questions]
    answers[1] += " and more"
    with (tmp_path / "test.jsonl").open("w") as file:
        for question, answer in zip(questions, answers, strict=True):
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages, "answer": answer}) + "\n")
    task = block("yaml", "generate_until")
    assert task.count("#### (.+)") == task.count("max_gen_toks: 256") == 1
    task = task.replace("#### (.+)", "(.+)")  # random weights write no marks
    task = task.replace("max_gen_toks: 256", f"max_gen_toks: {NUM_TOKENS}")
    (tmp_path / "task.yaml").write_text(task)
    lines = block("bash", "lm_eval --model").replace("\\\n", " ").splitlines()
    (line,) = [line for line in lines if line.startswith("lm_eval")]
    line = line.replace("bfloat16", "float32")
    words = [sys.executable, "-m", *shlex.split(line), "--device", "cpu"]
    result = subprocess.run(
        words,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (path,) = (tmp_path / "results" / "kd" / "lm_eval").rglob("results_*.json")
    scores = json.loads(path.read_text())["results"]["word_problems"]
    assert scores["exact_match,after_marks"] * 3 == 2
