"""Reads vLLM's `prompt_logprobs` as rows of a cache.

One JSON object a line, with `prompt_token_ids` (n ids) and `prompt_logprobs` (n entries): the first is null, every other
an object {token id as text: {"logprob": ..., "rank": ...}} for the token at its own place. vLLM adds the prompt's own
token where it is not among the k likeliest. Objects as the OpenAI-compatible server answers (`choices`) are read too.
"""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from nemo_kd.batch import CachedExample, Example, TeacherTopK
from nemo_kd.cache.fields import array as field_array
from nemo_kd.cache.fields import example_index, ids
from nemo_kd.cache.layout import CacheError

SMALLEST_LOGPROB = -1000.0
"""JSON has no -inf: vLLM writes -9999 for what cannot be."""


class VllmRows:
    """The rows of a JSONL file of vLLM's, by position; a line's place in the file is its index where it has none.

    Args:
        top_k: tokens to keep a position; None keeps all that are there.

    Raises:
        CacheError: the file cannot be read or is empty.
    """

    manifests: list[Any] = []

    def __init__(self, path: str, top_k: int | None = None) -> None:
        self.path, self.top_k = path, top_k
        self._starts = array("q", [0])
        try:
            with open(path, "rb") as file:
                for line in file:
                    self._starts.append(self._starts[-1] + len(line))
        except OSError as error:
            raise CacheError(f"{path}: cannot be read ({error.strerror})") from error
        if len(self) == 0:
            raise CacheError(f"{path}: the file is empty")

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, position: int) -> CachedExample:
        where = f"{self.path}:{position + 1}"
        with open(self.path, "rb") as file:
            file.seek(self._starts[position])
            line = file.read(self._starts[position + 1] - self._starts[position])
        try:
            payload = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise CacheError(f"{where}: found {len(line)} bytes that are not valid JSON ({error})") from error
        return self._row(payload, position, where)

    def fingerprint(self) -> str:
        """Name and size; the content is whatever vLLM wrote."""
        return f"{Path(self.path).name}:{self._starts[-1]}"

    def _row(self, payload: Any, position: int, where: str) -> CachedExample:
        if isinstance(payload, dict) and "choices" in payload and "prompt_logprobs" not in payload:
            payload = {**payload, **payload["choices"][0]}
        if not isinstance(payload, dict) or "prompt_logprobs" not in payload:
            raise CacheError(f"{where}: field prompt_logprobs: found nothing, expected a list with one object a token")
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
        # The entry of a token is what the model said before it: it belongs to the position in front.
        kept = [self._entries(entry, int(token), where) for entry, token in zip(found[1:], tokens[1:], strict=True)]
        k = max(1, *(len(entries) for entries, _ in kept))
        logits_SK = np.full((len(kept), k), -np.inf, dtype=np.float64)
        ids_SK = np.full((len(kept), k), -1, dtype=np.int64)
        for number, (entries, _) in enumerate(kept):
            for rank, (token, logprob) in enumerate(entries):
                ids_SK[number, rank], logits_SK[number, rank] = token, logprob
        largest_S = np.where(ids_SK[:, 0] >= 0, logits_SK[:, 0], 0)
        teacher = TeacherTopK(
            topk_logits_SK=(logits_SK - largest_S[:, None]).astype(np.float32),
            topk_token_ids_SK=ids_SK,
            log_sum_exp_logits_S=np.maximum(-largest_S, 0).astype(np.float32),
            tail_mass_TS=np.clip(1 - np.exp(logits_SK).sum(axis=1), 0, 1).astype(np.float32)[None],
            label_logprobs_S=np.array([label for _, label in kept], dtype=np.float32),
        )
        example = Example(example_index(payload, position, where), tokens[:-1], tokens[1:], mask[1:])
        return CachedExample(example, teacher)

    def _entries(self, entry: Any, token: int, where: str) -> tuple[list[tuple[int, float]], float]:
        """(kept (id, log-probability), likeliest first; log-probability of `token`)."""
        try:
            found = sorted(
                (int(facts.get("rank") or 0), int(key), float(facts["logprob"])) for key, facts in entry.items()
            )
            label = next(logprob for _, key, logprob in found if key == token)
        except (AttributeError, KeyError, TypeError, ValueError, StopIteration) as error:
            raise CacheError(
                f"{where}: field prompt_logprobs: found {str(entry)[:80]!r} for token {token}, expected an object "
                '{"id": {"logprob": number, "rank": number}} with the token itself among the ids'
            ) from error
        # Equal log-probabilities share a rank. One beyond its place is the prompt's token, added behind the likeliest.
        likeliest = [
            (key, logprob)
            for place, (rank, key, logprob) in enumerate(sorted(found, key=lambda item: (-item[2], item[1])), start=1)
            if rank <= place
        ]
        likeliest = [(key, logprob) for key, logprob in likeliest if logprob > SMALLEST_LOGPROB]
        return likeliest[: self.top_k], max(label, SMALLEST_LOGPROB)
