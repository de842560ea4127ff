"""One example as one JSON line, in NeMo-Aligner's fields.

Shape legend: S positions, K kept teacher logits. Every field is a plain JSON number or list, so any JSON library reads
a line: `index`, `tokens` (S), `labels` (S), `loss_mask` (S), `topk_logits` (S x K), `topk_token_ids` (S x K) and
`log_sum_exp_logits` (S). Floats are written with the fewest digits that give the same float32 back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson

from nemo_kd.batch import CachedExample, Example, TeacherTopK
from nemo_kd.cache.layout import CacheError

# The kept probabilities sum to at most 1. NeMo-Aligner rounds log-sum-exp to bf16, whose step is 1/16 between 8 and
# 16: an honest sum stays below exp(1/32) plus the error of the logits. A larger one means that the two fields disagree.
LARGEST_MASS = 1.1


def encode(row: CachedExample) -> bytes:
    """The JSON line of an example, newline included.

    Raises:
        CacheError: lengths disagree, or a value is not finite (JSON has no word for NaN and infinity).
    """
    where = f"example {row.example.index}"
    fields = {
        "tokens": row.example.tokens_S,
        "labels": row.example.labels_S,
        "loss_mask": row.example.loss_mask_S.astype(np.float32),
        "topk_logits": row.teacher.topk_logits_SK.astype(np.float32),
        "topk_token_ids": row.teacher.topk_token_ids_SK,
        "log_sum_exp_logits": row.teacher.log_sum_exp_logits_S.astype(np.float32),
    }
    _check_lengths(fields, where)
    for name in ("topk_logits", "log_sum_exp_logits"):
        _check_finite(name, fields[name], where)
    contiguous = {name: np.ascontiguousarray(array) for name, array in fields.items()}
    payload = {"index": int(row.example.index), **contiguous}
    return orjson.dumps(payload, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)


def decode(line: bytes, where: str, top_k: int | None = None, index: int | None = None) -> CachedExample:
    """The example that a line holds, cut to what training needs.

    Lines of NeMo-Aligner are taken too: other fields are ignored, padding is dropped. Positions after the last one that
    counts in the loss are cut off, whatever they hold: attention is causal, so nothing depends on them. A line without
    any loss position keeps its first one. Logits that are not shifted to a largest of 0 are shifted, with their
    log-sum-exp.

    Args:
        line: one JSON object.
        where: `file:line` for error messages.
        top_k: keep only this many of each position's logits; None keeps all.
        index: the example's index if the line has none.

    Raises:
        CacheError: the line is no JSON object, or a field is missing, malformed or contradicts another one.
    """
    payload = _parse(line, where)
    tokens_S = _array(payload, "tokens", 1, "i", where)
    loss_mask_S = _array(payload, "loss_mask", 1, "ifb", where)
    logits_SK = _array(payload, "topk_logits", 2, "if", where)
    fields = {
        "tokens": tokens_S,
        "labels": _array(payload, "labels", 1, "i", where),
        "loss_mask": loss_mask_S,
        "topk_logits": logits_SK,
        "topk_token_ids": _array(payload, "topk_token_ids", 2, "i", where),
        "log_sum_exp_logits": _array(payload, "log_sum_exp_logits", 1, "if", where),
    }
    _check_lengths(fields, where)
    if not np.isin(loss_mask_S, (0, 1)).all():
        wrong = loss_mask_S[~np.isin(loss_mask_S, (0, 1))][0]
        raise CacheError(f"{where}: field loss_mask: found {wrong}, expected only 0 and 1")
    if top_k is not None and top_k > logits_SK.shape[1]:
        raise CacheError(
            f"{where}: field topk_logits: found {logits_SK.shape[1]} logits a position, expected at least top_k={top_k}"
        )
    num_positions = trimmed_length(loss_mask_S)
    fields = {name: array[:num_positions] for name, array in fields.items()}
    example = Example(
        index=_index(payload, index, where),
        tokens_S=fields["tokens"],
        labels_S=fields["labels"],
        loss_mask_S=fields["loss_mask"].astype(np.float32),
    )
    for name in ("tokens", "labels", "topk_token_ids"):
        _check_ids(name, fields[name], where)
    return CachedExample(example, _teacher(fields, top_k, where))


def trimmed_length(loss_mask_S: np.ndarray) -> int:
    """The number of positions that `decode` keeps: up to the last loss position, at least one."""
    loss_positions = np.flatnonzero(loss_mask_S)
    return int(loss_positions[-1]) + 1 if len(loss_positions) else 1


def is_json(line: bytes) -> bool:
    """Whether a line is valid JSON: a line cut short never is."""
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return True


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        payload = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        hint = " NaN and Infinity are not JSON: the teacher's logits overflowed." if b"NaN" in line else ""
        raise CacheError(
            f"{where}: found {len(line)} bytes that are not valid JSON ({error}), expected one JSON object.{hint} "
            "Delete the line or write the file again."
        ) from error
    if not isinstance(payload, dict):
        raise CacheError(
            f"{where}: found a JSON {type(payload).__name__}, expected one JSON object with the field tokens"
        )
    return payload


def _array(payload: dict[str, Any], field: str, ndim: int, kinds: str, where: str) -> np.ndarray:
    expected = ("a list of " if ndim == 1 else "a list of equally long lists of ") + (
        "integers" if kinds == "i" else "numbers"
    )
    if field not in payload:
        raise CacheError(f"{where}: field {field}: found nothing, expected {expected}")
    try:
        # Without a dtype: numpy would otherwise read strings as numbers and cut 1.5 down to 1.
        array = np.array(payload[field])
    except ValueError as error:
        raise CacheError(f"{where}: field {field}: found lists of different lengths, expected {expected}") from error
    if array.size == 0 or array.ndim != ndim:
        raise CacheError(f"{where}: field {field}: found an array of shape {array.shape}, expected {expected}")
    if array.dtype.kind == "O" and any(value is None for value in array.flat):
        raise CacheError(f"{where}: field {field}: found null (how some writers spell NaN), expected {expected}")
    if array.dtype.kind not in kinds:
        raise CacheError(f"{where}: field {field}: found values of type {array.dtype}, expected {expected}")
    return array


def _index(payload: dict[str, Any], default: int | None, where: str) -> int:
    index = payload.get("index", default)
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
        raise CacheError(f"{where}: field index: found {index!r}, expected an integer of at least 0")
    return index


def _teacher(fields: dict[str, np.ndarray], top_k: int | None, where: str) -> TeacherTopK:
    logits_SK, ids_SK, log_sum_exp_S = (
        fields[name] for name in ("topk_logits", "topk_token_ids", "log_sum_exp_logits")
    )
    for name, array in (("topk_logits", logits_SK), ("log_sum_exp_logits", log_sum_exp_S)):
        with np.errstate(over="ignore"):
            _check_finite(name, array.astype(np.float32), where)
    rises_S = (logits_SK[:, 1:] > logits_SK[:, :-1]).any(axis=1)
    if rises_S.any():
        raise CacheError(
            f"{where}: field topk_logits: found logits that are not in descending order at position {rises_S.argmax()}, "
            "expected the largest first (top_k keeps the first ones); sort logits and ids together"
        )
    sorted_ids_SK = np.sort(ids_SK, axis=1)
    repeats_S = (sorted_ids_SK[:, 1:] == sorted_ids_SK[:, :-1]).any(axis=1)
    if repeats_S.any():
        raise CacheError(
            f"{where}: field topk_token_ids: found an id twice at position {repeats_S.argmax()}, expected distinct ids"
        )
    largest_S = logits_SK[:, 0]
    if largest_S.any():
        logits_SK, log_sum_exp_S = logits_SK - largest_S[:, None], log_sum_exp_S - largest_S
    mass_S = np.exp(logits_SK - log_sum_exp_S[:, None]).sum(axis=1)
    if mass_S.max() > LARGEST_MASS:
        raise CacheError(
            f"{where}: field log_sum_exp_logits: found {log_sum_exp_S[mass_S.argmax()]:.4g} at position {mass_S.argmax()}, "
            f"with which the kept probabilities sum to {mass_S.max():.4g}, expected the log-sum-exp of the same logits "
            "over the whole vocabulary"
        )
    return TeacherTopK(
        topk_logits_SK=np.ascontiguousarray(logits_SK[:, :top_k], dtype=np.float32),
        topk_token_ids_SK=np.ascontiguousarray(ids_SK[:, :top_k]),
        # Rounding of the logits can put it a little below its least value, which a certain teacher reaches.
        log_sum_exp_logits_S=np.maximum(log_sum_exp_S, 0).astype(np.float32),
    )


def _check_lengths(fields: dict[str, np.ndarray], where: str) -> None:
    num_positions = len(fields["tokens"])
    for name, array in fields.items():
        if len(array) != num_positions:
            raise CacheError(
                f"{where}: field {name}: found {len(array)} positions, expected {num_positions} as in tokens"
            )
    found, expected = fields["topk_token_ids"].shape, fields["topk_logits"].shape
    if found != expected:
        raise CacheError(
            f"{where}: field topk_token_ids: found {found[1]} ids a position, expected {expected[1]} as in topk_logits"
        )


def _check_finite(name: str, array: np.ndarray, where: str) -> None:
    finite = np.isfinite(array)
    if not finite.all():
        position = int(np.argwhere(~finite)[0][0])
        raise CacheError(
            f"{where}: field {name}: found {array[~finite][0]} at position {position}, expected finite numbers"
        )


def _check_ids(name: str, array: np.ndarray, where: str) -> None:
    if array.min() < 0:
        raise CacheError(f"{where}: field {name}: found {array.min()}, expected token ids of at least 0")
