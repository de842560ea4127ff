"""Teacher targets in NeMo-Aligner's fields: plain numbers that any JSON library reads.

Shape legend: S positions, P positions with targets, K kept teacher logits, T temperatures, M tail
samples. NeMo-Aligner's own fields are `topk_logits` (S x K), `topk_token_ids` (S x K) and
`log_sum_exp_logits` (S); its reader ignores the others: `tail_mass` (T x S) with `temperatures`
(T), `label_logprobs` (S) and `tail_token_ids` (S x M). Floats are written with the fewest digits
that give the same float32 back.
"""

from __future__ import annotations

import functools
import reprlib
from typing import Any

import numpy as np

from nemo_kd.batch import CachedExample, Example, TeacherRows
from nemo_kd.cache.layout import CacheError

LARGEST_MASS = 1.1
"""Largest sum of kept probabilities. NeMo-Aligner rounds log-sum-exp to bf16, whose step is 1/16
between 8 and 16: a right sum stays below exp(1/32) plus the error of the logits."""
PROBABILITY_ERROR = 1e-3
SMALLEST_TEMPERATURE = 1e-3
LARGEST_ID = (1 << 31) - 1
LARGEST_FLOAT = float(np.finfo(np.float32).max)


def array(
    payload: dict[str, Any],
    where: str,
    field: str,
    kinds: str,
    shape: tuple[int | None, ...],
    smallest: float = -LARGEST_FLOAT,
    largest: float = LARGEST_FLOAT,
    default: Any = None,
) -> np.ndarray:
    """Return a field of a JSON object as an array.

    Args:
        kinds: numpy's kinds of dtypes that are accepted.
        shape: None for any length.
        default: of a field that may be missing.

    Raises:
        CacheError: it is missing, of another type or shape, or a number is out of range.
    """
    try:
        # Without a dtype: numpy would otherwise read strings as numbers and cut 1.5 down to 1.
        values = np.array(payload.get(field, default))
    except ValueError:  # lists of different lengths
        values = np.array(None)
    expected = "integers" if kinds == "i" else "numbers"
    fits = len(values.shape) == len(shape) and all(
        wanted in (None, length)
        for wanted, length in zip(shape, values.shape, strict=True)
    )
    if not fits or not values.size or values.dtype.kind not in kinds:
        raise CacheError(
            f"{where}: field {field}: found {reprlib.repr(payload.get(field))} of shape "
            f"{values.shape}, expected {expected} of shape {shape} (None: any length)"
        )
    outside = ~((values >= smallest) & (values <= largest))
    if outside.any():
        raise CacheError(
            f"{where}: field {field}: found {values[outside][0]:.10g}, expected {expected} from "
            f"{smallest:.10g} to {largest:.10g}"
        )
    return values


def teacher_fields(row: CachedExample) -> dict[str, Any]:
    """Return the fields of a row; positions without a target, which do not count, are filled.

    Raises:
        CacheError: a position with an unused entry, which NeMo-Aligner's reader cannot express; or
            a value that is not finite.
    """
    where = f"example {row.example.index}"
    teacher = row.teacher.at(row.teacher.topk_token_ids_PK[:, 0] >= 0)
    counts_P = (teacher.topk_token_ids_PK >= 0).sum(axis=1)
    k = teacher.topk_token_ids_PK.shape[1]
    if counts_P.min(initial=k) < k:
        raise CacheError(
            f"{where}: positions keep different numbers of tokens ({counts_P.min()} at least), "
            "which the json codec cannot hold; write the cache with cache.min_probability=0 "
            "cache.top_p=1, keep no more than that (top_k), or stay with cache.codec=packed"
        )
    fields: dict[str, Any] = {}
    for name, values_P, filler in (
        ("topk_logits", teacher.topk_logits_PK, 0),
        ("topk_token_ids", teacher.topk_token_ids_PK, np.arange(k)),
        ("log_sum_exp_logits", teacher.log_sum_exp_logits_P, np.log(np.float32(k))),
        ("temperatures", None, None),
        ("tail_mass", teacher.tail_mass_PT, 0),
        ("label_logprobs", teacher.label_logprobs_P, 0),
        ("tail_token_ids", teacher.tail_token_ids_PM, -1),
    ):
        if name == "temperatures":
            fields[name] = np.array(teacher.temperatures)
        if values_P is None:
            continue
        dtype = np.float32 if values_P.dtype.kind == "f" else values_P.dtype
        values_S = np.empty((row.example.num_tokens, *values_P.shape[1:]), dtype)
        values_S[:] = filler
        values_S[teacher.positions_P] = values_P
        if not np.isfinite(values_S).all():
            raise CacheError(
                f"{where}: field {name}: found a number that is not finite"
            )
        fields[name] = np.ascontiguousarray(
            values_S.T if name == "tail_mass" else values_S
        )
    return fields


def row(payload: dict[str, Any], example: Example, where: str) -> CachedExample:
    """Return the row that the fields describe.

    Logits that are not shifted to a largest of 0 are shifted, with their log-sum-exp.

    Raises:
        CacheError: a field is missing, malformed or contradicts another one.
    """
    length = example.num_tokens
    read = functools.partial(array, payload, where)
    logits_SK = read("topk_logits", "if", (length, None))
    ids_SK = read("topk_token_ids", "i", logits_SK.shape, 0, LARGEST_ID)
    log_sum_exp_S = read("log_sum_exp_logits", "if", (length,))
    is_wrong_S = (np.diff(logits_SK) > 0).any(axis=1)
    is_wrong_S |= (np.diff(np.sort(ids_SK)) == 0).any(axis=1)
    if is_wrong_S.any():
        raise CacheError(
            f"{where}: fields topk_logits and topk_token_ids: expected the largest logit first "
            f"and distinct ids; position {is_wrong_S.argmax()} has not"
        )
    log_sum_exp_S = log_sum_exp_S.astype(np.float64) - logits_SK[:, 0]
    logits_SK = logits_SK.astype(np.float64) - logits_SK[:, :1]
    mass_S = np.exp(logits_SK - log_sum_exp_S[:, None]).sum(axis=1)
    if mass_S.max() > LARGEST_MASS:
        raise CacheError(
            f"{where}: field log_sum_exp_logits: the kept probabilities sum to {mass_S.max():.4g}, "
            "expected the log-sum-exp of the same logits over the whole vocabulary"
        )
    temperatures_T = read(
        "temperatures", "if", (None,), SMALLEST_TEMPERATURE, default=[1.0]
    )
    tail_mass_TS = read(
        "tail_mass",
        "if",
        (len(temperatures_T), length),
        -PROBABILITY_ERROR,
        1 + PROBABILITY_ERROR,
        default=[np.maximum(1 - mass_S, 0)],
    )
    labels_S = None
    if "label_logprobs" in payload:
        labels_S = read("label_logprobs", "if", (length,), largest=PROBABILITY_ERROR)
        labels_S = labels_S.astype(np.float32)
    samples_SM = None
    if "tail_token_ids" in payload:
        samples_SM = read("tail_token_ids", "i", (length, None), -1, LARGEST_ID)
    teacher = TeacherRows(
        positions_P=np.arange(length),
        topk_logits_PK=logits_SK.astype(np.float32),
        topk_token_ids_PK=ids_SK,
        # Rounding of the logits can put it a little below 0.
        log_sum_exp_logits_P=np.maximum(log_sum_exp_S, 0).astype(np.float32),
        tail_mass_PT=np.ascontiguousarray(tail_mass_TS.clip(0, 1).T, dtype=np.float32),
        temperatures=tuple(temperatures_T.astype(np.float32).tolist()),
        label_logprobs_P=labels_S,
        tail_token_ids_PM=samples_SM,
    )
    return CachedExample(example, teacher)
