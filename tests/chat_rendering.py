"""Render messages for tests, and show the trained text."""

from __future__ import annotations

from typing import Any

from nemo_kd.config.data import DatasetConfig
from nemo_kd.data.conversation import Conversation
from nemo_kd.data.template import Rendered, render_messages


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def trained_stretches(ids: list[int], trained: list[bool], tokenizer) -> list[str]:
    """The text of every run of trained tokens."""
    stretches: list[list[int]] = []
    for position, (token, flag) in enumerate(zip(ids, trained, strict=True)):
        if flag:
            if position and trained[position - 1]:
                stretches[-1].append(token)
            else:
                stretches.append([token])
    return [tokenizer.decode(stretch) for stretch in stretches]


def render(messages: list[dict], tokenizer, tools=None, **settings: Any) -> Rendered:
    """Render `messages` of a record that may hold `tools`, with settings of `data.data`."""
    config = DatasetConfig(file_path="x", **settings)
    conversation = Conversation.read(messages, {"tools": tools}, config)
    return render_messages(conversation, tokenizer, config)


def marked(messages: list[dict], tokenizer, tools=None, **settings: Any) -> str:
    """The rendered text, with every trained stretch between « and »."""
    ids, trained, _ = render(messages, tokenizer, tools, **settings)
    pieces: list[list[int]] = [[]]
    flags = [False]
    for token, flag in zip(ids, trained, strict=True):
        if flag != flags[-1]:
            pieces.append([])
            flags.append(flag)
        pieces[-1].append(token)
    texts = map(tokenizer.decode, pieces)
    return "".join(
        f"«{text}»" if flag else text for text, flag in zip(texts, flags, strict=True)
    )
