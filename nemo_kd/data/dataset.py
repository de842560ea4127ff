"""Turn a dataset's records into tokenized examples."""

from __future__ import annotations

import string
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from transformers import PreTrainedTokenizerBase

from nemo_kd.batch import Example
from nemo_kd.config import ConfigError
from nemo_kd.config.data import DataConfig, DatasetConfig
from nemo_kd.data.chat import render_messages
from nemo_kd.data.nemo_chat import render_conversations
from nemo_kd.data.records import DataError, JsonlRecords
from nemo_kd.data.tokenizer import encode, encode_continuation

TOO_LONG = "too long"
TOO_SHORT = "too short"
NO_LOSS_TOKENS = "no loss tokens"


@dataclass(frozen=True)
class Skipped:
    """A record that makes no example; `reason` is one of the three above."""

    index: int
    reason: str


class TokenizedDataset:
    """Records of one JSONL file as examples of at most `max_seq_length` positions.

    A record with `messages` is an OpenAI chat, one with `conversations` a NeMo chat; any other goes
    through the prompt template. Rendering happens on access and is deterministic.

    Raises:
        DataError: the file or, on access, a record cannot be used; with file:line.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        max_seq_length: int,
        vocab_size: int,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.max_seq_length = max_seq_length
        self.vocab_size = vocab_size
        self.records = JsonlRecords(config.data.file_path, config.data.PATH_KEY)
        self.prompt_template = PromptTemplate(config.data)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example | Skipped:
        record = self.records[index]
        where = self.records.where(index)
        try:
            ids, trained = self._render(record)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        # Tensor-parallel embeddings would return zeros for such an id.
        largest = max(ids, default=0)
        if largest >= self.vocab_size:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise DataError(
                f"{where}: the token {token!r} has the id {largest}, outside the model's "
                f"vocabulary of {self.vocab_size}; tokenizer and model do not belong together"
            )
        example = Example(
            index=index,
            tokens_S=np.array(ids[:-1], dtype=np.int64),
            labels_S=np.array(ids[1:], dtype=np.int64),
            loss_mask_S=np.array(trained[1:], dtype=np.float32),
        )
        if example.num_tokens > self.max_seq_length:
            return Skipped(index, TOO_LONG)
        if example.num_tokens < max(1, self.config.data.min_seq_length):
            return Skipped(index, TOO_SHORT)
        if not example.num_loss_tokens:
            return Skipped(index, NO_LOSS_TOKENS)
        return example

    def formats(self, indices: Iterable[int]) -> list[str]:
        """Return the formats of these records, sorted. Only `messages` uses the chat template.

        Raises:
            DataError: a record cannot be read, or its format is not the configured one.
        """
        if self.config.data.format != "auto":
            return [self.config.data.format]
        found = set()
        for index in indices:
            try:
                found.add(self._format(self.records[index]))
            except DataError as error:
                raise DataError(f"{self.records.where(index)}: {error}") from error
        return sorted(found)

    def _render(self, record: dict[str, Any]) -> tuple[list[int], list[bool]]:
        kind = self._format(record)
        if kind == "messages":
            return render_messages(
                record["messages"], self.tokenizer, self._tools(record)
            )
        if kind == "conversations":
            return render_conversations(
                record, self.tokenizer, self.config.chat_prompt_tokens
            )
        return self.prompt_template.render(
            record, self.tokenizer, self.max_seq_length + 1
        )

    def _tools(self, record: dict[str, Any]) -> list[Any] | None:
        """Return the record's tool definitions, which are a list or its JSON text."""
        key = self.config.data.tools_key
        tools = record.get(key)
        try:
            tools = orjson.loads(tools) if isinstance(tools, str) and tools else tools
        except orjson.JSONDecodeError as error:
            raise DataError(
                f"`{key}` is a text that is not valid JSON ({error})"
            ) from error
        if tools and not isinstance(tools, list):
            raise DataError(
                f"`{key}` must be a list of tool definitions, found {str(tools)[:80]!r}"
            )
        return tools or None

    def _format(self, record: dict[str, Any]) -> str:
        asked = self.config.data.format
        fields = ", ".join(record)
        kind = asked
        if asked == "auto":
            chats = (key for key in ("messages", "conversations") if key in record)
            kind = next(chats, "prompt_template")
        elif asked != "prompt_template" and asked not in record:
            raise DataError(
                f"{self.config.data.KEY}.format={asked} needs the field `{asked}`; "
                f"the record has {fields}"
            )
        key = f"{self.config.KEY}.chat"
        is_chat = kind != "prompt_template"
        if self.config.chat is True and not is_chat:
            raise DataError(
                f"{key}=True needs the field `messages` or `conversations`; the record has "
                f"{fields}. Set {key}=False for input/output records"
            )
        if self.config.chat is False and is_chat:
            raise DataError(
                f"{key}=False, but the record is a conversation (`{kind}`); set {key}=True"
            )
        return kind


class PromptTemplate:
    """A template, for example "{input} {output}", whose last field, the answer, is trained.

    Prompt and answer are tokenized apart, so the start of the answer does not depend on the prompt.
    Spaces between the two belong to the answer's first token, as tokenizers expect.

    Raises:
        ConfigError: the template is malformed or does not end with the field `label_key`.
    """

    def __init__(self, config: DatasetConfig) -> None:
        self.config = config
        key = f"{config.KEY}.prompt_template"
        template = config.prompt_template
        try:
            parts = list(string.Formatter().parse(template))
        except ValueError as error:
            raise ConfigError(f"{key}: {template!r} is malformed ({error})") from error
        self._parts: list[tuple[str, str | None]] = []
        for literal, name, specification, conversion in parts:
            if name == "" or specification or conversion:
                raise ConfigError(
                    f"{key}: in {template!r} every field must be a plain name such as {{input}}"
                )
            self._parts.append((literal, name))
        names = [name for _, name in self._parts]
        if names[-1:] != [config.label_key] or names.count(config.label_key) > 1:
            raise ConfigError(
                f"{key}: {template!r} must end with the field of {config.KEY}.label_key, "
                f"{{{config.label_key}}}, and hold it once"
            )
        literal, _ = self._parts.pop()
        self._parts.append((literal.rstrip(" "), None))
        self._spaces = literal[len(literal.rstrip(" ")) :]
        fields = [name.strip() for name in config.truncation_field.split(",")]
        self._cuttable = [name for name in fields if name in names[:-1]]

    def render(
        self, record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> tuple[list[int], list[bool]]:
        """Return token ids, and True for the trained ones; cut prompt fields to fit `max_length`.

        Raises:
            DataError: a field is missing or not a text, or the tokenizer lacks a special token.
        """
        label_key = self.config.label_key
        names = [name for _, name in self._parts if name is not None]
        values = {name: self._text(record, name) for name in [*names, label_key]}
        start = self._special(tokenizer, "bos", self.config.add_bos)
        separator = self._special(tokenizer, "sep", self.config.add_sep)
        end = self._special(tokenizer, "eos", self.config.add_eos)
        answer = encode_continuation(tokenizer, self._spaces + values[label_key])
        room = max_length - len(start) - len(separator) - len(answer) - len(end)
        context = [*start, *self._encode_prompt(values, tokenizer, room), *separator]
        trained = [*answer, *end]
        return context + trained, [False] * len(context) + [True] * len(trained)

    def _text(self, record: dict[str, Any], name: str) -> str:
        if isinstance(record.get(name), str):
            return record[name]
        found = f"the record has {', '.join(record) or 'nothing'}"
        if name in record:
            found = f"found {str(record[name])[:80]!r}"
        raise DataError(
            f"the field `{name}` of {self.config.KEY}.prompt_template must be a text, but {found}"
        )

    def _special(
        self, tokenizer: PreTrainedTokenizerBase, name: str, is_wanted: bool
    ) -> list[int]:
        if not is_wanted:
            return []
        token_id = getattr(tokenizer, f"{name}_token_id")
        if token_id is None:
            raise DataError(
                f"{self.config.KEY}.add_{name}=True, but the tokenizer has no {name} token"
            )
        return [int(token_id)]

    def _encode_prompt(
        self, values: dict[str, str], tokenizer: PreTrainedTokenizerBase, room: int
    ) -> list[int]:
        """Return the prompt's ids, without the tokens of cuttable fields that exceed `room`."""
        text = ""
        spans: dict[str, list[tuple[int, int]]] = {}
        for literal, name in self._parts:
            text += literal
            if name is not None:
                spans.setdefault(name, []).append(
                    (len(text), len(text) + len(values[name]))
                )
                text += values[name]
        ids = encode(tokenizer, text)
        excess = len(ids) - max(room, 0)
        if excess <= 0 or not self._cuttable:
            return ids
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        cut: set[int] = set()
        for name in self._cuttable:
            inside = [
                position
                for position, (first, last) in enumerate(encoding["offset_mapping"])
                if any(start <= first < last <= stop for start, stop in spans[name])
            ]
            number = min(excess - len(cut), len(inside))
            if self.config.truncation_method == "right":
                inside.reverse()
            cut.update(inside[:number])
        return [token_id for position, token_id in enumerate(ids) if position not in cut]
