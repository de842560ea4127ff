"""Losses, top-k and log-sum-exp over 1, 2 and 4 vocabulary shards against dense float64 autograd."""

from __future__ import annotations

import pytest
import torch

from nemo_kd.ops.distillation import DistillationLoss
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
@pytest.mark.parametrize("objective", ["fwd_kl", "bwd_kl"])
def test_unused_entries_take_part_in_nothing(ranks, world_size, objective):
    """Rows that keep 5, 3, 1 and 0 teacher entries equal dense references over just those."""
    problem, kept = _problem(4, 40, 5), (5, 3, 1, 0)
    for row, count in enumerate(kept):
        problem["topk_logits"][row, count:] = float("-inf")
        problem["topk_ids"][row, count:] = -1
    results = ranks(world_size).run(_run_losses, problem, 40 // world_size, 0.0, torch.float64, objective, (0.5, 2.0))
    gradient = torch.cat([result[2] for result in results], dim=1)
    for row, count in enumerate(kept):
        one = {name: values[row : row + 1] for name, values in problem.items()}
        one |= {name: one[name][:, :count] for name in ("topk_logits", "topk_ids")}
        ce, kd, expected = _dense(one, objective, 0.5, 2.0)
        torch.testing.assert_close(results[0][0][row], ce[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(results[0][1][row], kd[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(gradient[row], expected[0], rtol=0, atol=1e-12)


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
