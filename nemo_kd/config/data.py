"""How a dataset's records become token ids and loss masks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from nemo_kd.config.errors import ConfigError
from nemo_kd.config.typed import PATH

DEFAULT_SEQ_LENGTH = 4096
"""Longest sequence where nobody asks for another and the model can do as much."""

FORMATS = ("auto", "messages", "conversations", "prompt_template")


@dataclass
class ChatPromptTokens:
    """Marker texts of NeMo's `conversations` chat format."""

    system_turn_start: str = "<extra_id_0>"
    """Before the system prompt."""
    turn_start: str = "<extra_id_1>"
    """Before every other turn."""
    label_start: str = "<extra_id_2>"
    """Before a turn's label (attributes of the answer)."""
    end_of_turn: str = "\n"
    """After every turn."""
    end_of_name: str = "\n"
    """After the speaker's name."""


@dataclass
class DatasetConfig:
    """One JSONL dataset and its formatting."""

    KEY: ClassVar[str] = "data.data"
    PATH_KEY: ClassVar[str] = "data.data.file_path"

    file_path: Any = field(default="???", metadata=PATH)
    """JSONL file: one record a line, in any format of `format`. Stage 1 also takes {train: PATH, validation: PATH}."""
    format: str = "auto"
    """auto (by the record's keys), messages (OpenAI chat, rendered by the tokenizer's chat template), conversations (NeMo chat), prompt_template (fields of the record put into prompt_template)."""
    max_seq_length: int | None = None
    """Longest example in tokens. Longer ones are skipped and counted (prompt_template: truncation_field is cut first). None: 4096, or the model's own maximum where that is smaller."""
    min_seq_length: int = 1
    """Shorter examples are skipped and counted."""
    prompt_template: str = "{input} {output}"
    """How fields of a record make one text; the field named by label_key must come last."""
    label_key: str = "output"
    """Field that carries the loss."""
    add_bos: bool = False
    """prompt_template: begin with the tokenizer's beginning-of-sequence token."""
    add_eos: bool = True
    """prompt_template: end with the tokenizer's end-of-sequence token (counts in the loss)."""
    add_sep: bool = False
    """prompt_template: put the tokenizer's separator token between prompt and answer."""
    truncation_field: str = "input"
    """prompt_template: comma-separated fields that may be cut to fit max_seq_length; empty cuts nothing."""
    truncation_method: str = "right"
    """prompt_template: cut truncation_field from the right or the left."""
    tools_key: str = "tools"
    """messages: field of the record with tool definitions, passed to the chat template."""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(
                f"{self.KEY}.format: {self.format!r} is not one of {', '.join(FORMATS)}"
            )
        if self.truncation_method not in ("left", "right"):
            raise ConfigError(
                f"{self.KEY}.truncation_method: {self.truncation_method!r} is not one of left, right"
            )
        if self.max_seq_length is not None and self.max_seq_length < 2:
            raise ConfigError(
                f"{self.KEY}.max_seq_length: {self.max_seq_length} must be at least 2"
            )


@dataclass
class DataConfig:
    """The dataset of stage 1."""

    KEY: ClassVar[str] = "data"

    chat: bool | None = None
    """True refuses records that are no conversation, False refuses conversations; None takes each record as it is."""
    chat_prompt_tokens: ChatPromptTokens = field(default_factory=ChatPromptTokens)
    data: DatasetConfig = field(default_factory=DatasetConfig)


def sequence_length(key: str, asked: int | None, max_position_embeddings: int) -> int:
    """The longest sequence in tokens: what was asked for, else 4096 or the model's maximum where that is smaller.

    Raises:
        ConfigError: less than two tokens were asked for, or more than the model's positions are made for.
    """
    if asked is None:
        return min(DEFAULT_SEQ_LENGTH, max_position_embeddings)
    if asked < 2:
        raise ConfigError(f"{key}: {asked} must be at least 2")
    if asked > max_position_embeddings:
        raise ConfigError(
            f"{key}: {asked} exceeds the model's max_position_embeddings ({max_position_embeddings})"
        )
    return asked
