"""Which examples are computed together: every example once, limits kept, little padding."""

from __future__ import annotations

import numpy as np
import pytest

from nemo_kd.data.batches import MicroBatches, form_batches
from tests.tiny_tokenizer import docstrings


class Lengths(list):
    def num_tokens(self, position: int) -> int:
        return self[position]


def padded(batch: list[int], lengths: list[int], multiple_of: int) -> int:
    return (
        len(batch)
        * -(-max(lengths[member] for member in batch) // multiple_of)
        * multiple_of
    )


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("max_examples", "max_tokens"),
    [(None, 300), (3, None), (4, 200), (1, 50), (None, 1), (None, None)],
)
def test_every_example_once_and_within_the_limits(packed, max_examples, max_tokens):
    lengths = np.random.default_rng(0).integers(1, 260, 97).tolist()
    batches = form_batches(lengths, max_examples, max_tokens, packed, multiple_of=8)
    assert sorted(member for batch in batches for member in batch) == list(range(97))
    for batch in batches:
        tokens = (
            sum(lengths[member] for member in batch)
            if packed
            else padded(batch, lengths, 8)
        )
        assert len(batch) == 1 or max_tokens is None or tokens <= max_tokens
        assert max_examples is None or len(batch) <= max_examples
    if max_examples is None and max_tokens is None:
        assert len(batches) == 1


def test_packed_batches_are_full():
    """No two batches would fit into one: what first-fit guarantees, and padding or one batch an example would not."""
    lengths = np.random.default_rng(1).integers(1, 400, 200).tolist()
    totals = sorted(
        sum(lengths[member] for member in batch)
        for batch in form_batches(lengths, None, 1000, True)
    )
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


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("count", "max_tokens", "packed"),
    [
        (40, 512, True),
        (40, 512, False),
        (40, None, True),
        (5, 64, True),
        (1, 64, True),
    ],
)
def test_ranks_share_a_global_batch(num_ranks, count, max_tokens, packed):
    lengths = np.random.default_rng(count).integers(1, 260, 97).tolist()
    positions = np.random.default_rng(2).permutation(97)[:count].tolist()
    shares = [
        MicroBatches(
            Lengths(lengths), rank, num_ranks, 3, max_tokens, packed, 8
        ).share(positions)
        for rank in range(num_ranks)
    ]
    assert len({len(share) for share in shares}) == 1
    assert sorted(
        position for share in shares for batch in share for position in batch
    ) == sorted(positions)
    for batch in (batch for share in shares for batch in share if batch):
        chosen = [lengths[position] for position in batch]
        if max_tokens is None:
            assert len(batch) <= 3
            continue
        tokens = sum(chosen) if packed else padded(batch, lengths, 8)
        assert len(batch) == 1 or tokens <= max_tokens
    if max_tokens is not None:
        loads = [
            sum(lengths[position] for batch in share for position in batch)
            for share in shares
        ]
        assert max(loads) - min(loads) <= max(max_tokens, *lengths)
        empty = sum(not batch for share in shares for batch in share)
        assert not empty or all(len(batch) <= 1 for share in shares for batch in share)


def test_the_largest_micro_batch_is_halved_for_the_ranks_to_have_equally_many():
    lengths = [60, 30, 30, 20, 20, 20]
    assert form_batches(lengths, None, 60, True) == [[0], [1, 2], [3, 4, 5]]
    first, second = (
        MicroBatches(Lengths(lengths), rank, 2, 1, 60, True).share(range(6))
        for rank in (0, 1)
    )
    assert (first, second) == ([[0], [1]], [[3, 4, 5], [2]])
    alone = [
        MicroBatches(Lengths(lengths), rank, 2, 1, 60, True).share([0])
        for rank in (0, 1)
    ]
    assert alone == [[[0]], [[]]]


def test_lengths_are_not_asked_for_without_a_budget():
    rows = MicroBatches(None, 1, 2, 2, None, True)
    assert rows.share([5, 6, 7, 8, 9]) == [[8, 9], []]
