"""NeMo's `conversations` chat records, and which of their tokens are trained.

    <system_turn_start>System<end_of_name>{system}<end_of_turn>
    <turn_start>{from}<end_of_name>[<label_start>{label}<end_of_name>]{value}<end_of_turn> ...      and at last <turn_start>

A record's `mask` names the speakers that are not trained (default "User", comma-separated). Of the other turns the
value and the end of the turn are trained, with the following turn's start marker as the signal that the turn is over.
The first turn is never trained. `type` VALUE_TO_TEXT shows labels as context, TEXT_TO_VALUE trains the labels alone,
and without a type labels are left out. Every piece is tokenized on its own, so that spans are exact.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from nemo_kd.config.data import ChatPromptTokens
from nemo_kd.data.records import DataError

_TYPES = (None, "VALUE_TO_TEXT", "TEXT_TO_VALUE")


def render_conversations(
    record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, markers: ChatPromptTokens
) -> tuple[list[int], list[bool]]:
    """Token ids of the whole record, and for each whether it is trained.

    Raises:
        DataError: the record has another shape.
    """
    turns, masked, kind = record["conversations"], _masked_speakers(record), record.get("type")
    if kind not in _TYPES:
        raise DataError(f"`type` must be VALUE_TO_TEXT, TEXT_TO_VALUE or absent, found {kind!r}")
    if not isinstance(turns, list) or len(turns) < 2:
        raise DataError(f"`conversations` must be a list of at least two turns, found {str(turns)[:80]!r}")
    speakers = [_turn_text(turn, number)[0] for number, turn in enumerate(turns)]
    if not masked & set(speakers):
        raise DataError(
            f"`mask` is {', '.join(sorted(masked))!r}, but the speakers are {', '.join(dict.fromkeys(speakers))!r}; name in `mask` "
            "those that are not trained"
        )
    pieces: list[tuple[str, bool]] = [
        (
            f"{markers.system_turn_start}System{markers.end_of_name}{record.get('system', '')}{markers.end_of_turn}",
            False,
        )
    ]
    answered = False  # whether the turn before was trained: then this turn's start marker ends it
    for number, turn in enumerate(turns):
        speaker, value = _turn_text(turn, number)
        label = turn.get("label")
        pieces += [(markers.turn_start, answered), (f"{speaker}{markers.end_of_name}", False)]
        answered = number > 0 and speaker not in masked
        if kind == "TEXT_TO_VALUE":
            pieces += [(value + markers.end_of_turn, False)]
            if label is not None:
                pieces[-1:] = [
                    (f"{markers.label_start}", False),
                    (f"{label}{markers.end_of_name}", answered),
                    (value + markers.end_of_turn, False),
                ]
            answered = False
            continue
        if kind == "VALUE_TO_TEXT" and label is not None:
            pieces.append((f"{markers.label_start}{label}{markers.end_of_name}", False))
        pieces.append((value + markers.end_of_turn, answered))
    if answered:
        pieces.append((markers.turn_start, True))
    ids: list[int] = []
    trained: list[bool] = []
    for text, is_trained in pieces:
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += piece
        trained += [is_trained] * len(piece)
    return ids, trained


def _masked_speakers(record: dict[str, Any]) -> set[str]:
    mask = record.get("mask", "User")
    if not isinstance(mask, str) or not mask.strip():
        raise DataError(f'`mask` must name the speakers that are not trained, such as "User"; found {mask!r}')
    return {speaker.strip() for speaker in mask.split(",")}


def _turn_text(turn: Any, number: int) -> tuple[str, str]:
    if not isinstance(turn, dict) or not isinstance(turn.get("from"), str) or not isinstance(turn.get("value"), str):
        raise DataError(f"turn {number} must be an object with texts `from` and `value`, found {str(turn)[:80]!r}")
    return turn["from"], turn["value"]
