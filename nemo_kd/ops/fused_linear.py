"""Output projection, losses and both gradients block by block: logits of all positions never exist
at once.

The gradients are made in the forward pass, while a block's logits are there (Liger-Kernel, Hsu et
al. 2024, section 3.2); this needs the weights of the losses beforehand and saves a fourth matrix
product. The block's logits become its gradient in place.

Sums over blocks must be more exact than a bf16 weight. `main_grad` is; for a weight without it the
backward pass computes the logits once more, now in slices of the vocabulary with all positions, so
that each element of the gradient is one product, rounded once.

Shape legend: N positions, H hidden size, v this rank's vocabulary columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_kd.batch import TeacherRows
from nemo_kd.ops.distillation import DistillationLoss, TokenLosses
from nemo_kd.ops.student_logits import Slope, StudentLogits, write_gradient
from nemo_kd.ops.vocab import VocabShard, reduction_dtype, row_blocks

BLOCK_ROWS = 512
WEIGHT_SLICE_ELEMENTS = 1 << 23


def fused_linear_loss(
    loss: DistillationLoss,
    hidden_NH: Tensor,
    weight_vH: Tensor,
    labels_N: Tensor,
    shard: VocabShard,
    teacher: TeacherRows[Tensor] | None = None,
    ce_weight: float | Tensor = 1.0,
    kd_weight: float | Tensor = 1.0,
    block_rows: int = BLOCK_ROWS,
) -> tuple[Tensor, TokenLosses]:
    """Return (ce_weight * CE + kd_weight * divergence summed over all positions, the losses of each
    position outside autograd).

    The logits are `hidden_NH @ weight_vH.T`. A weight is a number, or a tensor with one for each
    position. Two all-reduces per block. The gradient of `hidden_NH` is this rank's part, to be
    summed over the ranks of the shard's group. If the weight has a `main_grad`, as Megatron's have,
    its gradient is added there in the forward pass: a caller with gradients enabled must then run
    backward, once. Otherwise backward returns it, in the weight's dtype and with one matrix product
    more. A frozen weight has none.

    Raises:
        ValueError: as `DistillationLoss`.
    """
    teacher = loss.checked(len(hidden_NH), labels_N, teacher, shard)
    total, *of_tokens = _FusedLinear.apply(
        hidden_NH,
        weight_vH,
        labels_N,
        teacher,
        shard,
        loss,
        [_of_rows(weight, hidden_NH) for weight in (ce_weight, kd_weight)],
        block_rows,
        torch.is_grad_enabled(),
    )
    return total, TokenLosses(*of_tokens)


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_vH: Tensor,
        labels_N: Tensor,
        teacher: TeacherRows[Tensor] | None,
        shard: VocabShard,
        loss: DistillationLoss,
        weights: Sequence[Tensor],
        block_rows: int,
        with_gradients: bool,
    ) -> tuple[Tensor | None, ...]:
        trains_weight = with_gradients and weight_vH.requires_grad
        main_grad = getattr(weight_vH, "main_grad", None) if trains_weight else None
        d_hidden_NH = torch.empty_like(hidden_NH) if with_gradients else None
        of_blocks = []
        ctx.blocks = []
        shape = (min(block_rows, len(hidden_NH)), len(weight_vH))
        buffer_Nv = hidden_NH.new_empty(shape)
        for rows in row_blocks(len(hidden_NH), 1, block_rows):
            some_NH = hidden_NH[rows]
            logits_Nv = torch.mm(some_NH, weight_vH.t(), out=buffer_Nv[: len(some_NH)])
            some = None if teacher is None else teacher.at(rows)
            losses, slopes, student = loss.evaluate(
                logits_Nv, labels_N[rows], some, shard
            )
            of_blocks.append(losses)
            if d_hidden_NH is None:
                continue
            of_rows = [weight_N[rows] for weight_N in weights]
            write_gradient(
                logits_Nv, logits_Nv, loss.scales, student, of_rows, slopes, shard
            )
            torch.mm(logits_Nv, weight_vH, out=d_hidden_NH[rows])
            if main_grad is not None:
                _add_product(main_grad, logits_Nv, some_NH)
            elif trains_weight:
                ctx.blocks.append((rows, student, slopes))
        found = [_joined(parts) for parts in zip(*of_blocks, strict=True)]
        ce_N, kd_N, *_ = found
        assert ce_N is not None
        total = (weights[0] * ce_N).sum()
        if kd_N is not None:
            total = total + (weights[1] * kd_N).sum()
        inputs = (hidden_NH, weight_vH) if ctx.blocks else ()
        ctx.save_for_backward(d_hidden_NH, *inputs)
        ctx.weight_with_main_grad = None if main_grad is None else weight_vH
        ctx.weights = weights
        ctx.options = (
            ctx.blocks,
            loss.scales,
            shard,
            max(shape[1], buffer_Nv.numel()),
        )
        of_tokens = [values for values in found if values is not None]
        ctx.mark_non_differentiable(*of_tokens)
        return total, *found

    @staticmethod
    def backward(
        ctx: Any, d_total: Tensor, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        d_hidden_NH, *inputs = ctx.saved_tensors
        unused = (None,) * 7
        if ctx.weight_with_main_grad is not None:
            # The gradient by the weight is in main_grad already.
            assert d_total.is_cuda or d_total == 1, (
                "scale ce_weight and kd_weight instead of the sum"
            )
            return d_hidden_NH, _stand_in(ctx.weight_with_main_grad), *unused
        d_weight_vH = None
        if ctx.blocks:
            weights = [d_total * weight for weight in ctx.weights]
            d_weight_vH = _weight_gradient(weights, *[*inputs, *ctx.options])
        return d_hidden_NH * d_total, d_weight_vH, *unused


def _weight_gradient(
    weights: Sequence[Tensor],
    hidden_NH: Tensor,
    weight_vH: Tensor,
    blocks: Sequence[tuple[slice, StudentLogits, Sequence[Slope]]],
    scales: Sequence[float],
    shard: VocabShard,
    max_logits: int,
) -> Tensor:
    """Return the weight's gradient, from logits of at most `max_logits` elements at a time.

    Args:
        weights: of the losses at every position, times the gradient by the sum.
        blocks: rows, and what the forward pass found there.
    """
    d_weight_vH = torch.empty_like(weight_vH)
    for columns in row_blocks(len(weight_vH), len(hidden_NH), max_logits):
        logits_Nv = hidden_NH @ weight_vH[columns].t()
        part = shard.part(columns)
        for rows, student, slopes in blocks:
            some_Nv = logits_Nv[rows]
            of_part = student.at(part)
            of_rows = [weight_N[rows] for weight_N in weights]
            write_gradient(some_Nv, some_Nv, scales, of_part, of_rows, slopes, part)
        torch.mm(logits_Nv.t(), hidden_NH, out=d_weight_vH[columns])
    return d_weight_vH


def _stand_in(weight_vH: Tensor) -> Tensor | None:
    """Return autograd's substitute for a gradient that is already in main_grad.

    Megatron may reduce gradients during the backward pass, once autograd has delivered one to every
    weight. `grad_added_to_main_grad` keeps it from adding this one. A weight that is the embedding
    too (`zero_out_wgrad`) also has the embedding's gradient, which has to be added.
    """
    if not hasattr(weight_vH, "grad_added_to_main_grad") or getattr(
        weight_vH, "zero_out_wgrad", False
    ):
        return None
    weight_vH.grad_added_to_main_grad = True
    return torch.empty_like(weight_vH)


def _of_rows(weight: float | Tensor, hidden_NH: Tensor) -> Tensor:
    """Return a weight for every row, in the dtype of the losses."""
    if isinstance(weight, Tensor):
        return weight.to(reduction_dtype(hidden_NH))
    return hidden_NH.new_full(
        (len(hidden_NH),), weight, dtype=reduction_dtype(hidden_NH)
    )


def _joined(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    """Join the values of all blocks; None stands for a loss that is not computed."""
    given = [part for part in parts if part is not None]
    return torch.cat(given) if given else None


def _add_product(sum_vH: Tensor, gradient_Nv: Tensor, hidden_NH: Tensor) -> None:
    """Add gradient.T @ hidden to the sum, without a second tensor of the weight's size."""
    if sum_vH.dtype == gradient_Nv.dtype:
        sum_vH.addmm_(gradient_Nv.t(), hidden_NH)
        return
    for columns in row_blocks(len(sum_vH), hidden_NH.shape[1], WEIGHT_SLICE_ELEMENTS):
        sum_vH[columns] += gradient_Nv[:, columns].t() @ hidden_NH
