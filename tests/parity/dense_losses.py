"""Plain definitions of the student's losses on the whole vocabulary, row by row, for autograd to differentiate.

Written from the textbook formulas, in float64, without a thought for speed or memory. Also makes the problems that the
tests solve both ways.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch

from nemo_kd.batch import SMALLEST_SAMPLED_TAIL
from nemo_kd.config.loss import Divergence

SMALLEST_TAIL = 1e-12  # the teacher's tail bucket never counts for less
LABEL_OBJECTIVES = ("k1", "k2", "k3", "low_var_kl")
OBJECTIVES = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "tvd",
    "adaptive_kl",
)
SUPPORTS = ("renormalize", "tail", "truncate", "label")
INFINITE = tuple(
    (objective, support)
    for objective in ("reverse_kl", "adaptive_kl")
    for support in ("truncate", "label")
)
COMBINATIONS = tuple(
    (o, s) for o in OBJECTIVES for s in SUPPORTS if (o, s) not in INFINITE
)
NEGATIVE_INFINITY = float("-inf")


@dataclass(frozen=True)
class Definition(Divergence):
    """What to compute: the settings of the divergence, and those of the cross-entropy."""

    label_smoothing: float = 0.0
    z_loss_weight: float = 0.0

    def of_divergence(self) -> dict[str, float | str]:
        """The arguments of `Divergence`."""
        names = [field.name for field in fields(Divergence)]
        return {name: getattr(self, name) for name in names}


DEFAULT = Definition()


@dataclass(frozen=True)
class Problem:
    """Student logits over the real vocabulary, what the teacher said, and the gradient that comes in per position."""

    logits_NV: torch.Tensor
    labels_N: torch.Tensor
    topk_logits_NK: torch.Tensor
    topk_token_ids_NK: torch.Tensor
    tail_mass_N: torch.Tensor
    label_logprobs_N: torch.Tensor
    tail_token_ids_NM: torch.Tensor
    ce_weight_N: torch.Tensor
    kd_weight_N: torch.Tensor

    def map(self, function) -> Problem:
        return replace(
            self,
            **{
                field.name: function(getattr(self, field.name))
                for field in fields(self)
            },
        )

    def rows(self, rows) -> Problem:
        return self.map(lambda tensor: tensor[rows])

    def cast(self, dtype: torch.dtype) -> Problem:
        """The float tensors of student and teacher rounded to `dtype` (tail and weights at least to float32)."""
        small = ("logits_NV", "topk_logits_NK")
        wide = torch.promote_types(dtype, torch.float32)
        floats = [
            field.name
            for field in fields(self)
            if getattr(self, field.name).is_floating_point()
        ]
        return replace(
            self,
            **{
                name: getattr(self, name).to(dtype if name in small else wide)
                for name in floats
            },
        )


def make_problem(
    teacher_NV: torch.Tensor,
    logits_NV: torch.Tensor,
    ids_NK: torch.Tensor,
    labels_N: torch.Tensor,
    teacher_scale: float = 1.0,
    num_samples: int = 3,
    seed: int = 0,
) -> Problem:
    """The problem of a teacher with logits `teacher_NV` that keeps `ids_NK`: exact tails, samples drawn with return."""
    generator = torch.Generator().manual_seed(seed)
    num_rows = len(teacher_NV)
    kept_NK = teacher_NV.gather(1, ids_NK)
    kept_NK, order_NK = kept_NK.sort(dim=1, descending=True)
    ids_NK = ids_NK.gather(1, order_NK)
    outside_NV = torch.ones_like(teacher_NV).scatter_(1, ids_NK, 0.0)
    tail_NV = torch.softmax(teacher_NV * teacher_scale, 1) * outside_NV
    drawable_NV = torch.where(tail_NV.sum(1, keepdim=True) > 0, tail_NV, 1.0)
    samples_NM = torch.multinomial(
        drawable_NV, num_samples, replacement=True, generator=generator
    )
    return Problem(
        logits_NV=logits_NV,
        labels_N=labels_N,
        topk_logits_NK=kept_NK - kept_NK[:, :1],
        topk_token_ids_NK=ids_NK,
        tail_mass_N=tail_NV.sum(1).clamp(max=1),  # rounding
        label_logprobs_N=torch.log_softmax(teacher_NV, 1).gather(1, labels_N[:, None])[
            :, 0
        ],
        tail_token_ids_NM=samples_NM.masked_fill(
            tail_NV.sum(1)[:, None] < SMALLEST_SAMPLED_TAIL, -1
        ),
        ce_weight_N=torch.rand(num_rows, generator=generator, dtype=torch.float64)
        + 0.1,
        kd_weight_N=torch.rand(num_rows, generator=generator, dtype=torch.float64)
        + 0.1,
    )


def random_problem(
    num_rows: int,
    vocab_size: int,
    k: int,
    *,
    wanted_ids: tuple[int, ...] = (),
    spread: float = 3.0,
    teacher_scale: float = 1.0,
    seed: int = 0,
) -> Problem:
    """Random student and teacher. `wanted_ids` are kept in every row, beside random ids, and are labels in turn."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, vocab_size)
    teacher_NV = torch.randn(shape, generator=generator, dtype=torch.float64) * spread
    logits_NV = torch.randn(shape, generator=generator, dtype=torch.float64) * spread
    priority_NV = torch.rand(shape, generator=generator)
    wanted = torch.tensor(wanted_ids[: max(k - 1, 0)], dtype=torch.int64)
    priority_NV[:, wanted] += 1
    labels_N = torch.randint(vocab_size, (num_rows,), generator=generator)
    for row in range(0, num_rows, 2):
        labels_N[row] = (
            wanted_ids[row // 2 % len(wanted_ids)] if wanted_ids else labels_N[row]
        )
    return make_problem(
        teacher_NV,
        logits_NV,
        priority_NV.topk(k).indices,
        labels_N,
        teacher_scale,
        seed=seed,
    )


def forget(problem: Problem, row: int, num_used: int) -> Problem:
    """`problem` with only the first `num_used` entries of `row` kept. The rest joins the teacher's tail mass."""
    logits_NK, ids_NK = (
        problem.topk_logits_NK.clone(),
        problem.topk_token_ids_NK.clone(),
    )
    tail_N = problem.tail_mass_N.clone()
    lost = torch.softmax(logits_NK[row], 0)[num_used:].sum()
    tail_N[row] = tail_N[row] + (1 - tail_N[row]) * lost
    logits_NK[row, num_used:] = NEGATIVE_INFINITY
    ids_NK[row, num_used:] = -1
    return replace(
        problem, topk_logits_NK=logits_NK, topk_token_ids_NK=ids_NK, tail_mass_N=tail_N
    )


def dense_losses(
    problem: Problem, definition: Definition
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ce_N, kd_N, gradient of their weighted sum with respect to the logits), all float64."""
    problem = problem.map(
        lambda tensor: tensor.double() if tensor.is_floating_point() else tensor.long()
    )
    leaf_NV = problem.logits_NV.clone().requires_grad_()
    num_rows = len(leaf_NV)
    ce_N = torch.stack(
        [
            _cross_entropy(leaf_NV[n], problem.labels_N[n], definition)
            for n in range(num_rows)
        ]
    )
    kd_N = (
        torch.stack(
            [_divergence(leaf_NV[n], problem, n, definition) for n in range(num_rows)]
        )
        * definition.factor
    )
    (
        (ce_N * problem.ce_weight_N).sum() + (kd_N * problem.kd_weight_N).sum()
    ).backward()
    assert leaf_NV.grad is not None
    return ce_N.detach(), kd_N.detach(), leaf_NV.grad


def _cross_entropy(
    z_V: torch.Tensor, label: torch.Tensor, definition: Definition
) -> torch.Tensor:
    ce = torch.nn.functional.cross_entropy(
        z_V[None], label[None], label_smoothing=definition.label_smoothing
    )
    return ce + definition.z_loss_weight * torch.logsumexp(z_V, 0) ** 2


def _divergence(
    z_V: torch.Tensor, problem: Problem, row: int, definition: Definition
) -> torch.Tensor:
    if definition.objective in LABEL_OBJECTIVES:
        log_ratio = (
            torch.log_softmax(z_V, 0)[problem.labels_N[row]]
            - problem.label_logprobs_N[row]
        )
        return _label_objective(log_ratio, definition.objective)
    ids = problem.topk_token_ids_NK[row]
    teacher_K, ids = problem.topk_logits_NK[row][ids >= 0], ids[ids >= 0]
    if len(ids) == 0:
        return z_V.sum() * 0
    log_head_K = torch.log_softmax(teacher_K * definition.teacher_scale, 0)
    if definition.support == "renormalize":
        return _of_entries(
            log_head_K,
            torch.log_softmax(z_V[ids] * definition.student_scale, 0),
            definition,
        )
    tail = problem.tail_mass_N[row]
    log_q_V = torch.log_softmax(z_V * definition.student_scale, 0)
    log_p_K = log_head_K + torch.log(1 - tail)
    if definition.support == "sampled":
        samples = problem.tail_token_ids_NM[row]
        weight = tail.clamp(min=SMALLEST_SAMPLED_TAIL) / len(samples)
        return (
            _kl(log_p_K, log_q_V[ids])
            + torch.xlogy(tail, tail)
            - weight * log_q_V[samples[samples >= 0]].sum()
        )
    if definition.support == "label":  # over the whole vocabulary, without a bucket
        p_V = torch.zeros_like(z_V).detach().index_put((ids,), log_p_K.exp())
        p_V[problem.labels_N[row]] += tail
        return _of_entries(p_V.log(), log_q_V, definition)
    outside = torch.ones_like(z_V, dtype=torch.bool).index_fill(0, ids, False)
    tail = (
        tail.clamp(min=SMALLEST_TAIL)
        if definition.support == "tail"
        else torch.zeros_like(tail)
    )
    if not outside.any():  # the whole vocabulary is kept: there is no bucket
        return _of_entries(log_p_K, log_q_V[ids], definition)
    log_q_tail = torch.logsumexp(log_q_V[outside], 0)
    log_p = torch.cat([tail.log()[None], log_p_K])
    return _of_entries(
        log_p, torch.cat([log_q_tail[None], log_q_V[ids]]), definition, has_bucket=True
    )


def _label_objective(log_ratio: torch.Tensor, objective: str) -> torch.Tensor:
    if objective == "k1":
        return log_ratio
    if objective == "k2":
        return log_ratio**2 / 2
    k3 = torch.exp(-log_ratio) - 1 + log_ratio
    if (
        objective == "low_var_kl" and k3.abs() > 10
    ):  # clamped; autograd would multiply 0 by what may be infinite
        return log_ratio * 0 + torch.sign(k3).detach() * 10
    return k3


def _of_entries(
    log_p: torch.Tensor, log_q: torch.Tensor, definition: Definition, has_bucket=False
) -> torch.Tensor:
    """The divergence of two distributions over the same entries; the first is the tail bucket if there is one."""
    p, q = log_p.exp(), log_q.exp()
    objective, beta, skew = (
        definition.objective,
        definition.jsd_beta,
        definition.skew_lambda,
    )
    if objective == "forward_kl":
        return _kl(log_p, log_q)
    if objective == "reverse_kl":
        return _kl(log_q, log_p)
    if objective == "jsd":
        log_m = _mixture(log_p, log_q, beta)
        return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    if objective == "skewed_forward_kl":
        return _kl(log_p, _mixture(log_p, log_q, skew))
    if objective == "skewed_reverse_kl":
        return _kl(log_q, _mixture(log_p, log_q, 1 - skew))
    if objective == "tvd":
        return (p - q).abs().sum() / 2
    assert objective == "adaptive_kl"
    gap = (p - q).abs().detach()
    order = p.argsort()
    if has_bucket:
        order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + p[1:].argsort()])
    in_tail = torch.empty_like(p, dtype=torch.bool)
    in_tail[order] = p[order].cumsum(0) <= definition.adaptive_kl_alpha
    in_tail[0] |= has_bucket
    head_gap, tail_gap = gap[~in_tail].sum(), gap[in_tail].sum()
    forward_weight = head_gap / (head_gap + tail_gap) if gap.sum() > 0 else 0.5
    return forward_weight * _kl(log_p, log_q) + (1 - forward_weight) * _kl(
        log_q, log_p
    )


def _kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    some = log_a.exp() > 0  # 0 log 0 = 0
    return (log_a[some].exp() * (log_a[some] - log_b[some])).sum()


def _mixture(
    log_p: torch.Tensor, log_q: torch.Tensor, weight_of_p: float
) -> torch.Tensor:
    return torch.logaddexp(
        log_p + math.log(weight_of_p), log_q + math.log(1 - weight_of_p)
    )


def num_real_of(
    layout: str, vocab_size: int, world_size: int
) -> tuple[list[int], int]:
    """(real columns of each rank, columns of every rank) of a vocabulary cut over `world_size` ranks.

    even: as Megatron does it, padding at the end. uneven: all sizes differ and one of four ranks holds only padding.
    late: the last rank holds everything.
    """
    if layout == "even":
        columns = -(-vocab_size // world_size) + 1
        return [
            max(0, min(columns, vocab_size - rank * columns))
            for rank in range(world_size)
        ], columns
    first = vocab_size // 3
    real = {
        1: [vocab_size],
        2: [first, vocab_size - first],
        4: [first, 0, vocab_size - first - 1, 1],
    }[world_size]
    if layout == "late":
        real = [0] * (world_size - 1) + [vocab_size]
    return real, max(real) + 2


def cut(
    tensor_NV: torch.Tensor, layout: str, rank: int, world_size: int, padding: float
) -> tuple[torch.Tensor, int, int]:
    """(a rank's columns with `padding` in those that are no tokens, its first token id, how many tokens it holds)."""
    num_real, columns = num_real_of(layout, tensor_NV.shape[1], world_size)
    start = sum(num_real[:rank])
    local_Nv = tensor_NV.new_full((len(tensor_NV), columns), padding)
    local_Nv[:, : num_real[rank]] = tensor_NV[:, start : start + num_real[rank]]
    return local_Nv, start, num_real[rank]


def join(parts: list[torch.Tensor], layout: str, vocab_size: int) -> torch.Tensor:
    """The whole vocabulary's columns from those of all ranks; what the padding columns hold must be 0."""
    num_real, _ = num_real_of(layout, vocab_size, len(parts))
    for part, count in zip(parts, num_real, strict=True):
        assert not part[:, count:].any(), "padding columns got a gradient"
    return torch.cat(
        [part[:, :count] for part, count in zip(parts, num_real, strict=True)], dim=1
    )
