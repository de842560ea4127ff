"""Reads vLLM's `prompt_logprobs` as rows of a cache.

One JSON object a line, with `prompt_token_ids` (n ids) and `prompt_logprobs` (n entries): the first is null, every other
an object {token id as text: {"logprob": ..., "rank": ...}} for the token at its own place. vLLM adds the prompt's own
token where it is not among the k likeliest. What the OpenAI-compatible server answers (`choices`) is read too, and so is
what its batch runner writes (`response.body`); either has the ids when it was asked with `return_token_ids`.
"""

from __future__ import annotations

import json
import math
import reprlib
from array import array
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from nemo_kd.batch import CachedExample, Example, TeacherRows
from nemo_kd.cache.fields import array as field_array
from nemo_kd.cache.fields import example_index, ids
from nemo_kd.cache.layout import CacheError
from nemo_kd.cache.packed_codec import MAX_CELLS
from nemo_kd.files import open_regular

SMALLEST_LOGPROB = -1000.0
"""JSON has no -inf: vLLM's server writes -9999 for what cannot be, others null or -Infinity."""
LARGEST_MASS = 1.01
ROWS_FOR_K = 16


class Told(NamedTuple):
    """What the entries of all S positions tell, N tokens in all: position by position, likeliest first.

    Attributes:
        own_rank_S: of the token at its own place; 0 where vLLM told none.
    """

    counts_S: np.ndarray
    ids_N: np.ndarray
    logprobs_N: np.ndarray
    own_rank_S: np.ndarray
    own_logprob_S: np.ndarray


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
            with open_regular(path) as file:
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
        with open_regular(self.path) as file:
            file.seek(self._starts[position])
            line = file.readline()
        return _row(_payload(line, where), position, where)

    @property
    def largest_k(self) -> int:
        """The k that vLLM was asked for, as far as the first rows tell."""
        return max(
            self[position].teacher.topk_token_ids_PK.shape[1]
            for position in range(min(len(self), ROWS_FOR_K))
        )

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
        raise CacheError(
            f"{where}: found {len(line)} bytes that are not valid JSON ({error})"
        ) from error
    if isinstance(payload, dict) and isinstance(payload.get("response"), dict):
        payload = {**payload, **(payload["response"].get("body") or {})}
    if (
        isinstance(payload, dict)
        and payload.get("prompt_logprobs") is None
        and payload.get("choices")
    ):
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
            raise CacheError(
                f"{where}: field loss_mask: found {len(mask)} positions, expected {len(tokens)}"
            )
        if not np.isin(mask, (0, 1)).all():
            raise CacheError(
                f"{where}: field loss_mask: found {mask[~np.isin(mask, (0, 1))][0]}, expected only 0 and 1"
            )
    # The entry of a token is what the model said before it: it belongs to the position in front.
    told = _told(found[1:], tokens[1:], where)
    row_N = np.repeat(np.arange(len(told.counts_S)), told.counts_S)
    place_N = np.arange(len(row_N)) - np.repeat(
        np.cumsum(told.counts_S) - told.counts_S, told.counts_S
    )
    kept_N = _kept(told, tokens[1:], place_N, row_N)
    k = max(1, int(place_N[kept_N].max(initial=-1)) + 1)
    if k * len(tokens) > MAX_CELLS:
        raise CacheError(
            f"{where}: field prompt_logprobs: found {k} ids for one of {len(tokens)} tokens, more than a row may hold"
        )
    logprobs_SK = np.full((len(tokens) - 1, k), -np.inf, dtype=np.float64)
    ids_SK = np.full((len(tokens) - 1, k), -1, dtype=np.int64)
    logprobs_SK[row_N[kept_N], place_N[kept_N]] = told.logprobs_N[kept_N]
    ids_SK[row_N[kept_N], place_N[kept_N]] = told.ids_N[kept_N]
    mass_S = np.exp(logprobs_SK).sum(axis=1)
    if mass_S.max() > LARGEST_MASS:
        raise CacheError(
            f"{where}: field prompt_logprobs: found probabilities that sum to {mass_S.max():.4g} for token "
            f"{tokens[1 + mass_S.argmax()]}, expected log-probabilities; run vLLM with --logprobs-mode raw_logprobs"
        )
    largest_S = np.where(ids_SK[:, 0] >= 0, logprobs_SK[:, 0], 0)
    teacher = TeacherRows(
        positions_P=np.arange(len(ids_SK)),
        topk_logits_PK=(logprobs_SK - largest_S[:, None]).astype(np.float32),
        topk_token_ids_PK=ids_SK,
        log_sum_exp_logits_P=np.maximum(-largest_S, 0).astype(np.float32),
        tail_mass_PT=np.clip(1 - mass_S, 0, 1).astype(np.float32)[:, None],
        label_logprobs_P=np.maximum(told.own_logprob_S, SMALLEST_LOGPROB).astype(np.float32),
    )
    example = Example(example_index(payload, position, where), tokens[:-1], tokens[1:], mask[1:])
    return CachedExample(example, teacher)


def _told(entries: list[Any], tokens_S: np.ndarray, where: str) -> Told:
    try:
        ids = [int(key) for entry in entries for key in entry]
        logprobs = [_logprob(facts) for entry in entries for facts in entry.values()]
        own = [entry[str(token)] for entry, token in zip(entries, tokens_S.tolist(), strict=True)]
        ranks = [facts.get("rank") or 0 if isinstance(facts, dict) else 0 for facts in own]
        ids_N, logprobs_N = np.array(ids, dtype=np.int64), np.array(logprobs, dtype=np.float64)
        own_rank_S, own_logprob_S = (
            np.array(ranks, dtype=np.int64),
            np.array([_logprob(facts) for facts in own]),
        )
        if (
            ids_N.min() < 0
            or ids_N.max() >= 1 << 31
            or np.isnan(logprobs_N).any()
            or logprobs_N.max() == np.inf
        ):
            raise ValueError("an id or a log-probability is none")
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        if len(entries) > 1:  # find out which
            for number, entry in enumerate(entries):
                _told([entry], tokens_S[number : number + 1], where)
        raise CacheError(
            f"{where}: field prompt_logprobs: found {reprlib.repr(entries[0])[:80]!r} for token {tokens_S[0]}, expected an object "
            '{"id": {"logprob": number, "rank": number}} with the token itself among the ids'
        ) from error
    counts_S = np.array([len(entry) for entry in entries])
    order_N = np.lexsort((ids_N, -logprobs_N, np.repeat(np.arange(len(entries)), counts_S)))
    return Told(counts_S, ids_N[order_N], logprobs_N[order_N], own_rank_S, own_logprob_S)


def _logprob(facts: Any) -> float:
    value = facts["logprob"] if isinstance(facts, dict) else facts
    return -math.inf if value is None else float(value)


def _kept(told: Told, tokens_S: np.ndarray, place_N: np.ndarray, row_N: np.ndarray) -> np.ndarray:
    """Which tokens are kept, as a mask: not the prompt's own where it was added to the k likeliest, nor what cannot be.

    Whether a token is kept must not depend on its being the label: that would bias what is kept.
    """
    last_S = np.cumsum(told.counts_S) - 1
    is_added_S = (told.own_rank_S > told.counts_S) | (told.counts_S == told.counts_S.min() + 1)
    is_added_S &= told.ids_N[last_S] == tokens_S
    return (told.logprobs_N > SMALLEST_LOGPROB) & ~(
        is_added_S[row_N] & (place_N == told.counts_S[row_N] - 1)
    )
