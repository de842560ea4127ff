"""Read vLLM's `prompt_logprobs` as rows of a cache.

One JSON object per line, with `prompt_token_ids` (n ids) and `prompt_logprobs` (n entries). The
first entry is null; every other one is an object {token id as text: {"logprob": ..., "rank": ...}}
for the token at its own place. vLLM adds the prompt's token if it is not among the k likeliest.
Answers of the OpenAI-compatible server (`choices`) and of its batch runner (`response.body`) are
read too; both hold the ids if asked with `return_token_ids`.

Shape legend: S positions, K kept tokens.
"""

from __future__ import annotations

import json
import math
import reprlib
from typing import Any

import numpy as np

from nemo_kd.batch import CachedExample, TeacherRows
from nemo_kd.cache.layout import CacheError
from nemo_kd.cache.record import example_of
from nemo_kd.data.dataset import JsonlRecords

SMALLEST_LOGPROB = -1000.0
"""JSON has no -inf: vLLM's server writes -9999 for impossible tokens, others null or -Infinity."""
LARGEST_MASS = 1.01
ROWS_FOR_K = 16


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
        payload = _payload(self._records.raw(position), where)
        tokens = payload.get("prompt_token_ids")
        entries = payload.get("prompt_logprobs")
        if not isinstance(tokens, list) or not isinstance(entries, list):
            raise CacheError(
                f"{where}: fields prompt_token_ids and prompt_logprobs: expected lists; ask vLLM "
                "with prompt_logprobs=k, its server with return_token_ids too"
            )
        if len(entries) != len(tokens) or len(tokens) < 2:
            raise CacheError(
                f"{where}: field prompt_logprobs: found {len(entries)} entries, expected as many "
                f"as prompt_token_ids has, {len(tokens)}, and at least 2"
            )
        fields = payload | {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": payload.get("loss_mask", [1] * len(tokens))[1:],
        }
        example = example_of(fields, where, position)
        # A token's entry was predicted before it: it belongs to the position in front.
        return CachedExample(example, _targets(entries[1:], tokens[1:], where))

    @property
    def largest_k(self) -> int:
        """The requested k, estimated from the first rows."""
        rows = map(self.__getitem__, range(min(len(self), ROWS_FOR_K)))
        return max(row.teacher.topk_token_ids_PK.shape[1] for row in rows)

    def fingerprint(self) -> str:
        """Return the checksum of the file."""
        return self._records.fingerprint


def _payload(line: bytes, where: str) -> dict[str, Any]:
    """Return the object with the prompt's fields."""
    try:
        payload = json.loads(line)  # accepts -Infinity and NaN, which Python writes
    except ValueError as error:
        raise CacheError(
            f"{where}: found {len(line)} bytes that are not valid JSON ({error})"
        ) from error
    if not isinstance(payload, dict):
        raise CacheError(
            f"{where}: found {reprlib.repr(payload)}, expected a JSON object"
        )
    if isinstance(payload.get("response"), dict):
        payload |= payload["response"].get("body") or {}
    if payload.get("prompt_logprobs") is None and payload.get("choices"):
        choice = payload["choices"][0]
        payload |= {name: choice[name] for name in choice if name != "index"}
    return payload


def _targets(
    entries: list[Any], labels: list[int], where: str
) -> TeacherRows[np.ndarray]:
    sizes = [len(entry) if isinstance(entry, dict) else 0 for entry in entries]
    logprobs_SK = np.full((len(entries), max(1, *sizes)), -np.inf)
    ids_SK = np.full(logprobs_SK.shape, -1, dtype=np.int64)
    label_logprobs_S = np.zeros(len(entries), dtype=np.float32)
    for position, (entry, label) in enumerate(zip(entries, labels, strict=True)):
        try:
            found = {int(key): _logprob(facts) for key, facts in entry.items()}
            own = entry[str(label)]
            label_logprobs_S[position] = max(found[label], SMALLEST_LOGPROB)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CacheError(
                f"{where}: field prompt_logprobs: found {reprlib.repr(entry)} for token {label}, "
                'expected an object {"id": {"logprob": number, "rank": number}} with the token '
                "itself among the ids"
            ) from error
        kept = sorted(found, key=lambda token: (-found[token], token))
        # vLLM adds the prompt's token to the k likeliest; keeping it because it is the label would
        # bias the kept ones.
        rank = own.get("rank") or 0 if isinstance(own, dict) else 0
        is_added = rank > len(kept) or len(kept) == min(sizes) + 1
        if kept[-1] == label and is_added:
            kept.pop()
        kept = [token for token in kept if found[token] > SMALLEST_LOGPROB]
        ids_SK[position, : len(kept)] = kept
        logprobs_SK[position, : len(kept)] = [found[token] for token in kept]
    k = max(1, int((ids_SK >= 0).sum(axis=1).max()))
    ids_SK = ids_SK[:, :k]
    logprobs_SK = logprobs_SK[:, :k]
    mass_S = np.exp(logprobs_SK).sum(axis=1)
    if mass_S.max() > LARGEST_MASS:
        raise CacheError(
            f"{where}: field prompt_logprobs: found probabilities that sum to {mass_S.max():.4g} "
            f"for token {labels[mass_S.argmax()]}, expected log-probabilities; run vLLM with "
            "--logprobs-mode raw_logprobs"
        )
    largest_S = np.where(ids_SK[:, 0] >= 0, logprobs_SK[:, 0], 0)
    return TeacherRows(
        positions_P=np.arange(len(entries)),
        topk_logits_PK=(logprobs_SK - largest_S[:, None]).astype(np.float32),
        topk_token_ids_PK=ids_SK,
        log_sum_exp_logits_P=np.maximum(-largest_S, 0).astype(np.float32),
        tail_mass_PT=np.clip(1 - mass_S, 0, 1).astype(np.float32)[:, None],
        label_logprobs_P=label_logprobs_S,
    )


def _logprob(facts: Any) -> float:
    value = facts["logprob"] if isinstance(facts, dict) else facts
    value = -math.inf if value is None else float(value)
    if math.isnan(value):
        raise ValueError("a log-probability is not a number")
    return value
