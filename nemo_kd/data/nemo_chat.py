"""Render chats of NeMo's `conversations` format as token ids, and mark the trained ones."""

from __future__ import annotations

from collections import Counter
from typing import Any

from transformers import PreTrainedTokenizerBase

from nemo_kd.config import DataError
from nemo_kd.config.data import ChatPromptTokens
from nemo_kd.data.conversation import UNTRAINED_TURN, pop_weight
from nemo_kd.data.tokenizer import encode, encode_continuation

Piece = tuple[str, bool]

TURN_FIELDS = ("from", "value", "label")
NEMO_TYPES = (None, "VALUE_TO_TEXT", "TEXT_TO_VALUE")
"""Values of `type` in NeMo's records. A `conversations` record becomes

    <system_turn_start>System<end_of_name>{system}<end_of_turn>
    <turn_start>{from}<end_of_name>{value}<end_of_turn>          ... and at last <turn_start>

Its `mask` names the speakers that are not trained (default "User", comma-separated). Of the other
turns the value and the end of the turn are trained, with the following turn's start marker as the
signal that the turn is over; the first turn's value is never trained. `type` decides the use of a
turn's `label`:

    absent          left out
    VALUE_TO_TEXT   context: <label_start>{label}<end_of_name> before the value
    TEXT_TO_VALUE   the same after <end_of_turn>; label and <end_of_name> are trained
                    instead of the value
"""


def render_conversations(
    record: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    markers: ChatPromptTokens,
) -> tuple[list[int], list[bool], Counter[str]]:
    """Return the token ids of a NeMo chat record, True for the trained ones, and what is left out.

    Raises:
        DataError: the record has another shape.
    """
    turns = record["conversations"]
    mask = record.get("mask", "User")
    masked = {name.strip() for name in str(mask).split(",")}
    kind = record.get("type")
    system = record.get("system") or ""
    if kind not in NEMO_TYPES:
        raise DataError(
            f"`type` must be VALUE_TO_TEXT, TEXT_TO_VALUE or absent, found {kind!r}"
        )
    if not isinstance(system, str):
        raise DataError(f"`system` must be a text, found {str(system)[:80]!r}")
    if not isinstance(turns, list) or len(turns) < 2:
        raise DataError(
            f"`conversations` must be a list of at least two turns, found {str(turns)[:80]!r}"
        )
    for number, turn in enumerate(turns):
        if not _is_turn(turn):
            raise DataError(
                f"turn {number} must be an object with texts `from` and `value`, and `label` a text "
                f"or null, found {str(turn)[:80]!r}"
            )
    speakers = [turn["from"] for turn in turns]
    if masked.isdisjoint(speakers):
        raise DataError(
            f"`mask` is {mask!r}, but the speakers are {', '.join(dict.fromkeys(speakers))!r}; name "
            "in `mask` those that are not trained"
        )
    header = f"{markers.system_turn_start}System{markers.end_of_name}{system}{markers.end_of_turn}"
    pieces: list[Piece] = []
    weights, left_out = _weights(turns)
    # The previous turn was trained: this turn's start marker ends it.
    is_answered = False
    for number, turn in enumerate(turns):
        is_trained = weights[number] and turn["from"] not in masked
        is_trained &= number > 0 or kind == "TEXT_TO_VALUE"
        body = _body(turn, kind, is_trained, markers)
        pieces.append((markers.turn_start, is_answered))
        pieces.append((turn["from"] + markers.end_of_name, False))
        pieces += body
        is_answered = any(trained for _, trained in body)
    if speakers[-1] not in masked:
        pieces.append((markers.turn_start, is_answered))
    ids = encode(tokenizer, header)
    trained = [False] * len(ids)
    # Each on its own, so that trained stretches begin and end with whole tokens.
    for text, is_trained in pieces:
        piece = encode_continuation(tokenizer, text)
        ids += piece
        trained += [is_trained] * len(piece)
    return ids, trained, left_out


def _weights(turns: list[dict[str, Any]]) -> tuple[list[bool], Counter[str]]:
    """Return False for turns that a weight takes out of the loss, and what is left out."""
    weights = []
    left_out: Counter[str] = Counter()
    for number, turn in enumerate(turns):
        others = {name: turn[name] for name in turn if name not in TURN_FIELDS}
        try:
            weights.append(pop_weight(others))
        except DataError as error:
            raise DataError(f"turn {number} {error}") from error
        left_out[UNTRAINED_TURN] += not weights[-1]
        left_out.update(
            f"field `{name}` of turns, which nothing reads" for name in others
        )
    return weights, +left_out


def _body(
    turn: dict[str, Any], kind: str | None, is_trained: bool, markers: ChatPromptTokens
) -> list[Piece]:
    """Return the pieces after the speaker's name."""
    value = turn["value"] + markers.end_of_turn
    label = turn.get("label")
    if kind is None or label is None:
        return [(value, is_trained and kind != "TEXT_TO_VALUE")]
    label += markers.end_of_name
    if kind == "TEXT_TO_VALUE":
        return [(value, False), (markers.label_start, False), (label, is_trained)]
    return [(markers.label_start + label, False), (value, is_trained)]


def _is_turn(turn: Any) -> bool:
    return (
        isinstance(turn, dict)
        and isinstance(turn.get("from"), str)
        and isinstance(turn.get("value"), str)
        and isinstance(turn.get("label"), str | None)
    )
