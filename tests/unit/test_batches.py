"""Which examples are computed together: every example once, limits kept, little padding."""

from __future__ import annotations

import numpy as np
import pytest

from nemo_kd.data.batches import form_batches
from tests.tiny_tokenizer import docstrings


def padded(batch: list[int], lengths: list[int], multiple_of: int) -> int:
    return len(batch) * -(-max(lengths[member] for member in batch) // multiple_of) * multiple_of


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("max_examples", "max_tokens"), [(None, 300), (3, None), (4, 200), (1, 50), (None, 1), (None, None)]
)
def test_every_example_once_and_within_the_limits(packed, max_examples, max_tokens):
    lengths = np.random.default_rng(0).integers(1, 260, 97).tolist()
    batches = form_batches(lengths, max_examples, max_tokens, packed, multiple_of=8)
    assert sorted(member for batch in batches for member in batch) == list(range(97))
    for batch in batches:
        tokens = sum(lengths[member] for member in batch) if packed else padded(batch, lengths, 8)
        assert len(batch) == 1 or max_tokens is None or tokens <= max_tokens
        assert max_examples is None or len(batch) <= max_examples
    if max_examples is None and max_tokens is None:
        assert len(batches) == 1


def test_packed_batches_are_full():
    """No two batches would fit into one: what first-fit guarantees, and padding or one batch an example would not."""
    lengths = np.random.default_rng(1).integers(1, 400, 200).tolist()
    totals = sorted(sum(lengths[member] for member in batch) for batch in form_batches(lengths, None, 1000, True))
    assert totals[0] + totals[1] > 1000
    assert sum(lengths) / (len(totals) * 1000) > 0.95


def test_padded_batches_of_real_texts_have_little_padding():
    lengths = [len(text) for text in docstrings()][:4096]
    batches = form_batches(lengths, None, max(lengths), False)
    computed = sum(padded(batch, lengths, 1) for batch in batches)
    assert 1 - sum(lengths) / computed < 0.05


def test_a_longer_example_is_alone():
    assert form_batches([10, 500, 20], None, 100, True) == [[1], [2, 0]]
    assert form_batches([20, 500, 20], None, 100, False) == [[1], [0, 2]]
    assert form_batches([], None, 100, True) == []
