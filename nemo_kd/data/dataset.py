"""Turn the records of a dataset into tokenized examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from nemo_kd.batch import Example
from nemo_kd.config import DataError
from nemo_kd.config.data import DataConfig
from nemo_kd.data.conversation import Conversation
from nemo_kd.data.nemo_chat import render_conversations
from nemo_kd.data.prompt_template import PromptTemplate
from nemo_kd.data.records import Records, open_records
from nemo_kd.data.template import render_messages

TOO_LONG = "too long"
TOO_SHORT = "too short"
NO_LOSS_TOKENS = "no loss tokens"


@dataclass
class TokenizedDataset:
    """Records of one dataset as examples of at most `max_seq_length` positions.

    A record with `messages` is an OpenAI chat, one with `conversations` a NeMo chat; any other goes
    through the prompt template. Rendering happens on access and is deterministic. A record that
    makes no example gives the reason instead, one of the three above.

    Args:
        opened: the records, if they are open already; else `config` names them.

    Raises:
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
        self.prompt_template = PromptTemplate(data)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def indices(self) -> Sequence[int]:
        """Return the indices of the records that slices select."""
        return self.records.indices

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
            conversation = Conversation.read(
                record["messages"], record, self.config.data
            )
            ids, trained, _ = render_messages(
                conversation, self.tokenizer, self.config.data
            )
            return ids, trained
        if kind == "conversations":
            return render_conversations(
                record, self.tokenizer, self.config.chat_prompt_tokens
            )
        return self.prompt_template.render(
            record, self.tokenizer, self.max_seq_length + 1
        )
