"""OpenAI `messages` through the tokenizer's chat template, and which of their tokens are trained.

Trained are the tokens of every assistant turn's content and its end-of-turn token; headers such as
`<|im_start|>assistant\\n`, line breaks between turns and all other roles are not.

Where a turn's content lies is found by rendering, never by searching text: the conversation is rendered a second time
with that content replaced, and what differs between the two renders is the content. So no text that a user typed can
pass for a turn, and templates that rewrite the history (Qwen3 drops the reasoning of earlier turns) are taken as they
are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from nemo_kd.data.records import DataError

Message = dict[str, Any]
Span = tuple[int, int]

_REPLACEMENTS = ("\u2983zq\u2984", "\u2986xk\u2985")
"""Two contents that differ in every character, for the comparison; the second serves where content equals the first."""


def render_messages(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any] | None = None
) -> tuple[list[int], list[bool]]:
    """Token ids of the whole conversation, and for each whether it is trained.

    The ids are exactly `tokenizer.apply_chat_template(messages)`.

    Raises:
        DataError: no template, messages of another shape, a template that refuses them, or one that renders an
            assistant turn so that its content cannot be told from the rest.
    """
    _check(messages, tokenizer)
    text = _render(messages, tokenizer, tools)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = encoding["input_ids"]
    expected = tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=True, return_dict=True)["input_ids"]
    if ids != list(expected):
        raise DataError("the chat template's text and its token ids disagree; the tokenizer adds tokens of its own")
    end_ids = _end_of_turn_ids(tokenizer)
    trained = [False] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        first, last = _content_span(messages, turn, text, tokenizer, tools)
        for position, (start, end) in enumerate(encoding["offset_mapping"]):
            trained[position] |= start < last and end > first
        # The next special token ends the turn, and so does white space that the template puts before it: the model has
        # to write both. Nothing that a user typed stands there.
        after = next((i for i, (start, _) in enumerate(encoding["offset_mapping"]) if start >= last), len(ids))
        stop = after
        while (
            stop < len(ids) and ids[stop] not in end_ids and not text[slice(*encoding["offset_mapping"][stop])].strip()
        ):
            stop += 1
        if stop < len(ids) and ids[stop] in end_ids:
            trained[after : stop + 1] = [True] * (stop + 1 - after)
    return ids, trained


def _check(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template, which `messages` need; add chat_template to its folder")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"`messages` must be a list of at least one message, found {str(messages)[:80]!r}")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(
                f"message {number} must be an object with a `role` and a `content`, found {str(message)[:80]!r}"
            )
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise DataError(
                f"message {number} ({message['role']}): `content` must be a text, found {str(message.get('content'))[:80]!r}"
            )


def _render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any] | None) -> str:
    try:
        rendered = tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False)
    except (TemplateError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise DataError(f"the chat template cannot render this conversation: {error}") from error
    assert isinstance(rendered, str)
    return rendered


def _content_span(
    messages: Sequence[Message],
    turn: int,
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[Any] | None,
) -> Span:
    """Characters of `text` that come from the content and tool calls of message `turn`."""
    spans = []
    for replacement in _REPLACEMENTS:
        changed = {
            key: value for key, value in messages[turn].items() if key not in ("tool_calls", "reasoning_content")
        }
        changed["content"] = replacement
        other = _render([*messages[:turn], changed, *messages[turn + 1 :]], tokenizer, tools)
        where = other.find(replacement)
        if where < 0 or other.find(replacement, where + 1) >= 0:
            continue
        before, after = other[:where], other[where + len(replacement) :]
        if text.startswith(before) and text.endswith(after) and len(before) + len(after) <= len(text):
            spans.append((len(before), len(text) - len(after)))
    if len(set(spans)) != 1:
        spans = [span for span in (_reasoning_span(messages, turn, text, tokenizer, tools),) if span]
    if not spans:
        raise DataError(
            f"message {turn} (assistant): the chat template changes the text around this turn's content, so its tokens "
            "cannot be told apart; render the conversation yourself and use input/output records"
        )
    return spans[0]


def _reasoning_span(
    messages: Sequence[Message],
    turn: int,
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[Any] | None,
) -> Span | None:
    """For templates that write something of their own before a content without reasoning (an empty think block).

    Then everything from the generation prompt on is the model's: the span begins where the prompt for this turn ends.
    """
    try:
        prompt = tokenizer.apply_chat_template(
            list(messages[:turn]), tools=tools, tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, TypeError, KeyError, AttributeError, ValueError):
        return None
    changed = {"role": "assistant", "content": _REPLACEMENTS[0]}
    other = _render([*messages[:turn], changed, *messages[turn + 1 :]], tokenizer, tools)
    _, found, after = other.partition(_REPLACEMENTS[0])
    if not found or not text.endswith(after) or not text.startswith(prompt):
        return None
    return (len(prompt), len(text) - len(after)) if len(prompt) <= len(text) - len(after) else None


def _end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that may end a turn: every special token of the tokenizer."""
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special | set(tokenizer.all_special_ids)
