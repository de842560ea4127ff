"""Every objective, support and temperature over 1, 2 and 4 vocabulary shards against dense float64 autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch

from nemo_kd.batch import TeacherRows
from nemo_kd.config.loss import Divergence
from nemo_kd.ops.distillation import DistillationLoss
from nemo_kd.ops.vocab import VocabShard
from tests.parity.dense_losses import (
    COMBINATIONS,
    DEFAULT,
    LABEL_OBJECTIVES,
    NEGATIVE_INFINITY,
    Definition,
    Problem,
    cut,
    dense_losses,
    forget,
    join,
    random_problem,
)

WORLD_SIZES = [1, 2, 4]
SCALES = [(1.0, 1.0), (0.5, 0.5), (0.5, 2.0)]
# The first and last id of every shard of 50 ids, in each layout.
BORDERS = (0, 15, 16, 48, 49, 25, 26, 13, 14)
UNSCALED = [
    ("forward_kl", "sampled"),
    *((objective, "tail") for objective in LABEL_OBJECTIVES),
]


@dataclass(frozen=True)
class Case:
    name: str
    problem: Problem
    definition: Definition
    layout: str = "uneven"
    padding: float = 1e4
    tolerance: float = 1e-12
    limit: Problem | None = (
        None  # what the dense reference solves, where that is not the problem itself
    )


TEMPERATURES = (1.0, 2.0, 0.5)


def teacher_rows(problem: Problem) -> TeacherRows[torch.Tensor]:
    """The problem's only tail is taken for that of all temperatures."""
    return TeacherRows(
        positions_P=torch.arange(len(problem.labels_N)),
        topk_logits_PK=problem.topk_logits_NK,
        topk_token_ids_PK=problem.topk_token_ids_NK,
        log_sum_exp_logits_P=torch.zeros_like(problem.tail_mass_N),
        tail_mass_PT=problem.tail_mass_N[:, None].repeat(1, len(TEMPERATURES)),
        temperatures=TEMPERATURES,
        label_logprobs_P=problem.label_logprobs_N,
        tail_token_ids_PM=problem.tail_token_ids_NM,
    )


def loss_of(definition: Definition, compile: bool = False) -> DistillationLoss:
    divergence = Divergence(**definition.of_divergence())
    return DistillationLoss(
        divergence,
        definition.label_smoothing,
        definition.z_loss_weight,
        compile=compile,
    )


def whole_vocabulary(problem: Problem) -> VocabShard:
    return VocabShard(0, problem.logits_NV.shape[1], problem.logits_NV.shape[1])


def solve_alone(
    problem: Problem, definition: Definition = DEFAULT, compile: bool = False
):
    """(ce_N, kd_N, gradient) on a single rank."""
    leaf_NV = problem.logits_NV.clone().requires_grad_()
    losses = loss_of(definition, compile)(
        leaf_NV.clone(),
        problem.labels_N,
        whole_vocabulary(problem),
        teacher_rows(problem),
    )
    (
        (losses.ce_N * problem.ce_weight_N).sum()
        + (losses.kd_N * problem.kd_weight_N).sum()
    ).backward()
    return losses.ce_N.detach(), losses.kd_N.detach(), leaf_NV.grad


def solve(make_cases: Callable[[], list[Case]]) -> list[tuple]:
    """On a rank: (ce_N, kd_N, this rank's gradient) of every case, as arrays."""
    group, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
    results = []
    for case in make_cases():
        problem = case.problem
        vocab_size = problem.logits_NV.shape[1]
        local_Nv, start, num_real = cut(
            problem.logits_NV, case.layout, rank, group.size(), case.padding
        )
        leaf_Nv = local_Nv.requires_grad_()
        losses = loss_of(case.definition)(
            leaf_Nv.clone(),
            problem.labels_N,
            VocabShard(start, num_real, vocab_size, group),
            teacher_rows(problem),
        )
        (
            (losses.ce_N * problem.ce_weight_N).sum()
            + (losses.kd_N * problem.kd_weight_N).sum()
        ).backward()
        results.append(
            tuple(
                tensor.detach().numpy()
                for tensor in (losses.ce_N, losses.kd_N, leaf_Nv.grad)
            )
        )
    return results


@functools.cache
def references(
    make_cases: Callable[[], list[Case]],
) -> list[tuple[Case, tuple[torch.Tensor, ...]]]:
    return [
        (case, dense_losses(case.limit or case.problem, case.definition))
        for case in make_cases()
    ]


def assert_cases_match(
    ranks, world_size: int, make_cases: Callable[[], list[Case]]
) -> None:
    per_rank = ranks(world_size).run(solve, make_cases)
    faults = []
    for number, (case, expected) in enumerate(references(make_cases)):
        found = [
            [torch.from_numpy(array) for array in results[number]]
            for results in per_rank
        ]
        gradient_NV = join(
            [gradient for _, _, gradient in found],
            case.layout,
            case.problem.logits_NV.shape[1],
        )
        values = [
            (name, rank[i], expected[i])
            for rank in found
            for i, name in enumerate(("ce", "kd"))
        ]
        for name, ours, theirs in [*values, ("gradient", gradient_NV, expected[2])]:
            try:
                torch.testing.assert_close(
                    ours.double(), theirs, rtol=case.tolerance, atol=case.tolerance
                )
            except AssertionError as error:
                faults.append(f"{case.name}: {name}: {str(error)[:400]}")
        masked = (case.problem.ce_weight_N == 0) & (case.problem.kd_weight_N == 0)
        if gradient_NV[masked].any():
            faults.append(f"{case.name}: masked rows have a gradient")
    assert not faults, f"{len(faults)} of {len(per_rank[0])} cases:\n" + "\n".join(
        faults
    )


@functools.cache
def mixed_rows(teacher_scale: float) -> Problem:
    """Eight rows: plain, label inside and outside the kept ids, masked, 3, 1 and 0 used entries, without a tail."""
    problem = random_problem(
        8, 50, 10, wanted_ids=BORDERS, teacher_scale=teacher_scale
    )
    problem.labels_N[1] = problem.topk_token_ids_NK[1, 2]
    problem.labels_N[2] = min(
        set(range(1, 50)) - set(problem.topk_token_ids_NK[2].tolist())
    )
    problem.ce_weight_N[3], problem.kd_weight_N[3] = 0, 0
    for row, num_used in ((4, 3), (5, 1), (6, 0)):
        problem = forget(problem, row, num_used)
    problem.tail_mass_N[1] = 1e-4  # its samples stand for more
    problem.tail_mass_N[7] = 0
    problem.tail_token_ids_NM[7] = -1
    return problem


def every_definition(scales: list[tuple[float, float]] = SCALES) -> list[Definition]:
    scaled = [
        Definition(*pair, *scale) for pair, scale in product(COMBINATIONS, scales)
    ]
    return scaled + [Definition(*pair) for pair in UNSCALED]


def name_of(definition: Definition) -> str:
    return f"{definition.objective}-{definition.support}-{definition.student_scale}-{definition.teacher_scale}"


def objective_cases() -> list[Case]:
    return [
        Case(
            name_of(definition),
            mixed_rows(definition.teacher_scale),
            definition,
            layout,
        )
        for layout, definition in product(("uneven", "even"), every_definition())
    ]


def option_cases() -> list[Case]:
    """Parameters of objectives, the factor, the options of the cross-entropy."""
    jsd = [
        Definition("jsd", support, 0.5, 0.5, jsd_beta=b)
        for support in ("tail", "truncate", "label")
        for b in (0.1, 0.9)
    ]
    skewed = [
        Definition(f"skewed_{direction}_kl", "tail", 0.5, 0.5, skew_lambda=value)
        for direction, value in product(("forward", "reverse"), (0.01, 0.5, 0.9))
    ]
    adaptive = [
        Definition("adaptive_kl", support, 0.5, 0.5, adaptive_kl_alpha=alpha)
        for support, alpha in product(
            ("renormalize", "tail"), (0.0, 0.05, 0.3, 0.8, 0.95)
        )
    ]
    others = [
        Definition("forward_kl", support, 0.5, 0.5, factor=4.0)
        for support in ("renormalize", "tail", "label")
    ]
    others += [Definition("k2", factor=0.5), Definition("tvd", label_smoothing=0.1)]
    others += [
        Definition("reverse_kl", z_loss_weight=1e-2),
        Definition(label_smoothing=0.3, z_loss_weight=0.5),
    ]
    return [
        Case(str(one), mixed_rows(one.teacher_scale), one)
        for one in [*jsd, *skewed, *adaptive, *others]
    ]


def shape_cases() -> list[Case]:
    """K=1, K=V, one row, every rank but one without a token."""
    shapes = {
        "K=1": (3, 5, 1, "uneven"),
        "K=V": (3, 13, 13, "uneven"),
        "K=V even": (3, 13, 13, "even"),
    }
    shapes |= {
        "N=1": (1, 50, 10, "uneven"),
        "late": (2, 11, 4, "late"),
        "V=1": (2, 1, 1, "late"),
    }
    cases = []
    for (name, (num_rows, vocab_size, k, layout)), one in product(
        shapes.items(), every_definition([(0.5, 2.0)])
    ):
        borders = tuple(
            sorted(
                {0, vocab_size // 3 - 1, vocab_size // 3, vocab_size - 1}
                & set(range(vocab_size))
            )
        )
        problem = random_problem(
            num_rows,
            vocab_size,
            k,
            wanted_ids=borders,
            teacher_scale=one.teacher_scale,
            seed=num_rows,
        )
        if one.support == "sampled" and k == vocab_size:
            problem = replace(
                problem,
                tail_token_ids_NM=torch.full_like(problem.tail_token_ids_NM, -1),
            )
        # Without a tail the bucket adds 1e-12 times a logarithm that a smallest number keeps finite.
        tolerance = 2e-9 if k == vocab_size and one.support == "tail" else 1e-12
        cases.append(
            Case(f"{name} {name_of(one)}", problem, one, layout, tolerance=tolerance)
        )
    return cases


def padding_cases() -> list[Case]:
    return [
        Case(
            f"padding {padding} {name_of(one)}", mixed_rows(1.0), one, layout, padding
        )
        for one in every_definition([(1.0, 1.0)])
        for padding, layout in (
            (NEGATIVE_INFINITY, "uneven"),
            (float("nan"), "even"),
            (float("nan"), "uneven"),
        )
    ]


def large_cases() -> list[Case]:
    """Logits up to +-1e4, where most probabilities underflow."""
    cases = []
    for one in every_definition([(1.0, 1.0), (0.5, 2.0)]):
        problem = random_problem(
            8, 50, 10, wanted_ids=BORDERS, teacher_scale=one.teacher_scale, seed=3
        )
        kept = torch.zeros(8, 50, dtype=torch.bool).scatter_(
            1, problem.topk_token_ids_NK, True
        )
        logits_NV, topk_logits_NK = (
            problem.logits_NV.clone(),
            problem.topk_logits_NK.clone(),
        )
        logits_NV[0] += 1e4
        logits_NV[1] *= 1e3
        logits_NV[2, problem.topk_token_ids_NK[2, 3]] = -1e4
        logits_NV[3] -= 1e4 * kept[3]
        logits_NV[4] -= 1e4 * ~kept[4]
        logits_NV[5, problem.labels_N[5]] = -500 if one.objective == "k3" else -1e4
        topk_logits_NK[6, 1:] -= 1e4
        topk_logits_NK[7] += 1e4
        problem = replace(problem, logits_NV=logits_NV, topk_logits_NK=topk_logits_NK)
        rows = (
            [0, 5] if one.objective == "k3" else list(range(8))
        )  # exp(1e4) overflows
        cases.append(Case(name_of(one), problem.rows(rows), one, tolerance=1e-11))
    return cases


def infinite_cases() -> list[Case]:
    """Student logits of -inf, which are the limit of ever smaller ones; a teacher with no mass on its kept ids."""
    cases = []
    for one in every_definition([(1.0, 1.0), (0.5, 2.0)]):
        problem = random_problem(
            6, 50, 10, wanted_ids=BORDERS, teacher_scale=one.teacher_scale, seed=4
        )
        problem.labels_N[:] = problem.topk_token_ids_NK[:, 0]
        outside = torch.ones(6, 50, dtype=torch.bool).scatter_(
            1, problem.topk_token_ids_NK, False
        )
        hidden = torch.zeros_like(outside)
        hidden[0] = outside[0] & (torch.arange(50) % 2 == 0)
        hidden[0, problem.tail_token_ids_NM[0]] = False
        bounded = one.objective in (
            "jsd",
            "skewed_forward_kl",
            "skewed_reverse_kl",
            "tvd",
        )
        if bounded or one.objective == "reverse_kl" or one.support == "renormalize":
            hidden[1] = outside[1]
        if bounded or one.objective == "reverse_kl":
            hidden[2, problem.topk_token_ids_NK[2, 4:]] = True
            hidden[3, 16:] = True
            hidden[3, problem.labels_N[3]] = False
        if bounded or one.objective == "forward_kl":
            problem.tail_mass_N[4] = 1
        hidden[5] = outside[5]
        problem.tail_mass_N[5] = 0
        problem.tail_token_ids_NM[5] = -1
        problem, limit = (
            replace(problem, logits_NV=problem.logits_NV.masked_fill(hidden, value))
            for value in (NEGATIVE_INFINITY, -1e6)
        )
        # Row 5, without any tail: 1e-12 times a logarithm that the limit still has.
        cases.append(
            Case(
                name_of(one),
                problem,
                one,
                tolerance=2e-6 if one.support == "tail" else 1e-12,
                limit=limit,
            )
        )
    return cases


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(
    "make_cases",
    [
        objective_cases,
        option_cases,
        shape_cases,
        padding_cases,
        large_cases,
        infinite_cases,
    ],
)
def test_losses_and_gradients_match_dense_float64(ranks, world_size, make_cases):
    assert_cases_match(ranks, world_size, make_cases)


def test_the_cases_hold_what_they_promise():
    """Labels in and out of the kept ids, on borders; k3 above and below its clamp; row 3 masked."""
    problem = mixed_rows(1.0)
    inside = (problem.topk_token_ids_NK == problem.labels_N[:, None]).any(1)
    assert inside[1]
    assert not inside[2]
    assert {15, 16} & set(problem.labels_N.tolist())
    assert {0, 15, 16, 48, 49} <= set(problem.topk_token_ids_NK[0].tolist())
    k3 = dense_losses(problem, Definition("k3"))[1]
    assert (k3 > 10).any()
    assert (k3 < 10).any()
