"""Rows of a cache against the examples of an evaluation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nemo_kd.batch import Example
from nemo_kd.evaluation.inputs import is_row_of

EXAMPLE = Example(
    index=0,
    tokens_S=np.array([5, 6, 7, 8]),
    labels_S=np.array([6, 7, 8, 9]),
    loss_mask_S=np.array([0.0, 1.0, 1.0, 0.0]),
)


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("labels_S", [6, 7, 3, 9], False),  # the last trained one, which is no input
        ("tokens_S", [5, 6, 3, 8], False),
        ("loss_mask_S", [1.0, 1.0, 1.0, 0.0], False),
        ("labels_S", [6, 7, 8, 3], True),  # behind the last trained one
    ],
)
def test_a_row_is_compared_up_to_its_last_trained_label(name, values, expected):
    row = replace(EXAMPLE, **{name: np.array(values)})
    assert is_row_of(row, EXAMPLE) is expected
