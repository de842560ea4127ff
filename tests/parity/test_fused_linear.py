"""The losses from hidden states against the losses on logits and against dense float64 autograd."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, replace

import pytest
import torch

from nemo_kd.ops import fused_linear
from nemo_kd.ops.fused_linear import fused_linear_loss
from nemo_kd.ops.vocab import VocabShard
from tests.parity.dense_losses import (
    DEFAULT,
    Definition,
    Problem,
    cut,
    dense_losses,
    join,
    random_problem,
)
from tests.parity.test_losses import (
    loss_of,
    mixed_rows,
    teacher_rows,
    whole_vocabulary,
)

CE_WEIGHT, KD_WEIGHT = 0.25, 0.75
DEFINITIONS = [
    Definition("forward_kl", "tail", 0.5, 0.5, factor=4.0),
    Definition("reverse_kl", "renormalize", 0.5, 2.0),
    Definition("jsd", "truncate", label_smoothing=0.1, z_loss_weight=0.01),
    Definition("adaptive_kl", "tail"),
    Definition("forward_kl", "sampled"),
    Definition("forward_kl", "label", 0.5, 0.5, factor=4.0),
    Definition("low_var_kl"),
]
BLOCK_ROWS = (1, 3, 8, 512)
HIDDEN = 6


COMPILED = DEFINITIONS[0], DEFINITIONS[2], DEFINITIONS[4]


@dataclass(frozen=True)
class Fused:
    """Hidden states and output weights that make a problem's logits."""

    problem: Problem
    hidden_NH: torch.Tensor
    weight_VH: torch.Tensor


@functools.cache
def fused_problem(teacher_scale: float = 1.0) -> Fused:
    generator = torch.Generator().manual_seed(20)
    hidden_NH = torch.randn(8, HIDDEN, generator=generator, dtype=torch.float64)
    weight_VH = torch.randn(50, HIDDEN, generator=generator, dtype=torch.float64)
    problem = replace(
        mixed_rows(teacher_scale),
        logits_NV=hidden_NH @ weight_VH.T,
        ce_weight_N=torch.full((8,), CE_WEIGHT, dtype=torch.float64),
        kd_weight_N=torch.full((8,), KD_WEIGHT, dtype=torch.float64),
    )
    return Fused(problem, hidden_NH, weight_VH)


def dense_fused(fused: Fused, definition: Definition) -> tuple[torch.Tensor, ...]:
    """(total, ce_N, kd_N, gradient of hidden, gradient of the weight)."""
    ce_N, kd_N, gradient_NV = dense_losses(fused.problem, definition)
    total = (ce_N * CE_WEIGHT + kd_N * KD_WEIGHT).sum()
    return (
        total,
        ce_N,
        kd_N,
        gradient_NV @ fused.weight_VH,
        gradient_NV.T @ fused.hidden_NH,
    )


def _solve(layout: str, with_main_grad: bool) -> list[tuple]:
    """On a rank: (total, ce_N, kd_N, gradients of hidden and of the weight) for every definition and block size."""
    group, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
    results = []
    for definition in DEFINITIONS:
        fused = fused_problem(definition.teacher_scale)
        local_Hv, start, num_real = cut(
            fused.weight_VH.T, layout, rank, group.size(), padding=100.0
        )
        shard = VocabShard(start, num_real, 50, group)
        for block_rows in BLOCK_ROWS:
            hidden_NH = fused.hidden_NH.clone().requires_grad_()
            weight_vH = local_Hv.T.contiguous().requires_grad_()
            if with_main_grad:
                weight_vH.main_grad = torch.zeros_like(weight_vH, dtype=torch.float32)
            problem = fused.problem
            total, losses = fused_linear_loss(
                loss_of(definition),
                hidden_NH,
                weight_vH,
                problem.labels_N,
                shard,
                teacher_rows(problem),
                ce_weight=CE_WEIGHT,
                kd_weight=KD_WEIGHT,
                block_rows=block_rows,
            )
            assert not losses.ce_N.requires_grad
            assert not losses.kd_N.requires_grad
            total.backward()
            weight_gradient = weight_vH.main_grad if with_main_grad else weight_vH.grad
            found = (total, losses.ce_N, losses.kd_N, hidden_NH.grad, weight_gradient)
            results.append(tuple(tensor.detach().numpy() for tensor in found))
    return results


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("layout", "with_main_grad"),
    [("uneven", False), ("even", False), ("uneven", True)],
)
def test_fused_equals_dense_float64(ranks, world_size, layout, with_main_grad):
    per_rank = ranks(world_size).run(_solve, layout, with_main_grad)
    cases = [
        (definition, block_rows)
        for definition in DEFINITIONS
        for block_rows in BLOCK_ROWS
    ]
    for number, (definition, block_rows) in enumerate(cases):
        expected = dense_fused(fused_problem(definition.teacher_scale), definition)
        found = [
            [torch.from_numpy(array) for array in results[number]]
            for results in per_rank
        ]
        name = f"{definition}, blocks of {block_rows}"
        close = functools.partial(
            torch.testing.assert_close,
            rtol=1e-11,
            atol=1e-11,
            msg=f"{name}: {{}}".format,
        )
        for total, ce_N, kd_N, _, _ in found:
            close(total, expected[0])
            close(ce_N, expected[1])
            close(kd_N, expected[2])
        close(sum(hidden for _, _, _, hidden, _ in found), expected[3])
        weight_VH = join([weight.T for *_, weight in found], layout, 50).T
        tolerance = 2e-6 if with_main_grad else 1e-11
        close(weight_VH.double(), expected[4], rtol=tolerance, atol=tolerance)


def _run_alone(fused: Fused, weight_VH: torch.Tensor, definition=DEFAULT, **options):
    problem = fused.problem
    hidden_NH = fused.hidden_NH.clone().requires_grad_()
    total, losses = fused_linear_loss(
        loss_of(definition),
        hidden_NH,
        weight_VH,
        problem.labels_N,
        whole_vocabulary(problem),
        teacher_rows(problem),
        **options,
    )
    return hidden_NH, total, losses


@pytest.mark.parametrize("upstream", [1.0, 0.5])
def test_fused_equals_the_losses_on_logits(upstream):
    """Without main_grad any gradient may come in."""
    fused = fused_problem()
    weight_VH = fused.weight_VH.clone().requires_grad_()
    hidden_NH, total, losses = _run_alone(
        fused, weight_VH, ce_weight=2.0, kd_weight=3.0
    )
    (total * upstream).backward()
    hidden2_NH, weight2_VH = (
        t.clone().requires_grad_() for t in (fused.hidden_NH, fused.weight_VH)
    )
    logits_NV = hidden2_NH @ weight2_VH.T
    on_logits = loss_of(DEFAULT)(
        logits_NV,
        fused.problem.labels_N,
        whole_vocabulary(fused.problem),
        teacher_rows(fused.problem),
    )
    total2 = (2 * on_logits.ce_N + 3 * on_logits.kd_N).sum()
    (total2 * upstream).backward()
    pairs = (
        (total, total2),
        (losses.ce_N, on_logits.ce_N),
        (losses.kd_N, on_logits.kd_N),
    )
    for ours, theirs in (
        *pairs,
        (hidden_NH.grad, hidden2_NH.grad),
        (weight_VH.grad, weight2_VH.grad),
    ):
        torch.testing.assert_close(
            ours.detach(), theirs.detach(), rtol=1e-12, atol=1e-12
        )


def test_main_grad_accumulates():
    fused = fused_problem()
    expected = dense_fused(fused, DEFAULT)
    weight_VH = fused.weight_VH.clone().requires_grad_()
    weight_VH.main_grad = torch.full_like(weight_VH, 7.0, dtype=torch.float32)
    for _ in range(3):
        _, total, _ = _run_alone(
            fused, weight_VH, ce_weight=CE_WEIGHT, kd_weight=KD_WEIGHT
        )
        total.backward()
    torch.testing.assert_close(
        weight_VH.main_grad.double(), 7 + 3 * expected[4], rtol=1e-6, atol=1e-5
    )
    assert weight_VH.grad is None or not weight_VH.grad.any(), (
        "the gradient would count twice"
    )


def test_with_main_grad_another_upstream_gradient_than_1_is_refused():
    fused = fused_problem()
    weight_VH = fused.weight_VH.clone().requires_grad_()
    weight_VH.main_grad = torch.zeros_like(weight_VH, dtype=torch.float32)
    _, total, _ = _run_alone(fused, weight_VH)
    with pytest.raises(AssertionError, match="scale ce_weight and kd_weight"):
        (total * 0.5).backward()


@pytest.mark.parametrize("with_main_grad", [False, True])
def test_tied_weight_gets_the_gradients_of_both_its_uses(with_main_grad):
    """The same tensor as embedding and output layer; main_grad and grad together hold the whole gradient."""
    fused = fused_problem()
    problem, tokens_N = fused.problem, torch.tensor([0, 3, 3, 15, 16, 48, 49, 7])
    weight_VH = fused.weight_VH.clone().requires_grad_()
    if with_main_grad:
        weight_VH.main_grad = torch.zeros_like(weight_VH, dtype=torch.float32)
    hidden_NH = torch.tanh(torch.nn.functional.embedding(tokens_N, weight_VH))
    total, _ = fused_linear_loss(
        loss_of(DEFAULT),
        hidden_NH,
        weight_VH,
        problem.labels_N,
        whole_vocabulary(problem),
        teacher_rows(problem),
    )
    total.backward()
    found = weight_VH.grad.double() + (
        weight_VH.main_grad.double() if with_main_grad else 0
    )

    tied_VH = fused.weight_VH.clone().requires_grad_()
    hidden_NH = torch.tanh(torch.nn.functional.embedding(tokens_N, tied_VH))
    logits_NV = hidden_NH @ tied_VH.T
    ones = torch.ones(8, dtype=torch.float64)
    _, _, gradient_NV = dense_losses(
        replace(
            problem, logits_NV=logits_NV.detach(), ce_weight_N=ones, kd_weight_N=ones
        ),
        DEFAULT,
    )
    logits_NV.backward(gradient_NV)
    tolerance = 1e-5 if with_main_grad else 1e-11
    torch.testing.assert_close(found, tied_VH.grad, rtol=tolerance, atol=tolerance)


def test_values_need_no_gradient():
    fused = fused_problem()
    with torch.no_grad():
        _, total, losses = _run_alone(
            fused, fused.weight_VH, ce_weight=CE_WEIGHT, kd_weight=KD_WEIGHT
        )
    expected = dense_fused(fused, DEFAULT)
    for ours, theirs in zip((total, losses.ce_N, losses.kd_N), expected, strict=False):
        torch.testing.assert_close(
            ours.detach(), theirs.detach(), rtol=1e-12, atol=1e-12
        )


def test_no_gradient_of_a_frozen_weight_is_computed(monkeypatch):
    for name in ("_add_product", "_weight_gradient"):
        monkeypatch.setattr(fused_linear, name, lambda *_: pytest.fail("computed"))
    fused = fused_problem()
    weight_VH = fused.weight_VH.clone()
    weight_VH.main_grad = torch.full_like(weight_VH, 7.0)
    hidden_NH, total, _ = _run_alone(
        fused, weight_VH, ce_weight=CE_WEIGHT, kd_weight=KD_WEIGHT
    )
    total.backward()
    torch.testing.assert_close(
        hidden_NH.grad, dense_fused(fused, DEFAULT)[3], rtol=1e-11, atol=1e-11
    )
    assert weight_VH.grad is None
    assert (weight_VH.main_grad == 7).all()


@pytest.mark.parametrize("with_main_grad", [False, True])
def test_no_rows(with_main_grad):
    fused = fused_problem()
    empty = Fused(
        fused.problem.rows(slice(0, 0)), fused.hidden_NH[:0], fused.weight_VH
    )
    weight_VH = fused.weight_VH.clone().requires_grad_()
    if with_main_grad:
        weight_VH.main_grad = torch.ones_like(weight_VH, dtype=torch.float32)
    hidden_NH, total, losses = _run_alone(empty, weight_VH)
    total.backward()
    assert float(total) == 0
    assert hidden_NH.grad.shape == (0, HIDDEN)
    assert losses.ce_N.shape == losses.kd_N.shape == (0,)
    if with_main_grad:
        assert (weight_VH.main_grad == 1).all()
    assert weight_VH.grad is None or not weight_VH.grad.any()


def test_without_a_teacher():
    fused = fused_problem()
    hidden_NH, weight_VH = (
        t.clone().requires_grad_() for t in (fused.hidden_NH, fused.weight_VH)
    )
    problem = fused.problem
    total, losses = fused_linear_loss(
        loss_of(DEFAULT),
        hidden_NH,
        weight_VH,
        problem.labels_N,
        whole_vocabulary(problem),
        block_rows=3,
    )
    total.backward()
    hidden2_NH, weight2_VH = (
        t.clone().requires_grad_() for t in (fused.hidden_NH, fused.weight_VH)
    )
    plain = torch.nn.functional.cross_entropy(
        hidden2_NH @ weight2_VH.T, problem.labels_N, reduction="sum"
    )
    plain.backward()
    assert losses.kd_N is None
    for ours, theirs in (
        (total, plain),
        (hidden_NH.grad, hidden2_NH.grad),
        (weight_VH.grad, weight2_VH.grad),
    ):
        torch.testing.assert_close(
            ours.detach(), theirs.detach(), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision(dtype):
    """bf16 weights with a float32 main_grad: as near to float64 as logits rounded to bf16 allow."""
    fused = fused_problem()
    rounded = Fused(
        fused.problem, fused.hidden_NH.to(dtype), fused.weight_VH.to(dtype)
    )
    weight_VH = rounded.weight_VH.clone().requires_grad_()
    weight_VH.main_grad = torch.zeros(50, HIDDEN)
    hidden_NH, total, _ = _run_alone(
        rounded, weight_VH, ce_weight=CE_WEIGHT, kd_weight=KD_WEIGHT, block_rows=3
    )
    total.backward()
    problem = replace(
        fused.problem,
        logits_NV=rounded.hidden_NH.double() @ rounded.weight_VH.double().T,
    )
    expected = dense_fused(
        Fused(problem, rounded.hidden_NH.double(), rounded.weight_VH.double()), DEFAULT
    )
    assert hidden_NH.grad.dtype == dtype
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    for ours, theirs in (
        (total, expected[0]),
        (hidden_NH.grad, expected[3]),
        (weight_VH.main_grad, expected[4]),
    ):
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("block_rows", [2, 512])
def test_the_gradient_of_a_bfloat16_weight_is_rounded_once(block_rows):
    """Whatever the number of blocks; a sum of 256 blocks in bfloat16 would be off by several per cent."""
    problem = random_problem(512, 60, 7, seed=3)
    generator = torch.Generator().manual_seed(4)
    hidden_NH = torch.randn(512, HIDDEN, generator=generator).bfloat16()
    hidden_NH += 4
    weight_VH = torch.randn(60, HIDDEN, generator=generator).mul_(2**-7).bfloat16()
    problem = replace(
        problem,
        logits_NV=hidden_NH.double() @ weight_VH.double().T,
        ce_weight_N=torch.ones(512, dtype=torch.float64),
        kd_weight_N=torch.ones(512, dtype=torch.float64),
    )
    _, _, gradient_NV = dense_losses(problem, DEFAULT)
    expected_VH = gradient_NV.T @ hidden_NH.double()
    weight_VH.requires_grad_()
    total, _ = fused_linear_loss(
        loss_of(DEFAULT),
        hidden_NH.clone().requires_grad_(),
        weight_VH,
        problem.labels_N,
        whole_vocabulary(problem),
        teacher_rows(problem),
        block_rows=block_rows,
    )
    (total / 3).backward()
    error = (weight_VH.grad.double() - expected_VH / 3).norm()
    assert error < 2**-8 * expected_VH.norm() / 3


def test_compiled_equals_dense_float64_for_any_number_of_rows(caplog):
    """Of one row too, which torch would compile anew."""
    caplog.set_level(logging.INFO, logger="nemo_kd.ops.vocab_pass")
    for definition in COMPILED:
        whole = fused_problem(definition.teacher_scale)
        for num_rows in (8, 1, 3, 5, 7, 2):
            rows = slice(0, num_rows)
            fused = Fused(
                whole.problem.rows(rows), whole.hidden_NH[rows], whole.weight_VH
            )
            expected = dense_fused(fused, definition)
            weight_VH = fused.weight_VH.clone().requires_grad_()
            hidden_NH = fused.hidden_NH.clone().requires_grad_()
            total, losses = fused_linear_loss(
                loss_of(definition, compile=True),
                hidden_NH,
                weight_VH,
                fused.problem.labels_N,
                whole_vocabulary(fused.problem),
                teacher_rows(fused.problem),
                ce_weight=CE_WEIGHT,
                kd_weight=KD_WEIGHT,
                block_rows=3,
            )
            total.backward()
            gradients = (hidden_NH.grad, weight_VH.grad)
            found = (total.detach(), losses.ce_N, losses.kd_N, *gradients)
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    assert "torch.compile failed" not in caplog.text
