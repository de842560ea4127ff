"""What must hold for any divergence: signs, bounds, equality, blind spots, unbiased samples; peers' formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from nemo_kd.ops.topk import topk_of_logits
from nemo_kd.ops.vocab import VocabShard
from tests.parity.dense_losses import (
    COMBINATIONS,
    LABEL_OBJECTIVES,
    OBJECTIVES,
    SUPPORTS,
    Definition,
    Problem,
    dense_losses,
    make_problem,
    random_problem,
)
from tests.parity.test_losses import (
    loss_of,
    solve_alone,
    teacher_rows,
    whole_vocabulary,
)

TEMPERATURES = [1.0, 0.5, 2.0]


def _kd_of(
    problem: Problem, definition: Definition
) -> tuple[torch.Tensor, torch.Tensor]:
    """(kd_N, its gradient for the weight 1 at every row)."""
    ones = torch.ones_like(problem.kd_weight_N)
    _, kd_N, gradient_NV = solve_alone(
        replace(problem, ce_weight_N=ones * 0, kd_weight_N=ones), definition
    )
    return kd_N, gradient_NV


class _Again(torch.autograd.Function):
    """A loss that gradcheck may differentiate often: every backward runs the whole loss anew."""

    @staticmethod
    def forward(ctx, logits_NV, problem, definition):
        ctx.save_for_backward(logits_NV)
        ctx.problem, ctx.definition = problem, definition
        return _Again.losses(logits_NV.detach().clone(), problem, definition)

    @staticmethod
    def losses(logits_NV, problem, definition):
        shard = whole_vocabulary(problem)
        losses = loss_of(definition)(
            logits_NV, problem.labels_N, shard, teacher_rows(problem)
        )
        return losses.ce_N, losses.kd_N

    @staticmethod
    def backward(ctx, *upstream):
        with torch.enable_grad():
            leaf_NV = ctx.saved_tensors[0].detach().clone().requires_grad_()
            losses = _Again.losses(leaf_NV.clone(), ctx.problem, ctx.definition)
            return torch.autograd.grad(losses, leaf_NV, upstream)[0], None, None


GRADCHECKED = [
    pair for pair in COMBINATIONS if pair[0] != "adaptive_kl"
]  # its weight is a constant for the gradient


@pytest.mark.parametrize(
    ("objective", "support"),
    [
        *GRADCHECKED,
        ("forward_kl", "sampled"),
        *((objective, "tail") for objective in LABEL_OBJECTIVES),
    ],
)
def test_gradcheck(objective, support):
    scales = (
        (1.0, 1.0)
        if support == "sampled" or objective in LABEL_OBJECTIVES
        else (0.5, 2.0)
    )
    definition = Definition(
        objective, support, *scales, factor=2.0, label_smoothing=0.1, z_loss_weight=0.1
    )
    problem = random_problem(3, 7, 3, spread=1.0, teacher_scale=scales[1], seed=5)
    assert torch.autograd.gradcheck(
        lambda logits_NV: _Again.apply(logits_NV, problem, definition),
        (problem.logits_NV.clone().requires_grad_(),),
        atol=1e-6,
    )


@pytest.mark.parametrize(("objective", "support"), COMBINATIONS)
@pytest.mark.parametrize("inside", [True, False])
def test_float32_is_exact_where_the_student_is_nearly_all_inside_or_outside(
    objective, support, inside
):
    """One side of the kept set holds 1e-1 .. 1e-8 of the student's mass: 1 - sum would lose the other."""
    generator = torch.Generator().manual_seed(6)
    teacher_NV = torch.randn(8, 200, generator=generator, dtype=torch.float64) * 3
    logits_NV = torch.randn(8, 200, generator=generator, dtype=torch.float64)
    ids_NK = teacher_NV.topk(20).indices
    kept = torch.zeros_like(teacher_NV, dtype=torch.bool).scatter_(1, ids_NK, True)
    small = torch.logspace(-1, -8, 8, dtype=torch.float64)[:, None]
    for mask, mass in (
        (kept, 1 - small if inside else small),
        (~kept, small if inside else 1 - small),
    ):
        held = logits_NV.masked_fill(~mask, -math.inf).logsumexp(1, keepdim=True)
        logits_NV = torch.where(mask, logits_NV - held + mass.log(), logits_NV)
    problem = make_problem(teacher_NV, logits_NV, ids_NK, ids_NK[:, 3]).cast(
        torch.float32
    )
    ones = torch.ones(8)
    problem = replace(problem, ce_weight_N=ones * 0, kd_weight_N=ones)
    definition = Definition(objective, support)
    _, expected_kd, expected = dense_losses(problem, definition)
    _, kd_N, gradient_NV = solve_alone(problem, definition)
    torch.testing.assert_close(kd_N.double(), expected_kd, rtol=1e-5, atol=0)
    error_N, size_N = (
        (gradient_NV.double() - expected).norm(dim=1),
        expected.norm(dim=1),
    )
    assert error_N.norm() <= 1e-6 * size_N.norm()
    # Where the student is nearly all outside, a bounded objective has next to no gradient.
    assert (error_N <= 5e-6 * size_N + (0 if inside else 1e-7)).all(), error_N / size_N


@pytest.mark.parametrize(
    ("objective", "support"),
    [pair for pair in COMBINATIONS if pair[1] in ("renormalize", "tail")],
)
@pytest.mark.parametrize("temperature_scale", TEMPERATURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_divergences_are_not_negative_and_0_at_equality(
    objective, support, temperature_scale, dtype
):
    rounding = 1e-12 if dtype == torch.float64 else 3e-6
    definition = Definition(objective, support, temperature_scale, temperature_scale)
    problem = random_problem(64, 40, 6, teacher_scale=temperature_scale).cast(dtype)
    kd_N, _ = _kd_of(problem, definition)
    assert (kd_N > 0).all()
    assert kd_N.mean() > 0.01
    teacher_NV = (
        torch.randn(
            64, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )
        * 3
    )
    teacher_NV = teacher_NV.to(dtype).double()
    for distance in (0.0, 1e-7, 1e-4):
        student_NV = teacher_NV + distance * torch.sin(
            torch.arange(40.0, dtype=torch.float64)
        )
        ids_NK = teacher_NV.topk(6).indices
        problem = make_problem(
            teacher_NV, student_NV, ids_NK, ids_NK[:, 0], temperature_scale
        ).cast(dtype)
        kd_N, gradient_NV = _kd_of(problem, definition)
        assert kd_N.min() >= -rounding
        if (
            objective == "tvd"
        ):  # half the sum of |p - q|, whose gradient jumps at equality
            assert kd_N.max() <= distance * temperature_scale + rounding
        else:
            assert kd_N.max() <= (distance * temperature_scale) ** 2 + rounding
            assert (
                gradient_NV.abs().max()
                <= 2 * distance * temperature_scale**2 + rounding
            )


@pytest.mark.parametrize("objective", LABEL_OBJECTIVES)
def test_label_objectives_are_0_at_equality(objective):
    teacher_NV = random_problem(16, 40, 6).logits_NV
    problem = make_problem(
        teacher_NV, teacher_NV + 5, teacher_NV.topk(6).indices, torch.arange(16)
    )
    kd_N, gradient_NV = _kd_of(problem, Definition(objective))
    assert kd_N.abs().max() < 1e-12
    # k1 pushes the label's probability down even there: it is no divergence.
    assert bool(gradient_NV.abs().max() < 1e-12) is (objective != "k1")


def _all_mass_outside(k: int = 5) -> Problem:
    """A student that agrees with the teacher on the kept ids but puts all its mass on one other token."""
    teacher_NV = random_problem(8, 40, k).logits_NV
    ids_NK = teacher_NV.topk(k).indices
    student_NV = teacher_NV.clone()
    student_NV[torch.arange(8), teacher_NV.argmin(1)] = 60.0
    return make_problem(teacher_NV, student_NV, ids_NK, ids_NK[:, 0])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_tail_sees_the_mass_outside_the_kept_ids_that_renormalize_does_not(objective):
    problem = _all_mass_outside()
    blind, seeing = (
        _kd_of(problem, Definition(objective, "renormalize")),
        _kd_of(problem, Definition(objective)),
    )
    assert blind[0].abs().max() < 1e-12
    if objective != "tvd":  # whose gradient jumps at equality
        assert blind[1].abs().max() < 1e-10
    assert (seeing[0] > 0.1).all()
    if objective in ("forward_kl", "adaptive_kl"):
        assert (seeing[1].abs().amax(1) > 0.1).all()
    if (objective, "truncate") in COMBINATIONS:
        assert (_kd_of(problem, Definition(objective, "truncate"))[0] > 0.1).all()


@pytest.mark.parametrize("support", SUPPORTS)
def test_jsd_and_tvd_are_bounded(support):
    problem = random_problem(64, 40, 6, spread=30.0, seed=8)
    apart = replace(
        problem,
        logits_NV=problem.logits_NV.scatter(1, problem.topk_token_ids_NK, -500.0),
    )
    for one in (problem, apart, _all_mass_outside()):
        for beta in (0.1, 0.5, 0.9):
            entropy = -(beta * math.log(beta) + (1 - beta) * math.log(1 - beta))
            jsd_N, _ = _kd_of(one, Definition("jsd", support, jsd_beta=beta))
            assert jsd_N.max() <= entropy + 1e-12
        tvd_N, _ = _kd_of(one, Definition("tvd", support))
        assert tvd_N.max() <= 1 + 1e-12
    closest, _ = _kd_of(apart, Definition("jsd", "tail"))
    assert closest.max() > 0.9 * math.log(2)


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.5, 2.0)])
def test_adaptive_kl_lies_between_forward_and_reverse(scales):
    problem = random_problem(32, 40, 6, seed=9, teacher_scale=scales[1])
    forward = _kd_of(problem, Definition("forward_kl", "renormalize", *scales))
    reverse = _kd_of(problem, Definition("reverse_kl", "renormalize", *scales))
    for alpha, expected in ((0.0, forward), (1.0, reverse)):
        found = _kd_of(
            problem,
            Definition("adaptive_kl", "renormalize", *scales, adaptive_kl_alpha=alpha),
        )
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    between, _ = _kd_of(problem, Definition("adaptive_kl", "renormalize", *scales))
    assert (between <= forward[0].maximum(reverse[0]) + 1e-12).all()
    assert (between >= forward[0].minimum(reverse[0]) - 1e-12).all()


def _sampled_rows(
    teacher_V: torch.Tensor,
    student_V: torch.Tensor,
    k: int,
    num_draws: int,
    num_samples: int,
):
    """(value, gradient) of each of `num_draws` independent draws of the teacher's tail at one position."""
    teacher_NV = teacher_V.expand(num_draws, -1)
    ids_NK = teacher_NV.topk(k).indices
    shard = VocabShard(0, len(teacher_V), len(teacher_V))
    generator = torch.Generator().manual_seed(10)
    uniforms_NU = torch.rand(
        num_draws, num_samples + 1, generator=generator, dtype=torch.float64
    )
    found = topk_of_logits(
        teacher_NV.clone(),
        ids_NK[:, 0],
        shard,
        k,
        lambda p_NK: torch.ones_like(p_NK, dtype=torch.bool),
        uniforms_NU=uniforms_NU,
    )
    samples_NM, tail_N = found.tail_token_ids_PM.long(), found.tail_mass_PT[:, 0]
    problem = make_problem(
        teacher_NV, student_V.repeat(num_draws, 1), ids_NK, ids_NK[:, 0]
    )
    torch.testing.assert_close(problem.tail_mass_N, tail_N)
    problem = replace(problem, tail_token_ids_NM=samples_NM)
    return (*_kd_of(problem, Definition("forward_kl", "sampled")), samples_NM)


@pytest.mark.parametrize(
    "head_shift", [0.0, 9.0]
)  # the second tail is so small that most draws are dropped
def test_sampled_forward_kl_is_unbiased(head_shift):
    generator = torch.Generator().manual_seed(11)
    kept = 5
    teacher_V = torch.randn(30, generator=generator, dtype=torch.float64)
    teacher_V[teacher_V.topk(kept).indices] += head_shift
    student_V = torch.randn(30, generator=generator, dtype=torch.float64) * 2
    log_p, log_q = torch.log_softmax(teacher_V, 0), torch.log_softmax(student_V, 0)
    log_tail_p = log_p[log_p.argsort(descending=True)[kept:]]
    tail = log_tail_p.exp().sum()
    entropy = -(log_tail_p.exp() / tail * (log_tail_p - tail.log())).sum()
    kd_N, gradient_NV, samples_NM = _sampled_rows(
        teacher_V, student_V, kept, 20_000, 3
    )
    assert bool((samples_NM < 0).any()) is (head_shift > 0)
    assert (samples_NM >= 0).any()
    expected = [
        ((log_p.exp() * (log_p - log_q)).sum() + tail * entropy)[None],
        log_q.exp() - log_p.exp(),
    ]
    for draws, theirs in zip((kd_N[:, None], gradient_NV), expected, strict=True):
        standard_error = draws.std(dim=0) / math.sqrt(len(draws))
        assert ((draws.mean(dim=0) - theirs).abs() <= 4 * standard_error + 1e-12).all()
    # The mean is not exact by accident: samples do vary.
    assert kd_N.std() > 1e-4


def _roll(
    objective: str,
    teacher_K,
    student_K,
    temperature: float,
    teacher_temperature: float,
) -> float:
    """ROLL's `various_divergence` on K gathered logits of a position, with its default parameters."""
    p = torch.softmax(teacher_K / temperature / teacher_temperature, 0).tolist()
    q = torch.softmax(student_K / temperature, 0).tolist()
    pairs = list(zip(p, q, strict=True))
    forward = sum(a * (math.log(a) - math.log(b)) for a, b in pairs)
    reverse = sum(b * (math.log(b) - math.log(a)) for a, b in pairs)
    if objective == "adaptive_kl":
        running, gaps = 0.0, {True: 0.0, False: 0.0}
        for a, b in sorted(pairs):
            running += a
            gaps[running <= 0.5] += abs(a - b)
        return (gaps[False] * forward + gaps[True] * reverse) / (
            gaps[True] + gaps[False]
        )
    return {
        "forward_kl": forward,
        "reverse_kl": reverse,
        "skewed_forward_kl": sum(
            a * (math.log(a) - math.log(0.1 * a + 0.9 * b)) for a, b in pairs
        ),
        "skewed_reverse_kl": sum(
            b * (math.log(b) - math.log(0.9 * a + 0.1 * b)) for a, b in pairs
        ),
        "jsd": sum(
            a * math.log(2 * a / (a + b)) / 2 + b * math.log(2 * b / (a + b)) / 2
            for a, b in pairs
        ),
    }[objective]


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "tvd"])
@pytest.mark.parametrize(
    ("temperature", "teacher_temperature"), [(1.0, 1.0), (2.0, 0.5)]
)
def test_renormalize_equals_roll(objective, temperature, teacher_temperature):
    problem = random_problem(16, 40, 6, seed=12)
    scales = (1 / temperature, 1 / (temperature * teacher_temperature))
    kd_N, _ = _kd_of(problem, Definition(objective, "renormalize", *scales))
    for row, kd in enumerate(kd_N.tolist()):
        student_K = problem.logits_NV[row, problem.topk_token_ids_NK[row]]
        expected = _roll(
            objective,
            problem.topk_logits_NK[row],
            student_K,
            temperature,
            teacher_temperature,
        )
        assert kd == pytest.approx(expected, rel=1e-11, abs=1e-12)


def test_label_objectives_equal_slime():
    """slime's k1, k2, k3 and low_var_kl, and their derivatives with respect to log q of the label."""
    problem = random_problem(32, 40, 6, seed=13)
    log_q_NV = torch.log_softmax(problem.logits_NV, 1)
    for row, label in enumerate(problem.labels_N.tolist()):
        log_ratio = float(log_q_NV[row, label] - problem.label_logprobs_N[row])
        k3 = math.exp(-log_ratio) - 1 + log_ratio
        expected = {
            "k1": (log_ratio, 1.0),
            "k2": (log_ratio**2 / 2, log_ratio),
            "k3": (k3, 1 - math.exp(-log_ratio)),
            "low_var_kl": (
                min(max(k3, -10.0), 10.0),
                1 - math.exp(-log_ratio) if abs(k3) < 10 else 0.0,
            ),
        }
        onehot_V = torch.zeros(40, dtype=torch.float64)
        onehot_V[label] = 1
        for objective, (value, derivative) in expected.items():
            kd_N, gradient_NV = _kd_of(
                problem.rows(slice(row, row + 1)), Definition(objective)
            )
            assert float(kd_N) == pytest.approx(value, rel=1e-12, abs=1e-12)
            gradient_V = derivative * (onehot_V - log_q_NV[row].exp())
            torch.testing.assert_close(
                gradient_NV[0], gradient_V, rtol=1e-11, atol=1e-12
            )


@pytest.mark.parametrize(
    ("objective", "theirs"), [("forward_kl", "fwd_kl"), ("reverse_kl", "bwd_kl")]
)
@pytest.mark.parametrize(
    ("logits_scale", "target_logits_scale"), [(1.0, 1.0), (0.5, 2.0)]
)
def test_renormalize_equals_nemo_aligner(
    objective, theirs, logits_scale, target_logits_scale
):
    """Values and the gradients that NeMo-Aligner writes by hand, with respect to the scaled logits."""
    problem = random_problem(16, 40, 6, seed=14)
    kd_N, gradient_NV = _kd_of(
        problem,
        Definition(objective, "renormalize", logits_scale, target_logits_scale),
    )
    student_NK = problem.logits_NV.gather(1, problem.topk_token_ids_NK) * logits_scale
    q = student_NK.exp() / student_NK.exp().sum(1, keepdim=True)
    teacher_NK = (problem.topk_logits_NK * target_logits_scale).exp()
    p = teacher_NK / teacher_NK.sum(1, keepdim=True)
    if theirs == "fwd_kl":
        value_N, gradient_NK = (p * (p.log() - q.log())).sum(1), q - p
    else:
        value_N = (q * (q.log() - p.log())).sum(1)
        gradient_NK = q * ((q / p).log() - value_N[:, None])
    expected_NV = torch.zeros_like(gradient_NV).scatter_(
        1, problem.topk_token_ids_NK, logits_scale * gradient_NK
    )
    torch.testing.assert_close(kd_N, value_N, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient_NV, expected_NV, rtol=1e-12, atol=1e-12)


def test_scales_do_not_touch_cross_entropy():
    problem = random_problem(16, 40, 6, seed=15)
    plain, scaled = (
        solve_alone(problem, Definition("forward_kl", "renormalize", *scales))
        for scales in ((1, 1), (0.25, 4))
    )
    assert torch.equal(plain[0], scaled[0])
    assert not torch.equal(plain[1], scaled[1])


def test_the_gradient_of_tail_is_nearer_to_the_whole_teacher_than_that_of_renormalize():
    """Against forward KL over the full vocabulary, the reason why tail is the default."""
    problem = random_problem(64, 200, 20, spread=2.0, seed=16)
    generator = torch.Generator().manual_seed(16)
    teacher_NV = torch.randn(64, 200, generator=generator, dtype=torch.float64) * 2
    student_NV = (
        teacher_NV
        + torch.randn(64, 200, generator=generator, dtype=torch.float64) * 0.5
    )
    ids_NK = teacher_NV.topk(20).indices
    problem = make_problem(teacher_NV, student_NV, ids_NK, ids_NK[:, 0])
    full_NV = torch.softmax(student_NV, 1) - torch.softmax(teacher_NV, 1)
    errors = {
        support: float(
            (_kd_of(problem, Definition("forward_kl", support))[1] - full_NV).norm()
            / full_NV.norm()
        )
        for support in ("tail", "renormalize", "truncate")
    }
    assert errors["tail"] < 0.5 * min(errors["renormalize"], errors["truncate"]), (
        errors
    )
