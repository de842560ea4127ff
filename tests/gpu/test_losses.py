"""The losses on a GPU: against dense float64 on the CPU, compiled or not, and their memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nemo_kd.config.loss import Divergence
from nemo_kd.ops.distillation import DistillationLoss
from nemo_kd.ops.fused_linear import fused_linear_loss
from nemo_kd.ops.vocab import VocabShard
from tests.parity.dense_losses import Definition, dense_losses, random_problem
from tests.parity.test_losses import loss_of, teacher_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

DEFINITIONS = [
    Definition("forward_kl", "tail", 0.5, 0.5, factor=4.0),
    Definition("reverse_kl", "renormalize"),
    Definition("jsd", "truncate", label_smoothing=0.1, z_loss_weight=0.01),
    Definition("forward_kl", "sampled"),
    Definition("k3"),
    Definition("forward_kl", "label", 0.5, 0.5),
]


TOLERANCES = {
    torch.float32: {"cross-entropy": 2e-5, "divergence": 1.1e-4, "gradient": 1e-5},
    torch.bfloat16: {"cross-entropy": 2e-5, "divergence": 1.1e-4, "gradient": 2e-2},
}
"""Largest errors of `errors`."""


def errors(
    definition: Definition,
    dtype: torch.dtype,
    compile: bool,
    device: str,
    vocab_size: int,
) -> dict[str, float]:
    """Largest errors of the losses, relative where a loss exceeds 1, and the relative error of the gradient's norm."""
    problem = random_problem(
        64, vocab_size, 20, teacher_scale=definition.teacher_scale
    )
    rounded_NV = problem.logits_NV.to(dtype)
    exact = replace(problem, logits_NV=rounded_NV.double())
    ce_N, kd_N, gradient_NV = dense_losses(exact, definition)
    moved = problem.map(lambda tensor: tensor.to(device))
    leaf_NV = rounded_NV.to(device).requires_grad_()
    shard = VocabShard.of(vocab_size, vocab_size)
    found = loss_of(definition, compile)(
        leaf_NV * 1, moved.labels_N, shard, teacher_rows(moved)
    )
    weighted = found.ce_N * moved.ce_weight_N, found.kd_N * moved.kd_weight_N
    (weighted[0].sum() + weighted[1].sum()).backward()

    def largest(found_N: torch.Tensor, expected_N: torch.Tensor) -> float:
        difference_N = (found_N.double().cpu() - expected_N).abs()
        return float((difference_N / expected_N.abs().clamp(min=1)).max())

    difference_NV = leaf_NV.grad.double().cpu() - gradient_NV
    return {
        "cross-entropy": largest(found.ce_N, ce_N),
        "divergence": largest(found.kd_N, kd_N),
        "gradient": float(difference_NV.norm() / gradient_NV.norm()),
    }


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    "definition", DEFINITIONS, ids=lambda d: f"{d.objective}-{d.support}"
)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_losses_and_gradients_match_dense_float64(definition, dtype, compile):
    found = errors(definition, dtype, compile, "cuda", 5000)
    for name, tolerance in TOLERANCES[dtype].items():
        assert found[name] < tolerance, name


@pytest.mark.parametrize("compile", [False, True])
def test_memory(compile):
    """What the loss takes beside the logits, and the fused form beside its inputs and gradients."""
    num_rows, vocab_size, hidden_size = 4096, 64000, 512
    problem = random_problem(num_rows // 64, vocab_size, 100)
    problem = problem.map(lambda tensor: tensor.cuda())
    teacher = teacher_rows(problem).map(
        lambda values: values.repeat(64, *[1] * (values.dim() - 1))
    )
    labels_N = problem.labels_N.repeat(64)
    shard = VocabShard.of(vocab_size, vocab_size)
    loss = DistillationLoss(Divergence(), compile=compile)
    hidden_NH = torch.randn(
        num_rows, hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True
    )
    weight_vH = torch.randn(
        vocab_size,
        hidden_size,
        device="cuda",
        dtype=torch.bfloat16,
        requires_grad=True,
    )
    weight_vH.main_grad = torch.zeros_like(weight_vH, dtype=torch.float32)
    logits_bytes = num_rows * vocab_size * 2
    for _ in range(2):  # compiles first
        logits_Nv = (hidden_NH @ weight_vH.t()).detach().requires_grad_() * 1
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        losses = loss(logits_Nv, labels_N, shard, teacher)
        gradient_Nv = torch.autograd.grad(
            (losses.ce_N + losses.kd_N).sum(), logits_Nv
        )[0]
        extra = torch.cuda.max_memory_allocated() - before
    assert gradient_Nv.data_ptr() == logits_Nv.data_ptr()
    assert extra < 0.3 * logits_bytes
    del logits_Nv, gradient_Nv, losses
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused_linear_loss(loss, hidden_NH, weight_vH, labels_N, shard, teacher)[
        0
    ].backward()
    assert torch.cuda.max_memory_allocated() - before < 0.5 * logits_bytes
