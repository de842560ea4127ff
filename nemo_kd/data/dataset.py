"""Turn the records of a dataset into tokenized examples."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import InitVar, dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from nemo_kd.batch import Example
from nemo_kd.config import DataError
from nemo_kd.config.data import CHAT_FORMATS, CHAT_TEMPLATE_FORMATS, DataConfig
from nemo_kd.config.user_function import import_function, source_fingerprint
from nemo_kd.data.conversation import Conversation, question_turns
from nemo_kd.data.formats import (
    Record,
    format_of,
    missing_fields,
    turns_key,
    unread_fields,
)
from nemo_kd.data.nemo_chat import render_conversations
from nemo_kd.data.prompt_template import BUILT_IN_TEMPLATES, PromptTemplate
from nemo_kd.data.records import Records, open_records
from nemo_kd.data.template import Rendered, render_messages
from nemo_kd.data.token_records import read_tokens

TOO_LONG = "too long"
TOO_SHORT = "too short"
NO_LOSS_TOKENS = "no loss tokens"
OTHER_SPLIT = "another split"
SKIPPED_BY_FUNCTION = "skipped by record_function"


def describe_left_out(path: Any, left_out: Counter[str]) -> str:
    """Return a line on the records, and parts of records, that are not used."""
    counts = (f"{count:,} x {reason}" for reason, count in left_out.most_common())
    return f"{path}: left out: {'; '.join(counts)}"


@dataclass
class TokenizedDataset:
    """Records of one dataset as examples of at most `max_seq_length` positions.

    Rendering happens on access and is deterministic. A record that makes no example gives the
    reason instead, one of those above.

    Attributes:
        function_source: hash of the source of `record_function`; None without one.

    Args:
        opened: the records, if they are open already; else `config` names them.

    Raises:
        ConfigError: `record_function` cannot be used.
        DataError: the file or, on access, a record cannot be used; with file:line.
    """

    config: DataConfig
    tokenizer: PreTrainedTokenizerBase
    max_seq_length: int
    vocab_size: int
    opened: InitVar[Records | None] = None

    def __post_init__(self, opened: Records | None) -> None:
        data = self.config.data
        self.records = opened or open_records(data.file_path)
        self.templates = {"prompt_template": PromptTemplate(data)}
        for name, (template, label_key) in BUILT_IN_TEMPLATES.items():
            settings = dataclasses.replace(
                data, prompt_template=template, label_key=label_key
            )
            self.templates[name] = PromptTemplate(settings)
        self._function: Callable[[Record], Any] | None = None
        self.function_source: str | None = None
        if data.record_function is not None:
            try:
                self._function = import_function(data.record_function, {})
                self.function_source = source_fingerprint(self._function)
            except ValueError as error:
                raise data.error(
                    "record_function",
                    f"{data.record_function} cannot be called as function(record): {error}",
                ) from error

    def __len__(self) -> int:
        return len(self.records)

    @property
    def indices(self) -> Sequence[int]:
        """Return the indices of the records that slices select."""
        return self.records.indices

    def __getitem__(self, index: int) -> Example | str:
        record = self._record(index)
        if isinstance(record, str):
            return record
        where = self.records.where(index)
        kind = self._format(record, where)
        try:
            ids, trained, left_out = self._render(kind, record)
            unread = unread_fields(record, kind, self.config.data)
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
        left_out.update(f"field `{name}`, which nothing reads" for name in unread)
        example = Example(
            index=index,
            tokens_S=np.array(ids[:-1], dtype=np.int64),
            labels_S=np.array(ids[1:], dtype=np.int64),
            loss_mask_S=np.array(trained[1:], dtype=np.float32),
            left_out=left_out,
        )
        if example.num_tokens > self.max_seq_length:
            return TOO_LONG
        if example.num_tokens < max(1, self.config.data.min_seq_length):
            return TOO_SHORT
        return example if example.num_loss_tokens else NO_LOSS_TOKENS

    def formats(self, indices: Iterable[int]) -> set[str]:
        """Return the formats of records.

        Raises:
            DataError: one cannot be read, or its format is not the configured one.
        """
        return {
            self._format(record, self.records.where(index))
            for index in indices
            if isinstance(record := self._record(index), dict)
        }

    def _record(self, index: int) -> Record | str:
        """Return a record as `record_function` makes it, or the reason to skip it.

        Raises:
            DataError: it cannot be read, or the function fails.
        """
        record: Any = self.records[index]
        where = self.records.where(index)
        data = self.config.data
        if data.split is not None:
            if "split" not in record:
                raise DataError(
                    f"{where}: {data.KEY}.split={data.split}, but the record has no field `split`; "
                    f"its fields are {', '.join(record)}"
                )
            if record["split"] != data.split:
                return OTHER_SPLIT
        if self._function is None:
            return record
        try:
            record = self._function(record)
        except Exception as error:  # it is the user's and can raise anything
            raise DataError(
                f"{where}: {data.KEY}.record_function={data.record_function} failed: "
                f"{type(error).__name__}: {error}"
            ) from error
        if record is None:
            return SKIPPED_BY_FUNCTION
        if isinstance(record, dict):
            return record
        raise DataError(
            f"{where}: {data.KEY}.record_function={data.record_function} must return a record (a "
            f"dict) or None, found {str(record)[:80]!r}"
        )

    def _format(self, record: Record, where: str) -> str:
        data = self.config.data
        kind = format_of(record, data)
        chat = self.config.chat
        if chat not in (None, kind in CHAT_FORMATS) or missing_fields(
            record, kind, data
        ):
            raise DataError(
                f"{where}: {data.KEY}.format={data.format} and {self.config.KEY}.chat={chat} do "
                f"not fit a record with the fields {', '.join(record)}"
            )
        return kind

    def _render(self, kind: str, record: Record) -> Rendered:
        data = self.config.data
        if kind in CHAT_TEMPLATE_FORMATS:
            turns = record.get(turns_key(record, data))
            if kind == "question_answer":
                turns = question_turns(record, data)
            conversation = Conversation.read(turns, record, data)
            return render_messages(conversation, self.tokenizer, data)
        if data.loss_mask not in ("auto", "nemo_chat"):
            raise DataError(
                f"{data.KEY}.loss_mask={data.loss_mask} needs a chat template, which records of "
                f"the format {kind} do not use; use auto"
            )
        if kind == "conversations":
            return Rendered(
                *render_conversations(
                    record, self.tokenizer, self.config.chat_prompt_tokens
                )
            )
        if kind == "tokens":
            rendered = read_tokens(record)
        else:
            if kind == "alpaca" and not record.get("input"):
                kind = "alpaca without input"
            rendered = self.templates[kind].render(
                record, self.tokenizer, self.max_seq_length + 1
            )
        return Rendered(*rendered, Counter())
