"""Losses, top-k and log-sum-exp over 1, 2 and 4 vocabulary shards against dense float64 autograd."""

from __future__ import annotations

import pytest
import torch

from nemo_kd.ops.distillation import DistillationLoss
from nemo_kd.ops.topk import vocab_parallel_topk
from nemo_kd.ops.vocab import VocabShard

WORLD_SIZES = [1, 2, 4]
SCALES = [(1.0, 1.0), (0.5, 2.0)]


def _problem(num_rows: int, vocab_size: int, k: int, spread: float = 3.0, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(num_rows, vocab_size, generator=generator, dtype=torch.float64) * spread
    topk_logits, topk_ids = teacher.topk(k)
    return {
        "logits": torch.randn(num_rows, vocab_size, generator=generator, dtype=torch.float64) * spread,
        "labels": torch.randint(vocab_size, (num_rows,), generator=generator),
        "topk_logits": topk_logits - topk_logits[:, :1],
        "topk_ids": topk_ids,
        "weight_ce": torch.rand(num_rows, generator=generator, dtype=torch.float64),
        "weight_kd": torch.rand(num_rows, generator=generator, dtype=torch.float64),
    }


def _dense(problem: dict[str, torch.Tensor], objective: str, student_scale: float, teacher_scale: float):
    """Plain definitions on the whole vocabulary, differentiated by autograd."""
    logits = problem["logits"].clone().requires_grad_()
    ce = torch.nn.functional.cross_entropy(logits, problem["labels"], reduction="none")
    p = torch.softmax(problem["topk_logits"] * teacher_scale, -1)
    q = torch.softmax(logits.gather(1, problem["topk_ids"]) * student_scale, -1)
    kd = (p * (p / q).log()).sum(-1) if objective == "fwd_kl" else (q * (q / p).log()).sum(-1)
    ((ce * problem["weight_ce"]).sum() + (kd * problem["weight_kd"]).sum()).backward()
    return ce.detach(), kd.detach(), logits.grad


def _shard(problem: dict[str, torch.Tensor], num_columns: int, padding_value: float, dtype: torch.dtype):
    """This rank's columns, padded with a value that would show in any result it reached."""
    world_size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    rows, vocab_size = problem["logits"].shape
    padded = torch.full((rows, num_columns * world_size), padding_value, dtype=dtype)
    padded[:, :vocab_size] = problem["logits"].to(dtype)
    group = torch.distributed.group.WORLD
    return padded.chunk(world_size, dim=1)[rank].contiguous(), VocabShard.of(num_columns, vocab_size, group)


def _run_losses(problem, num_columns, padding_value, dtype, objective, scales):
    logits, shard = _shard(problem, num_columns, padding_value, dtype)
    logits.requires_grad_()
    losses = DistillationLoss(objective, *scales)(
        logits, problem["labels"], shard, problem["topk_logits"].to(dtype), problem["topk_ids"]
    )
    total = (losses.ce_N * problem["weight_ce"]).sum() + (losses.kd_N * problem["weight_kd"]).sum()
    total.backward()
    return losses.ce_N.detach(), losses.kd_N.detach(), logits.grad


def _run_topk(problem, num_columns, padding_value, dtype, k):
    logits, shard = _shard(problem, num_columns, padding_value, dtype)
    return tuple(vocab_parallel_topk(logits, k, shard))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("objective", ["fwd_kl", "bwd_kl"])
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize(("num_rows", "vocab_size", "k", "num_columns"), [(7, 50, 5, 64), (1, 13, 13, 4), (3, 5, 1, 8)])
def test_losses_and_gradients_match_dense_float64(
    ranks, world_size, objective, scales, num_rows, vocab_size, k, num_columns
):
    num_columns = max(num_columns, -(-vocab_size // world_size))
    problem = _problem(num_rows, vocab_size, k)
    ce, kd, gradient = _dense(problem, objective, *scales)
    results = ranks(world_size).run(_run_losses, problem, num_columns, 1e4, torch.float64, objective, scales)
    for ours_ce, ours_kd, _ in results:
        torch.testing.assert_close(ours_ce, ce, rtol=0, atol=1e-12)
        torch.testing.assert_close(ours_kd, kd, rtol=0, atol=1e-12)
    whole = torch.cat([result[2] for result in results], dim=1)
    torch.testing.assert_close(whole[:, :vocab_size], gradient, rtol=0, atol=1e-12)
    assert not whole[:, vocab_size:].any(), "padding columns got a gradient"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("vocab_size", "k", "num_columns"), [(50, 7, 64), (50, 50, 16), (5, 3, 2), (33, 20, 9)])
def test_topk_matches_dense(ranks, world_size, vocab_size, k, num_columns):
    num_columns = max(num_columns, -(-vocab_size // world_size))
    problem = _problem(6, vocab_size, k=1)
    values, ids = problem["logits"].topk(k)
    for ours_values, ours_ids, ours_lse in ranks(world_size).run(
        _run_topk, problem, num_columns, 1e4, torch.float64, k
    ):
        assert torch.equal(ours_ids, ids)
        torch.testing.assert_close(ours_values, values - values[:, :1], rtol=0, atol=1e-12)
        torch.testing.assert_close(ours_lse, problem["logits"].logsumexp(-1) - values[:, 0], rtol=0, atol=1e-12)


def test_topk_orders_ties_alike_in_every_layout(ranks):
    problem = _problem(4, 40, k=1)
    problem["logits"] = (problem["logits"]).round()  # many equal logits
    reference = ranks(1).run(_run_topk, problem, 40, 0.0, torch.float32, 40)[0]
    for world_size in (2, 4):
        for result in ranks(world_size).run(_run_topk, problem, 40, 0.0, torch.float32, 40):
            assert torch.equal(result[1], reference[1])
            assert torch.equal(result[0], reference[0])


def test_bfloat16_log_sum_exp_runs_in_float32(ranks):
    problem = _problem(8, 500, k=1)
    exact = problem["logits"].bfloat16().double()
    _, _, ours = ranks(2).run(_run_topk, problem, 256, 1e4, torch.bfloat16, 4)[0]
    torch.testing.assert_close(ours.double(), exact.logsumexp(-1) - exact.amax(-1), rtol=0, atol=2e-6)


@pytest.mark.parametrize("objective", ["fwd_kl", "bwd_kl"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_extreme_logits_stay_finite(ranks, objective, world_size):
    problem = _problem(4, 20, 6)
    problem["logits"][0] += 1e4
    problem["logits"][1] *= 1e3
    problem["logits"][2, problem["topk_ids"][2, 3]] = -1e4  # one student probability underflows
    problem["topk_logits"][3, 1:] -= 1e4  # the teacher is certain
    for ce, kd, gradient in ranks(world_size).run(_run_losses, problem, 20, 0.0, torch.float32, objective, (1.0, 1.0)):
        assert torch.isfinite(ce).all()
        assert torch.isfinite(kd).all()
        assert torch.isfinite(gradient).all()


def test_scales_do_not_touch_cross_entropy(ranks):
    problem = _problem(5, 30, 4)
    plain = ranks(1).run(_run_losses, problem, 30, 0.0, torch.float64, "fwd_kl", (1.0, 1.0))[0]
    scaled = ranks(1).run(_run_losses, problem, 30, 0.0, torch.float64, "fwd_kl", (0.25, 4.0))[0]
    assert torch.equal(plain[0], scaled[0])
    assert not torch.equal(plain[1], scaled[1])


def test_top_k_above_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="top_k: 9 exceeds the vocabulary of 8 tokens"):
        vocab_parallel_topk(torch.zeros(1, 8), 9, VocabShard(0, 8, 8))
