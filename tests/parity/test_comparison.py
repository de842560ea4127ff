"""What is told about student and teacher beside the losses, over 1, 2 and 4 vocabulary shards against plain float64 sums."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from nemo_kd.config.loss import Divergence
from nemo_kd.ops.distillation import DistillationLoss
from nemo_kd.ops.fused_linear import fused_linear_loss
from nemo_kd.ops.selection import entropy
from nemo_kd.ops.token_losses import COMPARED
from nemo_kd.ops.vocab import VocabShard
from tests.parity.dense_losses import cut, random_problem
from tests.parity.test_losses import mixed_rows, teacher_rows

DIVERGENCES = {
    "cross-entropy": None,
    "tail": Divergence(),
    "tail at other scales": Divergence("jsd", "tail", 0.5, 0.5),
    "renormalize": Divergence("reverse_kl", "renormalize"),
    "sampled": Divergence("forward_kl", "sampled"),
    "tail on the label": Divergence("forward_kl", "label", 0.5, 0.5),
    "label": Divergence("k2"),
}


def loss_and_gradient(divergence, with_comparison):
    """(compared, this rank's gradient), as arrays."""
    group, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
    problem = mixed_rows(1.0)
    rows = teacher_rows(problem)
    local_Nv, start, num_real = cut(
        problem.logits_NV, "uneven", rank, group.size(), 1e4
    )
    leaf_Nv = local_Nv.requires_grad_()
    shard = VocabShard(start, num_real, problem.logits_NV.shape[1], group)
    losses = DistillationLoss(
        divergence, label_smoothing=0.1, z_loss_weight=0.01, compares=with_comparison
    )(leaf_Nv.clone(), problem.labels_N, shard, rows)
    total = (losses.ce_N * problem.ce_weight_N).sum()
    if losses.kd_N is not None:
        total = total + (losses.kd_N * problem.kd_weight_N).sum()
    total.backward()
    return losses.compared.numpy() if with_comparison else None, leaf_Nv.grad.numpy()


def compared_rows():
    """All of `DIVERGENCES`: (compared, gradient, gradient without comparing)."""
    results = []
    for divergence in DIVERGENCES.values():
        compared, gradient = loss_and_gradient(divergence, True)
        results.append((compared, gradient, loss_and_gradient(divergence, False)[1]))
    return results


def expected_rows(problem):
    """The same by plain sums, a row at a time."""
    rows = []
    for logits_V, topk_K, ids_K, tail in zip(
        problem.logits_NV,
        problem.topk_logits_NK,
        problem.topk_token_ids_NK,
        problem.tail_mass_N.tolist(),
        strict=True,
    ):
        ids = [token for token in ids_K.tolist() if token >= 0]
        if not ids:
            rows.append([0.0] * (1 + len(COMPARED)))
            continue
        q_V = torch.softmax(logits_V.double(), 0)
        outside = [token for token in range(len(q_V)) if token not in ids]
        p = [
            *(torch.softmax(topk_K.double(), 0)[: len(ids)] * (1 - tail)).tolist(),
            tail,
        ]
        q = [*q_V[ids].tolist(), q_V[outside].sum().item()]
        kl = sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
        entropies = [-sum(a * np.log(a) for a in side if a > 0) for side in (p, q)]
        same = int(logits_V.argmax()) == ids[0]
        rows.append([1.0, 1 - tail, sum(q[:-1]), float(same), kl, *entropies])
    return np.array(rows)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_comparison_equals_plain_sums_and_changes_no_gradient(ranks, world_size):
    expected = expected_rows(mixed_rows(1.0))
    assert 0 < expected[:, 0].sum() < len(expected)
    for results in ranks(world_size).run(compared_rows):
        for name, (compared, gradient, plain) in zip(
            DIVERGENCES, results, strict=True
        ):
            np.testing.assert_allclose(
                compared, expected, rtol=1e-9, atol=1e-9, err_msg=name
            )
            np.testing.assert_allclose(
                gradient, plain, rtol=1e-11, atol=1e-13, err_msg=name
            )


def entropies(layout):
    """On a rank: the entropy of every row, from this rank's columns."""
    group, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
    logits_NV = mixed_rows(1.0).logits_NV
    local_Nv, start, num_real = cut(logits_NV, layout, rank, group.size(), 1e4)
    return entropy(local_Nv, VocabShard(start, num_real, 50, group)).numpy()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_entropy_over_the_whole_vocabulary_is_that_of_torch(ranks, world_size):
    logits_NV = mixed_rows(1.0).logits_NV
    expected = torch.distributions.Categorical(logits=logits_NV).entropy()
    for layout in ("uneven", "even", "late"):
        for found in ranks(world_size).run(entropies, layout):
            np.testing.assert_allclose(found, expected, rtol=1e-12, err_msg=layout)


def test_the_students_first_token_is_seen_where_it_is_the_teachers():
    problem = random_problem(6, 40, 5)
    problem.logits_NV[::2].scatter_(1, problem.topk_token_ids_NK[::2, :1], 50.0)
    problem.logits_NV[1::2].scatter_(1, problem.topk_token_ids_NK[1::2, 1:2], 50.0)
    rows = teacher_rows(problem)
    losses = DistillationLoss(compares=True)(
        problem.logits_NV, problem.labels_N, VocabShard(0, 40, 40), rows
    )
    assert losses.kd_N is None
    assert (
        losses.compared[:, 1 + COMPARED.index("top1_agreement")].tolist() == [1, 0] * 3
    )


def test_the_fused_loss_compares_every_block():
    problem = mixed_rows(1.0)
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(8, 6, dtype=torch.float64, generator=generator)
    weight_VH = torch.randn(50, 6, dtype=torch.float64, generator=generator)
    rows = teacher_rows(problem)
    _, losses = fused_linear_loss(
        DistillationLoss(Divergence(), compares=True),
        hidden_NH,
        weight_VH,
        problem.labels_N,
        VocabShard(0, 50, 50),
        rows,
        block_rows=3,
    )
    expected = expected_rows(replace(problem, logits_NV=hidden_NH @ weight_VH.T))
    np.testing.assert_allclose(losses.compared, expected, rtol=1e-9, atol=1e-9)
