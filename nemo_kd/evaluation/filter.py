"""Keep the records of a dataset whose response is correct. Imports neither torch nor transformers."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import orjson

from nemo_kd.answers.checkers import Judge, ground_truth, judge_of
from nemo_kd.answers.outcomes import Outcome
from nemo_kd.config import ConfigError, DataError
from nemo_kd.config.answers import AnswerConfig
from nemo_kd.data.records import open_records
from nemo_kd.files import atomic_file, write_atomically

NO_RESPONSE = "no response in the record"
REASONS = (
    *(each.value for each in Outcome if each is not Outcome.CORRECT),
    NO_RESPONSE,
)


def filter_records(
    source: str | Path, target: Path, settings: AnswerConfig, label_key: str = "output"
) -> dict[str, Any]:
    """Write correct records to `target` as JSONL, lines byte for byte, and statistics beside it.

    Args:
        label_key: field with the response of records that are not chats.

    Returns:
        The statistics: `original`, `kept`, `retention` and counts of `reasons`, with the settings.

    Raises:
        ConfigError: both paths are one file, or the settings cannot work.
        DataError: a record cannot be read, or none has the field of the answer; with file:line.
    """
    statistics_path = target.with_suffix(".stats.json")
    records = open_records(str(source))
    for path, used in itertools.product((target, statistics_path), records.files()):
        if path.resolve() == used.resolve() or (path.exists() and path.samefile(used)):
            raise ConfigError(f"{path}: would replace the input; give another output")
    judge = judge_of(settings)
    answer_field = settings.answer_field or ""
    counts: Counter[str] = Counter()
    fields: set[str] = set()
    with atomic_file(target) as file:
        for index in records.indices:
            record = records[index]
            fields.update(record)
            try:
                outcome = _judge_record(record, answer_field, label_key, judge)
            except DataError as error:
                raise DataError(f"{records.where(index)}: {error}") from error
            counts[outcome] += 1
            if outcome == Outcome.CORRECT.value:
                file.write(records.raw(index))
        if answer_field not in fields:
            raise DataError(
                f"{source}: no record has the field {answer_field!r} with the right answer; the "
                f"fields are {', '.join(sorted(fields))}"
            )
    kept = counts[Outcome.CORRECT.value]
    statistics = {
        "original": counts.total(),
        "kept": kept,
        "retention": kept / counts.total(),
        "reasons": {reason: counts[reason] for reason in REASONS},
        "input": str(source),
        "output": str(target),
        "answer_field": answer_field,
        "checker": settings.checker,
        "pattern": settings.pattern,
        "custom_checker": settings.custom_checker,
    }
    write_atomically(
        statistics_path, orjson.dumps(statistics, option=orjson.OPT_INDENT_2) + b"\n"
    )
    return statistics


def response_of(record: dict[str, Any], label_key: str) -> str | None:
    """Return the text of a record's last trained turn; None if it has none.

    Raises:
        DataError: the turns have another shape.
    """
    if "messages" in record:
        messages = _turns(record, "messages")
        texts = [
            each.get("content") for each in messages if each.get("role") == "assistant"
        ]
    elif "conversations" in record:
        turns = _turns(record, "conversations")
        masked = {name.strip() for name in str(record.get("mask", "User")).split(",")}
        is_labelled = record.get("type") == "TEXT_TO_VALUE"
        if not is_labelled:
            turns = turns[1:]  # the first one is never trained
        key = "label" if is_labelled else "value"
        texts = [turn.get(key) for turn in turns if turn.get("from") not in masked]
    else:
        texts = [record.get(label_key)]
    texts = [text for text in texts if isinstance(text, str)]
    return texts[-1] if texts else None


def _turns(record: dict[str, Any], key: str) -> list[dict[str, Any]]:
    turns = record[key]
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) for turn in turns
    ):
        raise DataError(
            f"`{key}` must be a list of objects, found {str(turns)[:80]!r}"
        )
    return turns


def _judge_record(
    record: dict[str, Any], answer_field: str, label_key: str, judge: Judge
) -> str:
    answer = ground_truth(record, answer_field)
    if answer is None:
        return Outcome.NO_TRUTH.value
    response = response_of(record, label_key)
    return NO_RESPONSE if response is None else judge(response, answer).value
