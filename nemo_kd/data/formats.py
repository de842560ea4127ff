"""Find the format of a record, and the fields that it reads."""

from __future__ import annotations

import string
from typing import Any

from nemo_kd.config import DataError
from nemo_kd.config.data import CHAT_FORMATS, PLAIN_TEMPLATE, DatasetConfig
from nemo_kd.data.conversation import SPEAKERS, TURN_WEIGHTS, decoded
from nemo_kd.data.nemo_chat import NEMO_TYPES

Record = dict[str, Any]
EMPTY: Any = (None, "", [], {})

CONTEXT_FIELDS = ("system", "system_prompt", "history", "functions")
"""Fields that hold a part of the conversation wherever they occur."""


def format_of(record: Record, config: DatasetConfig) -> str:
    """Return the configured format, or else the one that the record's fields show."""
    if config.format != "auto":
        return config.format
    key = turns_key(record, config)
    if record.get(key) is not None:
        return _chat_format(record, key)
    held = {name for name, value in record.items() if value is not None}
    if "input_ids" in held:
        return "tokens"
    if config.prompt_template != PLAIN_TEMPLATE:
        return "prompt_template"
    if config.label_key in held:
        return "alpaca" if "instruction" in held else "prompt_template"
    if {config.question_key, config.answer_key} <= held:
        return "question_answer"
    return "text" if "text" in held else "prompt_template"


def turns_key(record: Record, config: DatasetConfig) -> str:
    """Return the field with the turns of a chat record."""
    is_default = config.input_key == DatasetConfig.input_key
    if is_default and record.get(config.input_key) is None:
        return "conversations"
    return config.input_key


def last_role(record: Record, config: DatasetConfig) -> str:
    """Return the role of a chat record's last turn, empty for other records."""
    turns = decoded(record.get(turns_key(record, config)))
    last = turns[-1] if isinstance(turns, list) and turns else None
    if not isinstance(last, dict):
        return ""
    return str(last.get("role", last.get("from"))).lower()


def _chat_format(record: Record, key: str) -> str:
    turns = decoded(record[key])
    if not isinstance(turns, list):
        turns = []
    turns = [turn for turn in turns if isinstance(turn, dict)]
    is_openai = any("role" in turn for turn in turns)
    speakers = {str(turn["from"]) for turn in turns if "from" in turn}
    if is_openai or key != "conversations":
        return "sharegpt" if speakers else "messages"
    is_nemo = (
        record.get("mask") is not None
        or record.get("type") in NEMO_TYPES[1:]
        or any(turn.get("label") is not None for turn in turns)
        or not speakers
        or not speakers <= SPEAKERS.keys()
    )
    return "conversations" if is_nemo else "sharegpt"


def missing_fields(record: Record, kind: str, config: DatasetConfig) -> list[str]:
    """Return the fields without which a record is not of a format."""
    needed, _ = _fields(record, kind, config)
    return [name for name in needed if record.get(name) is None]


def unread_fields(record: Record, kind: str, config: DatasetConfig) -> list[str]:
    """Return the fields of a record that hold something which its format does not use.

    Raises:
        DataError: one holds a part of the conversation, or takes the record out of the loss.
    """
    needed, optional = _fields(record, kind, config)
    read = {*needed, *optional, config.split and "split"}
    unread = [
        name for name in record if record[name] not in EMPTY and name not in read
    ]
    for name in unread:
        is_context = name in CONTEXT_FIELDS and kind in (*CHAT_FORMATS, "alpaca")
        if is_context or (name in TURN_WEIGHTS and record[name] == 0):
            raise DataError(
                f"`{name}`: {str(record[name])[:80]!r} would be lost, because records of the format "
                f"{kind} have no such field; name it in {config.KEY}.system_key or tools_key (of "
                f"chats), or use or remove it in a function, {config.KEY}.record_function"
            )
    return unread


def _fields(
    record: Record, kind: str, config: DatasetConfig
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the fields that a format needs, and the others that it reads."""
    beside = (config.system_key, config.tools_key)
    chat = ((turns_key(record, config),), beside)
    question = (config.question_key, config.answer_key)
    template = string.Formatter().parse(config.prompt_template)
    return {
        "messages": chat,
        "sharegpt": chat,
        "question_answer": (question, (config.prompt_key, *beside)),
        "conversations": (("conversations",), ("system", "mask", "type")),
        "tokens": (("input_ids",), ("attention_mask", "loss_mask", "labels")),
        "alpaca": (("instruction", "output"), ("input",)),
        "text": (("text",), ()),
        # Its template names what is missing.
        "prompt_template": ((), tuple(part[1] or "" for part in template)),
    }[kind]
