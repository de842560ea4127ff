"""The losses on a GPU: against dense float64 on the CPU, compiled or not, and their memory."""

from __future__ import annotations

import pytest
import torch

from nemo_kd.batch import TeacherRows
from nemo_kd.config.loss import Divergence
from nemo_kd.ops.distillation import DistillationLoss
from nemo_kd.ops.fused_linear import fused_linear_loss
from nemo_kd.ops.vocab import VocabShard
from tests.parity.dense_losses import Definition, Problem, dense_losses, random_problem
from tests.parity.test_losses import teacher_rows

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
]


def on_gpu(problem: Problem) -> tuple[TeacherRows[torch.Tensor], torch.Tensor]:
    problem = problem.map(lambda tensor: tensor.cuda())
    return teacher_rows(problem), problem.labels_N


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    "definition", DEFINITIONS, ids=lambda d: f"{d.objective}-{d.support}"
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_losses_and_gradients_match_dense_float64(
    definition, dtype, tolerance, compile
):
    problem = random_problem(64, 5000, 20, teacher_scale=definition.teacher_scale)
    problem = problem.map(
        lambda tensor: (
            tensor if tensor is not problem.logits_NV else tensor.to(dtype).double()
        )
    )
    ce_N, kd_N, gradient_NV = dense_losses(problem, definition)
    teacher, labels_N = on_gpu(problem)
    loss = DistillationLoss(
        Divergence(**definition.of_divergence()),
        definition.label_smoothing,
        definition.z_loss_weight,
        compile,
    )
    leaf_NV = problem.logits_NV.to("cuda", dtype).requires_grad_()
    losses = loss(leaf_NV * 1, labels_N, VocabShard.of(5000, 5000), teacher)
    torch.testing.assert_close(losses.ce_N.double().cpu(), ce_N, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.kd_N.double().cpu(), kd_N, rtol=1e-4, atol=1e-5)
    weights = problem.ce_weight_N.cuda(), problem.kd_weight_N.cuda()
    ((losses.ce_N * weights[0]).sum() + (losses.kd_N * weights[1]).sum()).backward()
    difference = leaf_NV.grad.double().cpu() - gradient_NV
    assert difference.norm() < tolerance * gradient_NV.norm()


@pytest.mark.parametrize("compile", [False, True])
def test_memory(compile):
    """What the loss takes beside the logits, and the fused form beside its inputs and gradients."""
    num_rows, vocab_size, hidden_size = 4096, 64000, 512
    teacher, labels_N = on_gpu(random_problem(num_rows // 64, vocab_size, 100))
    teacher = teacher.map(lambda values: values.repeat(64, *[1] * (values.dim() - 1)))
    labels_N, shard = labels_N.repeat(64), VocabShard.of(vocab_size, vocab_size)
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
