"""What stage 1 takes from a teacher's hidden states, against dense float64 references on 1, 2 and 4 ranks."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import topk as benchmark
from nemo_kd.batch import SMALLEST_SAMPLED_TAIL, TeacherRows
from nemo_kd.config.data import CacheConfig
from nemo_kd.ops.tail_sampling import tail_uniforms
from nemo_kd.ops.topk import topk_of_logits, topk_rows
from nemo_kd.ops.vocab import VocabShard

WORLD_SIZES = [1, 2, 4]
TEMPERATURES = (1.0, 0.5, 2.0)


def _everything(probabilities_NK):
    return torch.ones_like(probabilities_NK, dtype=torch.bool)


def _logits(num_rows: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(num_rows, vocab_size, generator=generator, dtype=torch.float64) * 3
    )


def _run(
    hidden, weight, num_columns, labels, kept=_everything, **settings
) -> TeacherRows[torch.Tensor]:
    """`topk_rows` of this rank, whose weight is padded with what would show in any result it reached."""
    world_size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    padded = weight.new_full((num_columns * world_size, weight.shape[1]), float("nan"))
    padded[: len(weight)] = weight
    shard = VocabShard.of(num_columns, len(weight), torch.distributed.group.WORLD)
    return topk_rows(
        hidden, padded.chunk(world_size)[rank], labels, shard, kept=kept, **settings
    )


def _run_logits(
    logits, num_columns, dtype, labels=None, **settings
) -> TeacherRows[torch.Tensor]:
    """`_run` with a weight that hands the logits through as they are."""
    labels = torch.zeros(len(logits), dtype=torch.int64) if labels is None else labels
    return _run(
        logits.to(dtype),
        torch.eye(logits.shape[1], dtype=dtype),
        num_columns,
        labels,
        **settings,
    )


def _alone(logits: torch.Tensor, **settings) -> TeacherRows[torch.Tensor]:
    shard = VocabShard(0, logits.shape[1], logits.shape[1])
    labels = torch.zeros(len(logits), dtype=torch.int64)
    return topk_of_logits(
        logits.clone(), labels, shard, **({"kept": _everything} | settings)
    )


def _columns(vocab_size: int, world_size: int, wanted: int = 0) -> int:
    return max(wanted, -(-vocab_size // world_size))


@pytest.mark.parametrize("block_bytes", [1, 2000, None])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(
    ("vocab_size", "k", "num_columns"),
    [
        (50, 7, 64),
        (50, 50, 16),
        (5, 3, 2),
        (33, 20, 9),
        (33, 1, 9),
        (1, 1, 1),
        (1000, 3, 300),
    ],
)
def test_rows_match_dense(ranks, world_size, vocab_size, k, num_columns, block_bytes):
    """Also with padding on some ranks and nothing else on others, and with blocks of one, a few and all rows."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(7, 12, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab_size, 12, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, vocab_size - 1, 1, 2, 3, 4, 0]).clamp(max=vocab_size - 1)
    logits = hidden @ weight.T
    values, ids = logits.topk(k)
    settings = {"top_k": k, "temperatures": TEMPERATURES, "block_bytes": block_bytes}
    columns = _columns(vocab_size, world_size, num_columns)
    for found in ranks(world_size).run(
        partial(_run, **settings), hidden, weight, columns, labels
    ):
        close = partial(torch.testing.assert_close, rtol=0, atol=1e-12)
        assert torch.equal(found.topk_token_ids_PK.long(), ids)
        close(found.topk_logits_PK, values - values[:, :1])
        close(found.log_sum_exp_logits_P, (logits - values[:, :1]).logsumexp(-1))
        close(
            found.label_logprobs_P,
            logits.log_softmax(-1).gather(1, labels[:, None])[:, 0],
        )
        for number, temperature in enumerate(TEMPERATURES):
            tail = (logits / temperature).softmax(-1).scatter(1, ids, 0).sum(-1)
            close(found.tail_mass_PT[:, number], tail)
        assert found.tail_token_ids_PM is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_projection_of_lower_precision_is_as_good_as_its_logits(
    ranks, world_size, dtype
):
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(50, 64, generator=generator).div(2).to(dtype)
    weight = torch.randn(3000, 64, generator=generator).to(dtype)
    labels = torch.randint(0, 3000, (50,), generator=generator)
    exact = hidden.double() @ weight.double().T
    # Logits below 32 are rounded by up to 2^-4 in bfloat16, and by some 2^-20 in float32.
    tolerance = 0.07 if dtype == torch.bfloat16 else 3e-5
    run = partial(_run, top_k=20, block_bytes=100_000)
    for found in ranks(world_size).run(
        run, hidden, weight, _columns(3000, world_size, 900), labels
    ):
        shifted = exact - exact.amax(-1, keepdim=True)
        close = partial(
            torch.testing.assert_close, rtol=0, atol=2 * tolerance, check_dtype=False
        )
        assert found.topk_logits_PK.dtype == torch.float32
        assert found.topk_token_ids_PK.dtype == torch.int32
        close(found.topk_logits_PK, shifted.gather(1, found.topk_token_ids_PK.long()))
        close(found.topk_logits_PK, shifted.topk(20).values)
        close(found.log_sum_exp_logits_P, shifted.logsumexp(-1))
        close(
            found.label_logprobs_P,
            exact.log_softmax(-1).gather(1, labels[:, None])[:, 0],
        )


@pytest.mark.parametrize(
    "config",
    [{"min_probability": 0.05}, {"min_probability": 0.0, "top_p": 0.8, "min_k": 2}],
)
def test_what_is_not_kept_is_tail(ranks, config):
    kept, logits = CacheConfig(**config).kept, _logits(30, 60)
    probabilities, ids = logits.softmax(-1).topk(10)
    kept_NK = kept(probabilities)
    assert 2 < kept_NK.sum(-1).double().mean() < 9
    expected = torch.zeros_like(logits).scatter_(1, ids, kept_NK.double()) == 0
    for world_size in WORLD_SIZES:
        settings = {"top_k": 10, "temperatures": TEMPERATURES, "kept": kept}
        run = partial(_run_logits, **settings)
        for found in ranks(world_size).run(
            run, logits, _columns(60, world_size, 25), torch.float64
        ):
            assert torch.equal(found.topk_token_ids_PK.long(), ids.where(kept_NK, -1))
            assert torch.equal(found.topk_logits_PK.isfinite(), kept_NK)
            for number, temperature in enumerate(TEMPERATURES):
                tail = ((logits / temperature).softmax(-1) * expected).sum(-1)
                torch.testing.assert_close(
                    found.tail_mass_PT[:, number], tail, rtol=1e-12, atol=0
                )


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_tail_masses_and_log_sum_exps_near_zero_are_exact_in_float32(
    ranks, world_size
):
    """1 minus the kept mass would round to 0 or to a multiple of 6e-8."""
    logits = _logits(20, 500).float()
    logits[torch.arange(20), torch.arange(20) * 25] += torch.linspace(20, 45, 20)
    exact = logits.double().softmax(-1)
    top = exact.argmax(-1, keepdim=True)
    for found in ranks(world_size).run(
        partial(_run_logits, top_k=1), logits, _columns(500, world_size), torch.float32
    ):
        tail = exact.scatter(1, top, 0).sum(-1)
        assert tail.min() < 1e-12
        # Shifted logits near -50 are rounded by up to 2e-6; a log-sum-exp is the float64 logarithm of 1 and the tail.
        torch.testing.assert_close(
            found.tail_mass_PT[:, 0].double(), tail, rtol=4e-6, atol=0
        )
        torch.testing.assert_close(
            found.log_sum_exp_logits_P.double(),
            -(-tail).log1p(),
            rtol=4e-6,
            atol=1e-15,
        )


@pytest.mark.parametrize("num_rows", [0, 1])
def test_no_row_and_one_row(ranks, num_rows):
    uniforms = torch.from_numpy(tail_uniforms(0, 0, num_rows, 2))
    run = partial(
        _run_logits, top_k=4, uniforms_NU=uniforms, temperatures=TEMPERATURES
    )
    for world_size in WORLD_SIZES:
        for found in ranks(world_size).run(
            run, _logits(num_rows, 30), _columns(30, world_size, 12), torch.float32
        ):
            assert {
                len(values)
                for values in vars(found).values()
                if torch.is_tensor(values)
            } == {num_rows}
            assert [
                values.shape[1]
                for values in found.arrays().values()
                if values.dim() == 2
            ] == [
                4,
                4,
                3,
                2,
            ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 5, 40, 129])
def test_the_largest_of_a_large_vocabulary_are_exact(top_k, dtype):
    """Several levels of groups with columns left over, many equal logits and some of -inf."""
    for seed, vocab_size in enumerate((1000, 8191, 20_011)):
        logits = _logits(6, vocab_size, seed).to(dtype)
        logits[0] = logits[0].round()
        logits[1, 40:] = float("-inf")
        logits[2] = logits[2].sort().values
        logits[3, ::100] += 20  # in few groups
        logits[4, -150:] += 20
        found = _alone(logits, top_k=top_k)
        values = logits.float().topk(top_k).values
        assert torch.equal(found.topk_logits_PK, values - values[:, :1])
        ids = found.topk_token_ids_PK.long()
        assert torch.equal(logits.float().gather(1, ids), values)
        assert all(len(set(row)) == top_k for row in ids.tolist())
        exact = logits.double().softmax(-1)
        torch.testing.assert_close(
            found.log_sum_exp_logits_P.double(),
            -exact.amax(-1).log(),
            rtol=1e-6,
            atol=1e-7,
        )
        expected = exact.scatter(1, ids, 0).sum(-1)
        torch.testing.assert_close(
            found.tail_mass_PT[:, 0].double(), expected, rtol=4e-6, atol=0
        )


def test_topk_orders_ties_alike_in_every_layout(ranks):
    logits = _logits(4, 40).round()  # many equal logits
    reference = ranks(1).run(
        partial(_run_logits, top_k=40), logits, 40, torch.float32
    )[0]
    equal = reference.topk_logits_PK.diff() == 0
    assert equal.any()
    assert (reference.topk_token_ids_PK.diff()[equal] > 0).all()
    for world_size in (2, 4):
        run = partial(_run_logits, top_k=40)
        for result in ranks(world_size).run(
            run, logits, _columns(40, world_size), torch.float32
        ):
            assert torch.equal(result.topk_token_ids_PK, reference.topk_token_ids_PK)
            assert torch.equal(result.topk_logits_PK, reference.topk_logits_PK)


def test_bfloat16_log_sum_exp_runs_in_float32(ranks):
    logits = _logits(8, 500)
    exact = logits.bfloat16().double()
    ours = (
        ranks(2)
        .run(partial(_run_logits, top_k=4), logits, 256, torch.bfloat16)[0]
        .log_sum_exp_logits_P
    )
    torch.testing.assert_close(
        ours.double(), exact.logsumexp(-1) - exact.amax(-1), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_broken_hidden_states_show_in_their_row_alone(ranks, value):
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (
        torch.randn(6, 8, generator=generator),
        torch.randn(300, 8, generator=generator),
    )
    uniforms = torch.from_numpy(tail_uniforms(0, 0, 6, 2))
    labels = torch.arange(6)
    run = partial(_run, top_k=5, uniforms_NU=uniforms, block_bytes=3000)
    for world_size in WORLD_SIZES:
        whole = ranks(world_size).run(run, hidden, weight, 300, labels)
        broken = hidden.clone()
        broken[3, 2] = value
        results = ranks(world_size).run(run, broken, weight, 300, labels)
        others = labels != 3
        for expected, found in zip(whole, results, strict=True):
            assert found.log_sum_exp_logits_P.isfinite().tolist() == others.tolist()
            for ours, theirs in zip(
                found.arrays().values(), expected.arrays().values(), strict=True
            ):
                assert torch.equal(ours[others], theirs[others])


def test_one_nan_among_the_logits_shows(ranks):
    logits = _logits(4, 30).float()
    weight = torch.eye(31)[:30]
    weight[29, 30] = float("nan")  # the last rank's
    hidden = torch.cat([logits, torch.ones(4, 1)], dim=1)
    for world_size in WORLD_SIZES:
        labels = torch.zeros(4, dtype=torch.int64)
        for found in ranks(world_size).run(
            partial(_run, top_k=3), hidden, weight, _columns(30, world_size), labels
        ):
            assert not found.log_sum_exp_logits_P.isfinite().any()


def test_memory_does_not_grow_with_the_rows():
    """8,192 rows of 128,256 logits would take 4.2 GB; the processes' peak is that of one block of them."""
    program = """
import torch
from nemo_kd.ops.topk import topk_rows
from nemo_kd.ops.vocab import VocabShard

def peak_bytes():
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

hidden, weight = torch.randn(8192, 4), torch.randn(128256, 4)
def run(num_rows):
    labels = torch.zeros(num_rows, dtype=torch.int64)
    topk_rows(hidden[:num_rows], weight, labels, VocabShard(0, 128256, 128256), top_k=8, kept=lambda p: p > 0)
    return peak_bytes()

run(1)
print(run(1), run(512), run(8192))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", program]
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment, cwd=root
    )
    one, few, many = map(int, result.stdout.split())
    assert few - one < 250e6
    assert many - few < 100e6


@pytest.mark.parametrize(
    ("vocab_size", "num_columns", "num_samples"),
    [(50, 64, 4), (37, 10, 3), (5, 2, 1), (33, 9, 7), (200, 64, 4), (300, 77, 2)],
)
def test_every_layout_draws_the_same_ids(ranks, vocab_size, num_columns, num_samples):
    logits, kept = _logits(40, vocab_size), CacheConfig(min_probability=0.1).kept
    p = logits.softmax(-1)
    top, top_ids = p.topk(3)
    p_tail = p.scatter(1, top_ids, top * ~kept(top))
    uniforms = torch.from_numpy(tail_uniforms(7, 3, 40, num_samples))
    run = partial(
        _run_logits, top_k=3, kept=kept, uniforms_NU=uniforms, block_bytes=10_000
    )
    for world_size in WORLD_SIZES:
        columns = _columns(vocab_size, world_size, num_columns)
        for found in ranks(world_size).run(run, logits, columns, torch.float64):
            ids, tail = found.tail_token_ids_PM.long(), found.tail_mass_PT[:, 0]
            torch.testing.assert_close(tail, p_tail.sum(-1), rtol=0, atol=1e-12)
            drawn = tail >= SMALLEST_SAMPLED_TAIL
            assert drawn.sum() > 20
            assert (ids[drawn] >= 0).all()
            assert (p_tail[drawn].gather(1, ids[drawn]) > 0).all(), (
                "a kept id or a padding column was drawn"
            )
            strata = (
                (torch.arange(num_samples) + uniforms[:, :num_samples])
                / num_samples
                * p_tail.sum(-1)[:, None]
            )
            expected = torch.searchsorted(p_tail.cumsum(-1), strata, right=True)
            assert torch.equal(ids[drawn], expected[drawn])


@pytest.mark.parametrize("vocab_size", [61, 197])
def test_draws_at_the_borders_of_ids_groups_and_ranks(ranks, vocab_size):
    """Numbers that fall on, right below and right above every border, with the first id of every rank kept."""
    num_columns = 64 if vocab_size == 61 else 256
    kept = torch.arange(0, vocab_size, num_columns // 4)
    logits = _logits(20, vocab_size)
    logits[:, kept] = 14
    p_tail = logits.index_fill(1, kept, float("-inf")).softmax(-1)
    borders = (p_tail.cumsum(-1)[:, :-1] / p_tail.sum(-1, keepdim=True)).flatten()
    numbers = torch.stack(
        [
            borders,
            borders.nextafter(torch.zeros(())),
            borders.nextafter(torch.ones(())),
        ],
        dim=1,
    )
    uniforms = torch.stack([numbers.flatten(), torch.zeros(numbers.numel())], dim=1)
    logits, p_tail = (
        rows.repeat_interleave(3 * (vocab_size - 1), dim=0)
        for rows in (logits, p_tail)
    )
    ends = p_tail.cumsum(-1)
    wanted = uniforms[:, :1] * ends[:, -1:]
    run = partial(_run_logits, top_k=len(kept), uniforms_NU=uniforms)
    for world_size in WORLD_SIZES:
        for found in ranks(world_size).run(
            run, logits, num_columns // world_size, torch.float64
        ):
            ids = found.tail_token_ids_PM.long()
            assert (p_tail.gather(1, ids) > 0).all(), "a kept id was drawn"
            assert (ends.gather(1, ids) > wanted - 1e-14).all()
            assert ((ends - p_tail).gather(1, ids) < wanted + 1e-14).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_of_lower_precision_draw_the_same_ids_in_every_layout(ranks, dtype):
    logits = _logits(100, 1000).to(dtype)
    uniforms = torch.from_numpy(tail_uniforms(1, 0, 100, 4))
    run = partial(_run_logits, top_k=8, uniforms_NU=uniforms)
    reference = ranks(1).run(run, logits, 1000, dtype)[0]
    p_tail = (
        logits.double().softmax(-1).scatter(1, reference.topk_token_ids_PK.long(), 0)
    )
    torch.testing.assert_close(
        reference.tail_mass_PT[:, 0].double(), p_tail.sum(-1), rtol=1e-6, atol=0
    )
    strata = (torch.arange(4) + uniforms[:, :4]) / 4 * p_tail.sum(-1)[:, None]
    expected = torch.searchsorted(p_tail.cumsum(-1), strata, right=True)
    assert torch.equal(reference.tail_token_ids_PM.long(), expected)
    for world_size in (2, 4):
        for found in ranks(world_size).run(run, logits, 300 * 4 // world_size, dtype):
            same = (found.topk_token_ids_PK == reference.topk_token_ids_PK).all(
                -1
            )  # but for ties at the last place
            assert same.sum() > 80
            assert torch.equal(
                found.tail_token_ids_PM[same], reference.tail_token_ids_PM[same]
            )
            torch.testing.assert_close(
                found.tail_mass_PT, reference.tail_mass_PT, rtol=1e-6, atol=0
            )


def test_nothing_is_drawn_where_everything_is_kept(ranks):
    logits = _logits(3, 8)
    run = partial(
        _run_logits, top_k=8, uniforms_NU=torch.from_numpy(tail_uniforms(0, 0, 3, 2))
    )
    for world_size in WORLD_SIZES:
        for found in ranks(world_size).run(
            run, logits, 8 // world_size, torch.float64
        ):
            assert (found.tail_token_ids_PM == -1).all()
            assert (found.tail_mass_PT == 0).all()


def test_random_numbers_depend_on_seed_example_and_position_alone():
    assert (tail_uniforms(1, 2, 5, 3) == tail_uniforms(1, 2, 9, 3)[:5]).all()
    assert (tail_uniforms(1, 2, 5, 3) != tail_uniforms(1, 3, 5, 3)).all()
    assert (tail_uniforms(1, 2, 5, 3) != tail_uniforms(2, 2, 5, 3)).all()
    assert (tail_uniforms(2**63, 2, 5, 3) != tail_uniforms(2**63 + 1, 2, 5, 3)).all()
    assert (tail_uniforms(2**64 - 1, 2, 5, 3) != tail_uniforms(0, 2, 5, 3)).all()


@pytest.mark.parametrize(
    ("certainty", "vocab_size"), [(0.0, 60), (9.0, 60), (0.0, 300)]
)
def test_head_and_samples_are_an_unbiased_estimate(certainty, vocab_size):
    """The mean over many draws of any function's estimate is its exact expectation; without the tail it is not."""
    num_draws, num_samples = 40_000, 3
    logits = _logits(1, vocab_size, seed=3)
    logits[0, logits.argmax()] += certainty
    p = logits.softmax(-1)[0]
    kept = logits.topk(4).indices
    assert (1 - p[kept[0]].sum() < SMALLEST_SAMPLED_TAIL) == (certainty > 0)  # thinned
    uniforms = torch.from_numpy(tail_uniforms(5, 0, num_draws, num_samples))
    found = _alone(logits.expand(num_draws, -1), top_k=4, uniforms_NU=uniforms)
    ids, tail = found.tail_token_ids_PM, found.tail_mass_PT[:, 0]
    weight = torch.where(
        ids >= 0, tail.clamp(min=SMALLEST_SAMPLED_TAIL)[:, None] / num_samples, 0
    )
    for seed in range(5):
        f = (
            torch.randn(
                vocab_size,
                generator=torch.Generator().manual_seed(seed),
                dtype=torch.float64,
            )
            + 2
        )
        head = (p[kept[0]] * f[kept[0]]).sum()
        estimates = head + (weight * f[ids.clamp(min=0)]).sum(-1)
        standard_error = estimates.std() / num_draws**0.5
        exact = (p * f).sum()
        assert abs(estimates.mean() - exact) < 5 * standard_error
        assert abs(head - exact) > 5 * standard_error, (
            "the test would not notice a missing tail"
        )


def test_samples_follow_the_tail():
    """Also those of the largest logits that are not kept."""
    num_draws, vocab_size = 30_000, 25
    logits = _logits(1, vocab_size, seed=1)
    top, top_ids = logits.softmax(-1).topk(6)
    kept = CacheConfig(min_probability=float(top[0, 1])).kept
    expected = logits.softmax(-1)[0].scatter(0, top_ids[0, :2], 0)
    expected = expected / expected.sum()
    uniforms = torch.from_numpy(tail_uniforms(0, 0, num_draws, 1))
    found = _alone(
        logits.expand(num_draws, -1), top_k=6, kept=kept, uniforms_NU=uniforms
    )
    assert (found.topk_token_ids_PK >= 0).sum() == 2 * num_draws
    counts = torch.bincount(
        found.tail_token_ids_PM[:, 0], minlength=vocab_size
    ).double()
    often = expected * num_draws > 5
    chi_square = (
        (counts - expected * num_draws)[often] ** 2 / (expected * num_draws)[often]
    ).sum()
    assert chi_square < 60  # 22 degrees of freedom: exceeded once in 25,000 tries


def test_the_benchmark_compares_methods_that_agree():
    options = argparse.Namespace(
        device="cpu",
        dtypes=["float32"],
        num_rows=20,
        vocab_size=3000,
        hidden_size=16,
        top_k=8,
        repetitions=1,
    )
    ours = benchmark.method_of(benchmark.TOPK_ROWS, options)[1]()
    logprobs, ids, labels = benchmark.method_of(benchmark.OBVIOUS, options)[1]()
    assert torch.equal(ours.topk_token_ids_PK.long(), ids)
    torch.testing.assert_close(
        ours.topk_logits_PK - ours.log_sum_exp_logits_P[:, None],
        logprobs,
        rtol=0,
        atol=1e-6,
    )
    torch.testing.assert_close(ours.label_logprobs_P, labels, rtol=0, atol=1e-6)
    for name in benchmark.METHODS:
        found = benchmark.measure(name, options)
        assert min(found["us"], found["projection_us"]) > 0
