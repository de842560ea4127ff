"""Which examples are drawn when: a pure function of seed, epoch and data, the same for every number of ranks."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from omegaconf import OmegaConf

from nemo_kd.config import ConfigError
from nemo_kd.config.student import StudentDataConfig
from nemo_kd.config.typed import typed
from nemo_kd.data.order import (
    CHUNKS,
    SampleOrder,
    TrainingBatches,
    pass_order,
    shares,
)

# Three sources: 9 rows in 3 chunks, 40 rows in 4 chunks, 2 rows in one.
SOURCES = [[4, 4, 1], [10, 10, 10, 10], [2]]
WEIGHTS = [1.0, 2.0, 1.0]
ORDERS = list(itertools.product((None, WEIGHTS), (True, False, CHUNKS)))


def test_one_source_has_the_order_of_numpys_permutation():
    order = SampleOrder([[21]], None, 3, True)
    for epoch in range(3):
        expected = np.random.Generator(np.random.PCG64([3, epoch])).permutation(21)
        assert order.epoch(epoch, 16).tolist() == expected[:16].tolist()
        # A list of sources without weights is one after the other.
        assert (
            SampleOrder([[10, 5], [6]], None, 3, True).epoch(epoch, 21).tolist()
            == expected.tolist()
        )
    assert SampleOrder([[10, 5], [6]], None, 3, False).epoch(4, 21).tolist() == list(
        range(21)
    )


def test_orders_differ_by_epoch_and_seed():
    for weights, shuffle in ORDERS:
        orders = [
            SampleOrder(SOURCES, weights, seed, shuffle).epoch(epoch, 51)
            for seed, epoch in ((1, 0), (1, 1), (2, 0))
        ]
        different = {order.tobytes() for order in orders}
        assert len(different) == (3 if shuffle else 1 if weights is None else 2)
        assert (
            SampleOrder(SOURCES, weights, 1, shuffle).epoch(0, 51) == orders[0]
        ).all()
        if weights is None:
            assert all(sorted(order) == list(range(51)) for order in orders)


@pytest.mark.parametrize(
    ("weights", "num_samples", "expected"),
    [
        ([0.3, 0.7], 10, [3, 7]),
        ([3, 7], 10, [3, 7]),
        ([1, 1, 1], 10, [4, 3, 3]),
        (
            [0.5, 0.3, 0.2],
            7,
            [4, 2, 1],
        ),  # 3.5, 2.1, 1.4: the largest remainder gets the last sample
        ([1, 1e-9], 5, [5, 0]),
        ([2.5], 5, [5]),
    ],
)
def test_shares_add_up(weights, num_samples, expected):
    assert shares(weights, num_samples) == expected


@pytest.mark.parametrize("shuffle", [True, False, CHUNKS])
def test_a_blend_draws_every_row_of_a_source_equally_often(shuffle):
    """Of 48 samples an epoch the sources give 12, 24, 12: the first and last repeat, the second takes two epochs."""
    order = SampleOrder(SOURCES, WEIGHTS, 7, shuffle)
    counts: Counter[int] = Counter()
    for epoch in range(15):
        drawn = order.epoch(epoch, 48)
        per_source = [
            int(((drawn >= first) & (drawn < last)).sum())
            for first, last in ((0, 9), (9, 49), (49, 51))
        ]
        assert per_source == [12, 24, 12]
        counts.update(drawn.tolist())
        for rows in (range(9), range(9, 49), range(49, 51)):
            seen = [counts[row] for row in rows]
            assert max(seen) - min(seen) <= 1
    assert [counts[0], counts[9], counts[49]] == [20, 9, 90]


def test_a_blend_that_is_not_shuffled_is_mixed_evenly():
    drawn = SampleOrder([[100], [100]], [1, 3], 0, False).epoch(0, 40).tolist()
    assert [row for row in drawn if row < 100] == list(range(10))
    assert [row for row in drawn if row >= 100] == list(range(100, 130))
    for start in range(0, 40, 4):
        assert sum(row < 100 for row in drawn[start : start + 4]) == 1


@pytest.mark.parametrize("weights", [None, [1.0, 1.0]])
def test_chunks_are_mixed_and_read_one_after_the_other(weights):
    sizes = [[5, 7, 3], [4, 6]]
    chunk_of = np.repeat(np.arange(5), [5, 7, 3, 4, 6])
    order = SampleOrder(sizes, weights, 1, CHUNKS)
    orders_of_chunks = set()
    for epoch in range(6):
        drawn = order.epoch(epoch, 25)
        for part in (
            [chunk_of >= 0] if weights is None else [chunk_of < 3, chunk_of >= 3]
        ):
            rows = [row for row in drawn if part[row]]
            runs = [
                (chunk, list(run))
                for chunk, run in itertools.groupby(
                    rows, key=lambda row: chunk_of[row]
                )
            ]
            if weights is None:
                assert len(runs) == 5  # each chunk is read to its end before the next
                orders_of_chunks.add(tuple(chunk for chunk, _ in runs))
                assert any(run != sorted(run) for _, run in runs)
            else:
                assert len(runs) <= 7
    assert weights is not None or len(orders_of_chunks) > 3
    assert sorted(pass_order([5, 7, 3], (1, 2), CHUNKS)) == list(range(15))


def batches(order, consumed=0, steps_per_epoch=2, max_steps=7):
    result = TrainingBatches(order, 8, steps_per_epoch, max_steps)
    result.consumed_samples = consumed
    return list(result)


@pytest.mark.parametrize(("weights", "shuffle"), ORDERS)
def test_global_batches_follow_the_order(weights, shuffle):
    order = SampleOrder(SOURCES, weights, 3, shuffle)
    straight = batches(order)
    assert [sum(straight[start : start + 2], []) for start in (0, 2, 4)] == [
        order.epoch(epoch, 16).tolist() for epoch in range(3)
    ]
    # A run that stopped after any number of batches goes on with the next one.
    for done in range(8):
        assert batches(order, done * 8) == straight[done:]


def test_resuming_late_costs_no_more_than_an_epoch(monkeypatch):
    order = SampleOrder(SOURCES, WEIGHTS, 3, True)
    asked = []
    draw = SampleOrder.epoch
    monkeypatch.setattr(
        SampleOrder,
        "epoch",
        lambda self, epoch, count: asked.append(epoch) or draw(self, epoch, count),
    )
    assert len(batches(order, consumed=8 * 1999, max_steps=2000)) == 1
    assert asked == [999]


def data_config(**values):
    return typed(StudentDataConfig, OmegaConf.create(values))


@pytest.mark.parametrize(
    ("train", "paths", "weights"),
    [
        ("a", ["a"], None),
        (["a", "b[:10%]"], ["a", "b[:10%]"], None),
        ([0.3, "a", 0.7, "b"], ["a", "b"], [0.3, 0.7]),
        ([3, "a"], ["a"], [3]),
        ([{"path": "a"}, {"path": "b", "kd_weight": 2}], ["a", "b"], None),
        ([{"path": "a", "weight": 3, "sft_weight": 0}], ["a"], [3]),
        ({"path": "a", "weight": 3}, ["a"], [3]),
        (None, [], None),
    ],
)
def test_paths_with_and_without_weights(train, paths, weights):
    config = data_config(data_prefix={"train": train, "validation": ["v"]})
    assert (config.paths("train"), config.weights("train")) == (paths, weights)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"data_prefix": {"train": [0.3, "a", "b"]}},
            r"model.data.data_prefix.train: .* is neither PATH, \[PATH, PATH",
        ),
        (
            {"data_prefix": {"train": ["a", 0.3, "b", 0.7]}},
            r"is neither PATH, \[PATH, PATH",
        ),
        (
            {"data_prefix": {"train": [0.3, "a", 0.7]}},
            r"is neither PATH, \[PATH, PATH",
        ),
        ({"data_prefix": {"train": [0.3, 0.7]}}, r"is neither PATH, \[PATH, PATH"),
        ({"data_prefix": {"train": [{"path": "a", "loss_weight": 2}]}}, "is neither"),
        (
            {"data_prefix": {"train": [{"path": "a", "weight": 1}, {"path": "b"}]}},
            "for all or none",
        ),
        (
            {
                "data_prefix": {
                    "train": [{"path": "a", "kd_weight": 0, "sft_weight": 0}]
                }
            },
            "not both 0",
        ),
        ({"data_prefix": {"train": [{"path": "a", "kd_weight": -1}]}}, "is neither"),
        ({"data_prefix": {"train": [{"path": "a"}, "b"]}}, "is neither"),
        (
            {"data_prefix": {"validation": [{"path": "a", "kd_weight": 2}]}},
            "model.data.data_prefix.validation: weights are for train only",
        ),
        (
            {"data_prefix": {"train": [0, "a", 1, "b"]}},
            r"is neither PATH, \[PATH, PATH",
        ),
        ({"data_prefix": {"train": [-1.0, "a"]}}, r"is neither PATH, \[PATH, PATH"),
        (
            {"data_prefix": {"train": [float("nan"), "a"]}},
            r"is neither PATH, \[PATH, PATH",
        ),
        ({"data_prefix": {"train": [True, "a"]}}, r"is neither PATH, \[PATH, PATH"),
        (
            {"data_prefix": {"validation": [1.0, "a"]}},
            "model.data.data_prefix.validation: weights are for train only",
        ),
        (
            {"data_prefix": {"test": [1.0, "a"]}},
            "model.data.data_prefix.test: weights are for train only",
        ),
        (
            {"shuffle": "chunk"},
            "model.data.shuffle: 'chunk' is not one of True, False, chunks",
        ),
        ({"shuffle": 1}, "shuffle: Value '1' of type 'int'"),
        (
            {"max_tokens_per_batch": 0},
            "model.data.max_tokens_per_batch: 0 must be at least 1",
        ),
        ({"num_workers": -1}, "model.data.num_workers: -1 must be at least 0"),
    ],
)
def test_wrong_data_settings_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        data_config(**values)


def test_shuffle_takes_a_truth_value_or_chunks():
    assert [
        data_config(shuffle=value).shuffle for value in (True, False, "chunks")
    ] == [
        True,
        False,
        CHUNKS,
    ]
