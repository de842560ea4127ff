"""Read vLLM's `prompt_logprobs` as rows of a cache.

One JSON object per line, with `prompt_token_ids` (n ids) and `prompt_logprobs` (n entries). The
first entry is null; every other one is an object {token id as text: {"logprob": ..., "rank": ...}}
for the token at its own place. vLLM adds the prompt's token if it is not among the k likeliest.
Answers of the OpenAI-compatible server (`choices`) and of its batch runner (`response.body`) are
read too; both hold the ids if asked with `return_token_ids`.

Shape legend: S positions, N entries of all positions, likeliest first in each, K kept tokens.
"""

from __future__ import annotations

import json
import math
import reprlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from nemo_kd.batch import CachedExample, Example, TeacherRows
from nemo_kd.cache.fields import array as field_array
from nemo_kd.cache.fields import example_index, ids
from nemo_kd.cache.layout import CacheError
from nemo_kd.cache.packed_codec import MAX_CELLS
from nemo_kd.data.records import JsonlRecords

SMALLEST_LOGPROB = -1000.0
"""JSON has no -inf: vLLM's server writes -9999 for impossible tokens, others null or -Infinity."""
LARGEST_MASS = 1.01
ROWS_FOR_K = 16


class Entries(NamedTuple):
    """The log-probabilities of all positions.

    Attributes:
        own_rank_S: rank of the token at its own place; 0 if vLLM wrote none.
    """

    counts_S: np.ndarray
    ids_N: np.ndarray
    logprobs_N: np.ndarray
    own_rank_S: np.ndarray
    own_logprob_S: np.ndarray


class VllmRows:
    """Rows of a JSONL file that vLLM wrote. The index of a line defaults to its place.

    Raises:
        DataError: the file cannot be read or is empty.
        CacheError: on access, a line is malformed; with file:line.
    """

    manifests: list[Any] = []

    def __init__(self, path: str) -> None:
        self.path = path
        self._records = JsonlRecords(path, "the source")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, position: int) -> CachedExample:
        where = self._records.where(position)
        return _row(_payload(self._records.raw(position), where), position, where)

    @property
    def largest_k(self) -> int:
        """The requested k, estimated from the first rows."""
        rows = map(self.__getitem__, range(min(len(self), ROWS_FOR_K)))
        return max(row.teacher.topk_token_ids_PK.shape[1] for row in rows)

    def fingerprint(self) -> str:
        """Return name and size; the content has no checksum."""
        return f"{Path(self.path).name}:{Path(self.path).stat().st_size}"


def _payload(line: bytes, where: str) -> dict[str, Any]:
    """Return the object with the prompt's fields."""
    try:
        try:
            payload = orjson.loads(line)
        except orjson.JSONDecodeError:
            payload = json.loads(line)  # accepts -Infinity and NaN, which Python writes
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
            f"{where}: field prompt_logprobs: found nothing, expected a list with one object per "
            "token; ask vLLM with prompt_logprobs=k"
        )
    return payload


def _row(payload: dict[str, Any], position: int, where: str) -> CachedExample:
    field = f"{where}: field prompt_logprobs"
    tokens = ids(payload, "prompt_token_ids", 1, where)
    entries = payload["prompt_logprobs"]
    if not isinstance(entries, list) or len(entries) != len(tokens) or len(tokens) < 2:
        found = len(entries) if isinstance(entries, list) else type(entries).__name__
        raise CacheError(
            f"{field}: found {found}, expected a list of {len(tokens)} entries as in "
            "prompt_token_ids, at least 2"
        )
    loss_mask = np.ones(len(tokens), dtype=np.float32)
    if "loss_mask" in payload:
        loss_mask = field_array(payload, "loss_mask", 1, "ifb", where).astype(np.float32)
        if len(loss_mask) != len(tokens):
            raise CacheError(
                f"{where}: field loss_mask: found {len(loss_mask)} positions, "
                f"expected {len(tokens)}"
            )
        is_other = ~np.isin(loss_mask, (0, 1))
        if is_other.any():
            raise CacheError(
                f"{where}: field loss_mask: found {loss_mask[is_other][0]}, expected only 0 and 1"
            )
    # A token's entry was predicted before it: it belongs to the position in front.
    parsed = _parse_entries(entries[1:], tokens[1:], where)
    counts_S = parsed.counts_S
    row_N = np.repeat(np.arange(len(counts_S)), counts_S)
    place_N = np.arange(len(row_N)) - np.repeat(np.cumsum(counts_S) - counts_S, counts_S)
    is_kept_N = _is_kept(parsed, tokens[1:], place_N, row_N)
    k = max(1, int(place_N[is_kept_N].max(initial=-1)) + 1)
    if k * len(tokens) > MAX_CELLS:
        raise CacheError(
            f"{field}: found {k} ids for one of {len(tokens)} tokens, more than a row may hold"
        )
    cells = (row_N[is_kept_N], place_N[is_kept_N])
    logprobs_SK = np.full((len(counts_S), k), -np.inf, dtype=np.float64)
    ids_SK = np.full((len(counts_S), k), -1, dtype=np.int64)
    logprobs_SK[cells] = parsed.logprobs_N[is_kept_N]
    ids_SK[cells] = parsed.ids_N[is_kept_N]
    mass_S = np.exp(logprobs_SK).sum(axis=1)
    if mass_S.max() > LARGEST_MASS:
        raise CacheError(
            f"{field}: found probabilities that sum to {mass_S.max():.4g} for token "
            f"{tokens[1 + mass_S.argmax()]}, expected log-probabilities; run vLLM with "
            "--logprobs-mode raw_logprobs"
        )
    largest_S = np.where(ids_SK[:, 0] >= 0, logprobs_SK[:, 0], 0)
    teacher = TeacherRows(
        positions_P=np.arange(len(ids_SK)),
        topk_logits_PK=(logprobs_SK - largest_S[:, None]).astype(np.float32),
        topk_token_ids_PK=ids_SK,
        log_sum_exp_logits_P=np.maximum(-largest_S, 0).astype(np.float32),
        tail_mass_PT=np.clip(1 - mass_S, 0, 1).astype(np.float32)[:, None],
        label_logprobs_P=np.maximum(parsed.own_logprob_S, SMALLEST_LOGPROB).astype(
            np.float32
        ),
    )
    index = example_index(payload, position, where)
    return CachedExample(Example(index, tokens[:-1], tokens[1:], loss_mask[1:]), teacher)


def _parse_entries(entries: list[Any], tokens_S: np.ndarray, where: str) -> Entries:
    try:
        own = [
            entry[str(token)]
            for entry, token in zip(entries, tokens_S.tolist(), strict=True)
        ]
        ranks = [
            facts.get("rank") or 0 if isinstance(facts, dict) else 0 for facts in own
        ]
        facts_N = [facts for entry in entries for facts in entry.values()]
        ids_N = np.array([int(key) for entry in entries for key in entry], dtype=np.int64)
        logprobs_N = np.array(list(map(_logprob, facts_N)), dtype=np.float64)
        own_rank_S = np.array(ranks, dtype=np.int64)
        own_logprob_S = np.array(list(map(_logprob, own)))
        # A comparison with NaN is False.
        if ids_N.min() < 0 or ids_N.max() >= 1 << 31 or not (logprobs_N < np.inf).all():
            raise ValueError("an id or a log-probability is out of range")
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        if len(entries) > 1:  # find the one
            for number, entry in enumerate(entries):
                _parse_entries([entry], tokens_S[number : number + 1], where)
        raise CacheError(
            f"{where}: field prompt_logprobs: found {reprlib.repr(entries[0])[:80]!r} for token "
            f'{tokens_S[0]}, expected an object {{"id": {{"logprob": number, "rank": number}}}} '
            "with the token itself among the ids"
        ) from error
    counts_S = np.array([len(entry) for entry in entries])
    order_N = np.lexsort(
        (ids_N, -logprobs_N, np.repeat(np.arange(len(entries)), counts_S))
    )
    return Entries(
        counts_S, ids_N[order_N], logprobs_N[order_N], own_rank_S, own_logprob_S
    )


def _logprob(facts: Any) -> float:
    value = facts["logprob"] if isinstance(facts, dict) else facts
    return -math.inf if value is None else float(value)


def _is_kept(
    entries: Entries, tokens_S: np.ndarray, place_N: np.ndarray, row_N: np.ndarray
) -> np.ndarray:
    """Mask out the prompt's tokens that vLLM added to the k likeliest, and impossible tokens.

    Keeping a token because it is the label would bias the kept ones.
    """
    counts_S = entries.counts_S
    is_added_S = (entries.own_rank_S > counts_S) | (counts_S == counts_S.min() + 1)
    is_added_S &= entries.ids_N[np.cumsum(counts_S) - 1] == tokens_S
    is_last_N = place_N == counts_S[row_N] - 1
    return (entries.logprobs_N > SMALLEST_LOGPROB) & ~(is_added_S[row_N] & is_last_N)
