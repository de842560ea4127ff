"""What stage 1 takes from a teacher's logits, against dense float64 references on 1, 2 and 4 ranks."""

from __future__ import annotations

import pytest
import torch

from nemo_kd.batch import SMALLEST_SAMPLED_TAIL
from nemo_kd.ops.tail_sampling import sample_tail, tail_uniforms
from nemo_kd.ops.topk import vocab_parallel_topk
from nemo_kd.ops.vocab import VocabShard

WORLD_SIZES = [1, 2, 4]
TEMPERATURES = (1.0, 0.5, 2.0)


def _logits(num_rows: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab_size, generator=generator, dtype=torch.float64) * 3


def _shard(logits: torch.Tensor, num_columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, VocabShard]:
    """This rank's columns, padded with a value that would show in any result it reached."""
    world_size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    padded = torch.full((len(logits), num_columns * world_size), 1e4, dtype=dtype)
    padded[:, : logits.shape[1]] = logits.to(dtype)
    group = torch.distributed.group.WORLD
    return padded.chunk(world_size, dim=1)[rank].contiguous(), VocabShard.of(num_columns, logits.shape[1], group)


def _run_topk(logits, num_columns, dtype, k, labels=None, temperatures=(1.0,)):
    mine, shard = _shard(logits, num_columns, dtype)
    return tuple(vocab_parallel_topk(mine, k, shard, labels, temperatures))


def _run_tail(logits, num_columns, dtype, kept_ids, uniforms):
    mine, shard = _shard(logits, num_columns, dtype)
    return sample_tail(mine, kept_ids, uniforms, shard)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("vocab_size", "k", "num_columns"), [(50, 7, 64), (50, 50, 16), (5, 3, 2), (33, 20, 9)])
def test_topk_matches_dense(ranks, world_size, vocab_size, k, num_columns):
    num_columns = max(num_columns, -(-vocab_size // world_size))
    logits = _logits(6, vocab_size)
    labels = torch.tensor([0, vocab_size - 1, 1, 2, 3, 4])
    values, ids = logits.topk(k)
    shifted = logits - values[:, :1]
    results = ranks(world_size).run(_run_topk, logits, num_columns, torch.float64, k, labels, TEMPERATURES)
    for ours_values, ours_ids, ours_lse, ours_labels in results:
        assert torch.equal(ours_ids, ids)
        torch.testing.assert_close(ours_values, values - values[:, :1], rtol=0, atol=1e-12)
        for number, temperature in enumerate(TEMPERATURES):
            expected = (shifted / temperature).logsumexp(-1)
            torch.testing.assert_close(ours_lse[number], expected, rtol=0, atol=1e-12)
        expected = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
        torch.testing.assert_close(ours_labels, expected, rtol=0, atol=1e-12)


def test_topk_orders_ties_alike_in_every_layout(ranks):
    logits = _logits(4, 40).round()  # many equal logits
    reference = ranks(1).run(_run_topk, logits, 40, torch.float32, 40)[0]
    for world_size in (2, 4):
        for result in ranks(world_size).run(_run_topk, logits, 40, torch.float32, 40):
            assert torch.equal(result[1], reference[1])
            assert torch.equal(result[0], reference[0])


def test_bfloat16_log_sum_exp_runs_in_float32(ranks):
    logits = _logits(8, 500)
    exact = logits.bfloat16().double()
    ours = ranks(2).run(_run_topk, logits, 256, torch.bfloat16, 4)[0][2][0]
    torch.testing.assert_close(ours.double(), exact.logsumexp(-1) - exact.amax(-1), rtol=0, atol=2e-6)


def test_top_k_above_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="top_k: 9 exceeds the vocabulary of 8 tokens"):
        vocab_parallel_topk(torch.zeros(1, 8), 9, VocabShard(0, 8, 8))


@pytest.mark.parametrize(
    ("vocab_size", "num_columns", "num_samples"), [(50, 64, 4), (37, 10, 3), (5, 2, 1), (33, 9, 7)]
)
def test_every_layout_draws_the_same_ids(ranks, vocab_size, num_columns, num_samples):
    logits = _logits(40, vocab_size)
    kept = logits.topk(3).indices
    kept[::2, 1:] = -1
    uniforms = torch.from_numpy(tail_uniforms(7, 3, 40, num_samples))
    p = logits.softmax(-1)
    p_tail = p.scatter(1, kept.clamp(min=0), 0)
    p_tail[::2] = p[::2].scatter(1, kept[::2, :1], 0)
    for world_size in WORLD_SIZES:
        columns = max(num_columns, -(-vocab_size // world_size))
        for ids, tail in ranks(world_size).run(_run_tail, logits, columns, torch.float64, kept, uniforms):
            torch.testing.assert_close(tail, p_tail.sum(-1), rtol=0, atol=1e-12)
            drawn = tail >= SMALLEST_SAMPLED_TAIL
            assert drawn.sum() > 20
            assert (ids[drawn] >= 0).all()
            assert (p_tail[drawn].gather(1, ids[drawn]) > 0).all(), "a kept id or a padding column was drawn"
            strata = (torch.arange(num_samples) + uniforms[:, :num_samples]) / num_samples * p_tail.sum(-1)[:, None]
            expected = torch.searchsorted(p_tail.cumsum(-1), strata, right=True)
            assert torch.equal(ids[drawn], expected[drawn])


def test_draws_at_the_borders_of_ids_and_ranks(ranks):
    """Numbers that fall on, right below and right above every border, with the first id of every rank kept."""
    vocab_size, kept = 61, torch.tensor([0, 16, 32, 48])
    p_tail = _logits(20, vocab_size).softmax(-1).scatter(1, kept.expand(20, -1), 0)
    borders = (p_tail.cumsum(-1)[:, :-1] / p_tail.sum(-1, keepdim=True)).flatten()
    numbers = torch.stack([borders, borders.nextafter(torch.zeros(())), borders.nextafter(torch.ones(()))], dim=1)
    uniforms = torch.stack([numbers.flatten(), torch.zeros(numbers.numel())], dim=1)
    logits, p_tail = (rows.repeat_interleave(180, dim=0) for rows in (_logits(20, vocab_size), p_tail))
    ends = p_tail.cumsum(-1)
    wanted = uniforms[:, :1] * ends[:, -1:]
    for world_size in WORLD_SIZES:
        columns = 64 // world_size
        arguments = (logits, columns, torch.float64, kept.expand(len(logits), -1), uniforms)
        for ids, _ in ranks(world_size).run(_run_tail, *arguments):
            assert (p_tail.gather(1, ids) > 0).all(), "a kept id was drawn"
            assert (ends.gather(1, ids) > wanted - 1e-14).all()
            assert ((ends - p_tail).gather(1, ids) < wanted + 1e-14).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_of_lower_precision_draw_the_same_ids_in_every_layout(ranks, dtype):
    logits = _logits(100, 1000)
    kept = logits.topk(8).indices
    uniforms = torch.from_numpy(tail_uniforms(1, 0, 100, 4))
    p_tail = logits.to(dtype).double().softmax(-1).scatter(1, kept, 0)
    reference = ranks(1).run(_run_tail, logits, 1000, dtype, kept, uniforms)[0]
    torch.testing.assert_close(reference[1], p_tail.sum(-1), rtol=2e-6, atol=0)  # float32 sums
    strata = (torch.arange(4) + uniforms[:, :4]) / 4 * p_tail.sum(-1)[:, None]
    assert torch.equal(reference[0], torch.searchsorted(p_tail.cumsum(-1), strata, right=True))
    for world_size in (2, 4):
        for ids, tail in ranks(world_size).run(_run_tail, logits, 300 * 4 // world_size, dtype, kept, uniforms):
            assert torch.equal(ids, reference[0])
            torch.testing.assert_close(tail, reference[1], rtol=2e-6, atol=0)


def test_nothing_is_drawn_where_everything_is_kept(ranks):
    logits = _logits(3, 8)
    everything = torch.arange(8).repeat(3, 1)
    for world_size in WORLD_SIZES:
        uniforms = torch.from_numpy(tail_uniforms(0, 0, 3, 2))
        for ids, tail in ranks(world_size).run(_run_tail, logits, 8 // world_size, torch.float64, everything, uniforms):
            assert (ids == -1).all()
            assert (tail == 0).all()


def test_random_numbers_depend_on_seed_example_and_position_alone():
    assert (tail_uniforms(1, 2, 5, 3) == tail_uniforms(1, 2, 9, 3)[:5]).all()
    assert (tail_uniforms(1, 2, 5, 3) != tail_uniforms(1, 3, 5, 3)).all()
    assert (tail_uniforms(1, 2, 5, 3) != tail_uniforms(2, 2, 5, 3)).all()
    assert (tail_uniforms(2**63, 2, 5, 3) != tail_uniforms(2**63 + 1, 2, 5, 3)).all()
    assert (tail_uniforms(2**64 - 1, 2, 5, 3) != tail_uniforms(0, 2, 5, 3)).all()


@pytest.mark.parametrize("certainty", [0.0, 9.0], ids=["plain", "thinned"])
def test_head_and_samples_are_an_unbiased_estimate(certainty):
    """The mean over many draws of any function's estimate is its exact expectation; without the tail it is not."""
    num_draws, vocab_size, num_samples = 40_000, 60, 3
    logits = _logits(1, vocab_size, seed=3)
    logits[0, logits.argmax()] += certainty
    p = logits.softmax(-1)[0]
    kept = logits.topk(4).indices
    tail_mass = 1 - p[kept[0]].sum()
    assert (tail_mass < SMALLEST_SAMPLED_TAIL) == (certainty > 0)
    uniforms = torch.from_numpy(tail_uniforms(5, 0, num_draws, num_samples))
    shard = VocabShard(0, vocab_size, vocab_size)
    ids, tail = sample_tail(logits.expand(num_draws, -1), kept.expand(num_draws, -1), uniforms, shard)
    weight = torch.where(ids >= 0, tail.clamp(min=SMALLEST_SAMPLED_TAIL)[:, None] / num_samples, 0)
    for seed in range(5):
        f = torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 2
        head = (p[kept[0]] * f[kept[0]]).sum()
        estimates = head + (weight * f[ids.clamp(min=0)]).sum(-1)
        standard_error = estimates.std() / num_draws**0.5
        exact = (p * f).sum()
        assert abs(estimates.mean() - exact) < 5 * standard_error
        assert abs(head - exact) > 5 * standard_error, "the test would not notice a missing tail"


def test_samples_follow_the_tail():
    num_draws, vocab_size = 30_000, 25
    logits = _logits(1, vocab_size, seed=1)
    kept = logits.topk(2).indices
    expected = logits.softmax(-1)[0].scatter(0, kept[0], 0)
    expected = expected / expected.sum()
    uniforms = torch.from_numpy(tail_uniforms(0, 0, num_draws, 1))
    ids, _ = sample_tail(
        logits.expand(num_draws, -1), kept.expand(num_draws, -1), uniforms, VocabShard(0, vocab_size, vocab_size)
    )
    counts = torch.bincount(ids[:, 0], minlength=vocab_size).double()
    often = expected * num_draws > 5
    chi_square = ((counts - expected * num_draws)[often] ** 2 / (expected * num_draws)[often]).sum()
    assert chi_square < 60  # 22 degrees of freedom: exceeded once in 25,000 tries
