"""Datasets of every record format: which tokens they become, and what is counted or refused."""

from __future__ import annotations

import json
import random
from collections import Counter
from types import SimpleNamespace

import pytest

from nemo_kd.cache.layout import CacheError
from nemo_kd.config import ConfigError, DataError
from nemo_kd.config.data import DataConfig, DatasetConfig
from nemo_kd.data.dataset import (
    OTHER_SPLIT,
    SKIPPED_BY_FUNCTION,
    TokenizedDataset,
)
from nemo_kd.data.tokenizer import trained_text
from nemo_kd.tools import cache_origin
from tests.tiny_tokenizer import CHATML, CHATML_TOOLS, train_tokenizer

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Yo"}
CHAT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Yo<|im_end|>»"
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]


@pytest.fixture
def dataset(tmp_path):
    def open_dataset(*records, template=CHATML, **config):
        path = tmp_path / "d.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        data = DataConfig(data=DatasetConfig(file_path=str(path), **config))
        return TokenizedDataset(data, train_tokenizer(512, template), 4096, 512)

    return open_dataset


def text_of(dataset, index=0):
    # A row ends with its last trained token here; the line break behind it is dropped.
    return trained_text(dataset[index], dataset.tokenizer).removesuffix("\n")


@pytest.mark.parametrize(
    ("record", "config", "kind", "text"),
    [
        ({"messages": [USER, ASSISTANT]}, {}, "messages", CHAT),
        ({"chat": [USER, ASSISTANT]}, {"input_key": "chat"}, "messages", CHAT),
        ({"conversations": [USER, ASSISTANT]}, {}, "messages", CHAT),
        ({"messages": json.dumps([USER, ASSISTANT])}, {}, "messages", CHAT),
        ({"conversations": SHAREGPT}, {}, "sharegpt", CHAT),
        ({"conversations": SHAREGPT, "type": "math"}, {}, "sharegpt", CHAT),
        ({"messages": SHAREGPT}, {}, "sharegpt", CHAT),
        ({"chat": SHAREGPT}, {"input_key": "chat"}, "sharegpt", CHAT),
        (
            {"conversations": [{**turn, "from": turn["from"].upper()} for turn in SHAREGPT]},
            {"format": "sharegpt"},
            "sharegpt",
            CHAT,
        ),
        (
            {"conversations": SHAREGPT, "mask": "human"},
            {},
            "conversations",
            "<extra_id_0>System\n\n<extra_id_1>human\nHi\n<extra_id_1>gpt\n«Yo\n<extra_id_1>»",
        ),
        ({"question": "Hi", "answer": "Yo"}, {}, "question_answer", CHAT),
        (
            {"q": "Hi", "a": "Yo", "input": "no", "output": "no"},
            {"format": "question_answer", "question_key": "q", "answer_key": "a"},
            "question_answer",
            CHAT,
        ),
        (
            {"s": "Be kind.", "p": "Answer:", "question": "Hi", "answer": "Yo"},
            {"system_key": "s", "prompt_key": "p"},
            "question_answer",
            "<|im_start|>system\nBe kind.<|im_end|>\n"
            + CHAT.replace("Hi", "Answer:\nHi"),
        ),
        (
            {"question": "Hi", "answer": "Yo"},
            {"prompt_template": "Q: {question} A: {answer}", "label_key": "answer"},
            "prompt_template",
            "Q: Hi A:« Yo<|im_end|>»",
        ),
        (
            {"input": "Hi", "output": "Yo", "answer": "1", "question": "2"},
            {},
            "prompt_template",
            "Hi« Yo<|im_end|>»",
        ),
        (
            {"instruction": "Say", "input": "Hi", "output": "Yo"},
            {},
            "alpaca",
            "### Instruction:\nSay\n\n### Input:\nHi\n\n### Response:\n«Yo<|im_end|>»",
        ),
        (
            {"instruction": "Say", "input": "", "output": "Yo"},
            {},
            "alpaca",
            "### Instruction:\nSay\n\n### Response:\n«Yo<|im_end|>»",
        ),
        ({"instruction": "Say", "output": "Yo"}, {"format": "alpaca"}, "alpaca", "### Instruction:\nSay\n\n### Response:\n«Yo<|im_end|>»"),
        (
            {"instruction": "Say", "input": "Hi", "output": "Yo"},
            {"format": "prompt_template"},
            "prompt_template",
            "Hi« Yo<|im_end|>»",
        ),
        ({"text": "All of it"}, {}, "text", "A«ll of it<|im_end|>»"),
        (
            {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1]},
            {},
            "tokens",
            None,
        ),
    ],
)  # fmt: skip
def test_formats_are_told_by_their_fields(dataset, record, config, kind, text):
    others = ("instruction", "input_ids", "output", "question", "answer", "messages")
    nulls = dict.fromkeys((*others, "conversations", "text", "mask", "type"))
    rows = dataset(record, nulls | record, **config)
    assert rows.formats([0, 1]) == {kind}
    if text is not None:
        assert text_of(rows) == text


@pytest.mark.parametrize(
    ("record", "trained"),
    [
        ({"loss_mask": [0, 0, 1, 1, 0]}, [False, False, True, True, False]),
        ({"loss_mask": [False, False, True, True, False]}, [0, 0, 1, 1, 0]),
        ({"labels": [-100, -100, 7, 8, -100]}, [0, 0, 1, 1, 0]),
        ({"labels": [5, 6, 7, 8, 9]}, [1, 1, 1, 1, 1]),
    ],
)
def test_token_records_keep_ids_and_mask(dataset, record, trained):
    ids = [5, 6, 7, 8, 9]
    example = dataset({"input_ids": ids, **record})[0]
    assert example.tokens_S.tolist() == ids[:-1]
    assert example.labels_S.tolist() == ids[1:]
    assert example.loss_mask_S.tolist() == [float(flag) for flag in trained[1:]]
    assert not example.left_out


def test_padding_of_token_records_is_left_out(dataset):
    ids = {"input_ids": [0, 5, 6, 7, 0], "attention_mask": [0, 1, 1, 1, 0]}
    example = dataset({**ids, "labels": [-100, -100, 6, 7, -100]})[0]
    assert example.tokens_S.tolist() == [5, 6]
    assert example.labels_S.tolist() == [6, 7]
    assert example.loss_mask_S.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"input_ids": [5, 6]}, "with either `loss_mask` .* or `labels`"),
        (
            {"input_ids": [5, 6], "loss_mask": [0, 1], "labels": [-100, 6]},
            "with either `loss_mask` .* or `labels`",
        ),
        ({"input_ids": [5, -1], "loss_mask": [0, 1]}, "must be ids of tokens"),
        ({"input_ids": [5, 6], "loss_mask": [1]}, "as long as `input_ids`"),
        ({"input_ids": [5, 6.5], "loss_mask": [0, 1]}, "`input_ids` must be a list"),
        ({"input_ids": [[5], [6, 7]], "loss_mask": [0, 1]}, "`input_ids` must be"),
        ({"input_ids": "5 6", "loss_mask": [0, 1]}, "`input_ids` must be a list"),
        ({"input_ids": [5, 6], "loss_mask": [0, 2]}, r"`loss_mask`\[1\] is 2"),
        ({"input_ids": [5, 6], "loss_mask": [0, 0.5]}, "`loss_mask` must be a list"),
        (
            {"input_ids": [5, 6, 7], "labels": [6, 7, -100]},
            r"`labels`\[0\] is 6 at the token 5; .* not shifted",
        ),
        ({"input_ids": [5, 512], "loss_mask": [0, 1]}, "outside the model's"),
        (
            {
                "input_ids": [5, 6, 7],
                "loss_mask": [0, 1, 1],
                "attention_mask": [1, 2, 2],
            },
            "`attention_mask` must be 1 for one stretch",
        ),
        (
            {
                "input_ids": [5, 6, 7],
                "loss_mask": [0, 1, 1],
                "attention_mask": [1, 0, 1],
            },
            "`attention_mask` must be 1 for one stretch",
        ),
    ],
)
def test_other_token_records_are_refused(dataset, record, message):
    with pytest.raises(DataError, match=rf"d\.jsonl:1: .*{message}"):
        dataset(record)[0]


@pytest.mark.parametrize(
    ("record", "config", "message"),
    [
        (
            {"instruction": "a", "context": "b", "response": "c"},
            {},
            "the field `output` .* fields instruction, context, response",
        ),
        ({"x": 1}, {"format": "messages"}, "format=messages .* with the fields x"),
        ({"x": 1}, {"format": "tokens"}, "format=tokens .* with the fields x"),
        ({"x": 1}, {"format": "question_answer"}, "format=question_answer"),
        ({"question": 3, "answer": "Yo"}, {}, "must be texts, found '3'"),
        (
            {"conversations": [{"from": "Bob", "value": "Hi"}]},
            {"format": "sharegpt"},
            "message 0 is from 'Bob'",
        ),
        ({"messages": 5}, {}, "`messages` must be a list"),
        ({"messages": [USER, ASSISTANT]}, {"split": "train"}, "has no field `split`"),
    ],
)
def test_records_that_do_not_fit_are_refused(dataset, record, config, message):
    with pytest.raises(DataError, match=rf"d\.jsonl:1: .*{message}"):
        dataset(record, **config)[0]


def test_fields_that_nothing_reads_are_counted(dataset):
    extra = {"id": 7, "empty": "", "nothing": None, "split": "train"}
    chat = {"messages": [USER, ASSISTANT], "system": "Be kind.", "tools": []}
    records = [
        {**chat, **extra},
        {"conversations": SHAREGPT, "mask": "human", "tools": [{}], **extra},
        {"input": "Hi", "output": "Yo", "instruction": "Say", "score": 3},
        {"question": "Hi", "answer": "Yo", "messages": None, "input": "x"},
    ]
    rows = dataset(*records)
    unread = [
        {reason.split("`")[1] for reason in rows[index].left_out}
        for index in range(len(rows))
    ]
    assert unread == [{"id", "split"}, {"tools", "id", "split"}, {"score"}, {"input"}]
    assert dataset(*records, format="prompt_template")[2].left_out.total() == 2
    assert "split" not in str(dataset(records[0], split="train")[0].left_out)


CHAT_RECORD = {"messages": [USER, ASSISTANT]}
ALPACA = {"instruction": "Say", "output": "Yo"}


@pytest.mark.parametrize(
    ("record", "config"),
    [
        (ALPACA | {"system": "Be kind."}, {}),
        (ALPACA | {"history": [["a", "b"]]}, {}),
        (CHAT_RECORD | {"functions": [{"name": "f"}]}, {}),
        (CHAT_RECORD | {"system": "Be kind."}, {"system_key": "s"}),
        ({"question": "Hi", "answer": "Yo", "system_prompt": "Be kind."}, {}),
        (CHAT_RECORD | {"weight": 0}, {}),
        ({"text": "All of it", "train": False}, {}),
    ],
)
def test_fields_that_must_not_be_lost_are_refused(dataset, record, config):
    name = list(record)[-1]
    with pytest.raises(DataError, match=rf"d\.jsonl:1: `{name}`: .* would be lost"):
        dataset(record, **config)[0]
    rows = dataset(record | {name: ""}, record | {name: None}, **config)
    assert not rows[0].left_out + rows[1].left_out


def test_another_field_does_not_stand_for_the_one_that_input_key_names(dataset):
    rows = dataset({"conversations": SHAREGPT}, input_key="dialogue")
    with pytest.raises(DataError, match=r"d\.jsonl:1: .* fields conversations"):
        rows[0]


def test_only_records_of_the_asked_split_are_used(dataset):
    chat = {"messages": [USER, ASSISTANT]}
    rows = dataset(
        {**chat, "split": "train"}, {**chat, "split": "test"}, split="train"
    )
    assert text_of(rows) == CHAT
    assert rows[1] == OTHER_SPLIT
    assert rows.formats([0, 1]) == {"messages"}


FUNCTION = """
def turn(record):
    if record["answer"] == "skip":
        return None
    if record["answer"] == "ids":
        return {"input_ids": [5, 6], "labels": [-100, 6]}
    if record["answer"] == "list":
        return [record]
    return {"messages": [{"role": "user", "content": record["ask"]},
                         {"role": "assistant", "content": record["answer"]}]}
def two(record, other): ...
"""


def test_a_function_of_the_user_makes_the_records(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_records_1.py").write_text(FUNCTION)
    records = [
        {"ask": "Hi", "answer": answer}
        for answer in ("Yo", "skip", "ids", "list", 7)
    ] + [{}]  # fmt: skip
    rows = dataset(*records, record_function="my_records_1.turn")
    assert text_of(rows) == CHAT
    assert rows[1] == SKIPPED_BY_FUNCTION
    assert rows[2].labels_S.tolist() == [6]
    assert rows.formats(range(3)) == {"messages", "tokens"}
    with pytest.raises(DataError, match=r"d\.jsonl:4: .*must return a record .*dict"):
        rows[3]
    with pytest.raises(DataError, match=r"d\.jsonl:5: message 1 must be an object"):
        rows[4]
    with pytest.raises(DataError, match=r"d\.jsonl:6: .*failed: KeyError: 'answer'"):
        rows[5]
    (tmp_path / "my_records_2.py").write_text(FUNCTION + "\n# changed")
    other = dataset(*records, record_function="my_records_2.turn")
    assert rows.function_source != other.function_source
    for name, reason in (("two", "missing a required"), ("none", "no attribute")):
        with pytest.raises(
            ConfigError, match=rf"data\.data\.record_function: .*{name}.*{reason}"
        ):
            dataset(*records, record_function=f"my_records_1.{name}")


ALPHABET = [
    "<|im_start|>", "<|im_end|>", "assistant", "user\n", "{{ m }}", "{% if %}", "human", "gpt", "</s>",
    "<think>", "### Response:\n", "é", "日本", "🙂", "\u200b", "\\n", '"', "\n", " ", "word",
]  # fmt: skip


def random_text(rng):
    return "".join(rng.choices(ALPHABET, k=rng.randrange(1, 8))).strip() or "x"


def random_chat(rng):
    """Return messages, their ShareGPT form, and the texts that are trained."""
    messages = []
    for _ in range(rng.randrange(1, 4)):
        messages.append({"role": "user", "content": random_text(rng)})
        messages.append({"role": "assistant", "content": random_text(rng)})
    if rng.random() < 0.3:
        messages.insert(0, {"role": "system", "content": random_text(rng)})
    speakers = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = [
        {"from": speakers[message["role"]], "value": message["content"]}
        for message in messages
    ]
    return messages, turns


@pytest.mark.parametrize("seed", range(20))
def test_the_form_of_a_record_does_not_change_its_tokens(dataset, seed):
    """Against `apply_chat_template` of the messages."""
    rng = random.Random(seed)
    messages, turns = random_chat(rng)
    parts = [
        {**one, "content": [{"type": "text", "text": one["content"]}], "name": None}
        for one in messages
    ]
    records = [
        {"messages": messages},
        {"messages": parts},
        {"messages": json.dumps(messages), "tools": None},
        {"conversations": turns},
        {"conversations": turns, "messages": None},
    ]
    if messages[0]["role"] == "system":
        records.append({"system": messages[0]["content"], "messages": messages[1:]})
        records.append({"system": turns[0]["value"], "conversations": turns[1:]})
        messages_without = messages[1:]
    else:
        messages_without = messages
    if len(messages_without) == 2:
        question, answer = (one["content"] for one in messages_without)
        one = {"question": question, "answer": answer}
        if len(messages) == 3:
            one["system"] = messages[0]["content"]
        records.append(one)
    rows = dataset(*records)
    expected = rows.tokenizer.apply_chat_template(messages)["input_ids"]
    for index in range(len(rows)):
        example = rows[index]
        assert [*example.tokens_S.tolist(), int(example.labels_S[-1])] == expected
        assert (example.loss_mask_S == rows[0].loss_mask_S).all()
        assert example.left_out == Counter()


@pytest.mark.parametrize("seed", range(10))
def test_arguments_as_text_and_as_objects_are_the_same_tokens(dataset, seed):
    rng = random.Random(seed)
    arguments = {random_text(rng): random_text(rng), "n": rng.randrange(2**53)}
    records = []
    for form in (arguments, json.dumps(arguments), json.dumps(arguments, indent=1)):
        function = {"name": "f", "arguments": form}
        messages = [
            USER,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "call00001", "function": function}],
            },
        ]
        records.append({"messages": messages})
        messages = [USER, {"role": "assistant", "function_call": function}]
        records.append({"messages": messages})
    rows = dataset(*records, template=CHATML_TOOLS)
    texts = {text_of(rows, index) for index in range(len(rows))}
    (text,) = texts
    assert text.endswith("\n</tool_call><|im_end|>»")


@pytest.mark.parametrize(
    "field", ["weight", "train", "training", "step_loss_mask", "loss"]
)
def test_untrained_turns_are_out_of_the_loss_with_their_end(dataset, field):
    off = 0 if field in ("weight", "step_loss_mask") else False
    chat = [USER, ASSISTANT | {field: off}, USER, ASSISTANT]
    turns = [SHAREGPT[0], SHAREGPT[1] | {field: off}, *SHAREGPT]
    rows = dataset({"messages": chat}, {"conversations": turns})
    untrained = CHAT.replace("«", "").replace("»", "")
    for index in range(2):
        assert text_of(rows, index) == f"{untrained}\n{CHAT}"
        assert rows[index].left_out == {"assistant turn with weight 0": 1}


def test_weights_of_nemo_turns_are_honoured(dataset):
    turns = [SHAREGPT[0], SHAREGPT[1] | {"weight": 0, "id": 7}, *SHAREGPT]
    rows = dataset({"conversations": turns, "mask": "human"})
    assert text_of(rows).count("«") == 1
    assert text_of(rows).endswith("<extra_id_1>gpt\n«Yo\n<extra_id_1>»")
    assert rows[0].left_out == {
        "assistant turn with weight 0": 1,
        "field `id` of turns, which nothing reads": 1,
    }


@pytest.mark.parametrize(
    ("mask", "message"), [({}, "message 1"), ({"mask": "human"}, "turn 1")]
)
def test_weights_of_parts_of_a_turn_are_refused(dataset, mask, message):
    detail = [{"begin_offset": 0, "end_offset": 1, "train": False}]
    turns = [SHAREGPT[0], SHAREGPT[1] | {"train_detail": detail}]
    with pytest.raises(DataError, match=rf"d\.jsonl:1: {message} has `train_detail`"):
        dataset({"conversations": turns, **mask})[0]


def test_fields_of_messages_that_the_template_does_not_read_are_counted(dataset):
    named = CHATML.replace("m.role }}", "m.name or m.role }}")
    answer = ASSISTANT | {"name": "Ann", "refusal": "no", "score": 0.5, "date": None}
    record = {"messages": [USER, answer]}
    unread = {"name", "refusal", "score"}
    for template, fields in ((CHATML, unread), (named, unread - {"name"})):
        assert dataset(record, template=template)[0].left_out == {
            f"field `{field}` of assistant messages, which nothing reads": 1
            for field in fields
        }


def test_a_function_that_a_cache_names_is_not_run():
    formatting = {"record_function": "os.abort", "record_function_source": "sha256:0"}
    manifest = SimpleNamespace(
        dataset={"fingerprint": "x", "path": "x", "formatting": formatting}
    )
    with pytest.raises(CacheError, match=r"went through os\.abort, which is not run"):
        cache_origin._dataset_config([manifest], None)


def test_a_template_for_arguments_as_text_gets_json(dataset):
    template = CHATML_TOOLS.replace(
        "(call.function | tojson)", "(call.function.arguments)"
    ).replace("~ (call", "~ '' ~ (call")
    function = {"name": "f", "arguments": {"city": "Oslo"}}
    messages = [USER, {"role": "assistant", "tool_calls": [{"function": function}]}]
    rows = dataset({"messages": messages}, template=template, altered="count")
    assert '\n{"city": "Oslo"}\n' in text_of(rows)
    quoting = [{**USER, "content": str(function["arguments"])}, messages[1]]
    rows = dataset({"messages": quoting}, template=CHATML_TOOLS)
    assert '"arguments": {"city": "Oslo"}' in text_of(rows)
