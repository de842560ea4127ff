"""Render OpenAI `messages` by the chat template as token ids, and mark the trained ones.

Trained are the tokens of every assistant turn's content and tool calls, and the token that ends the
turn; headers such as `<|im_start|>assistant\\n`, line breaks between turns and all other roles are
not. A template that marks the assistant's text itself, with `{% generation %}`, decides instead.

Turns are located by rendering, never by searching text: the conversation is rendered again with
that turn's content replaced, and what differs between the two renders is the content. So no text
that a user typed can pass for a turn, and templates that rewrite the history (Qwen3 drops the
reasoning of earlier turns) are taken as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from transformers import PreTrainedTokenizerBase

from nemo_kd.config import DataError
from nemo_kd.data.tokenizer import special_ids

Message = dict[str, Any]
Span = tuple[int, int]

_MARKS_ASSISTANT = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def render_messages(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[Any] | None = None,
) -> tuple[list[int], list[bool]]:
    """Return the token ids of the whole conversation, and True for the trained ones.

    The ids are exactly `tokenizer.apply_chat_template(messages)`. A token that covers the last
    character of a header and the first of the content counts as content.

    Raises:
        DataError: no template, messages of another shape, or a template that refuses them, omits
            tool calls, or renders an assistant turn so that it cannot be located.
    """
    _check(messages, tokenizer)
    conversation = _Conversation(list(messages), tokenizer, tools)
    encoding = tokenizer(
        conversation.text, add_special_tokens=False, return_offsets_mapping=True
    )
    ids: list[int] = list(encoding["input_ids"])
    marked = bool(_MARKS_ASSISTANT.search(tokenizer.get_chat_template(tools=tools)))
    expected = _apply_template(
        tokenizer,
        conversation.messages,
        tools,
        return_dict=True,
        return_assistant_tokens_mask=marked,
    )
    if ids != list(expected["input_ids"]):
        raise DataError(
            "the chat template's text and its token ids disagree; the tokenizer adds tokens itself"
        )
    if marked:
        return ids, [bool(flag) for flag in expected["assistant_masks"]]
    offsets: list[Span] = encoding["offset_mapping"]
    special = special_ids(tokenizer)
    special_spans = [
        span
        for token_id, span in zip(ids, offsets, strict=True)
        if token_id in special
    ]
    trained = [False] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            first, last = conversation.turn_span(turn, special_spans)
            for position, (start, end) in enumerate(offsets):
                trained[position] |= start < last and end > first
    return ids, trained


def _apply_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    **options: Any,
) -> Any:
    """Call `tokenizer.apply_chat_template`.

    Raises:
        DataError: the template fails or refuses the conversation.
    """
    try:
        return tokenizer.apply_chat_template(list(messages), tools=tools, **options)
    # A template is a foreign program and can raise anything: 1/0 in it is a ZeroDivisionError.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise DataError(
            f"the chat template cannot render this conversation: {reason[:500]}"
        ) from error


def _check(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template, which `messages` need; add chat_template to its "
            "folder"
        )
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"`messages` must be a list of at least one message, found {str(messages)[:80]!r}"
        )
    for number, message in enumerate(messages):
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or not (
                isinstance(message.get("content"), str) or message.get("tool_calls")
            )
        ):
            raise DataError(
                f"message {number} must be an object with a `role`, and a text `content` or "
                f"`tool_calls`, found {str(message)[:80]!r}"
            )


@dataclass
class _Conversation:
    """A conversation with its rendered text. Positions are characters of that text."""

    messages: list[Message]
    tokenizer: PreTrainedTokenizerBase
    tools: Sequence[Any] | None

    def __post_init__(self) -> None:
        self.text = self._render(self.messages)
        self._stand_in = next(
            word for n in count() if (word := f"Qzx{n}kvJ") not in self.text
        )

    def turn_span(self, turn: int, special_spans: Sequence[Span]) -> Span:
        """Return the span of the assistant message `turn`, with its end-of-turn token."""
        content = self._content_span(turn)
        if content is None:
            span = self._written_span(turn)
        else:
            span = (content[0], self._end_of_turn(turn, content[1], special_spans))
        if span is None:
            raise DataError(
                f"message {turn} (assistant): the chat template changes the text around this "
                "turn's content, so its tokens cannot be told apart; render the conversation "
                "yourself and use input/output records"
            )
        for call in self.messages[turn].get("tool_calls") or ():
            function = call.get("function", call) if isinstance(call, dict) else None
            name = function.get("name") if isinstance(function, dict) else None
            if not isinstance(name, str) or name not in self.text[slice(*span)]:
                raise DataError(
                    f"message {turn} (assistant): the chat template does not render the tool call "
                    f"{name!r}; use a template with tool calls, or records without them"
                )
        return span

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> str:
        rendered: str = _apply_template(
            self.tokenizer,
            messages,
            self.tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        return rendered

    def _around(
        self, turn: int, stop: int | None = None, add_generation_prompt: bool = False
    ) -> tuple[str, str] | None:
        """Return the text before and after the content of `turn`, rendering `messages[:stop]`.

        The message's other fields (tool calls, reasoning) are left out, so they are in neither.
        None: the template refuses the changed message, or does not show its content exactly once.
        """
        message = self.messages[turn]
        changed: Message = {
            key: value for key, value in message.items() if key in ("role", "name")
        }
        changed["content"] = self._stand_in
        changed_messages = [
            *self.messages[:turn],
            changed,
            *self.messages[turn + 1 : stop],
        ]
        try:
            rendered = self._render(changed_messages, add_generation_prompt)
        except DataError:
            return None
        before, *others = rendered.split(self._stand_in)
        return (before, others[0]) if len(others) == 1 else None

    def _content_span(self, turn: int) -> Span | None:
        around = self._around(turn)
        if around is None:
            return None
        before, after = around
        fits = len(before) + len(after) <= len(self.text)
        if (
            not fits
            or not self.text.startswith(before)
            or not self.text.endswith(after)
        ):
            return None
        return len(before), len(self.text) - len(after)

    def _end_of_turn(
        self, turn: int, content_end: int, special_spans: Sequence[Span]
    ) -> int:
        """Return the end of the special token that follows the content after white space only.

        If the template ends turns with plain text (a ChatML template on a tokenizer without
        `<|im_end|>`), return the end of that text.
        """
        following = next(
            (span for span in special_spans if span[0] >= content_end), None
        )
        if following is not None and not self.text[content_end : following[0]].strip():
            return following[1]
        around = self._around(turn, stop=turn + 1)
        closing = around[1].rstrip() if around else ""
        return (
            content_end + len(closing)
            if self.text.startswith(closing, content_end)
            else content_end
        )

    def _written_span(self, turn: int) -> Span | None:
        """Return the turn from the end of its generation prompt on.

        For templates that write more than the content: a think block that is empty without
        reasoning, or tool calls that cannot be left out. Positions count from the end of the
        previous message's content, because a template may move earlier text.
        """
        if turn == 0:
            return None
        whole = self._around(turn - 1)
        prompt = self._around(turn - 1, stop=turn, add_generation_prompt=True)
        done = self._around(turn - 1, stop=turn + 1)
        if (
            whole is None
            or prompt is None
            or done is None
            or not self.text.endswith(whole[1])
        ):
            return None
        written = done[1].rstrip()
        if not written.startswith(prompt[1]) or not whole[1].startswith(written):
            return None
        start = len(self.text) - len(whole[1])
        return start + len(prompt[1]), start + len(written)
