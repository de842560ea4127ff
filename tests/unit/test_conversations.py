"""Chat records of every form become one canonical conversation."""

from __future__ import annotations

import json

import pytest

from nemo_kd.config import DataError
from nemo_kd.config.data import DatasetConfig
from nemo_kd.data.conversation import Conversation


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def call(arguments, **fields):
    return {
        "type": "function",
        "function": {"name": "add", "arguments": arguments},
        **fields,
    }


def read(turns, **record):
    return Conversation.read(turns, record, DatasetConfig(file_path="x"))


def test_canonical_messages_are_unchanged():
    messages = [
        {"role": "system", "content": "Be kind."},
        user("1 + 2?"),
        assistant(None, tool_calls=[call({"a": 1, "b": None}, id="call00001")]),
        {"role": "tool", "content": "3", "tool_call_id": "call00001", "name": "add"},
        assistant("3", reasoning_content="1 + 2 = 3"),
    ]
    before = json.dumps(messages)
    conversation = read(messages)
    assert conversation.messages == messages
    assert json.dumps(messages) == before
    assert conversation.trained_turns == {2, 4}
    assert conversation.tools is None
    assert not conversation.left_out


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ('{"a": 1}', {"a": 1}),
        ('{"città": "Zürich", "n": 123456789012345678901234567890}',) * 2,
        ("", {}),
        ("{}", {}),
        (None, {}),
        ({"a": ""}, {"a": ""}),
        ('{"a": "{\\"b\\": 1}"}', {"a": '{"b": 1}'}),
    ],
)
def test_arguments_are_decoded_once(written, meant):
    meant = json.loads(meant) if isinstance(meant, str) else meant
    (message,) = read([assistant("", tool_calls=[call(written)])]).messages
    assert message["tool_calls"] == [call(meant)]


@pytest.mark.parametrize("empty", [None, [], {}])
@pytest.mark.parametrize("name", ["tool_calls", "function_call", "reasoning_content"])
def test_empty_fields_are_as_if_absent(name, empty):
    assert read([user("Hi"), assistant("Yo", **{name: empty})]).messages == [
        user("Hi"),
        assistant("Yo"),
    ]


def test_a_struct_of_nulls_is_as_if_absent():
    """Parquet stores one for a message without the field."""
    nulls = {"function_call": {"name": None, "arguments": None}}
    conversation = read([assistant("Yo", weight=None, **nulls)])
    assert conversation.messages == [assistant("Yo")]


def test_legacy_functions_become_tools():
    function = {"name": "add", "arguments": '{"a": 1}'}
    messages = read(
        [
            assistant(None, function_call=function),
            {"role": "function", "name": "add", "content": "3"},
        ]
    ).messages
    assert messages == [
        assistant(None, tool_calls=[call({"a": 1})]),
        {"role": "tool", "name": "add", "content": "3"},
    ]


@pytest.mark.parametrize(
    "field",
    [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"step_loss_mask": 0}],
)
def test_turns_with_weight_0_are_not_trained(field):
    key = next(iter(field))
    conversation = read(
        [
            user("Hi") | {key: 0},
            assistant("bad", **field),
            user("Again"),
            assistant("good", **{key: 1}),
        ]
    )
    assert conversation.trained_turns == {3}
    assert conversation.left_out == ("assistant turn with weight 0",)
    assert all(set(one) == {"role", "content"} for one in conversation.messages)


def test_system_beside_the_messages_comes_first():
    system = {"role": "system", "content": "Be kind."}
    turns = [user("Hi"), assistant("Yo")]
    expected = [system, *turns]
    conversation = read(turns, system="Be kind.")
    assert conversation.messages == expected
    assert conversation.trained_turns == {2}
    assert read(expected, system="Be kind.").messages == expected
    assert read(turns, system="").messages == turns
    assert read(turns, system=None).messages == turns
    with pytest.raises(DataError, match="hold two system prompts; join them"):
        read(expected, system="Be rude.")
    with pytest.raises(DataError, match="`system` must be a text, found '3'"):
        read(turns, system=3)


def test_text_parts_are_joined():
    parts = [
        {"type": "text", "text": "1 + "},
        {"type": "text", "text": "2?", "image_url": None},
    ]
    assert read([user(parts)]).messages == [user("1 + 2?")]


def test_messages_may_be_json_text():
    messages = [user("Hi"), assistant("Yo")]
    assert read(json.dumps(messages)).messages == messages


def test_sharegpt_turns():
    turns = [
        {"from": "system", "value": "Be kind."},
        {"from": "human", "value": "1 + 2?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "3", "weight": 0},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes"},
    ]
    conversation = read(turns)
    assert conversation.messages == [
        {"role": "system", "content": "Be kind."},
        user("1 + 2?"),
        assistant(None, tool_calls=[call({"a": 1})]),
        {"role": "tool", "content": "3"},
        assistant("3"),
        user("Sure?"),
        assistant("Yes"),
    ]
    assert conversation.trained_turns == {2, 6}


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ("x", "message 0 must be an object with a `role`"),
        (user(3), "message 0 must be an object with a `role`, and a text `content`"),
        (user(None), "message 0 must be .* `content` or `tool_calls`"),
        (
            user([{"type": "image_url", "image_url": {"url": "x"}}]),
            "message 0 has a part of `content` that is not a text, found .*image_url",
        ),
        (user(["x"]), "that is not a text"),
        (assistant("", weight=0.5), "message 0 has `weight`: 0.5, which must be 0"),
        (assistant("", train="no"), "`train`: 'no', which must be 0"),
        (assistant("", tool_calls=[call("{")]), "its JSON text, found .*'{'"),
        (assistant("", tool_calls=[call('"{}"')]), "an object or its JSON text"),
        (assistant("", tool_calls=[call([1])]), "an object or its JSON text"),
        (assistant("", tool_calls=["add"]), "which needs a text `name`"),
        (
            assistant("", tool_calls=[call({})], function_call={"name": "add"}),
            "has both `tool_calls` and the older `function_call`",
        ),
        (
            {"from": "User 1", "value": "x"},
            "is from 'User 1', which is none of human,",
        ),
        ({"from": "human", "value": 3}, "message 0 must be an object"),
    ],
)
def test_other_messages_are_refused(turn, message):
    with pytest.raises(DataError, match=message):
        read([turn])
