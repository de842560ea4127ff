"""Reads vLLM's `prompt_logprobs` as rows of a cache.

One JSON object a line, with `prompt_token_ids` (n ids) and `prompt_logprobs` (n entries): the first is null, every other
an object {token id as text: {"logprob": ..., "rank": ...}} for the token at its own place. vLLM adds the prompt's own
token where it is not among the k likeliest. What the OpenAI-compatible server answers (`choices`) is read too, and so is
what its batch runner writes (`response.body`); either has the ids when it was asked with `return_token_ids`.
"""

from __future__ import annotations

import json
import math
from array import array
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from nemo_kd.batch import CachedExample, Example, TeacherTopK
from nemo_kd.cache.fields import array as field_array
from nemo_kd.cache.fields import example_index, ids
from nemo_kd.cache.layout import CacheError

SMALLEST_LOGPROB = -1000.0
"""JSON has no -inf: vLLM's server writes -9999 for what cannot be, others null or -Infinity."""
LARGEST_MASS = 1.01
ROWS_FOR_K = 16


class Entry(NamedTuple):
    """A token that an entry of `prompt_logprobs` tells of; rank 0 where it has none."""

    token: int
    logprob: float
    rank: int


class VllmRows:
    """The rows of a JSONL file of vLLM's, by position; a line's place in the file is its index where it has none.

    Raises:
        CacheError: the file cannot be read or is empty.
    """

    manifests: list[Any] = []

    def __init__(self, path: str) -> None:
        self.path = path
        self._starts, self._lines, size = array("q"), array("q"), 0
        try:
            with open(path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        self._starts.append(size)
                        self._lines.append(number)
                    size += len(line)
        except OSError as error:
            raise CacheError(f"{path}: cannot be read ({error.strerror})") from error
        self._size = size
        if len(self) == 0:
            raise CacheError(f"{path}: the file is empty")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, position: int) -> CachedExample:
        where = f"{self.path}:{self._lines[position]}"
        with open(self.path, "rb") as file:
            file.seek(self._starts[position])
            line = file.readline()
        return _row(_payload(line, where), position, where)

    @property
    def largest_k(self) -> int:
        """The k that vLLM was asked for, as far as the first rows tell."""
        return max(self[position].teacher.topk_token_ids_SK.shape[1] for position in range(min(len(self), ROWS_FOR_K)))

    def fingerprint(self) -> str:
        """Name and size; the content is whatever vLLM wrote."""
        return f"{Path(self.path).name}:{self._size}"


def _payload(line: bytes, where: str) -> dict[str, Any]:
    """The object with the prompt's fields."""
    try:
        try:
            payload = orjson.loads(line)
        except orjson.JSONDecodeError:
            payload = json.loads(line)  # Python's own writer spells -inf and NaN, which no JSON is
    except ValueError as error:
        raise CacheError(f"{where}: found {len(line)} bytes that are not valid JSON ({error})") from error
    if isinstance(payload, dict) and isinstance(payload.get("response"), dict):
        payload = {**payload, **(payload["response"].get("body") or {})}
    if isinstance(payload, dict) and payload.get("prompt_logprobs") is None and payload.get("choices"):
        payload = {**payload, **payload["choices"][0]}
        payload.pop("index", None)  # of the choice
    if not isinstance(payload, dict) or "prompt_logprobs" not in payload:
        raise CacheError(
            f"{where}: field prompt_logprobs: found nothing, expected a list with one object a token; ask vLLM with prompt_logprobs=k"
        )
    return payload


def _row(payload: dict[str, Any], position: int, where: str) -> CachedExample:
    tokens = ids(payload, "prompt_token_ids", 1, where)
    found = payload["prompt_logprobs"]
    if not isinstance(found, list) or len(found) != len(tokens) or len(tokens) < 2:
        raise CacheError(
            f"{where}: field prompt_logprobs: found {len(found) if isinstance(found, list) else type(found).__name__}, "
            f"expected a list of {len(tokens)} entries as in prompt_token_ids, at least 2"
        )
    mask = np.ones(len(tokens), dtype=np.float32)
    if "loss_mask" in payload:
        mask = field_array(payload, "loss_mask", 1, "ifb", where).astype(np.float32)
        if len(mask) != len(tokens):
            raise CacheError(f"{where}: field loss_mask: found {len(mask)} positions, expected {len(tokens)}")
        if not np.isin(mask, (0, 1)).all():
            raise CacheError(
                f"{where}: field loss_mask: found {mask[~np.isin(mask, (0, 1))][0]}, expected only 0 and 1"
            )
    # The entry of a token is what the model said before it: it belongs to the position in front.
    told = [_entries(entry, int(token), where) for entry, token in zip(found[1:], tokens[1:], strict=True)]
    k = min(len(entries) for entries in told)
    kept = [_likeliest(entries, int(token), k) for entries, token in zip(told, tokens[1:], strict=True)]
    largest_k = max(1, *(len(entries) for entries in kept))
    logprobs_SK = np.full((len(kept), largest_k), -np.inf, dtype=np.float64)
    ids_SK = np.full((len(kept), largest_k), -1, dtype=np.int64)
    for number, entries in enumerate(kept):
        for rank, entry in enumerate(entries):
            ids_SK[number, rank], logprobs_SK[number, rank] = entry.token, entry.logprob
    mass_S = np.exp(logprobs_SK).sum(axis=1)
    if mass_S.max() > LARGEST_MASS:
        raise CacheError(
            f"{where}: field prompt_logprobs: found probabilities that sum to {mass_S.max():.4g} for token "
            f"{tokens[1 + mass_S.argmax()]}, expected log-probabilities; run vLLM with --logprobs-mode raw_logprobs"
        )
    largest_S = np.where(ids_SK[:, 0] >= 0, logprobs_SK[:, 0], 0)
    labels = [
        next(entry.logprob for entry in entries if entry.token == token)
        for entries, token in zip(told, tokens[1:], strict=True)
    ]
    teacher = TeacherTopK(
        topk_logits_SK=(logprobs_SK - largest_S[:, None]).astype(np.float32),
        topk_token_ids_SK=ids_SK,
        log_sum_exp_logits_S=np.maximum(-largest_S, 0).astype(np.float32),
        tail_mass_TS=np.clip(1 - mass_S, 0, 1).astype(np.float32)[None],
        label_logprobs_S=np.maximum(labels, SMALLEST_LOGPROB).astype(np.float32),
    )
    example = Example(example_index(payload, position, where), tokens[:-1], tokens[1:], mask[1:])
    return CachedExample(example, teacher)


def _entries(entry: Any, token: int, where: str) -> list[Entry]:
    """What an entry tells, likeliest first; `token` is among it."""
    try:
        found = [_entry(int(key), facts) for key, facts in entry.items()]
        if token not in {one.token for one in found}:
            raise ValueError("the token itself is missing")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CacheError(
            f"{where}: field prompt_logprobs: found {str(entry)[:80]!r} for token {token}, expected an object "
            '{"id": {"logprob": number, "rank": number}} with the token itself among the ids'
        ) from error
    return sorted(found, key=lambda one: (-one.logprob, one.token))


def _entry(token: int, facts: Any) -> Entry:
    logprob, rank = (facts["logprob"], facts.get("rank")) if isinstance(facts, dict) else (facts, None)
    value = -math.inf if logprob is None else float(logprob)
    if math.isnan(value) or value == math.inf or token < 0:
        raise ValueError(f"{logprob} is no log-probability")
    return Entry(token, value, int(rank or 0))


def _likeliest(entries: list[Entry], token: int, k: int) -> list[Entry]:
    """The entries without the prompt's own token where that was added to the k likeliest, and without what cannot be.

    Whether a token is kept must not depend on its being the label: that would bias what is kept.
    """
    own = entries[-1]
    if own.token == token and (own.rank > len(entries) or len(entries) == k + 1):
        entries = entries[:-1]
    return [one for one in entries if one.logprob > SMALLEST_LOGPROB]
