"""Read vLLM's `prompt_logprobs` as rows of a cache.

One JSON object per line, with `prompt_token_ids` (n ids) and `prompt_logprobs` (n entries). The
first entry is null; every other one is an object {token id as text: {"logprob": ..., "rank": ...}}
for the token at its own place. vLLM adds the prompt's token if it is not among the k likeliest.
Answers of the OpenAI-compatible server (`choices`) and of its batch runner (`response.body`) are
read too; both hold the ids if asked with `return_token_ids`.
"""

from __future__ import annotations

import json
import reprlib
from typing import Any

from nemo_kd.batch import CachedExample
from nemo_kd.cache.layout import CacheError
from nemo_kd.cache.record import example_of, json_row
from nemo_kd.data.records import open_records

SMALLEST_LOGPROB = -1000.0
"""JSON has no -inf: vLLM's server writes -9999 for impossible tokens, others null or -Infinity."""
LARGEST_LOGPROB = 0.01
"""0 and rounding."""
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
        self._records = open_records(str(path))

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
        # A token's entry was predicted before it: it belongs to the position in front.
        fields = payload | {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": payload.get("loss_mask", [1] * len(tokens))[1:],
            **_teacher_fields(entries[1:], tokens[1:], where),
        }
        return json_row(fields, example_of(fields, where, position), where)

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
        payload = dict(json.loads(line))  # accepts -Infinity, which Python writes
    except (TypeError, ValueError) as error:
        raise CacheError(
            f"{where}: found {len(line)} bytes that are not valid JSON of an object ({error})"
        ) from error
    if isinstance(payload.get("response"), dict):
        payload |= payload["response"].get("body") or {}
    if payload.get("prompt_logprobs") is None and payload.get("choices"):
        choice = payload["choices"][0]
        payload |= {name: choice[name] for name in choice if name != "index"}
    return payload


def _teacher_fields(
    entries: list[Any], labels: list[int], where: str
) -> dict[str, Any]:
    """Return the fields of the json codec, with as many tokens as every position has."""
    rows = []
    label_logprobs = []
    for entry, label in zip(entries, labels, strict=True):
        try:
            row = {int(token): _logprob(facts) for token, facts in entry.items()}
            label_logprobs.append(row[label])
            # vLLM adds the prompt's token to the k likeliest; keeping it because it is the label
            # would bias the kept ones. Without its rank, it is last in a longer entry.
            if (entry[str(label)].get("rank") or 0) > len(row):
                del row[label]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CacheError(
                f"{where}: field prompt_logprobs: found {reprlib.repr(entry)} for token {label}, "
                'expected an object {"id": {"logprob": number, "rank": number}} with the token '
                "itself among the ids, and log-probabilities (vLLM: --logprobs-mode raw_logprobs)"
            ) from error
        rows.append(
            {token: row[token] for token in row if row[token] > SMALLEST_LOGPROB}
        )
    sizes = [len(row) for row in rows]
    k = min(sizes)
    if not k or max(sizes) > k + 1:
        raise CacheError(
            f"{where}: field prompt_logprobs: found {k} to {max(sizes)} tokens of a position, "
            "expected equally many everywhere, at least 1 (vLLM: prompt_logprobs=K, "
            "--logprobs-mode raw_logprobs)"
        )
    ranked = [sorted(row, key=lambda token: (-row[token], token))[:k] for row in rows]
    return {
        "topk_token_ids": ranked,
        "topk_logits": [
            [row[token] for token in ids]
            for row, ids in zip(rows, ranked, strict=True)
        ],
        "log_sum_exp_logits": [0.0] * len(rows),
        "label_logprobs": label_logprobs,
    }


def _logprob(facts: dict[str, float | None]) -> float:
    value = facts["logprob"]
    value = SMALLEST_LOGPROB if value is None else float(value)
    if not value <= LARGEST_LOGPROB:
        raise ValueError("not a log-probability")
    return max(value, SMALLEST_LOGPROB)
