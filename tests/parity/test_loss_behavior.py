"""How the losses treat their input: precision, memory, collectives, blocks, what they refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from nemo_kd.config.loss import Divergence
from nemo_kd.ops import distillation
from nemo_kd.ops.distillation import DistillationLoss
from nemo_kd.ops.vocab import VocabShard
from tests.parity.dense_losses import (
    COMBINATIONS,
    DEFAULT,
    Definition,
    cut,
    dense_losses,
    join,
    random_problem,
)
from tests.parity.test_losses import (
    Case,
    every_definition,
    infinite_cases,
    large_cases,
    loss_of,
    mixed_rows,
    name_of,
    objective_cases,
    option_cases,
    solve_alone,
    teacher_rows,
    whole_vocabulary,
)


@pytest.mark.parametrize(
    ("dtype", "epsilon"),
    [(torch.float32, 3e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)],
)
def test_low_precision_inputs(dtype, epsilon):
    """Values as exact as float32 sums allow; gradients as exact as their own dtype can hold."""
    for one in every_definition([(1.0, 1.0), (0.5, 0.5)]):
        problem = mixed_rows(one.teacher_scale).cast(dtype)
        expected_ce, expected_kd, expected = dense_losses(problem, one)
        ce, kd, gradient = solve_alone(problem, one)
        assert ce.dtype == kd.dtype == torch.float32
        assert gradient.dtype == dtype
        torch.testing.assert_close(
            ce.double(), expected_ce, rtol=1e-5, atol=1e-6, msg=name_of(one)
        )
        torch.testing.assert_close(
            kd.double(), expected_kd, rtol=1e-5, atol=2e-6, msg=name_of(one)
        )
        error = (gradient.double() - expected).abs().amax(1) / expected.abs().amax(
            1
        ).clamp(min=1e-9)
        assert error.max() < epsilon, f"{name_of(one)}: {error}"


@pytest.mark.parametrize("make_cases", [large_cases, infinite_cases])
def test_extreme_logits_in_float32(make_cases):
    for case in make_cases():
        problem, limit = case.problem, case.limit or case.problem
        if case.definition.objective == "k3":  # exp(500) overflows
            problem, limit = problem.rows([0]), limit.rows([0])
        expected_ce, expected_kd, expected = dense_losses(
            limit.cast(torch.float32), case.definition
        )
        ce, kd, gradient = solve_alone(problem.cast(torch.float32), case.definition)
        torch.testing.assert_close(
            ce.double(), expected_ce, rtol=1e-5, atol=1e-5, msg=case.name
        )
        torch.testing.assert_close(
            kd.double(), expected_kd, rtol=1e-5, atol=1e-5, msg=case.name
        )
        # The derivatives of a large divergence are differences of terms of its size.
        size_N = expected.abs().amax(1).maximum(expected_kd.abs())
        assert ((gradient.double() - expected).abs().amax(1) <= 2e-6 * size_N).all(), (
            case.name
        )


@pytest.mark.parametrize(
    ("objective", "support"),
    [pair for pair in COMBINATIONS if pair[0] == "forward_kl"],
)
def test_an_impossible_kept_token_makes_forward_kl_infinite_but_not_its_gradient(
    objective, support
):
    problem, definition = (
        mixed_rows(1.0).rows([0, 1, 2]),
        Definition(objective, support),
    )  # a copy
    rows_N, first_N = torch.arange(3), problem.topk_token_ids_NK[:, 1]
    problem.logits_NV[rows_N, first_N] = -1e6
    problem.ce_weight_N[:] = 0
    _, _, expected = dense_losses(problem, definition)
    problem.logits_NV[rows_N, first_N] = float("-inf")
    _, kd_N, gradient_NV = solve_alone(problem, definition)
    assert (kd_N == float("inf")).all()
    torch.testing.assert_close(gradient_NV, expected, rtol=1e-12, atol=1e-12)


def test_gradient_goes_into_the_logits_memory_unless_they_are_a_leaf():
    problem, loss = mixed_rows(1.0), DistillationLoss(Divergence())
    addresses = []
    for is_leaf in (False, True):
        leaf_NV = problem.logits_NV.clone().requires_grad_()
        logits_NV = leaf_NV if is_leaf else leaf_NV.clone()
        logits_NV.register_hook(lambda gradient: addresses.append(gradient.data_ptr()))
        losses = loss(
            logits_NV,
            problem.labels_N,
            whole_vocabulary(problem),
            teacher_rows(problem),
        )
        (losses.ce_N.sum() + losses.kd_N.sum()).backward()
        assert (addresses[-1] == logits_NV.data_ptr()) is not is_leaf
        assert torch.equal(leaf_NV.detach(), problem.logits_NV)


def _view_of_leaf(logits_NV):
    leaf = logits_NV.clone().view(2, -1, logits_NV.shape[1]).requires_grad_()
    return (
        leaf,
        leaf.view(logits_NV.shape),
        lambda gradient: gradient.view(logits_NV.shape),
    )


def _transposed(logits_NV):
    leaf = logits_NV.t().contiguous().requires_grad_()
    return leaf, (leaf * 1).t(), torch.t


def _columns_of_a_wider_tensor(logits_NV):
    leaf = torch.nn.functional.pad(logits_NV, (3, 5)).requires_grad_()
    return leaf, (leaf * 1)[:, 3:-5], lambda gradient: gradient[:, 3:-5]


@pytest.mark.parametrize(
    "layout", [_view_of_leaf, _transposed, _columns_of_a_wider_tensor]
)
def test_other_memory_layouts(layout):
    problem = mixed_rows(1.0)
    leaf, logits_NV, back = layout(problem.logits_NV)
    before = leaf.detach().clone()
    losses = loss_of(DEFAULT)(
        logits_NV, problem.labels_N, whole_vocabulary(problem), teacher_rows(problem)
    )
    (
        (losses.ce_N * problem.ce_weight_N).sum()
        + (losses.kd_N * problem.kd_weight_N).sum()
    ).backward()
    assert torch.equal(leaf.detach(), before)
    torch.testing.assert_close(
        back(leaf.grad), dense_losses(problem, DEFAULT)[2], rtol=1e-12, atol=1e-12
    )


def test_an_operation_that_needs_its_output_again_is_refused():
    """tanh differentiates through its result, which the gradient has replaced: an error, no wrong gradient."""
    problem = mixed_rows(1.0)
    logits_NV = torch.tanh(problem.logits_NV.clone().requires_grad_())
    losses = loss_of(DEFAULT)(
        logits_NV, problem.labels_N, whole_vocabulary(problem), teacher_rows(problem)
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.ce_N.sum().backward()


def test_ids_may_be_int32():
    problem, sampled = mixed_rows(1.0), Definition("forward_kl", "sampled")
    ids = {
        name: getattr(problem, name).int()
        for name in ("topk_token_ids_NK", "tail_token_ids_NM")
    }
    for ours, theirs in zip(
        solve_alone(replace(problem, **ids), sampled),
        solve_alone(problem, sampled),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_a_second_backward_through_the_same_graph_is_refused():
    problem = mixed_rows(1.0)
    leaf_NV = problem.logits_NV.clone().requires_grad_()
    losses = DistillationLoss(Divergence())(
        leaf_NV.clone(),
        problem.labels_N,
        whole_vocabulary(problem),
        teacher_rows(problem),
    )
    total = losses.ce_N.sum() + losses.kd_N.sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        total.backward()


def test_only_one_of_the_two_losses_may_be_used():
    problem = mixed_rows(1.0)
    for ce_weight, kd_weight in ((1.0, 0.0), (0.0, 1.0)):
        one = replace(
            problem,
            ce_weight_N=problem.ce_weight_N * ce_weight,
            kd_weight_N=problem.kd_weight_N * kd_weight,
        )
        leaf_NV = one.logits_NV.clone().requires_grad_()
        losses = DistillationLoss(Divergence())(
            leaf_NV.clone(), one.labels_N, whole_vocabulary(one), teacher_rows(one)
        )
        chosen_N = (
            losses.ce_N * one.ce_weight_N
            if ce_weight
            else losses.kd_N * one.kd_weight_N
        )
        chosen_N.sum().backward()
        torch.testing.assert_close(
            leaf_NV.grad, dense_losses(one, DEFAULT)[2], rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("divergence", [None, Divergence()])
def test_without_a_teacher_there_is_cross_entropy_only(divergence):
    problem = replace(mixed_rows(1.0), kd_weight_N=torch.zeros(8, dtype=torch.float64))
    expected_ce, _, expected = dense_losses(problem, Definition(label_smoothing=0.1))
    leaf_NV = problem.logits_NV.clone().requires_grad_()
    losses = DistillationLoss(divergence, label_smoothing=0.1)(
        leaf_NV.clone(), problem.labels_N, whole_vocabulary(problem)
    )
    (losses.ce_N * problem.ce_weight_N).sum().backward()
    assert losses.kd_N is None
    torch.testing.assert_close(
        losses.ce_N.detach(), expected_ce, rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(leaf_NV.grad, expected, rtol=1e-12, atol=1e-12)


def test_no_rows():
    ce, kd, gradient = solve_alone(mixed_rows(1.0).rows(slice(0, 0)))
    assert (ce.shape, kd.shape, gradient.shape) == ((0,), (0,), (0, 50))


def test_gradients_do_not_depend_on_blocks_or_micro_batches():
    """10 million elements, more than any block: whole, in micro-batches of 100 rows and rows by themselves."""
    problem = random_problem(2500, 4099, 8, wanted_ids=(0, 4098)).cast(torch.float32)
    whole = solve_alone(problem)
    for rows in (
        slice(0, 100),
        slice(900, 1000),
        slice(1020, 1030),
        slice(2400, 2500),
        slice(2499, 2500),
    ):
        for ours, part in zip(solve_alone(problem.rows(rows)), whole, strict=True):
            torch.testing.assert_close(ours, part[rows], rtol=1e-6, atol=1e-9)
    sample = slice(0, 2500, 500)
    expected = dense_losses(problem.rows(sample), DEFAULT)
    for ours, theirs in zip(whole, expected, strict=True):
        torch.testing.assert_close(ours[sample].double(), theirs, rtol=1e-5, atol=1e-7)


COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "broadcast",
    "reduce",
)


def _count_collectives(
    make_cases: Callable[[], list[Case]],
) -> list[tuple[list[int], list[int]]]:
    """Elements of every collective call of each case, in forward and in backward."""
    group, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
    originals = {name: getattr(torch.distributed, name) for name in COLLECTIVES}
    calls: list[int] = []

    def counted(name: str):
        def call(tensor, *args, **kwargs):
            assert name == "all_reduce", f"{name} was called"
            calls.append(tensor.numel())
            return originals[name](tensor, *args, **kwargs)

        return call

    counts = []
    try:
        for name in COLLECTIVES:
            setattr(torch.distributed, name, counted(name))
        for case in make_cases():
            problem = case.problem
            local_Nv, start, num_real = cut(
                problem.logits_NV, case.layout, rank, group.size(), case.padding
            )
            shard = VocabShard(start, num_real, problem.logits_NV.shape[1], group)
            logits_Nv = local_Nv.requires_grad_()
            losses = loss_of(case.definition)(
                logits_Nv, problem.labels_N, shard, teacher_rows(problem)
            )
            forward = len(calls)
            (losses.ce_N.sum() + losses.kd_N.sum()).backward()
            counts.append((calls[:forward], calls[forward:]))
            calls.clear()
    finally:
        for name, original in originals.items():
            setattr(torch.distributed, name, original)
    return counts


def test_two_small_all_reduces_forward_and_none_backward(ranks):
    for counts in ranks(2).run(_count_collectives, option_cases) + ranks(2).run(
        _count_collectives, objective_cases
    ):
        for forward, backward in counts:
            assert 1 <= len(forward) <= 2
            assert sum(forward) <= 8 * (10 + 3 + 8), (
                "more than a few numbers per kept entry and row"
            )
            assert not backward


def test_compiled_equals_eager():
    for one in (
        DEFAULT,
        Definition("jsd", "renormalize", 0.5, 2.0),
        Definition("forward_kl", "sampled"),
    ):
        problem = mixed_rows(one.teacher_scale)
        for ours, theirs in zip(
            solve_alone(problem, one, compile=True),
            solve_alone(problem, one),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def _solve_where_one_rank_cannot_compile() -> list[list]:
    """On a rank: values and gradient of a few losses, compiled on rank 0 only."""
    group, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
    found = []
    with pytest.MonkeyPatch.context() as patch:
        if rank:
            patch.setattr(distillation, "compile_passes", lambda *_: False)
        for one in (DEFAULT, Definition("reverse_kl", "renormalize")):
            problem = mixed_rows(1.0)
            local_Nv, start, num_real = cut(
                problem.logits_NV, "even", rank, group.size(), 0.0
            )
            shard = VocabShard(start, num_real, 50, group)
            logits_Nv = local_Nv.clone().requires_grad_()
            losses = loss_of(one, compile=True)(
                logits_Nv, problem.labels_N, shard, teacher_rows(problem)
            )
            (
                (losses.ce_N * problem.ce_weight_N).sum()
                + (losses.kd_N * problem.kd_weight_N).sum()
            ).backward()
            parts = (losses.ce_N, losses.kd_N, logits_Nv.grad)
            found.append([part.detach().numpy() for part in parts])
    return found


def test_ranks_may_differ_in_what_they_compile(ranks):
    per_rank = ranks(2).run(_solve_where_one_rank_cannot_compile)
    definitions = (DEFAULT, Definition("reverse_kl", "renormalize"))
    for one, *of_ranks in zip(definitions, *per_rank, strict=True):
        expected_ce, expected_kd, expected = dense_losses(mixed_rows(1.0), one)
        for ce, kd, _ in of_ranks:
            torch.testing.assert_close(torch.from_numpy(ce), expected_ce)
            torch.testing.assert_close(torch.from_numpy(kd), expected_kd)
        gradients = [torch.from_numpy(gradient) for *_, gradient in of_ranks]
        torch.testing.assert_close(join(gradients, "even", 50), expected)


WITH_COMPILE = """
import logging, torch
logging.basicConfig(format="%(levelname)s %(message)s")
from tests.parity.test_losses import DEFAULT, mixed_rows, solve_alone
for _ in range(2):
    compiled = solve_alone(mixed_rows(1.0), DEFAULT, compile=True)
    for one, other in zip(compiled, solve_alone(mixed_rows(1.0), DEFAULT), strict=True):
        assert torch.equal(one, other)
"""


def test_without_a_compiler_the_losses_run_with_one_warning(tmp_path):
    environment = os.environ | {
        "CXX": "no-such-compiler",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
    }
    found = subprocess.run(
        [sys.executable, "-c", WITH_COMPILE], env=environment, capture_output=True, text=True
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert found.stderr.count("WARNING") == 1, found.stderr
    assert "model.knowledge_distillation.compile: torch.compile failed" in found.stderr
    assert "no-such-compiler" in found.stderr
    assert "install a compiler (g++" in found.stderr


def _losses_with_nan(column: int) -> list[tuple[str, bool, bool]]:
    """Of every definition: its name, and whether values and this rank's gradient are nan where one logit is."""
    group, problem = torch.distributed.group.WORLD, mixed_rows(1.0)
    problem = replace(
        problem, logits_NV=_with(problem.logits_NV, (2, column), float("nan"))
    )
    local_Nv, start, num_real = cut(
        problem.logits_NV, "even", torch.distributed.get_rank(), group.size(), 0.0
    )
    shard, found = VocabShard(start, num_real, problem.logits_NV.shape[1], group), []
    for one in every_definition([(1.0, 1.0), (0.5, 0.5)]):
        logits_Nv = local_Nv.clone().requires_grad_()
        losses = loss_of(one)(
            logits_Nv, problem.labels_N, shard, teacher_rows(problem)
        )
        ce_N, kd_N = losses.ce_N, losses.kd_N
        (ce_N + kd_N).sum().backward()
        values_nan = bool(
            ce_N.isnan()[2] and (kd_N.isnan()[2] or one.support == "renormalize")
        )
        found.append((name_of(one), values_nan, bool(logits_Nv.grad[2].isnan().any())))
    return found


def test_nan_on_one_rank_is_nan_on_all(ranks):
    for column in (3, 47):
        for of_rank in ranks(2).run(_losses_with_nan, column):
            for name, values_nan, gradient_nan in of_rank:
                assert values_nan, (name, column)
                assert gradient_nan, (name, column)


def _refused_on_rank(
    fields: dict, labels_N: torch.Tensor, definition: Definition
) -> str:
    group, problem = torch.distributed.group.WORLD, mixed_rows(1.0)
    local_Nv, start, num_real = cut(
        problem.logits_NV, "uneven", torch.distributed.get_rank(), group.size(), 0.0
    )
    teacher = replace(teacher_rows(problem), **fields)
    try:
        loss_of(definition)(
            local_Nv.requires_grad_(),
            labels_N,
            VocabShard(start, num_real, 50, group),
            teacher,
        )
    except ValueError as error:
        return str(error)
    return "not refused"


def _with(tensor: torch.Tensor, index: tuple[int, ...], value: int) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


def test_hostile_input_is_refused_on_every_rank(ranks):
    problem = mixed_rows(1.0)
    ids, labels = problem.topk_token_ids_NK, problem.labels_N
    sampled, k1, tail = (
        Definition("forward_kl", "sampled"),
        Definition("k1"),
        Definition(),
    )
    hostile = [
        (
            {"topk_token_ids_PK": _with(ids, (2, 5), 50)},
            labels,
            tail,
            "topk_token_ids.*outside",
        ),
        (
            {"topk_token_ids_PK": _with(ids, (2, 5), -2)},
            labels,
            tail,
            "topk_token_ids.*outside",
        ),
        ({}, _with(labels, (3,), 50), tail, "labels.*outside"),
        ({}, _with(labels, (3,), -100), tail, "labels.*outside"),
        (
            {"temperatures": (1.0, 9.0)},
            labels,
            Definition(teacher_scale=0.5),
            "tail_mass",
        ),
        (
            {"temperatures": (1.0, 9.0)},
            labels,
            Definition("jsd", "truncate", teacher_scale=2.0),
            "tail_mass",
        ),
        (
            {"temperatures": (1.0, 9.0)},
            labels,
            Definition("forward_kl", "label", teacher_scale=0.5),
            "tail_mass",
        ),
        ({"tail_token_ids_PM": None}, labels, sampled, "tail_token_ids"),
        ({"label_logprobs_P": None}, labels, k1, "label_logprobs"),
    ]
    for fields, wrong_labels, definition, message in hostile:
        for found in ranks(2).run(_refused_on_rank, fields, wrong_labels, definition):
            assert found != "not refused", (fields, definition)
            assert pytest.raises(ValueError, match=message).matches(
                ValueError(found)
            ), (
                message,
                found,
            )


def test_numbers_of_rows_must_agree():
    problem, shard = mixed_rows(1.0), whole_vocabulary(mixed_rows(1.0))
    logits_NV, labels_N, teacher, loss = (
        problem.logits_NV,
        problem.labels_N,
        teacher_rows(problem),
        loss_of(DEFAULT),
    )
    for logits, labels, rows, message in (
        (logits_NV, labels_N[:1], teacher, "labels_N: 1 rows for 8 rows"),
        (logits_NV[:1], labels_N, teacher, "labels_N: 8 rows for 1 rows"),
        (logits_NV, labels_N, teacher.at(slice(0, 1)), "ids_PK: 1 rows for 8 rows"),
    ):
        with pytest.raises(ValueError, match=message.replace("8", str(len(labels_N)))):
            loss(logits, labels, shard, rows)


def test_fields_that_an_objective_does_not_need_may_be_missing():
    problem, shard = mixed_rows(1.0), whole_vocabulary(mixed_rows(1.0))
    whole = teacher_rows(problem)
    bare = replace(
        whole, temperatures=(9.0,), label_logprobs_P=None, tail_token_ids_PM=None
    )
    for one in every_definition([(0.5, 2.0)]):
        needed = {
            name: getattr(whole, name)
            for name in Divergence(**one.of_divergence()).needs
        }
        if "tail_mass_PT" in needed:
            needed["temperatures"] = whole.temperatures
        teacher = replace(bare, **needed)
        kd_N = loss_of(one)(
            problem.logits_NV.clone(), problem.labels_N, shard, teacher
        ).kd_N
        torch.testing.assert_close(kd_N, solve_alone(problem, one)[1], rtol=0, atol=0)


@pytest.mark.parametrize("support", ["tail", "sampled", "label"])
def test_half_precision_rounds_the_gradient_once(support):
    """Compiled too, at labels that the student is nearly sure of: q - 1 is no difference of rounded numbers."""
    problem = random_problem(60, 300, 7, seed=5)
    confident = torch.linspace(8, 18, 60, dtype=torch.float64)
    logits_NV = problem.logits_NV.scatter_add(
        1, problem.labels_N[:, None], confident[:, None]
    ).to(torch.bfloat16)
    samples_NM = torch.cat(
        [problem.labels_N[:, None]] * 2 + [problem.tail_token_ids_NM], dim=1
    )
    teacher = replace(teacher_rows(problem), tail_token_ids_PM=samples_NM)
    shard = VocabShard.of(300, 300)

    def gradient(logits_NV: torch.Tensor, compile: bool = False) -> torch.Tensor:
        leaf = logits_NV.clone().requires_grad_()
        losses = DistillationLoss(Divergence("forward_kl", support), compile=compile)(
            leaf * 1, problem.labels_N, shard, teacher
        )
        (losses.ce_N.sum() + losses.kd_N.sum()).backward()
        return leaf.grad.double()

    exact = gradient(logits_NV.double())
    for compile in (False, True):
        found = gradient(logits_NV, compile)
        assert ((found - exact).norm(dim=1) < 2**-8 * exact.norm(dim=1)).all()
