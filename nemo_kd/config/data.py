"""Configuration of datasets: how records become token ids and loss masks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from nemo_kd.config.errors import ConfigError
from nemo_kd.config.fields import Section, choice, path

DEFAULT_SEQ_LENGTH = 4096
"""Longest sequence if `model.max_seq_length` is not given and the model supports it."""


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
class DatasetConfig(Section, key="data.data"):
    """One JSONL dataset and its formatting."""

    PATH_KEY: ClassVar[str] = "data.data.file_path"

    file_path: Any = path()
    """JSONL file with one record per line, in a format of `format`. Stage 1 also takes {train:
    PATH, validation: PATH}."""
    format: str = choice(
        "auto", ("auto", "messages", "conversations", "prompt_template")
    )
    """Format of the records: messages (OpenAI chat, rendered by the tokenizer's chat template),
    conversations (NeMo chat), prompt_template (fields put into prompt_template), or auto (decided
    by each record's keys)."""
    min_seq_length: int = 1
    """Skip and count shorter examples, in tokens."""
    prompt_template: str = "{input} {output}"
    """Template that joins fields of a record to one text; the field named by label_key must come
    last."""
    label_key: str = "output"
    """Field that counts in the loss."""
    add_bos: bool = False
    """prompt_template: start with the tokenizer's beginning-of-sequence token."""
    add_eos: bool = True
    """prompt_template: end with the tokenizer's end-of-sequence token, which counts in the loss."""
    add_sep: bool = False
    """prompt_template: put the tokenizer's separator token between prompt and answer."""
    truncation_field: str = "input"
    """prompt_template: fields, separated by commas, that are cut to fit model.max_seq_length; empty
    cuts nothing."""
    truncation_method: str = choice("right", ("left", "right"))
    """prompt_template: cut truncation_field from the right or the left."""
    tools_key: str = "tools"
    """messages: field of the record with tool definitions, passed to the chat template."""


@dataclass
class DataConfig(Section, key="data"):
    """The dataset of stage 1."""

    chat: bool | None = None
    """True requires conversations, False refuses them; None accepts both."""
    chat_prompt_tokens: ChatPromptTokens = field(default_factory=ChatPromptTokens)
    data: DatasetConfig = field(default_factory=DatasetConfig)


def sequence_length(max_seq_length: int | None, max_position_embeddings: int) -> int:
    """Return the longest sequence in tokens: as given, else 4096 or the model's maximum if smaller.

    Raises:
        ConfigError: the model supports fewer positions.
    """
    if max_seq_length is None:
        return min(DEFAULT_SEQ_LENGTH, max_position_embeddings)
    if max_seq_length > max_position_embeddings:
        raise ConfigError(
            f"model.max_seq_length: {max_seq_length} exceeds the model's max_position_embeddings "
            f"({max_position_embeddings})"
        )
    return max_seq_length
