"""Render a conversation by a chat template, and find every text and every turn in the result.

No text is searched for. A mark is inserted into the middle of each text of each message, and the
conversation is rendered again. Without the marks both renders are equal, so that a mark stands where
its own text stands: no text passes for another one. A text without a mark is lost.

Turns are located in the same way: in one more render, stand-ins replace all assistant turns. What
stands there between a stand-in and the nearest marks is the turn's header and its end, compared with
the same place of the conversation. Three renders serve any number of turns.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from nemo_kd.config import DataError
from nemo_kd.data.chat_template import ChatTemplate, Message, reasoning_field

Span = tuple[int, int]

_TAGS = re.compile(r"(</?think>)")

Change = Callable[[str, str], str]


def change_texts(message: Message, change: Change) -> Message:
    """Return a copy of a message in which `change(kind, text)` replaces every text.

    Kinds are content, reasoning and tool call. Names and keys of arguments are texts, too.
    """
    changed = dict(message)
    content = message.get("content")
    if isinstance(content, str):
        pieces = [content]
        if message["role"] == "assistant":
            pieces = _TAGS.split(content)
        last = max(
            (n for n, piece in enumerate(pieces) if piece == "</think>"), default=0
        )
        for n in range(0, len(pieces), 2):
            pieces[n] = change("reasoning" if n < last else "content", pieces[n])
        changed["content"] = "".join(pieces)
    name = reasoning_field(message)
    if name:
        changed[name] = change("reasoning", message[name])
    if message.get("tool_calls"):
        in_call = partial(change, "tool call")
        changed["tool_calls"] = [
            _change_call(call, in_call) for call in message["tool_calls"]
        ]
    return changed


def _change_call(call: Any, change: Callable[[str], str]) -> Any:
    if not isinstance(call, dict):
        return call
    if "function" in call:
        return {**call, "function": _change_call(call["function"], change)}
    parts = {
        key: _change_all(call[key], change)
        for key in ("name", "arguments")
        if key in call
    }
    return {**call, **parts}


def _change_all(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_change_all(item, change) for item in value]
    if isinstance(value, dict):
        return {change(key): _change_all(item, change) for key, item in value.items()}
    return value


@dataclass
class Text:
    """One text of a message, in two halves around its mark.

    Attributes:
        message: index of the message.
        kind: content, reasoning or tool call.
        places: of its mark, in characters of the rendered conversation.
    """

    message: int
    kind: str
    before: str
    after: str
    places: list[int] = field(default_factory=list)

    def stands_in(self, rendered: str) -> bool:
        """Return True if the whole text stands around one of its places, plain or as JSON; white
        space around it does not count."""
        before = self.before.lstrip()
        after = self.after.rstrip()
        return any(
            rendered.endswith(write(before), 0, place)
            and rendered.startswith(write(after), place)
            for place in self.places
            for write in (str, _json_text, partial(_json_text, ensure_ascii=True))
        )


def _json_text(text: str, ensure_ascii: bool = False) -> str:
    return json.dumps(text, ensure_ascii=ensure_ascii)[1:-1]


class RenderedConversation:
    """A conversation with its rendered text; positions are characters of it.

    Attributes:
        messages: in the form that the template accepts.
        text: the rendered conversation.
        texts: of all messages, in their order, with the places found.

    Raises:
        DataError: the template refuses the conversation.
    """

    def __init__(self, template: ChatTemplate, messages: Sequence[Message]) -> None:
        self.template = template
        self.messages, self.text = template.render_any(messages)
        used = f"{self.text}{self.messages}"
        word = next(word for n in count() if (word := f"Qzx{n}kvJ") not in used)
        self._word = word
        self._mark = re.compile(rf"{word}(\d+)J")
        self.texts: list[Text] = []
        self._marked(range(0))
        self._find(range(len(self.texts)))
        self._order = sorted(
            (text for text in self.texts if len(text.places) == 1),
            key=lambda text: text.places[0],
        )
        self._own: dict[int, list[int]] = {}
        for number, text in enumerate(self._order):
            self._own.setdefault(text.message, []).append(number)
        self._starts: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._known: dict[str, int] = {}
        self._closing: str | None = None
        turns = [
            n for n, one in enumerate(self.messages) if one["role"] == "assistant"
        ]
        between_turns = self._locate(turns)
        between_turns |= self._locate(
            [n for n in turns if not self.messages[n].get("tool_calls")]
        )
        for turn in between_turns:
            self._locate([turn])

    def lost(self) -> list[Text]:
        """Return the texts that the template leaves out or changes."""
        return [text for text in self.texts if not text.stands_in(self.text)]

    def turn_span(self, turn: int, special_spans: Sequence[Span]) -> Span:
        """Return the span of an assistant turn with its end-of-turn token.

        Raises:
            DataError: the template changes the text around the turn.
        """
        start = self._starts.get(turn)
        if start is None:
            start = self.written_start(turn)
        end = self._ends.get(turn)
        if end is None:
            end = self._written_end(turn)
        else:
            end = self._end_of_turn(end, turn, special_spans)
        if start is None or end is None or start > end:
            raise DataError(
                f"message {turn} (assistant): the chat template changes the text around this "
                "turn's content, so its tokens cannot be told apart; render the conversation "
                "yourself and use input/output records"
            )
        return start, end

    def has_open_end(self, turn: int, span: Span) -> bool:
        """Return True if the template writes nothing that ends a turn of this span."""
        return self._ends.get(turn) == span[1]

    def written_start(self, turn: int) -> int | None:
        """Return the end of the turn's generation prompt.

        It differs from the start of `body` where the template writes an empty think block.
        """
        return self._beside(
            turn,
            is_end=False,
            rendered=partial(
                self._render_marked, stop=turn, add_generation_prompt=True
            ),
        )

    def _end_of_turn(self, end: int, turn: int, special_spans: Sequence[Span]) -> int:
        """Return the end of the special token that follows a body after white space only.

        If the template ends turns with plain text (a ChatML template on a tokenizer without
        `<|im_end|>`), return the end of that text.
        """
        following = bisect_left(special_spans, (end, end))
        if following < len(special_spans):
            start, stop = special_spans[following]
            if not self.text[end:start].strip():
                return stop
        if self._closing is None:
            stand_in = self._stand_in(turn)
            clean, marks = self._read(
                self.template.render([*self.messages[:turn], stand_in])
            )
            self._closing = clean[marks[-1][1] :].rstrip() if marks else ""
        if self.text.startswith(self._closing, end):
            return end + len(self._closing)
        return end

    def _marks(self, chosen: Collection[int]) -> Iterator[Message]:
        """Yield the messages with the marks of the chosen texts."""
        number = count()

        def insert(index: int, kind: str, text: str) -> str:
            stripped = text.strip()
            if not stripped:
                return text
            middle = len(text) - len(text.lstrip()) + len(stripped) // 2
            mark = next(number)
            if mark == len(self.texts):
                self.texts.append(Text(index, kind, text[:middle], text[middle:]))
            if mark not in chosen:
                return text
            return f"{text[:middle]}{self._word}{mark}J{text[middle:]}"

        for index, message in enumerate(self.messages):
            yield change_texts(message, partial(insert, index))

    def _marked(self, chosen: Collection[int]) -> list[Message]:
        return list(self._marks(chosen))

    def _stand_in(self, turn: int) -> Message:
        message = self.messages[turn]
        kept: Message = {
            key: message[key] for key in ("role", "name") if key in message
        }
        return {**kept, "content": f"{self._word}{len(self.texts) + turn}J"}

    def _read(self, rendered: str) -> tuple[str, list[tuple[int, int]]]:
        """Return a render without its marks, and every mark's number and place there."""
        pieces = self._mark.split(rendered)
        marks = []
        place = 0
        for piece, number in zip(pieces[::2], pieces[1::2], strict=False):
            place += len(piece)
            marks.append((int(number), place))
        return "".join(pieces[::2]), marks

    def _find(self, chosen: range) -> None:
        """Find the places of texts. Where marks change more than themselves, halve their number."""
        if not chosen:
            return
        try:
            clean, marks = self._read(self.template.render(self._marked(chosen)))
        except DataError:
            clean = ""
        if clean == self.text:
            for number, place in marks:
                self.texts[number].places.append(place)
        elif len(chosen) > 1:
            middle = len(chosen) // 2
            self._find(chosen[:middle])
            self._find(chosen[middle:])

    def _locate(self, turns: Sequence[int]) -> set[int]:
        """Locate turns between the marks around them, with stand-ins in place of all of them.

        Return those without a mark between them and the next stand-in.
        """
        turns = [n for n in turns if n not in self._starts or n not in self._ends]
        without_mark: set[int] = set()
        messages = self._marked(range(len(self.texts)))
        for turn in turns:
            messages[turn] = self._stand_in(turn)
        try:
            clean, marks = self._read(self.template.render(messages))
        except DataError:
            return without_mark
        numbers = [number for number, _ in marks]
        occurrences = Counter(numbers)
        places = [0, *(place for _, place in marks), len(clean)]
        known = [0, *map(self._place, numbers), len(self.text)]
        for n, number in enumerate(numbers, start=1):
            turn = number - len(self.texts)
            if turn < 0 or occurrences[number] > 1:
                continue
            left = known[n - 1]
            right = known[n + 1]
            header = clean[places[n - 1] : places[n]]
            closing = clean[places[n] : places[n + 1]]
            if left is None or right is None:
                without_mark.add(turn)
            if left is not None and self.text.startswith(header, left):
                self._starts.setdefault(turn, left + len(header))
            if right is not None and self.text.endswith(closing, 0, right):
                self._ends.setdefault(turn, right - len(closing))
        return without_mark

    def _place(self, number: int) -> int | None:
        """Return the only place of a text; None if there is none or several, or for a stand-in."""
        if number >= len(self.texts):
            return None
        places = self.texts[number].places
        return places[0] if len(places) == 1 else None

    def _render_marked(self, stop: int, add_generation_prompt: bool = False) -> str:
        messages = self._marked(range(len(self.texts)))[:stop]
        rendered: str = self.template.render(
            messages, add_generation_prompt=add_generation_prompt
        )
        return rendered

    def _written_end(self, turn: int) -> int | None:
        return self._beside(
            turn, is_end=True, rendered=partial(self._render_marked, stop=turn + 1)
        )

    def _beside(
        self, turn: int, is_end: bool, rendered: Callable[[], str]
    ) -> int | None:
        """Return the end of the text that `rendered()` writes behind its last mark.

        What the template writes between two texts is the same wherever it is equal, so the place
        within it is kept.
        """
        gap = self._gap(turn, is_end)
        if gap is not None:
            between = f"{is_end}{self.text[slice(*gap)]}"
            if between in self._known:
                return gap[0] + self._known[between]
        try:
            clean, marks = self._read(rendered())
        except DataError:
            return None
        number, place = marks[-1] if marks else (-1, 0)
        left = 0 if number < 0 else self._place(number)
        written = clean[place:]
        if is_end:
            written = written.rstrip()
        if left is None or not self.text.startswith(written, left):
            return None
        found = left + len(written)
        if gap is not None and gap[0] <= found <= gap[1]:
            self._known[between] = found - gap[0]
        return found

    def _gap(self, turn: int, is_end: bool) -> Span | None:
        """Return what stands between the turn and the text before or after it; None: unknown."""
        own = self._own.get(turn)
        if own is None:
            return None
        right = own[-1] + 1 if is_end else own[0]
        start = 0
        stop = len(self.text)
        if right > 0:
            text = self._order[right - 1]
            start = text.places[0] + len(text.after)
        if right < len(self._order):
            text = self._order[right]
            stop = text.places[0] - len(text.before)
        return (start, stop) if start <= stop else None
