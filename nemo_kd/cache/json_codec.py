"""Teacher targets in NeMo-Aligner's fields: plain numbers that any JSON library reads.

Shape legend: S positions, K kept teacher logits, T temperatures, M tail samples. NeMo-Aligner's own
fields are `topk_logits` (S x K), `topk_token_ids` (S x K) and `log_sum_exp_logits` (S); its reader
ignores the others: `tail_mass` (T x S) with `temperatures` (T), `label_logprobs` (S) and
`tail_token_ids` (S x M). Floats are written with the fewest digits that give the same float32 back.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nemo_kd.batch import CachedExample, Example, TeacherRows
from nemo_kd.cache.fields import array, check_finite, floats, ids
from nemo_kd.cache.layout import CacheError

LARGEST_MASS = 1.1
"""Largest sum of kept probabilities. NeMo-Aligner rounds log-sum-exp to bf16, whose step is 1/16
between 8 and 16: a right sum stays below exp(1/32) plus the error of the logits."""
PROBABILITY_ERROR = 1e-3
SMALLEST_TEMPERATURE = 1e-3


def teacher_fields(row: CachedExample) -> dict[str, Any]:
    """Return the fields of a row; every position has the same number of logits.

    Raises:
        CacheError: a position with an unused entry, which NeMo-Aligner's reader cannot express;
            lengths that disagree; or a value that is not finite.
    """
    where = f"example {row.example.index}"
    teacher = row.teacher
    ids_PK = teacher.topk_token_ids_PK
    known_P = ids_PK[:, 0] >= 0
    if (ids_PK[known_P] < 0).any():
        fewest = int((ids_PK[known_P] >= 0).sum(axis=1).min())
        raise CacheError(
            f"{where}: positions keep different numbers of tokens ({fewest} at least), which the "
            "json codec cannot hold; write the cache with cache.min_probability=0 cache.top_p=1, "
            "keep no more than that (top_k), or stay with cache.codec=packed"
        )
    k = ids_PK.shape[1]

    def everywhere(
        values_P: np.ndarray, filler: Any, rows_P: Any = slice(None)
    ) -> np.ndarray:
        """Fill the positions without a target, which do not count."""
        values_S = np.empty(
            (row.example.num_tokens, *values_P.shape[1:]), dtype=values_P.dtype
        )
        values_S[:] = filler
        values_S[teacher.positions_P[rows_P]] = values_P[rows_P]
        return values_S

    log_sum_exp_P = teacher.log_sum_exp_logits_P.astype(np.float32)
    fields: dict[str, Any] = {
        "topk_logits": everywhere(teacher.topk_logits_PK.astype(np.float32), 0, known_P),
        "topk_token_ids": everywhere(ids_PK, np.arange(k), known_P),
        "log_sum_exp_logits": everywhere(log_sum_exp_P, np.log(np.float32(k)), known_P),
        "temperatures": np.array(teacher.temperatures),
        "tail_mass": everywhere(teacher.tail_mass_PT.astype(np.float32), 1).T,
    }
    if teacher.label_logprobs_P is not None:
        fields["label_logprobs"] = everywhere(
            teacher.label_logprobs_P.astype(np.float32), 0
        )
    if teacher.tail_token_ids_PM is not None:
        fields["tail_token_ids"] = everywhere(teacher.tail_token_ids_PM, -1)
    for name in ("topk_logits", "log_sum_exp_logits", "tail_mass", "label_logprobs"):
        if name in fields:
            check_finite(name, fields[name], where)
    _check_lengths(fields, row.example.num_tokens, where)
    return {name: np.ascontiguousarray(values) for name, values in fields.items()}


def row(payload: dict[str, Any], example: Example, where: str) -> CachedExample:
    """Return the row that the fields describe.

    Logits that are not shifted to a largest of 0 are shifted, with their log-sum-exp. What
    NeMo-Aligner does not store is None, or follows from the rest.

    Raises:
        CacheError: a field is missing, malformed or contradicts another one.
    """
    logits_SK = array(payload, "topk_logits", 2, "if", where).astype(np.float64)
    log_sum_exp_S = array(payload, "log_sum_exp_logits", 1, "if", where).astype(
        np.float64
    )
    fields: dict[str, Any] = {
        "topk_logits": logits_SK,
        "topk_token_ids": ids(payload, "topk_token_ids", 2, where),
        "log_sum_exp_logits": log_sum_exp_S,
    }
    if "label_logprobs" in payload:
        fields["label_logprobs"] = floats(payload, "label_logprobs", 1, where)
    if "tail_token_ids" in payload:
        fields["tail_token_ids"] = ids(payload, "tail_token_ids", 2, where, smallest=-1)
    _check_lengths(fields, example.num_tokens, where)
    for name in ("topk_logits", "log_sum_exp_logits"):
        with np.errstate(over="ignore"):
            check_finite(name, fields[name].astype(np.float32), where)
    _check_order(logits_SK, fields["topk_token_ids"], where)
    log_sum_exp_S = log_sum_exp_S - logits_SK[:, 0]
    logits_SK = logits_SK - logits_SK[:, :1]
    mass_S = np.exp(logits_SK - log_sum_exp_S[:, None]).sum(axis=1)
    if mass_S.max() > LARGEST_MASS:
        raise CacheError(
            f"{where}: field log_sum_exp_logits: found {log_sum_exp_S[mass_S.argmax()]:.4g} at "
            f"position {mass_S.argmax()}, with which the kept probabilities sum to "
            f"{mass_S.max():.4g}, expected the log-sum-exp of the same logits over the whole "
            "vocabulary"
        )
    temperatures: tuple[float, ...] = (1.0,)
    tail_mass_TS = np.clip(1 - mass_S, 0, 1)[None]
    if "tail_mass" in payload:
        temperatures, tail_mass_TS = _tail_mass(payload, example.num_tokens, where)
    if "label_logprobs" in fields:
        _check_range(
            "label_logprobs", fields["label_logprobs"], -np.inf, PROBABILITY_ERROR, where
        )
    teacher = TeacherRows(
        positions_P=np.arange(example.num_tokens),
        topk_logits_PK=logits_SK.astype(np.float32),
        topk_token_ids_PK=fields["topk_token_ids"],
        # Rounding of the logits can put it a little below 0, which a certain teacher reaches.
        log_sum_exp_logits_P=np.maximum(log_sum_exp_S, 0).astype(np.float32),
        tail_mass_PT=np.ascontiguousarray(tail_mass_TS.T, dtype=np.float32),
        temperatures=temperatures,
        label_logprobs_P=fields.get("label_logprobs"),
        tail_token_ids_PM=fields.get("tail_token_ids"),
    )
    return CachedExample(example, teacher)


def _tail_mass(
    payload: dict[str, Any], num_positions: int, where: str
) -> tuple[tuple[float, ...], np.ndarray]:
    """Return the temperatures and the tail mass [T, S]."""
    temperatures = tuple(floats(payload, "temperatures", 1, where).tolist())
    tail_mass_TS = floats(payload, "tail_mass", 2, where)
    if tail_mass_TS.shape != (len(temperatures), num_positions) or temperatures[0] != 1:
        raise CacheError(
            f"{where}: field tail_mass: found an array of shape {tail_mass_TS.shape} for "
            f"temperatures {temperatures}, expected one list of {num_positions} numbers "
            "for each temperature, the first of which is 1"
        )
    _check_range(
        "temperatures", np.array(temperatures), SMALLEST_TEMPERATURE, np.inf, where
    )
    _check_range(
        "tail_mass", tail_mass_TS, -PROBABILITY_ERROR, 1 + PROBABILITY_ERROR, where
    )
    return temperatures, np.clip(tail_mass_TS, 0, 1)


def _check_lengths(fields: dict[str, Any], num_positions: int, where: str) -> None:
    for name, values in fields.items():
        if name not in ("temperatures", "tail_mass") and len(values) != num_positions:
            raise CacheError(
                f"{where}: field {name}: found {len(values)} positions, expected {num_positions} "
                "as in tokens"
            )
    found = fields["topk_token_ids"].shape
    expected = fields["topk_logits"].shape
    if found != expected:
        raise CacheError(
            f"{where}: field topk_token_ids: found {found[1]} ids per position, expected "
            f"{expected[1]} as in topk_logits"
        )


def _check_range(
    name: str, values: np.ndarray, smallest: float, largest: float, where: str
) -> None:
    wrong = (values < smallest) | (values > largest)
    if wrong.any():
        raise CacheError(
            f"{where}: field {name}: found {values[wrong][0]:.4g}, expected numbers from "
            f"{smallest:.4g} to {largest:.4g}"
        )


def _check_order(logits_SK: np.ndarray, ids_SK: np.ndarray, where: str) -> None:
    rises_S = (logits_SK[:, 1:] > logits_SK[:, :-1]).any(axis=1)
    if rises_S.any():
        raise CacheError(
            f"{where}: field topk_logits: found logits that are not in descending order at "
            f"position {rises_S.argmax()}, expected the largest first (top_k keeps the first "
            "ones); sort logits and ids together"
        )
    sorted_ids_SK = np.sort(ids_SK, axis=1)
    repeats_S = (sorted_ids_SK[:, 1:] == sorted_ids_SK[:, :-1]).any(axis=1)
    if repeats_S.any():
        raise CacheError(
            f"{where}: field topk_token_ids: found an id twice at position {repeats_S.argmax()}, "
            "expected distinct ids"
        )
