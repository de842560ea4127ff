"""Turn OpenAI `messages` into token ids by the chat template, and mark the trained ones.

By default the tokens of every assistant turn's content and tool calls are trained, and the token that
ends the turn; headers such as `<|im_start|>assistant\\n`, line breaks between turns and all other
roles are not. A template that marks the assistant's text itself, with `{% generation %}`, decides
instead.
"""

from __future__ import annotations

import contextlib
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from nemo_kd.config import DataError
from nemo_kd.config.data import DatasetConfig
from nemo_kd.data.chat_template import REASONING_FIELDS, ChatTemplate, Message
from nemo_kd.data.conversation import Conversation
from nemo_kd.data.tokenizer import encode, special_ids
from nemo_kd.data.turns import RenderedConversation, Span, Text

_MARKS_ASSISTANT = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_REASONING_BLOCK = re.compile(r"<think>(.*?)</think>\s*", re.DOTALL)


class Rendered(NamedTuple):
    """A conversation as tokens.

    Attributes:
        trained: True for the tokens in the loss.
        left_out: texts that are left out on purpose, counted by reason.
    """

    ids: list[int]
    trained: list[bool]
    left_out: Counter[str]


def render_messages(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    settings: DatasetConfig,
) -> Rendered:
    """Render a conversation. Its ids are those of `tokenizer.apply_chat_template`.

    `loss_mask=per_turn` and `reasoning=keep` change the text of turns. A conversation that ends
    without an end-of-turn token gets the token that would follow, and trains it. A token that covers
    the last character of a header and the first of the content counts as content.

    Raises:
        DataError: no template, or a template that refuses the conversation, loses text that must not
            be lost, or renders a turn so that it cannot be located.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template, which `messages` need; add chat_template to its "
            f"folder, or give a file with one as {settings.KEY}.chat_template"
        )
    if settings.loss_mask == "nemo_chat":
        raise DataError(
            f"{settings.KEY}.loss_mask=nemo_chat is the mask of `conversations`, not of `messages`; "
            "use auto"
        )
    return _Renderer(conversation, tokenizer, settings).render()


def _without_reasoning(message: Message, left_out: Counter[str]) -> Message:
    if message["role"] != "assistant":
        return message
    kept = {
        key: value for key, value in message.items() if key not in REASONING_FIELDS
    }
    before, tag, after = (message.get("content") or "").rpartition("</think>")
    if tag:
        kept["content"] = after.lstrip()
    if before.strip() or len(kept) < len(message):
        left_out["reasoning dropped"] += 1
    return kept


def _as_system(message: Message) -> Message:
    if message["role"] != "developer":
        return message
    return {**message, "role": "system"}


class _Renderer:
    """Renders one conversation."""

    def __init__(
        self,
        conversation: Conversation,
        tokenizer: PreTrainedTokenizerBase,
        settings: DatasetConfig,
    ) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self.left_out = Counter(conversation.left_out)
        self.template = ChatTemplate(tokenizer, conversation.tools, settings.date)
        self._without_tools = replace(self.template, tools=None)
        messages = conversation.messages
        if "developer" not in self.template.source:
            messages = [_as_system(message) for message in messages]
        if settings.reasoning == "drop":
            messages = [
                _without_reasoning(message, self.left_out) for message in messages
            ]
        self.conversation = RenderedConversation(self.template, messages)
        self.messages = self.conversation.messages
        self.left_out += self.template.unread_fields(
            self.messages, self.conversation.text
        )
        self.turns = [
            n
            for n, message in enumerate(self.messages)
            if message["role"] == "assistant"
        ]
        may_be_trained = self.turns
        if settings.loss_mask == "last_turn":
            may_be_trained = self.turns[-1:]
        self.trained_turns = [
            turn for turn in may_be_trained if turn in conversation.trained_turns
        ]
        self.is_marked = settings.loss_mask == "auto" and bool(
            _MARKS_ASSISTANT.search(self.template.source)
        )

    def render(self) -> Rendered:
        lost = self.conversation.lost()
        bodies: dict[int, str] = {}
        cut_turns: set[int] = set()
        if self.settings.loss_mask == "per_turn":
            bodies, lost = self._each_as_last(lost)
        if self.settings.reasoning == "keep":
            cut_turns = {text.message for text in lost if text.kind == "reasoning"}
            lost = [text for text in lost if text.kind != "reasoning"]
            self.is_marked &= not cut_turns
        for text in lost:
            self._account(text, lost)
        self._account_tools()
        whole = self.conversation.text
        tokens = self._tokenize(whole)
        marked = self._marked_by_template(tokens["input_ids"])
        spans = self._spans(tokens, all_turns=bool(bodies or cut_turns))
        stop = self._missing_stop(spans)
        for turn in cut_turns:
            body = bodies.get(turn, whole[slice(*spans[turn])])
            bodies[turn] = self._with_reasoning(turn, whole[: spans[turn][0]], body)
        if bodies:
            whole, spans = _replace(whole, spans, bodies)
            tokens = self._tokenize(whole)
        mask = self._mask(whole, tokens, marked, spans)
        return Rendered(
            [*tokens["input_ids"], *stop],
            mask + [True] * len(stop),
            self.left_out,
        )

    def _mask(
        self,
        text: str,
        tokens: Any,
        marked: Sequence[int],
        spans: dict[int, Span],
    ) -> list[bool]:
        mask = _Mask(tokens["offset_mapping"])
        if self.is_marked:
            mask.trained[:] = marked
        for turn, (start, end) in spans.items():
            if turn not in self.trained_turns:
                mask.set((start, end), False)
                continue
            if self.settings.loss_mask in ("qwen", "per_turn"):
                while end < len(text) and text[end].isspace():
                    end += 1
            if not self.is_marked:
                mask.set((start, end), True)
            for block in self._untrained_blocks(text, start, end):
                mask.set(block, False)
        flags: list[bool] = mask.trained.tolist()
        return flags

    def _tokenize(self, text: str) -> Any:
        return self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True
        )

    def _marked_by_template(self, ids: Sequence[int]) -> list[int]:
        """Return the assistant mask of a template that writes one.

        Raises:
            DataError: the tokens of the text are not those of the chat template.
        """
        expected = self.template.render(
            self.messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=self.is_marked,
        )
        if ids != list(expected["input_ids"]):
            raise DataError(
                "the chat template's text and its token ids disagree; the tokenizer adds tokens "
                "itself"
            )
        marks: list[int] = expected["assistant_masks"] if self.is_marked else []
        return marks

    def _spans(self, tokens: Any, all_turns: bool) -> dict[int, Span]:
        special = special_ids(self.tokenizer)
        special_spans = [
            span
            for token_id, span in zip(
                tokens["input_ids"], tokens["offset_mapping"], strict=True
            )
            if token_id in special
        ]
        spans = {}
        turns = self.turns if all_turns or self.is_marked else self.trained_turns
        if self.is_marked and self.settings.reasoning_loss == "train":
            turns = [turn for turn in turns if turn not in self.trained_turns]
        for turn in self.turns if all_turns else turns:
            span = self.conversation.turn_span(turn, special_spans)
            if self.settings.loss_mask in ("qwen", "per_turn"):
                start = self.conversation.written_start(turn)
                if start is None:
                    raise self._unfit(turn, "it writes no header in front of it")
                span = (start, span[1])
            if self.settings.loss_mask == "qwen":
                self._check_alone(turn, span)
            spans[turn] = span
        return spans

    def _check_alone(self, turn: int, span: Span) -> None:
        """Refuse `qwen` where a turn reads otherwise without the conversation."""
        inside = self.conversation.text[slice(*span)]
        try:
            alone = self._without_tools.render([self.messages[turn]])
        except DataError as error:
            raise self._unfit(turn, f"alone, {error}") from error
        if not alone.rstrip().endswith(inside):
            raise self._unfit(
                turn, f"alone it is rendered otherwise than here: {inside[:80]!r}"
            )

    def _unfit(self, turn: int, reason: str) -> DataError:
        return DataError(
            f"message {turn} (assistant): {self.settings.KEY}.loss_mask={self.settings.loss_mask} "
            f"does not fit the chat template: {reason}; use auto"
        )

    def _each_as_last(self, lost: list[Text]) -> tuple[dict[int, str], list[Text]]:
        """Return every turn as it is rendered as the last one, and the texts lost then."""
        lost = [text for text in lost if text.message not in self.turns]
        bodies = {}
        for turn in self.turns:
            messages = [{"role": "user", "content": "x"}, self.messages[turn]]
            short = RenderedConversation(self.template, messages)
            start = short.written_start(1)
            if start is None:
                raise self._unfit(turn, "it writes no header in front of it")
            bodies[turn] = short.text[start:].rstrip()
            lost += [
                replace(text, message=turn)
                for text in short.lost()
                if text.message == 1
            ]
        return bodies, lost

    def _with_reasoning(self, turn: int, header: str, body: str) -> str:
        """Return the text of a turn with the reasoning in front that the template cut."""
        message = self.messages[turn]
        name = next((name for name in REASONING_FIELDS if message.get(name)), None)
        if name is not None:
            block = f"<think>\n{message[name].strip()}\n</think>"
        else:
            before, tag, _ = message["content"].rpartition("</think>")
            block = before + tag
        if header.rstrip().endswith("<think>"):
            block = block.lstrip().removeprefix("<think>").lstrip()
        return f"{block}\n\n{body.lstrip()}"

    def _account(self, text: Text, lost: Sequence[Text]) -> None:
        """Count a text that the template leaves out or changes.

        Raises:
            DataError: such a text is to be refused.
        """
        role = self.messages[text.message]["role"]
        is_dropped = role != "assistant" and all(
            one in lost
            for one in self.conversation.texts
            if one.message == text.message
        )
        altered = self.settings.altered
        if altered is None:
            is_trained = text.message in self.trained_turns
            altered = "refuse" if is_trained or is_dropped else "count"
        if altered == "count":
            self.left_out[
                f"{text.kind} of {role} messages, changed by the chat template"
            ] += 1
            return
        key = self.settings.KEY
        remedy = f"use a template that renders it, or {key}.altered=count"
        if text.kind == "reasoning":
            remedy = (
                f"{key}.reasoning=keep writes it into the tokens, drop leaves it out, and "
                f"{key}.altered=count leaves it to the template"
            )
        raise DataError(
            f"message {text.message} ({role}): the chat template leaves out or changes the "
            f"{text.kind} {(text.before + text.after).strip()[:80]!r}; {remedy}"
        )

    def _account_tools(self) -> None:
        """Count tool definitions that the template leaves out."""
        if not self.template.tools:
            return
        try:
            text = self._without_tools.render(self.messages)
        except DataError:
            return
        if text != self.conversation.text:
            return
        if self.settings.altered == "refuse":
            raise DataError(
                "the chat template leaves out the tool definitions; use a template that renders "
                f"them, or {self.settings.KEY}.altered=count"
            )
        self.left_out["tool definitions, left out by the chat template"] += 1

    def _missing_stop(self, spans: dict[int, Span]) -> list[int]:
        """Return the token that would end the last turn of a template without an end of turns: the
        one that opens the next user's turn, or else the end of the sequence."""
        last = len(self.messages) - 1
        if last not in self.trained_turns or self.is_marked:
            return []
        if not self.conversation.has_open_end(last, spans[last]):
            return []
        text = self.conversation.text
        next_user = {"role": "user", "content": "x"}
        with contextlib.suppress(DataError):
            longer = self.template.render([*self.messages, next_user])
            following = encode(self.tokenizer, longer[len(text) :].lstrip())[:1]
            is_special = not special_ids(self.tokenizer).isdisjoint(following)
            if longer.startswith(text) and is_special:
                return following
        end = self.tokenizer.eos_token_id
        return [] if end is None else [end]

    def _untrained_blocks(self, text: str, start: int, end: int) -> Iterator[Span]:
        """Yield the think blocks of a turn that do not count in the loss."""
        setting = self.settings.reasoning_loss
        if setting == "train":
            return
        if text[:start].rstrip().endswith("<think>"):
            start = text.rindex("<think>", 0, start)
        for block in _REASONING_BLOCK.finditer(text, start, end):
            if setting == "exclude" or not block[1].strip():
                yield block.span()


class _Mask:
    """Trained tokens, set by spans of characters."""

    def __init__(self, offsets: Sequence[Span]) -> None:
        self._starts = [start for start, _ in offsets]
        self._ends = [end for _, end in offsets]
        self.trained = np.zeros(len(offsets), dtype=bool)

    def set(self, span: Span, flag: bool) -> None:
        first = bisect_right(self._ends, span[0])
        last = bisect_left(self._starts, span[1])
        self.trained[first:last] = flag


def _replace(
    text: str, spans: dict[int, Span], bodies: dict[int, str]
) -> tuple[str, dict[int, Span]]:
    """Return the text with other bodies of turns, and the spans of all turns there."""
    replaced = ""
    moved = {}
    done = 0
    for turn, (start, end) in sorted(spans.items()):
        replaced += text[done:start]
        body = bodies.get(turn, text[start:end])
        moved[turn] = (len(replaced), len(replaced) + len(body))
        replaced += body
        done = end
    return replaced + text[done:], moved
