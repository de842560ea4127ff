"""Read chat records as conversations in one canonical form. Nothing here depends on tokens."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import Any

from nemo_kd.config import DataError
from nemo_kd.config.data import DatasetConfig

Message = dict[str, Any]

TURN_WEIGHTS = ("weight", "train", "training", "step_loss_mask", "loss")
"""Fields of a message that take it out of the loss with 0 or false: of OpenAI and Mistral, of
axolotl (two), of slime, and of ms-swift."""
UNTRAINED_TURN = "assistant turn with weight 0"

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
"""Role of every speaker in ShareGPT's records. A `function_call` is the JSON text of tool calls."""


@dataclass(frozen=True)
class Conversation:
    """OpenAI messages in canonical form.

    Attributes:
        messages: objects without null or empty fields. `content` is a text, or None in a turn of
            tool calls only. `arguments` of tool calls are objects.
        tools: definitions of tools; None without any.
        trained_turns: places of the assistant messages that count in the loss.
        left_out: a reason for each part of the record that is left out on purpose.
    """

    messages: list[Message]
    tools: list[Any] | None
    trained_turns: frozenset[int]
    left_out: tuple[str, ...] = ()

    @classmethod
    def read(
        cls, turns: Any, record: dict[str, Any], config: DatasetConfig
    ) -> Conversation:
        """Return the conversation of a record.

        Args:
            turns: its messages, in OpenAI's or ShareGPT's form, or their JSON text.
            record: its other fields may hold a system prompt and definitions of tools.

        Raises:
            DataError: the record has another shape, or a part that is not a text.
        """
        turns = decoded(turns)
        if not isinstance(turns, list) or not turns:
            raise DataError(
                f"`messages` must be a list of at least one message, found {str(turns)[:80]!r}"
            )
        messages: list[Message] = []
        trained_turns = set()
        left_out = []
        system = _system_message(record, turns, config)
        for number, turn in enumerate([*system, *turns], start=-len(system)):
            try:
                message = _canonical(turn)
                is_trained = pop_weight(message)
            except DataError as error:
                raise DataError(f"message {number} {error}") from error
            if message["role"] == "assistant":
                if is_trained:
                    trained_turns.add(len(messages))
                else:
                    left_out.append(UNTRAINED_TURN)
            messages.append(message)
        tools = _tools(record, config.tools_key)
        return cls(messages, tools, frozenset(trained_turns), tuple(left_out))


def question_turns(record: dict[str, Any], config: DatasetConfig) -> list[Message]:
    """Return the messages of a question with its answer.

    Raises:
        DataError: a field is not a text.
    """
    prompt = record.get(config.prompt_key)
    question = record[config.question_key]
    answer = record[config.answer_key]
    for text in (prompt or "", question, answer):
        if not isinstance(text, str):
            raise DataError(
                f"`{config.question_key}`, `{config.answer_key}` and the field of "
                f"{config.KEY}.prompt_key must be texts, found {str(text)[:80]!r}"
            )
    return [
        {"role": "user", "content": f"{prompt}\n{question}" if prompt else question},
        {"role": "assistant", "content": answer},
    ]


def _canonical(turn: Any) -> Message:
    """Return a message in canonical form.

    Raises:
        DataError: it has another shape.
    """
    message = _without_empty(turn if isinstance(turn, dict) else {})
    if isinstance(message.get("from"), str):
        message = _of_speaker(message)
    if message.get("role") == "function":
        message["role"] = "tool"
    if "function_call" in message:
        if "tool_calls" in message:
            raise DataError("has both `tool_calls` and the older `function_call`")
        message["tool_calls"] = [message.pop("function_call")]
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(map(_text_of_part, content))
    calls = message.get("tool_calls", [])
    if (
        not isinstance(message.get("role"), str)
        or not isinstance(calls, list)
        or not (isinstance(content, str) or (content is None and calls))
    ):
        raise DataError(
            "must be an object with a `role`, and a text `content` or `tool_calls`, found "
            f"{str(turn)[:80]!r}"
        )
    message["content"] = content
    if calls:
        message["tool_calls"] = [_tool_call(call) for call in calls]
    return message


def _of_speaker(message: Message) -> Message:
    """Return a turn of ShareGPT, {from, value}, as a message.

    Raises:
        DataError: the speaker is unknown.
    """
    speaker = message.pop("from")
    value = message.pop("value", None)
    role = SPEAKERS.get(speaker.lower())
    if role is None:
        raise DataError(
            f"is from {speaker!r}, which is none of {', '.join(SPEAKERS)}; rename the speaker, or "
            "use format=conversations if these are NeMo's"
        )
    if speaker.lower() != "function_call":
        return message | {"role": role, "content": value}
    calls = decoded(value)
    return message | {
        "role": role,
        "tool_calls": calls if isinstance(calls, list) else [calls],
    }


def _text_of_part(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) else None
    if isinstance(text, str) and part == {"type": "text", "text": text}:
        return text
    raise DataError(
        f"has a part of `content` that is not a text, found {str(part)[:80]!r}; only parts "
        '{"type": "text", "text": ...} can be used'
    )


def _tool_call(call: Any) -> dict[str, Any]:
    """Return a tool call as {type, function: {name, arguments}}, with its other fields.

    Raises:
        DataError: it has no name, or arguments that are neither an object nor its JSON text.
    """
    call = call if isinstance(call, dict) else {}
    # Older records hold the function without the object around it.
    outer = call if "function" in call else {"function": call}
    function = outer["function"] if isinstance(outer["function"], dict) else {}
    arguments = decoded(function.get("arguments") or {})
    if not isinstance(function.get("name"), str) or not isinstance(arguments, dict):
        raise DataError(
            "has a tool call that is not an object with a `function`, which needs a text `name`, "
            f"and `arguments` as an object or its JSON text, found {str(call)[:200]!r}"
        )
    return (
        {"type": "function"}
        | outer
        | {"function": function | {"arguments": arguments}}
    )


def pop_weight(message: Message) -> bool:
    """Remove the weights of a message; return False if one takes the turn out of the loss.

    Raises:
        DataError: a weight is neither 0 nor 1, or holds for a part of the message.
    """
    is_trained = True
    for name in TURN_WEIGHTS:
        weight = message.pop(name, None)
        if weight not in (None, 0, 1):
            raise DataError(
                f"has `{name}`: {weight!r}, which must be 0 (not trained) or 1"
            )
        is_trained &= weight != 0
    if "train_detail" in message:
        raise DataError(
            f"has `train_detail`: {str(message['train_detail'])[:80]}, weights of parts of a text, "
            "which cannot be used; give the whole turn `train`, or token ids with a `loss_mask`"
        )
    return is_trained


def _system_message(
    record: dict[str, Any], turns: list[Any], config: DatasetConfig
) -> list[Message]:
    """Return the system prompt beside the messages as a message, none if there is none.

    Raises:
        DataError: it is not a text, or the messages have another one.
    """
    text = record.get(config.system_key)
    if not text:
        return []
    if not isinstance(text, str):
        raise DataError(
            f"`{config.system_key}` must be a text, found {str(text)[:80]!r}"
        )
    first = turns[0] if isinstance(turns[0], dict) else {}
    if first.get("role", first.get("from")) not in ("system", "developer"):
        return [{"role": "system", "content": text}]
    if first.get("content", first.get("value")) == text:
        return []
    raise DataError(
        f"`{config.system_key}` and the first message hold two system prompts; join them"
    )


def _tools(record: dict[str, Any], key: str) -> list[Any] | None:
    """Return the record's tool definitions, which are a list or its JSON text."""
    tools = decoded(record.get(key) or [])
    if not isinstance(tools, list):
        raise DataError(
            f"`{key}` must be a list of tool definitions, or its JSON text, found "
            f"{str(tools)[:80]!r}"
        )
    return tools or None


def decoded(value: Any) -> Any:
    """Return what JSON text stands for, and any other value as it is."""
    if isinstance(value, str):
        # orjson would round integers of more than 64 bits.
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(value)
    return value


def _without_empty(value: Any) -> Any:
    """Return a value without fields that are null or an empty list or object, at any depth.

    The arguments of tool calls stay as they are.
    """
    if isinstance(value, list):
        return [_without_empty(each) for each in value]
    if not isinstance(value, dict):
        return value
    cleaned = {
        name: inner if name == "arguments" else _without_empty(inner)
        for name, inner in value.items()
    }
    return {
        name: inner for name, inner in cleaned.items() if inner not in (None, [], {})
    }
