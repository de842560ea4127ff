"""Render conversations by a tokenizer's chat template: dates, tools and forms of tool calls."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from nemo_kd.config import DataError
from nemo_kd.config.data import DatasetConfig

Message = dict[str, Any]

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_KNOWN_FIELDS = ("role", "content", "tool_calls", "tool_call_id")
_DIRECTIVES = "aAwdbBmyYHIMSfzZjUWpcxXeDFTRn"
_PRINTS_DATE = "strftime_now"


def prints_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if a chat template of the tokenizer prints today's date."""
    return _PRINTS_DATE in str(tokenizer.chat_template)


def fixed_date(
    settings: DatasetConfig,
    tokenizer: PreTrainedTokenizerBase,
    recorded: str | None = None,
) -> str | None:
    """Return the date that templates print: as configured, else as recorded, else today.

    None: the template prints no date.
    """
    if settings.date is None and prints_date(tokenizer):
        return recorded or date.today().isoformat()
    return settings.date


def reasoning_field(message: Message) -> str:
    """Return the first field with the reasoning of a message, empty without one."""
    found = (name for name in REASONING_FIELDS if isinstance(message.get(name), str))
    return next(found, "")


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template with the tool definitions of a conversation.

    Attributes:
        day: date that the template prints as today's (ISO 8601); None: today.
    """

    tokenizer: PreTrainedTokenizerBase
    tools: Sequence[Any] | None = None
    day: str | None = None

    @cached_property
    def source(self) -> str:
        """Return the template's text. A macro in front replaces the function `strftime_now`, because
        transformers passes no functions to templates."""
        text: str = self.tokenizer.get_chat_template(tools=self.tools)
        if self.day is None or _PRINTS_DATE not in text:
            return text
        day = date.fromisoformat(self.day)
        directives = [flag + letter for letter in _DIRECTIVES for flag in ("%", "%-")]
        replaced = "".join(
            f".replace({directive!r}, {day.strftime(directive)!r})"
            for directive in directives
        )
        macro = f"{{% macro {_PRINTS_DATE}(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}"
        return f"{macro}\n{text}"

    def render(self, messages: Sequence[Message], **options: Any) -> Any:
        """Call `tokenizer.apply_chat_template`; text unless `options` say otherwise.

        Raises:
            DataError: the template fails or refuses the conversation.
        """
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=self.tools,
                chat_template=self.source,
                **{"tokenize": False, **options},
            )
        # A template is a foreign program and can raise anything: 1/0 in it is a ZeroDivisionError.
        except Exception as error:
            reason = (str(error) or type(error).__name__)[:500]
            if self.tools and "'function'" not in str(self.tools):
                reason += (
                    '; tools may have to be {"type": "function", "function": {...}}'
                )
            raise DataError(
                f"the chat template cannot render this conversation: {reason}"
            ) from error

    def render_any(self, messages: Sequence[Message]) -> tuple[list[Message], str]:
        """Render the first form of the messages that the template accepts; return both.

        Templates differ in what a turn of tool calls without text needs as its content (null or an
        empty text) and in how they take arguments (an object or JSON text).

        Raises:
            DataError: the template accepts none.
        """
        forms = [
            [_call_form(message, content, as_text) for message in messages]
            for content in (None, "")
            for as_text in (False, True)
        ]
        if not any(message.get("tool_calls") for message in messages):
            forms = forms[:1]
        accepted = []
        for form in forms:
            try:
                text = self.render(form)
            except DataError as error:
                refusal = error
                continue
            accepted.append((_num_python_texts(messages, text), form, text))
            if not accepted[-1][0]:
                break
        if not accepted:
            raise refusal
        _, form, text = min(accepted, key=lambda each: each[0])
        return form, text

    def unread_fields(self, messages: Sequence[Message], text: str) -> Counter[str]:
        """Count the other fields of messages without which the messages' text is the same."""
        fields = Counter(
            (name, message["role"])
            for message in messages
            for name in message
            if name not in (*_KNOWN_FIELDS, reasoning_field(message))
        )
        unread: Counter[str] = Counter()
        for (name, role), number in fields.items():
            without = [
                {key: one[key] for key in one if (key, one["role"]) != (name, role)}
                for one in messages
            ]
            with contextlib.suppress(DataError):
                if self.render(without) == text:
                    reason = f"field `{name}` of {role} messages, which nothing reads"
                    unread[reason] = number
        return unread


def _num_python_texts(messages: Sequence[Message], text: str) -> int:
    """Count the arguments that a template for JSON text prints as Python writes an object."""
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    functions = [call["function"] for call in calls]
    return sum(
        text.count(str(each["arguments"])) for each in functions if each["arguments"]
    )


def _call_form(message: Message, content: str | None, as_text: bool) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return message
    changed = dict(message)
    if not message.get("content"):
        changed["content"] = content
    if as_text:
        changed["tool_calls"] = [_with_text(call) for call in calls]
    return changed


def _with_text(call: Any) -> Any:
    """Return a tool call whose arguments are JSON text."""
    if not isinstance(call, dict):
        return call
    if "function" in call:
        return {**call, "function": _with_text(call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        return call
    return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
