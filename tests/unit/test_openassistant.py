"""preprocess_openassistant: the bytes that NeMo-Aligner's script writes of the same trees."""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path

import huggingface_hub
import pytest

from nemo_kd.cli import preprocess_openassistant as command
from nemo_kd.config import DataError
from nemo_kd.tools.openassistant import preprocess_openassistant


@pytest.fixture
def same_process(monkeypatch):
    """A command does not end this process with its children and process group."""
    monkeypatch.setattr("nemo_kd.run.endings.end_children", lambda: None)
    monkeypatch.setattr("nemo_kd.run.endings._process_group", lambda: None)


TAIL = (
    '"system": "A chat between a curious user and an artificial intelligence assistant. '
    "The assistant gives helpful, detailed, and polite answers to the user's questions.\", "
    '"mask": "User", "type": "VALUE_TO_TEXT"}\n'
)


def message(role: str, text: str, *replies: dict, **scores: float) -> dict:
    made = {"message_id": text, "text": text, "role": role, "replies": list(replies)}
    if scores:
        # Attributes stand in another order, and there are others.
        values = {name: {"value": value, "count": 3} for name, value in scores.items()}
        made["labels"] = {"spam": {"value": 0.0, "count": 3}} | values
    return made


def tree(prompt: dict) -> dict:
    return {"message_tree_id": "x", "tree_state": "growing", "prompt": prompt}


def write_trees(path: Path, trees: list[dict]) -> Path:
    data = "".join(json.dumps(one) + "\n" for one in trees).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


RICH = tree(
    message(
        "prompter",
        'Wie heißt "∑"?\n',
        message(
            "assistant",
            "Sum 🙂",
            message(
                "prompter",
                "And ∏?",
                message("assistant", "Product\u2028", humor=1.0, quality=0.875),
                message("assistant", "No labels"),
                quality=1.0,
            ),
            message("prompter", "Thanks"),
            creativity=0.1,
            humor=0.125,
            toxicity=0.375,
            quality=0.625,
        ),
        message("assistant", "Σ", spam=1.0),
        quality=0.5,
    )
)
USER = '{"conversations": [{"value": "Wie heißt \\"∑\\"?\\n", "from": "User", "label": null}, '
# Python rounds halves to even: 0.625, 0.375, 0.125 and 0.875 of 4 are 2, 2, 0 and 4.
SUM = '{"value": "Sum 🙂", "from": "Assistant", "label": "quality:2,toxicity:2,humor:0,creativity:0"}'
NEXT = '{"value": "And ∏?", "from": "User", "label": null}'
RICH_LINES = (
    f'{USER}{SUM}, {NEXT}, {{"value": "Product\u2028", "from": "Assistant", "label": "quality:4,humor:4"}}], {TAIL}'
    f'{USER}{SUM}, {NEXT}, {{"value": "No labels", "from": "Assistant"}}], {TAIL}'
    f'{USER}{SUM}, {{"value": "Thanks", "from": "User", "label": null}}], {TAIL}'
    f'{USER}{{"value": "Σ", "from": "Assistant", "label": ""}}], {TAIL}'
)


@pytest.mark.parametrize("name", ["trees.jsonl", "trees.jsonl.gz"])
def test_every_path_of_a_tree_is_a_record(tmp_path, name):
    source = write_trees(tmp_path / name, [RICH])
    counts = preprocess_openassistant(str(source), tmp_path)
    assert (tmp_path / "train.jsonl").read_bytes() == b""  # 95% of one tree is none
    assert (tmp_path / "val.jsonl").read_bytes() == RICH_LINES.encode()
    assert counts == {"trees": 1, "val": 4}


def test_trees_are_shuffled_and_split_as_with_the_seed_10(tmp_path):
    answer = {number: message("assistant", f"a{number}") for number in range(41)}
    prompts = [
        message("prompter", f"q{number}", answer[number]) for number in range(41)
    ]
    prompts[7]["replies"] = []
    source = write_trees(tmp_path / "t.jsonl", [tree(one) for one in prompts])
    counts = preprocess_openassistant(str(source), tmp_path)
    order = [f"q{number}" for number in range(41)]
    random.seed(10)
    random.shuffle(order)
    for split, expected in (("train", order[:38]), ("val", order[38:])):
        lines = (tmp_path / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        found = [json.loads(line)["conversations"][0]["value"] for line in lines]
        assert found == [text for text in expected if text != "q7"]
    assert counts["prompts without a reply"] == 1
    assert counts["train"] + counts["val"] == 40


def test_a_path_ends_before_what_is_no_message(tmp_path):
    prompt = message("prompter", "q", message("assistant", "a", {"deleted": True}))
    source = write_trees(tmp_path / "t.jsonl", [tree(prompt)])
    preprocess_openassistant(str(source), tmp_path)
    (line,) = (tmp_path / "val.jsonl").read_text().splitlines()
    texts = [turn["value"] for turn in json.loads(line)["conversations"]]
    assert texts == ["q", "a"]


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        (tree(message("system", "q")), "'system'"),
        ({"text": "q", "role": "prompter"}, "'replies'"),  # the file of messages
        (tree(message("prompter", "q") | {"replies": None}), "NoneType"),
    ],
)
def test_what_is_no_tree_is_named_with_its_line(tmp_path, broken, named):
    source = write_trees(tmp_path / "t.jsonl", [RICH, broken])
    with pytest.raises(DataError) as error:
        preprocess_openassistant(str(source), tmp_path)
    assert str(error.value).startswith(f"{source}:2: not a message tree of OpenAssist")
    assert named in str(error.value)
    assert "trees.jsonl.gz" in str(error.value)


def test_a_file_of_something_else_is_refused(tmp_path):
    source = write_trees(tmp_path / "t.jsonl", [{"messages": []}])
    with pytest.raises(
        DataError, match="no message has a reply; give OpenAssistant's"
    ):
        preprocess_openassistant(str(source), tmp_path)


@pytest.mark.parametrize(
    "option", ["-dir", "--output_directory", "--output-directory"]
)
@pytest.mark.usefixtures("same_process")
def test_the_command_downloads_the_trees_once(tmp_path, monkeypatch, capsys, option):
    folder = tmp_path / "data" / "oasst"
    asked = []

    def download(repository, name, repo_type, local_dir):
        asked.append((repository, repo_type))
        write_trees(local_dir / name, [RICH])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(sys, "argv", ["preprocess_openassistant", option, str(folder)])
    command.main()
    command.main()
    assert asked == [("OpenAssistant/oasst1", "dataset")]
    assert (folder / "val.jsonl").read_bytes() == RICH_LINES.encode()
    assert "val    4" in capsys.readouterr().out


@pytest.mark.usefixtures("same_process")
def test_without_a_network_the_command_names_the_option(tmp_path, monkeypatch, capsys):
    def download(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(
        sys, "argv", ["preprocess_openassistant", "-dir", str(tmp_path)]
    )
    with pytest.raises(SystemExit, match="2"):
        command.main()
    error = capsys.readouterr().err
    assert error.startswith("error: --input: 2023-04-12_oasst_all.trees.jsonl.gz of ")
    assert error.endswith("give the file that another machine has downloaded\n")
