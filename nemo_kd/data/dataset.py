"""From a dataset's records to tokenized examples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from transformers import PreTrainedTokenizerBase

from nemo_kd.batch import Example
from nemo_kd.config.data import DataConfig
from nemo_kd.data.chat import render_messages
from nemo_kd.data.nemo_chat import render_conversations
from nemo_kd.data.prompt import PromptTemplate
from nemo_kd.data.records import DataError, JsonlRecords

TOO_LONG, TOO_SHORT, NO_LOSS_TOKENS = "too long", "too short", "no loss tokens"


@dataclass(frozen=True)
class Skipped:
    """A record that makes no example: its index and one of the reasons above."""

    index: int
    reason: str


class TokenizedDataset:
    """Records of one JSONL file as examples of at most `max_seq_length` positions, for a model of `vocab_size` tokens.

    A record with `messages` is an OpenAI chat, one with `conversations` a NeMo chat, any other goes through the prompt
    template. Rendering happens on access and is deterministic.

    Raises:
        DataError: the file, or on access a record, cannot be used; with file:line.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        max_seq_length: int,
        vocab_size: int,
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.max_seq_length, self.vocab_size = max_seq_length, vocab_size
        self.records = JsonlRecords(config.data.file_path, config.data.PATH_KEY)
        self.prompt_template = PromptTemplate(config.data)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example | Skipped:
        record = self.records[index]
        try:
            ids, trained = self._render(record)
        except DataError as error:
            raise DataError(f"{self.records.where(index)}: {error}") from error
        # Tensor-parallel embeddings would take such an id for a token of another rank, and give zeros for it.
        if max(ids, default=0) >= self.vocab_size:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise DataError(
                f"{self.records.where(index)}: the token {token!r} has the id {max(ids)}, outside the model's vocabulary of "
                f"{self.vocab_size}; tokenizer and model do not belong together"
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
        """The formats that these records have, sorted; of them only `messages` uses the tokenizer's chat template.

        Raises:
            DataError: a record cannot be read, or is not what the configuration asks for; with file:line.
        """
        if self.config.data.format != "auto":
            return [self.config.data.format]
        found = set()
        for index in indices:
            record = self.records[index]
            try:
                found.add(self._format(record))
            except DataError as error:
                raise DataError(f"{self.records.where(index)}: {error}") from error
        return sorted(found)

    def _render(self, record: dict[str, Any]) -> tuple[list[int], list[bool]]:
        kind = self._format(record)
        if kind == "messages":
            return render_messages(record["messages"], self.tokenizer, self._tools(record))
        if kind == "conversations":
            return render_conversations(record, self.tokenizer, self.config.chat_prompt_tokens)
        return self.prompt_template.render(record, self.tokenizer, self.max_seq_length + 1)

    def _tools(self, record: dict[str, Any]) -> list[Any] | None:
        """The record's tool definitions, a list or its JSON text."""
        key = self.config.data.tools_key
        tools = record.get(key)
        try:
            tools = orjson.loads(tools) if isinstance(tools, str) and tools else tools
        except orjson.JSONDecodeError as error:
            raise DataError(f"`{key}` is a text that is not valid JSON ({error})") from error
        if tools and not isinstance(tools, list):
            raise DataError(
                f"`{key}` must be a list of tool definitions, found {str(tools)[:80]!r}"
            )
        return tools or None

    def _format(self, record: dict[str, Any]) -> str:
        asked, chat = self.config.data.format, self.config.chat
        found = next(
            (key for key in ("messages", "conversations") if key in record), "prompt_template"
        )
        if asked in ("messages", "conversations") and asked not in record:
            raise DataError(
                f"{self.config.data.KEY}.format={asked} needs the field `{asked}`; the record has {', '.join(record)}"
            )
        kind = found if asked == "auto" else asked
        if chat is True and kind == "prompt_template":
            raise DataError(
                f"{self.config.KEY}.chat=True needs the field `messages` or `conversations`; the record has {', '.join(record)}. "
                f"Set {self.config.KEY}.chat=False for input/output records"
            )
        if chat is False and kind != "prompt_template":
            raise DataError(
                f"{self.config.KEY}.chat=False, but the record is a conversation (`{kind}`); set {self.config.KEY}.chat=True"
            )
        return kind
