"""Prompts, ground truth and stop tokens of a dataset's records; samples and their summary."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pytest

from nemo_kd.answers.outcomes import Outcome, Verdict
from nemo_kd.answers.prompts import (
    Question,
    first_examples,
    question_of,
    stop_ids,
)
from nemo_kd.answers.samples import check_responses, summarize, write_samples
from nemo_kd.batch import Example
from nemo_kd.config import DataError
from nemo_kd.config.data import DataConfig, DatasetConfig
from nemo_kd.data.dataset import TokenizedDataset
from tests import tiny_tokenizer
from tests.tiny_tokenizer import train_sentencepiece_tokenizer, train_tokenizer

QUESTION = {"role": "user", "content": "Count to two"}
ANSWER = {"role": "assistant", "content": "One, two."}
CHAT = {"messages": [QUESTION, ANSWER, QUESTION, {**ANSWER, "content": "1, 2"}]}


def open_dataset(
    folder: Path, record: dict[str, Any], tokenizer: Any, **settings: Any
) -> TokenizedDataset:
    path = folder / "data.jsonl"
    path.write_text(f"\n{json.dumps(record)}\n")
    data = DataConfig(data=DatasetConfig(file_path=str(path), **settings))
    return TokenizedDataset(data, tokenizer, 256, len(tokenizer))


def only_example(dataset: TokenizedDataset) -> Example:
    example = dataset[0]
    assert isinstance(example, Example)
    return example


@pytest.mark.parametrize("template", ["CHATML", "LLAMA3", "ZEPHYR", "MISTRAL"])
def test_the_prompt_is_the_templates_own_generation_prompt(
    tmp_path: Path, template: str
) -> None:
    chat_template = getattr(tiny_tokenizer, template)
    tokenizer = train_tokenizer(512, chat_template)
    dataset = open_dataset(tmp_path, {**CHAT, "answer": 2}, tokenizer)
    question = question_of(dataset, only_example(dataset), "answer")
    expected = tokenizer.apply_chat_template(
        CHAT["messages"][:-1], tokenize=False, add_generation_prompt=True
    )
    found = tokenizer.decode(question.prompt_ids)
    # Mistral's template writes the space before an answer with the answer.
    assert found in (expected, f"{expected} ")
    assert question.answer == "2"
    assert question.reference == "1, 2"


def test_a_prompt_template_leaves_out_the_label(tmp_path: Path) -> None:
    tokenizer = train_sentencepiece_tokenizer()
    record = {"input": "Say two", "output": "two"}
    dataset = open_dataset(tmp_path, record, tokenizer)
    question = question_of(dataset, only_example(dataset), None)
    assert tokenizer.decode(question.prompt_ids) == "Say two"
    assert question.answer is None
    assert question.reference == "two"


def test_the_token_that_ends_a_turn_stops_a_response(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(512, tiny_tokenizer.LLAMA3)
    example = only_example(open_dataset(tmp_path, CHAT, tokenizer))
    names = ["<|im_end|>", "<|eot|>"]  # the tokenizer's, the template's
    assert stop_ids(tokenizer, [example], {3}) == {
        3,
        *tokenizer.convert_tokens_to_ids(names),
    }
    # It trains the line break after the turn as well.
    tokenizer = train_tokenizer(512, tiny_tokenizer.CHATML_MARKED)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = "<|endoftext|>"
    example = only_example(open_dataset(tmp_path, CHAT, tokenizer))
    found = stop_ids(tokenizer, [example])
    assert found == {*tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])}


CONVERSATION = {
    "system": "",
    "mask": "User",
    "conversations": [
        {"from": "User", "value": "Count to two"},
        {"from": "Assistant", "value": "1, 2"},
    ],
}


def test_the_start_of_a_turn_stops_a_conversation(tmp_path: Path, caplog: Any) -> None:
    """The format trains it after an answer; it need not be a special token."""
    tokenizer = copy.deepcopy(train_tokenizer())
    unknown = open_dataset(tmp_path, CONVERSATION, tokenizer)
    assert stop_ids(tokenizer, [only_example(unknown)]) == {tokenizer.eos_token_id}
    message = r"no trained turn .* ends a response; the last one ends with .*a_id_1>'"
    assert re.search(message, caplog.text)
    caplog.clear()
    tokenizer.add_tokens(["<extra_id_1>"])
    known = open_dataset(tmp_path, CONVERSATION, tokenizer)
    found = stop_ids(tokenizer, [only_example(known)])
    assert found == {tokenizer.eos_token_id, len(tokenizer) - 1}
    assert not caplog.text


def test_an_added_token_of_spaces_stops_no_response(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(train_tokenizer())
    tokenizer.add_tokens(["   "])
    spaces = open_dataset(
        tmp_path, {"input": "a", "output": "b   "}, tokenizer, add_eos=False
    )
    example = only_example(spaces)
    assert len(tokenizer) - 1 in example.labels_S
    assert stop_ids(tokenizer, [example]) == {tokenizer.eos_token_id}


def test_an_ordinary_token_stops_no_response(tmp_path: Path) -> None:
    tokenizer = train_tokenizer()
    plain = open_dataset(
        tmp_path, {"input": "a", "output": "b"}, tokenizer, add_eos=False
    )
    assert stop_ids(tokenizer, [only_example(plain)]) == {tokenizer.eos_token_id}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            CHAT,
            "data.jsonl:2: the field 'answer', which must hold the right answer, is missing or "
            "empty; the record has the fields messages",
        ),
        (
            {**CHAT, "answer": ["4"]},
            "data.jsonl:2: the field `answer` must be a text or a number, found \"['4']\"",
        ),
        ({**CHAT, "answer": True}, "must be a text or a number, found 'True'"),
        ({**CHAT, "answer": None}, "the record has the fields messages, answer"),
        ({**CHAT, "answer": " "}, "the record has the fields messages, answer"),
    ],
)
def test_a_record_without_a_usable_answer_is_refused(
    tmp_path: Path, record: dict[str, Any], message: str
) -> None:
    dataset = open_dataset(tmp_path, record, train_tokenizer())
    with pytest.raises(DataError) as caught:
        question_of(dataset, only_example(dataset), "answer")
    assert str(caught.value).endswith(message)


@pytest.mark.parametrize("answer_field", [None, "answer"])
@pytest.mark.parametrize("key", ["messages", "chat"])
@pytest.mark.parametrize("stored", [list, json.dumps])
def test_a_last_question_without_a_turn_of_the_assistant_is_refused(
    tmp_path: Path, answer_field: str | None, key: str, stored: Any
) -> None:
    """Else the question before it would be answered, and compared with the answer to this one."""
    record = {key: stored([QUESTION, ANSWER, QUESTION]), "answer": "1, 2"}
    dataset = open_dataset(tmp_path, record, train_tokenizer(), input_key=key)
    with pytest.raises(DataError, match=r"data.jsonl:2: the last turn is the user's"):
        question_of(dataset, only_example(dataset), answer_field)


def test_a_dataset_of_questions_alone_is_refused(tmp_path: Path) -> None:
    record = {"messages": [QUESTION], "answer": "1, 2"}
    dataset = open_dataset(tmp_path, record, train_tokenizer())
    with pytest.raises(
        DataError, match="none of .* needs one more turn of the assist"
    ):
        first_examples(dataset, None, "data.data.file_path")


@dataclass
class FakeResponse:
    token_ids: list[int]
    entropy_nats: list[float] = field(default_factory=list)
    stopped: bool = True


def test_samples_are_checked_summarized_and_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = train_tokenizer()
    prompt = tokenizer.encode("Say two:")
    questions = [Question(number, prompt, "two") for number in (3, 5, 6)]
    texts = [tokenizer.encode(text) for text in (" two", " three three", "")]
    cut = [1.0] * len(texts[1])
    responses = [
        FakeResponse(texts[0], [0.5] * (len(texts[0]) + 1)),
        FakeResponse(texts[1], cut, stopped=False),
        FakeResponse(texts[2], [2.0]),
    ]
    outcomes = {
        " two": Outcome.CORRECT,
        " three three": Outcome.WRONG,
        "": Outcome.UNDECIDED,
    }
    samples = check_responses(
        questions,
        responses,
        tokenizer,
        lambda text, _: Verdict(float(text == " two"), outcomes[text]),
    )
    assert [sample.outcome for sample in samples] == [*outcomes.values()]
    (warning,) = caplog.messages
    assert warning == (
        "warning: comparison exceeded its limits: responses to the records [6] count as not "
        "correct"
    )
    num_nats = 0.5 * (len(texts[0]) + 1) + len(cut) + 2.0
    assert summarize(samples) == {
        "num_examples": 3,
        "accuracy": pytest.approx(1 / 3),
        "reward": pytest.approx(1 / 3),
        "mean_response_length": pytest.approx(sum(map(len, texts)) / 3),
        "mean_response_length_correct": len(texts[0]),
        "mean_response_length_incorrect": len(texts[1]) / 2,
        "entropy": pytest.approx(num_nats / (sum(map(len, texts)) + 2)),
        "stopped": pytest.approx(2 / 3),
    }
    write_samples(tmp_path / "samples.jsonl", samples)
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert orjson.loads(lines[0]) == {
        "index": 3,
        "prompt": "Say two:",
        "response": " two",
        "answer": "two",
        "correct": True,
        "reward": 1.0,
        "outcome": "correct",
        "num_tokens": len(texts[0]),
        "mean_entropy": 0.5,
        "stopped": True,
        "reference": "",
    }
    assert [orjson.loads(line)["index"] for line in lines] == [3, 5, 6]


def test_means_over_nothing_are_missing() -> None:
    tokenizer = train_tokenizer()
    responses = [FakeResponse([300]), FakeResponse([301])]
    questions = [Question(0, [5]), Question(1, [5])]
    found = summarize(check_responses(questions, responses, tokenizer, None))
    assert found["accuracy"] is None
    assert found["entropy"] is None
    assert found["mean_response_length"] == 1
    assert found["mean_response_length_correct"] is None
