"""One example as one line of JSON, in either codec; the field `v` marks the packed one.

Every line has `index`, `hash`, `tokens`, `labels` and `loss_mask`. The `packed` codec adds `v` and
`teacher` (base64 of `packed_codec`'s blob), the `json` codec NeMo-Aligner's fields.
docs/cache_format.md specifies both.
"""

from __future__ import annotations

import binascii
import hashlib
import reprlib
from typing import Any

import numpy as np
import orjson

from nemo_kd.batch import CachedExample, Example
from nemo_kd.cache import json_codec, packed_codec
from nemo_kd.cache.json_codec import LARGEST_ID, array
from nemo_kd.cache.layout import CacheError

RECORD_VERSION = 1


def encode(row: CachedExample, codec: str, positions: str = "loss") -> bytes:
    """Return the JSON line of an example, newline included.

    Args:
        codec: packed or json.
        positions: for packed; loss stores the targets of positions whose label counts in the loss
            and cuts off what follows the last of them, all stores every position.

    Raises:
        CacheError: values are not finite, out of order, or outside what the format holds.
    """
    if codec == "packed" and positions == "loss":
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
        fields["teacher"] = binascii.b2a_base64(blob, newline=False).decode("ascii")
    else:
        fields |= json_codec.teacher_fields(row)
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
        return trimmed(json_codec.row(payload, example, where))
    if payload["v"] != RECORD_VERSION:
        raise CacheError(
            f"{where}: field v: found {payload['v']!r}, but this version of nemo_kd reads records "
            f"of version {RECORD_VERSION}"
        )
    try:
        blob = binascii.a2b_base64(payload.get("teacher", ""), strict_mode=True)
        return trimmed(CachedExample(example, packed_codec.unpack(blob, example)))
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
    return CachedExample(example, row.teacher.at(row.teacher.positions_P < length))


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
