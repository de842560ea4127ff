"""Read the records of a JSONL dataset, and turn them into tokenized examples."""

from __future__ import annotations

import contextlib
import hashlib
import string
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from transformers import PreTrainedTokenizerBase

from nemo_kd.batch import Example
from nemo_kd.config import ConfigError, DataError
from nemo_kd.config.data import DataConfig, DatasetConfig
from nemo_kd.data.chat import render_conversations, render_messages
from nemo_kd.data.tokenizer import encode_continuation
from nemo_kd.nemo_archive import check_regular_file

TOO_LONG = "too long"
TOO_SHORT = "too short"
NO_LOSS_TOKENS = "no loss tokens"


@dataclass
class TokenizedDataset:
    """Records of one JSONL file as examples of at most `max_seq_length` positions.

    A record with `messages` is an OpenAI chat, one with `conversations` a NeMo chat; any other goes
    through the prompt template. Rendering happens on access and is deterministic. A record that
    makes no example gives the reason instead, one of the three above.

    Raises:
        DataError: the file or, on access, a record cannot be used; with file:line.
    """

    config: DataConfig
    tokenizer: PreTrainedTokenizerBase
    max_seq_length: int
    vocab_size: int

    def __post_init__(self) -> None:
        data = self.config.data
        self.records = JsonlRecords(data.file_path)
        self.prompt_template = PromptTemplate(data)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example | str:
        where = self.records.where(index)
        record = self.records[index]
        kind = self._format(record, where)
        try:
            ids, trained = self._render(kind, record)
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
            return TOO_LONG
        if example.num_tokens < max(1, self.config.data.min_seq_length):
            return TOO_SHORT
        return example if example.num_loss_tokens else NO_LOSS_TOKENS

    def format(self, index: int) -> str:
        """Return the format of a record. Only `messages` uses the chat template.

        Raises:
            DataError: the record cannot be read, or its format is not the configured one.
        """
        return self._format(self.records[index], self.records.where(index))

    def _format(self, record: dict[str, Any], where: str) -> str:
        kind = asked = self.config.data.format
        if asked == "auto":
            chats = (key for key in ("messages", "conversations") if key in record)
            kind = next(chats, "prompt_template")
        is_chat = kind != "prompt_template"
        chat = self.config.chat
        if chat not in (None, is_chat) or (is_chat and kind not in record):
            raise DataError(
                f"{where}: {self.config.data.KEY}.format={asked} and "
                f"{self.config.KEY}.chat={chat} do not fit a record with the fields "
                f"{', '.join(record)}"
            )
        return kind

    def _render(
        self, kind: str, record: dict[str, Any]
    ) -> tuple[list[int], list[bool]]:
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
        tools = record.get(key) or []
        with contextlib.suppress(orjson.JSONDecodeError):
            tools = orjson.loads(tools) if isinstance(tools, str) else tools
        if not isinstance(tools, list):
            raise DataError(
                f"`{key}` must be a list of tool definitions, or its JSON text, found "
                f"{str(tools)[:80]!r}"
            )
        return tools or None


class PromptTemplate:
    """A template, for example "{input} {output}", whose last field, the answer, is trained.

    Prompt and answer are tokenized apart, so the start of the answer does not depend on the prompt.
    Spaces between the two belong to the answer's first token, as tokenizers expect.

    Raises:
        ConfigError: the template is malformed or does not end with the field `label_key`.
    """

    def __init__(self, config: DatasetConfig) -> None:
        self.config = config
        try:
            parts = list(string.Formatter().parse(config.prompt_template))
        except ValueError:
            parts = []
        fields = [name for _, name, _, _ in parts]
        if fields.count(config.label_key) != 1 or fields[-1] != config.label_key:
            raise ConfigError(
                f"{config.KEY}.prompt_template: {config.prompt_template!r} must be text with fields "
                f"and end with the field of {config.KEY}.label_key, {{{config.label_key}}}, the "
                "only time that it occurs"
            )
        *before, last = [(literal, name) for literal, name, _, _ in parts]
        self._parts = [*before, (last[0].rstrip(" "), None)]
        self._spaces = last[0][len(last[0].rstrip(" ")) :]
        self._cuttable = [name.strip() for name in config.truncation_field.split(",")]

    def render(
        self,
        record: dict[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
    ) -> tuple[list[int], list[bool]]:
        """Return token ids, and True for the trained ones; cut prompt fields to fit `max_length`.

        Raises:
            DataError: a field is missing or not a text, or the tokenizer lacks a special token.
        """
        start, separator, end = (
            self._special(tokenizer, name) for name in ("bos", "sep", "eos")
        )
        text = self._spaces + self._text(record, self.config.label_key)
        trained = encode_continuation(tokenizer, text) + end
        room = max_length - len(start) - len(separator) - len(trained)
        context = [*start, *self._encode_prompt(record, tokenizer, room), *separator]
        return context + trained, [False] * len(context) + [True] * len(trained)

    def _text(self, record: dict[str, Any], name: str) -> str:
        value = record.get(name)
        if not isinstance(value, str):
            raise DataError(
                f"the field `{name}` of {self.config.KEY}.prompt_template must be a text, found "
                f"{str(value)[:80]!r} in a record with the fields {', '.join(record)}"
            )
        return value

    def _special(self, tokenizer: PreTrainedTokenizerBase, name: str) -> list[int]:
        if not getattr(self.config, f"add_{name}"):
            return []
        token_id = getattr(tokenizer, f"{name}_token_id")
        if token_id is None:
            raise DataError(
                f"{self.config.KEY}.add_{name}=True, but the tokenizer has no {name} token"
            )
        return [int(token_id)]

    def _encode_prompt(
        self, record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, room: int
    ) -> list[int]:
        """Return the prompt's ids, without the tokens of cuttable fields that exceed `room`."""
        text = ""
        fields: list[str | None] = []  # of every character
        for literal, name in self._parts:
            value = "" if name is None else self._text(record, name)
            text += literal + value
            fields += [None] * len(literal) + [name] * len(value)
        encoding = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True
        )
        ids: list[int] = encoding["input_ids"]
        excess = len(ids) - max(room, 0)
        if excess <= 0:
            return ids
        cut: set[int] = set()
        for name in self._cuttable:
            inside = [
                position
                for position, (first, last) in enumerate(encoding["offset_mapping"])
                if {*fields[first:last]} == {name}
            ]
            if self.config.truncation_method == "right":
                inside.reverse()
            cut.update(inside[: excess - len(cut)])
        return [
            token_id for position, token_id in enumerate(ids) if position not in cut
        ]


class JsonlRecords:
    """The records of a JSONL file, one JSON object per line; blank lines do not count.

    Opening reads the file once, for line starts and its hash, and parses nothing. Reading a record
    touches its bytes only, from any process.

    Attributes:
        fingerprint: SHA-256 of the file's bytes, as they were when it was opened.

    Raises:
        DataError: the file is missing, unreadable or empty; on access: a line is not a JSON object.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._starts = array("q")
        self._lines = array("q")
        digest = hashlib.sha256()
        offset = 0
        check_regular_file(self.path, DataError)
        self._stamp = self._status()
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                digest.update(line)
                if line.strip():
                    self._starts.append(offset)
                    self._lines.append(number)
                offset += len(line)
        self.fingerprint = f"sha256:{digest.hexdigest()}"
        if not self._starts:
            raise DataError(
                f"{self.path}: the file has no records; a dataset holds one JSON object a line"
            )

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            record = orjson.loads(self.raw(index))
        except orjson.JSONDecodeError as error:
            raise DataError(
                f"{self.where(index)}: not valid JSON ({error}); every line must be one JSON object"
            ) from error
        if not isinstance(record, dict):
            raise DataError(
                f"{self.where(index)}: found a JSON {type(record).__name__}; every line must be "
                "one JSON object"
            )
        return record

    def raw(self, index: int) -> bytes:
        """Return the line of a record.

        Raises:
            DataError: the file was changed.
        """
        self.check_unchanged()
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            return file.readline()

    def where(self, index: int) -> str:
        """Return `file:line` of a record, for messages."""
        return f"{self.path}:{self._lines[index]}"

    def check_unchanged(self) -> None:
        """Check that the file still has the size and modification time that it was opened with.

        Raises:
            DataError: it was changed.
        """
        if self._status() != self._stamp:
            raise DataError(
                f"{self.path}: the file was changed while it was in use; restore it and run the same "
                "command again, or start over with the new file and another output path"
            )

    def _status(self) -> tuple[int, int] | None:
        if not self.path.exists():
            return None
        status = self.path.stat()
        return status.st_size, status.st_mtime_ns
