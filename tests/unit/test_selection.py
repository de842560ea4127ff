"""Which positions are selected, and by which scores."""

from __future__ import annotations

import math
import random

import pytest
import torch

from nemo_kd.cache.reader import CacheReader
from nemo_kd.config import ConfigError
from nemo_kd.config.loss import LossConfig
from nemo_kd.config.selection import Selection
from nemo_kd.data.batches import collate, pack
from nemo_kd.ops.distillation import distillation_loss
from nemo_kd.ops.selection import entropy, largest, student_entropy
from nemo_kd.ops.vocab import VocabShard
from nemo_kd.student.reports import describe_selection
from tests.tiny_cache import row, write


@pytest.mark.parametrize("seed", range(5))
def test_the_largest_scores_of_every_example(seed):
    """Against Python's sort, which is stable: of equal scores the first ones are selected."""
    generator = random.Random(seed)
    examples = [generator.randrange(6) for _ in range(60)]
    scores = [float(generator.randrange(8)) for _ in examples]
    counts = [generator.randrange(8) for _ in range(6)]
    expected = set()
    for example, count in enumerate(counts):
        places = [place for place, one in enumerate(examples) if one == example]
        expected |= set(sorted(places, key=lambda place: -scores[place])[:count])
    found = largest(*map(torch.tensor, (scores, examples, counts)))
    assert set(found.nonzero()[:, 0].tolist()) == expected
    nothing = torch.tensor([], dtype=torch.int64)
    assert largest(nothing.float(), nothing, torch.tensor(counts)).shape == (0,)


def test_counts_are_exact_and_rounded_up():
    assert [Selection.of("top 25% by student_entropy").count(n) for n in range(6)] == [0, 1, 1, 1, 1, 2]  # fmt: skip
    assert Selection.of("top 0.1% by teacher_entropy").count(1000) == 1
    assert (
        Selection.of("top 14% by entropy_gap").count(50) == 7
    )  # 0.14 * 50 is a little more


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"select": "top 25 by student_entropy"},
            "select: 'top 25 by student_entropy' is not a selection: top N% by student_entropy, "
            "teacher_entropy or entropy_gap, N above 0 and below 100, for example 'top 25% by "
            "student_entropy'",
        ),
        ({"select": "top 100% by student_entropy"}, "N above 0 and below 100"),
        ({"select": "top 0% by student_entropy"}, "N above 0 and below 100"),
        (
            {
                "select": "top 5% by entropy_gap",
                "kd_loss_weight": 0.0,
                "sft_loss_weight": 1.0,
            },
            "select: top 5% by entropy_gap selects positions of the KD term, which kd_loss_weight=0 leaves out",
        ),
        (
            {
                "select": "top 5% by entropy_gap",
                "kd_loss": "custom",
                "custom_loss": "a.b",
            },
            "which kd_loss=custom computes by itself",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ConfigError) as error:
        LossConfig(**settings)
    assert message in str(error.value)


def test_the_loss_for_other_trainers_does_not_select(tmp_path):
    batch = collate([CacheReader(str(write(tmp_path)))[0]], 0)
    config = LossConfig(select="top 25% by student_entropy")
    with pytest.raises(ValueError, match="select: top 25% by student_entropy; only"):
        distillation_loss(torch.zeros(*batch.tokens_BS.shape, 50), batch, config)


def test_examples_of_positions_and_their_loss_tokens():
    """Context-parallel ranks count the tokens of whole examples."""
    rows = [row(0, 6), row(1, 9), row(2, 4)]
    padded, packed = collate(rows, 0, 4), pack(rows, 0, 4)
    for batch in (padded, packed):
        counts = [one.example.num_loss_tokens for one in rows]
        assert batch.loss_lengths_B.tolist() == counts
        examples = batch.examples_of(batch.loss_positions_N)
        assert torch.bincount(examples).tolist() == counts
    parts = [padded.context_part(rank, 2) for rank in range(2)]
    assert [part.loss_lengths_B.tolist() for part in parts] == [counts] * 2
    found = sum(
        torch.bincount(part.examples_of(part.loss_positions_N), minlength=3)
        for part in parts
    )
    assert found.tolist() == counts


def test_entropy_equals_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 50, generator=generator, dtype=torch.float64)
    logits *= torch.logspace(-2, 3, 40, dtype=torch.float64)[:, None]
    logits[3, 7:] = -math.inf
    logits[4, 0] = 1e4
    expected = torch.distributions.Categorical(logits=logits.clamp(min=-1e5)).entropy()
    padded = torch.cat([logits, torch.full((40, 6), 1e5, dtype=torch.float64)], dim=1)
    before = padded.clone()
    found = entropy(padded, VocabShard.of(56, 50))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(padded, before)
    in_half = entropy(padded.float(), VocabShard.of(56, 50))
    torch.testing.assert_close(in_half.double(), expected, rtol=1e-5, atol=1e-5)


def test_entropy_of_hidden_states_does_not_depend_on_blocks():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    expected = torch.distributions.Categorical(logits=hidden @ weight.T).entropy()
    shard = VocabShard.of(50, 50)
    for block_rows in (1, 4, 512):
        found = student_entropy(hidden, weight, shard, block_rows)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert student_entropy(hidden[:0], weight, shard).shape == (0,)


@pytest.mark.parametrize(
    ("select", "sft_loss_weight", "products"),
    [
        ("top 25% by teacher_entropy", 0.0, "1.5"),
        ("top 25% by student_entropy", 0.0, "2.5"),
        ("top 25% by teacher_entropy", 0.1, "3"),
        ("top 25% by entropy_gap", "linear from 0 to 1 over steps 0 to 9", "4"),
    ],
)
def test_a_run_prints_what_its_selection_costs(select, sft_loss_weight, products):
    config = LossConfig(select=select, sft_loss_weight=sft_loss_weight)
    assert describe_selection(config) == [
        f"selection:  the KD term has the {select} of every example; {products} products with the "
        "output layer per loss token instead of 3"
    ]
    assert describe_selection(LossConfig()) == []
