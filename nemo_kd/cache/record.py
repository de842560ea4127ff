"""One example as one line of JSON, in either codec; the field `v` marks the packed one.

Every line has `index`, `hash`, `tokens`, `labels` and `loss_mask`. The `packed` codec adds `v` and
`teacher` (base64 of `packed_codec`'s blob), the `json` codec NeMo-Aligner's fields.
docs/cache_format.md specifies both.
"""

from __future__ import annotations

import functools
import hashlib
import reprlib
from dataclasses import replace
from typing import Any

import numpy as np
import orjson

from nemo_kd.batch import CachedExample, Example, TeacherRows
from nemo_kd.cache import packed_codec
from nemo_kd.cache.fast_bytes import fast_base64
from nemo_kd.cache.layout import CacheError
from nemo_kd.config.selection import Selection

RECORD_VERSION = 1


def encode(row: CachedExample, codec: str, positions: str = "loss") -> bytes:
    """Return the JSON line of an example, newline included.

    Args:
        codec: packed or json.
        positions: for packed; loss stores the targets of positions whose label counts in the loss
            and cuts off what follows the last of them, selected those of them that have targets,
            all stores every position.

    Raises:
        CacheError: values are not finite, out of order, or outside what the format holds.
    """
    if codec == "packed" and positions != "all":
        row = trimmed(row)
    example = row.example
    fields: dict[str, Any] = {"v": RECORD_VERSION} if codec == "packed" else {}
    fields |= {
        "index": int(example.index),
        "hash": example_hash(example),
        "tokens": np.ascontiguousarray(example.tokens_S),
        "labels": np.ascontiguousarray(example.labels_S),
        "loss_mask": example.loss_mask_S.astype(np.uint8),
    }
    if codec == "packed":
        try:
            blob = packed_codec.pack(row, positions)
        except ValueError as error:
            raise CacheError(f"example {example.index}: {error}") from error
        fields["teacher"] = fast_base64.b64encode(blob).decode()
    else:
        fields |= teacher_fields(row)
    return orjson.dumps(
        fields, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
    )


def decode(line: bytes, where: str, index: int | None = None) -> CachedExample:
    """Return the example of a line, cut after its last loss position.

    Attention is causal, so nothing depends on the rest. Lines of NeMo-Aligner are read too: unknown
    fields are ignored, fields that it does not write may be missing. A line without any loss
    position keeps its first one.

    Args:
        line: one JSON object.
        where: `file:line` for error messages.
        index: the example's index if the line has none.

    Raises:
        CacheError: the line is not a JSON object, or a field is missing, malformed, damaged or
            contradicts another one.
    """
    payload = _parse(line, where)
    example = example_of(payload, where, index)
    if "hash" in payload and payload["hash"] != example_hash(example):
        raise CacheError(
            f"{where}: field hash: found {payload['hash']!r}, but tokens, labels and loss_mask "
            f"give {example_hash(example)!r}; the line was damaged or edited: restore the file or "
            "write it again"
        )
    if "v" not in payload:
        return trimmed(json_row(payload, example, where))
    if payload["v"] != RECORD_VERSION:
        raise CacheError(
            f"{where}: field v: found {payload['v']!r}, but this version of nemo_kd reads records "
            f"of version {RECORD_VERSION}"
        )
    try:
        blob = fast_base64.b64decode(payload.get("teacher", ""), validate=True)
        teacher = packed_codec.unpack(blob, example)
        is_selected = len(teacher) < example.num_loss_tokens
        return trimmed(CachedExample(example, teacher, is_selected))
    except (TypeError, ValueError) as error:
        raise CacheError(
            f"{where}: field teacher: {error}; restore the file or write it again"
        ) from error


def example_hash(example: Example) -> str:
    """16 hexadecimal digits of SHA-256 over tokens, labels (little-endian int32) and loss mask
    (bytes 0 and 1).
    """
    parts = (
        example.tokens_S.astype("<i4"),
        example.labels_S.astype("<i4"),
        example.loss_mask_S.astype(np.uint8),
    )
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:16]


def trimmed(row: CachedExample) -> CachedExample:
    """Cut the row after its last loss position; at least one position stays."""
    example = row.example
    loss_positions = np.flatnonzero(example.loss_mask_S)
    length = int(loss_positions[-1]) + 1 if len(loss_positions) else 1
    if length == example.num_tokens:
        return row
    example = Example(
        example.index,
        example.tokens_S[:length],
        example.labels_S[:length],
        example.loss_mask_S[:length],
    )
    teacher = row.teacher.at(row.teacher.positions_P < length)
    return replace(row, example=example, teacher=teacher)


def check_vocabulary(row: CachedExample, vocab_size: int, where: str) -> None:
    """Refuse ids that the manifest's vocabulary does not have."""
    for name, ids_of_row in (
        ("tokens", row.example.tokens_S),
        ("labels", row.example.labels_S),
        ("topk_token_ids", row.teacher.topk_token_ids_PK),
        ("tail_token_ids", row.teacher.tail_token_ids_PM),
    ):
        if ids_of_row is not None and ids_of_row.max(initial=-1) >= vocab_size:
            raise CacheError(
                f"{where}: field {name}: found id {ids_of_row.max()}, outside the vocabulary of "
                f"{vocab_size} that the manifest (or --vocab-size) states"
            )


def check_selection(row: CachedExample, select: str | None, where: str) -> None:
    """Refuse a row that lacks other targets than the manifest's `select` says.

    Raises:
        CacheError: names both.
    """
    num_found = len(row.loss_rows())
    num_tokens = row.example.num_loss_tokens
    if row.is_selected and select is None:
        raise CacheError(
            f"{where}: field teacher: found {num_found} of {num_tokens} positions in the loss, but "
            "no manifest says that the cache was selected (cache.select); restore the manifest"
        )
    expected = num_tokens if select is None else Selection.of(select).count(num_tokens)
    if row.is_selected and num_found != expected:
        raise CacheError(
            f"{where}: field teacher: found {num_found} of {num_tokens} positions in the loss, but "
            f"the manifest says {select}, which is {expected}; restore the file or write it again"
        )


def is_packed(line: bytes) -> bool:
    """Return True if a valid line is of the packed codec."""
    return "v" in orjson.loads(line)


def is_json(line: bytes) -> bool:
    """Return True if a line is valid JSON: a line cut short never is."""
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return True


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        payload = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise CacheError(
            f"{where}: found {len(line)} bytes that are not valid JSON ({error}); restore the file, "
            "write it again, or cut a torn last line with `logit_cache repair`"
        ) from error
    if not isinstance(payload, dict):
        raise CacheError(
            f"{where}: found {reprlib.repr(payload)}, expected a JSON object"
        )
    if "tokens" not in payload:
        raise CacheError(
            f"{where}: field tokens: found nothing; if this is a dataset, compute its cache with "
            "compute_topk_logits, or train on its labels alone (model.data.data_impl=dataset, "
            "kd_loss_weight=0)"
        )
    return payload


def example_of(payload: dict[str, Any], where: str, index: int | None) -> Example:
    """Return the example in the fields of a line; `index` is that of a line without one."""
    tokens_S = array(payload, where, "tokens", "i", (None,), 0, LARGEST_ID)
    labels_S = array(payload, where, "labels", "i", tokens_S.shape, 0, LARGEST_ID)
    loss_mask_S = array(payload, where, "loss_mask", "ifb", tokens_S.shape)
    wrong = (loss_mask_S != 0) & (loss_mask_S != 1)
    if wrong.any():
        raise CacheError(
            f"{where}: field loss_mask: found {loss_mask_S[wrong][0]}, expected only 0 and 1"
        )
    index = payload.get("index", index)
    if type(index) is not int or index < 0:
        raise CacheError(
            f"{where}: field index: found {index!r}, expected an integer of at least 0"
        )
    return Example(index, tokens_S, labels_S, loss_mask_S.astype(np.float32))


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
    if not smallest <= values.min() <= values.max() <= largest:
        outside = ~((values >= smallest) & (values <= largest))
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


def json_row(payload: dict[str, Any], example: Example, where: str) -> CachedExample:
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
