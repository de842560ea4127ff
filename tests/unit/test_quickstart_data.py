"""The quickstart: its dataset, its models, and what happens when it runs again or a step fails."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_kd.config.data import DataConfig, DatasetConfig
from nemo_kd.data.dataset import TokenizedDataset
from nemo_kd.data.tokenizer import trained_text

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load_example(name, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # the script adds its folder
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def quickstart(monkeypatch):
    return load_example("quickstart", monkeypatch)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """The folder that the script writes, its splits as {question: answer}, and what it printed."""
    folder = tmp_path_factory.mktemp("dataset")
    script = [
        sys.executable,
        str(EXAMPLES / "docstring_dataset.py"),
        "--output-dir",
        str(folder),
    ]
    printed = subprocess.run(script, check=True, capture_output=True, text=True).stdout
    splits = {}
    for split in ("train", "validation"):
        records = [
            json.loads(line)["messages"]
            for line in (folder / f"{split}.jsonl").read_text().splitlines()
        ]
        assert all(
            [turn["role"] for turn in record] == ["user", "assistant"]
            for record in records
        )
        splits[split] = {
            record[0]["content"]: record[1]["content"] for record in records
        }
        assert len(splits[split]) == len(records)
    return SimpleNamespace(folder=folder, splits=splits, printed=printed)


def test_dataset_is_large_and_the_same_every_time(dataset, tmp_path, monkeypatch):
    counts = load_example("docstring_dataset", monkeypatch).write_dataset(tmp_path)
    assert counts["train"] > 2500
    assert counts["validation"] > 200
    assert dataset.printed == "".join(
        f"{split}: {count} records\n" for split, count in counts.items()
    )
    for name in ("train.jsonl", "validation.jsonl"):
        assert (tmp_path / name).read_bytes() == (dataset.folder / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "train.jsonl",
        "validation.jsonl",
    ]


def test_answers_are_docstrings_of_public_objects(dataset):
    answers = {**dataset.splits["train"], **dataset.splits["validation"]}
    assert all(40 <= len(answer) <= 400 for answer in answers.values())
    names = [
        re.fullmatch(r"What does `([\w.]+)` do\?", question)[1] for question in answers
    ]
    assert not [
        name for name in names if any(part.startswith("_") for part in name.split("."))
    ]
    import textwrap

    answer = answers["What does `textwrap.dedent` do?"]
    assert answer.splitlines()[0] == textwrap.dedent.__doc__.splitlines()[0]
    assert not any(question.startswith("What does `idlelib.") for question in answers)


def test_no_validation_answer_resembles_a_training_answer(dataset):
    def triples(text):
        words = re.sub(r"\W+", " ", text.lower()).split()
        return set(zip(words, words[1:], words[2:], strict=False))

    trained = [triples(answer) for answer in dataset.splits["train"].values()]
    for question, answer in dataset.splits["validation"].items():
        own = triples(answer)
        assert max(len(own & other) for other in trained) < 0.5 * max(1, len(own)), (
            question
        )


def test_models_are_hugging_face_folders_whose_template_trains_the_answer(
    quickstart, dataset, tmp_path
):
    run = quickstart.Quickstart(tmp_path / "run", quickstart.Settings(vocab_size=400))
    run.claim_folder()
    run.data.mkdir()
    for split in ("train", "validation"):
        lines = (
            (dataset.folder / f"{split}.jsonl").read_text().splitlines(keepends=True)
        )
        (run.data / f"{split}.jsonl").write_text("".join(lines[:200]))
    for name in ("teacher", "student"):
        run.build_model(name)
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "student_init")
    assert len(tokenizer) == 400
    assert (
        tokenizer.get_vocab()
        == AutoTokenizer.from_pretrained(run.folder / "teacher_init").get_vocab()
    )
    model = AutoModelForCausalLM.from_pretrained(run.folder / "student_init")
    assert model.config.vocab_size == 400
    assert model.config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    examples = TokenizedDataset(
        DataConfig(data=DatasetConfig(file_path=str(run.data / "validation.jsonl"))),
        tokenizer,
        512,
        400,
    )
    (question, answer), *_ = dataset.splits["validation"].items()
    assert trained_text(examples[0], tokenizer) == (
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n«{answer}<|im_end|>»\n"
    )

    weights = run.folder / "student_init" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    run.build_model("student")
    assert weights.stat().st_mtime_ns == before


def test_steps_that_are_done_are_skipped(quickstart, tmp_path, monkeypatch, capsys):
    run = quickstart.Quickstart(tmp_path, quickstart.Settings())
    lines = []

    def record(line, check):
        lines.append(line)
        return SimpleNamespace(returncode=len(lines) - 1)

    monkeypatch.setattr(subprocess, "run", record)
    run.cache_logits("validation")
    run.cache_logits("validation")
    assert len(lines) == 1
    assert lines[0][:2] == [sys.executable, str(EXAMPLES / "compute_topk_logits.py")]
    assert "model.tensor_model_parallel_size=2" in lines[0]
    printed = capsys.readouterr().out
    assert f"output_path={tmp_path}/cache/validation_CHUNK_ID.jsonl" in printed
    assert "cache_validation: done before" in printed
    with pytest.raises(
        SystemExit,
        match="the step student_kd failed with status 1; see its message above",
    ):
        run.train(
            "student_kd", "student_init", run.cache_keys(), 1.0, epochs=1, lr=1e-3
        )
    assert not (tmp_path / "student_kd.done").exists()


def test_a_folder_holds_one_setting(quickstart, tmp_path):
    quickstart.Quickstart(tmp_path / "run", quickstart.Settings()).claim_folder()
    quickstart.Quickstart(tmp_path / "run", quickstart.Settings()).claim_folder()
    with pytest.raises(
        SystemExit,
        match=r"made with seed 1234 \(now 7\), scale 1.0 \(now 0.5\); give another",
    ):
        quickstart.Quickstart(
            tmp_path / "run", quickstart.Settings(seed=7, scale=0.5)
        ).claim_folder()
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(
        SystemExit,
        match="holds other files; give an --output-dir that is new or empty",
    ):
        quickstart.Quickstart(tmp_path, quickstart.Settings()).claim_folder()


@pytest.mark.parametrize(
    "folder", ["/plain/folder-1.0", "/it's (a) dir, x=1", "/a\\b/[c]{d}: e", "/größe"]
)
def test_paths_survive_hydras_grammar(quickstart, folder):
    (override,) = OverridesParser.create().parse_overrides(
        [f"key={{train: [{quickstart.quoted(Path(folder))}]}}"]
    )
    assert override.value() == {"train": [folder]}
