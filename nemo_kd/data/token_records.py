"""Read records that hold token ids with a mask."""

from __future__ import annotations

from typing import Any

import numpy as np

from nemo_kd.config import DataError

IGNORED_LABEL = -100
MASKS = ("loss_mask", "labels")


def read_tokens(record: dict[str, Any]) -> tuple[list[int], list[bool]]:
    """Return the token ids of a record, and True for the trained ones.

    The mask is `loss_mask` (1 at the trained tokens) or `labels` (the ids of trained tokens at
    their own places, -100 elsewhere). Padding is left out, where `attention_mask` is 0.

    Raises:
        DataError: the record has another shape.
    """
    ids_S = _integers(record, "input_ids")
    masks = [name for name in MASKS if record.get(name) is not None]
    if len(masks) != 1 or ids_S.min(initial=0) < 0:
        raise DataError(
            "`input_ids` must be ids of tokens, with either `loss_mask` (1 at trained tokens) or "
            "`labels` (their ids at their own places, -100 elsewhere) beside them, found the fields "
            f"{', '.join(record)}"
        )
    mask_S = _integers(record, masks[0], len(ids_S))
    trained_S = mask_S == 1
    wrong_S = ~trained_S & (mask_S != 0)
    if masks == ["labels"]:
        trained_S = mask_S != IGNORED_LABEL
        wrong_S = trained_S & (mask_S != ids_S)
    if wrong_S.any():
        place = int(wrong_S.argmax())
        raise DataError(
            f"`{masks[0]}`[{place}] is {mask_S[place]} at the token {ids_S[place]}; `loss_mask` "
            "holds 1 at trained tokens and 0 elsewhere, `labels` their ids, not shifted, and -100"
        )
    if record.get("attention_mask") is not None:
        flags_S = _integers(record, "attention_mask", len(ids_S))
        is_text_S = flags_S == 1
        has_gaps = np.count_nonzero(np.diff(is_text_S, prepend=False)) > 2
        if has_gaps or (~is_text_S & (flags_S != 0)).any():
            raise DataError(
                "`attention_mask` must be 1 for one stretch of tokens and 0 for padding around it; "
                "a record holds one example, several packed ones cannot be told apart"
            )
        ids_S = ids_S[is_text_S]
        trained_S = trained_S[is_text_S]
    return ids_S.tolist(), trained_S.tolist()


def _integers(record: dict[str, Any], name: str, length: int = 0) -> np.ndarray:
    """Return a field as an array, of `length` if that is not 0.

    Raises:
        DataError: it is not a list of integers, or not of this length.
    """
    try:
        values_S = np.array(record[name])
    except ValueError:  # lists of several lengths
        values_S = np.array(None)
    is_list = values_S.ndim == 1 and values_S.dtype.kind in "iub"
    if not is_list or len(values_S) != (length or len(values_S)):
        raise DataError(
            f"`{name}` must be a list of integers, as long as `input_ids`, found "
            f"{str(record[name])[:80]!r}"
        )
    return values_S.astype(np.int64)
