"""Configuration of datasets (how records become token ids and loss masks) and of caches."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date as calendar_date
from typing import Any

from nemo_kd.config import ConfigError
from nemo_kd.config.fields import Section, bounded, choice, count, path, positive
from nemo_kd.config.selection import Selection

DEFAULT_SEQ_LENGTH = 4096
"""Longest sequence if `model.max_seq_length` is not given and the model supports it."""


CHAT_TEMPLATE_FORMATS = ("messages", "sharegpt", "question_answer")
"""Formats of records that the tokenizer's chat template renders."""
CHAT_FORMATS = (*CHAT_TEMPLATE_FORMATS, "conversations")
FORMATS = ("auto", *CHAT_FORMATS, "tokens", "alpaca", "text", "prompt_template")
PLAIN_TEMPLATE = "{input} {output}"


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
    """One dataset and its formatting."""

    file_path: Any = path()
    """Records in a format of `format`: JSONL (also .gz, .zst), a JSON array, Parquet, Arrow, or a
    folder that `datasets` saved; a path, a list, a pattern ("data/*.parquet") or a URL of fsspec;
    PATH@[a:b] selects records. Stage 1 also takes {train: PATH, validation: PATH}."""
    format: str = choice("auto", FORMATS)
    """Format of the records. messages: an OpenAI chat, rendered by the tokenizer's chat template;
    sharegpt: the same with turns of human and gpt; question_answer: the same from the fields of
    question_key and answer_key. conversations: NeMo's chat. tokens: input_ids with loss_mask or
    labels. prompt_template: fields put into prompt_template; alpaca and text: the same with a
    built-in template for instruction, input and output, or for text. auto: decided by each record's
    fields."""
    input_key: str = "messages"
    """messages, sharegpt: field with the chat; messages may also be conversations."""
    question_key: str = "question"
    """question_answer: field with the user's text."""
    answer_key: str = "answer"
    """question_answer: field with the assistant's text."""
    prompt_key: str = ""
    """question_answer: field with a text that precedes the question, on a line above it."""
    system_key: str = "system"
    """messages, sharegpt, question_answer: field with a system prompt."""
    split: str | None = None
    """Use only the records whose field `split` has this value."""
    record_function: str | None = None
    """Import path of your function(record), which returns a record of one of the formats, or None
    to skip it; modules in the current folder count. Its module's source is part of a cache's
    identity."""
    min_seq_length: int = 1
    """Skip and count shorter examples, in tokens."""
    prompt_template: str = PLAIN_TEMPLATE
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
    """messages, sharegpt: field with tool definitions, passed to the chat template."""
    chat_template: str | None = path(None)
    """messages: file with a chat template that replaces the tokenizer's."""
    loss_mask: str = choice(
        "auto", ("auto", "last_turn", "per_turn", "qwen", "nemo_chat")
    )
    """messages: trained tokens of the assistant's turns. auto: content, tool calls and end of every
    turn, or as the template's `{% generation %}` marks them. last_turn: only those of the last turn.
    per_turn: render every turn as if it were the last one, think block in the loss (slime's qwen3).
    qwen: everything after the header, with the line break (slime's qwen). nemo_chat: the mask of
    conversations, which they always have."""
    reasoning: str | None = choice(None, ("keep", "drop"))
    """messages: keep writes reasoning that the template cuts out in front of its turn; drop takes all
    reasoning out of the messages. None: `altered` decides about reasoning that the template cuts."""
    reasoning_loss: str = choice("train", ("train", "exclude", "exclude_empty"))
    """messages: think blocks of trained turns count in the loss (train) or not (exclude);
    exclude_empty trains those with text."""
    altered: str | None = choice(None, ("refuse", "count"))
    """messages: refuse records with text that the template leaves out or changes, or count them and go
    on. None: refuse for trained turns and for roles that the template drops, count the rest."""
    date: str | None = None
    """messages: date (2026-12-31) that templates print as today's. None: the day on which the cache
    is begun, for all its records."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            calendar_date.fromisoformat(self.date or "2000-01-01")
        except ValueError as error:
            raise self.error(
                "date", f"{self.date!r} must be a date such as 2026-12-31"
            ) from error


@dataclass
class DataConfig(Section, key="data"):
    """The dataset of stage 1."""

    chat: bool | None = None
    """True requires conversations, False refuses them; None accepts both."""
    chat_prompt_tokens: ChatPromptTokens = field(default_factory=ChatPromptTokens)
    data: DatasetConfig = field(default_factory=DatasetConfig)


def names_records(file_path: Any) -> bool:
    """Return True if this is a path or a list of paths."""
    paths = file_path if isinstance(file_path, list) else [file_path]
    return bool(paths) and all(isinstance(path, str) for path in paths)


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


CODECS = ("packed", "json")
DEFAULT_FLOOR = 5e-4
MAX_TOP_K = 65_535
MAX_VOCAB_SIZE = 1 << 24


@dataclass
class CacheConfig(Section, key="cache"):
    """`cache`: tokens kept at a position, at most `top_k`: those that `min_probability` and `top_p`
    select, at least `min_k`."""

    codec: str = choice("packed", CODECS)
    """packed (a tenth of the bytes) or json (NeMo-Aligner's fields as plain numbers, top_k logits
    at every position)."""
    min_probability: float | None = bounded(None, at_least=0, below=1)
    """Drop tokens below this probability; 0 keeps top_k. None: 5e-4 for packed, 0 for json."""
    top_p: float = bounded(1.0, above=0, at_most=1)
    """Keep the likeliest tokens until their probabilities add up to this; 1 keeps all."""
    min_k: int = count(1)
    """Tokens kept at every position, whatever their probability."""
    positions: str = choice("loss", ("loss", "all"))
    """packed: store loss (positions whose label counts in the loss) or all positions."""
    select: str | None = None
    """packed: store some of the loss positions only, for example 'top 25% by teacher_entropy': in
    every example the share with the largest entropy of the teacher. The KD term then trains on
    them, cross-entropy on all. None: all."""
    temperatures: list[float] = positive([])
    """Temperatures other than 1 at which the probability outside the kept tokens is stored.
    Training at a temperature needs it here; at most 15."""
    tail_samples: int = bounded(0, at_least=0, at_most=255)
    """Token ids per position drawn from the teacher's distribution outside the kept tokens. They
    make the cache unbiased."""
    seed: int = bounded(1234, at_least=0)
    """Seed of the tail samples."""
    segment_examples: int = count(64)
    """Records computed and published together; a killed run loses at most this many per
    data-parallel rank."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.temperatures = sorted({float(each) for each in self.temperatures} - {1.0})
        if len(self.temperatures) > 15:
            raise self.error("temperatures", "more than 15; at most 15 are stored")
        self._check_selection()
        if self.codec == "json" and (self.probability_floor > 0 or self.top_p < 1):
            raise self.error(
                "codec",
                "json stores top_k logits at every position, so cache.min_probability must be 0 "
                "and cache.top_p 1; use cache.codec=packed to keep fewer if the teacher is certain",
            )

    def _check_selection(self) -> None:
        try:
            selection = self.selection
        except ValueError as error:
            raise self.error("select", str(error)) from error
        if selection is None:
            return
        if selection.needs_student:
            raise self.error(
                "select",
                f"{self.select}: stage 1 has no student; use teacher_entropy, or "
                "model.knowledge_distillation.select in stage 2",
            )
        if self.codec == "json" or self.positions == "all":
            raise self.error(
                "select",
                f"{self.select} stores some of the loss positions, but cache.codec={self.codec} "
                f"and cache.positions={self.positions}; use packed and loss",
            )

    @property
    def selection(self) -> Selection | None:
        """Return the loss positions to store; None for all."""
        return None if self.select is None else Selection.of(self.select)

    @property
    def stored_positions(self) -> str:
        """Return loss, all or selected."""
        return "selected" if self.select else self.positions

    @property
    def probability_floor(self) -> float:
        """Return `min_probability`, or the default of the codec."""
        # Not set in __post_init__: the default of one codec would become a given value of the
        # other.
        if self.min_probability is not None:
            return self.min_probability
        return DEFAULT_FLOOR if self.codec == "packed" else 0.0

    def kept(self, probabilities_NK: Any) -> Any:
        """Return a mask [N, K] of the kept ones of each row's descending probabilities: a prefix.

        Works with NumPy arrays and torch tensors.
        """
        kept_NK = probabilities_NK >= self.probability_floor
        if self.top_p < 1:  # a sum of all may round to 1 or more
            kept_NK &= probabilities_NK.cumsum(1) - probabilities_NK < self.top_p
        kept_NK[:, : self.min_k] = True
        return kept_NK
