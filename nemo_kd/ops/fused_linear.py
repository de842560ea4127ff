"""Output projection, losses and both gradients block by block: logits of all positions never exist
at once.

The gradients are made in the forward pass, while a block's logits are there (Liger-Kernel, Hsu et
al. 2024, section 3.2); this needs the weights of the losses beforehand and saves a fourth matrix
product. The block's logits become its gradient in place.

Shape legend: N positions, H hidden size, v this rank's vocabulary columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo_kd.batch import TeacherRows
from nemo_kd.ops.distillation import DistillationLoss, TokenLosses
from nemo_kd.ops.student_logits import write_gradient
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
    ce_weight: float = 1.0,
    kd_weight: float = 1.0,
    block_rows: int = BLOCK_ROWS,
) -> tuple[Tensor, TokenLosses]:
    """Return (ce_weight * CE + kd_weight * divergence summed over all positions, the losses of each
    position outside autograd).

    The logits are `hidden_NH @ weight_vH.T`. Two all-reduces per block. The gradient of `hidden_NH`
    is this rank's part, to be summed over the ranks of the shard's group. The gradient of the
    weight is summed in float32. If the weight has a `main_grad`, as Megatron's have, it is added
    there in the forward pass: a caller with gradients enabled must then run backward, once.
    Otherwise backward returns it in the weight's dtype. A frozen weight has none.

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
        (ce_weight, kd_weight),
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
        weights: tuple[float, float],
        block_rows: int,
        with_gradients: bool,
    ) -> tuple[Tensor | None, ...]:
        main_grad = d_hidden_NH = d_weight_vH = None
        if with_gradients:
            d_hidden_NH = torch.empty_like(hidden_NH)
        if with_gradients and weight_vH.requires_grad:
            d_weight_vH = main_grad = getattr(weight_vH, "main_grad", None)
            if main_grad is None:
                dtype = reduction_dtype(hidden_NH)
                d_weight_vH = torch.zeros_like(weight_vH, dtype=dtype)
        of_blocks = []
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
            weighted = [
                (torch.full_like(losses.ce_N, weight), slope)
                for weight, slope in zip(weights, slopes, strict=False)
            ]
            write_gradient(
                logits_Nv,
                logits_Nv,
                loss.scales,
                student,
                weighted,
                shard,
                loss.compile,
            )
            torch.mm(logits_Nv, weight_vH, out=d_hidden_NH[rows])
            if d_weight_vH is not None:
                _add_product(d_weight_vH, logits_Nv, some_NH)
        ce_N, kd_N, compared = map(_joined, zip(*of_blocks, strict=True))
        assert ce_N is not None
        total = weights[0] * ce_N.sum()
        if kd_N is not None:
            total = total + weights[1] * kd_N.sum()
        ctx.save_for_backward(d_hidden_NH, d_weight_vH if main_grad is None else None)
        ctx.weight_with_main_grad = None if main_grad is None else weight_vH
        ctx.weight_dtype = weight_vH.dtype
        of_tokens = [values for values in (ce_N, kd_N, compared) if values is not None]
        ctx.mark_non_differentiable(*of_tokens)
        return total, ce_N, kd_N, compared

    @staticmethod
    def backward(
        ctx: Any, d_total: Tensor, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        d_hidden_NH, d_weight_vH = ctx.saved_tensors
        unused = (None,) * 7
        if ctx.weight_with_main_grad is not None:
            # The gradient by the weight is in main_grad already.
            assert d_total.is_cuda or d_total == 1, (
                "scale ce_weight and kd_weight instead of the sum"
            )
            return d_hidden_NH, _stand_in(ctx.weight_with_main_grad), *unused
        if d_weight_vH is not None:
            d_weight_vH = (d_weight_vH * d_total).to(ctx.weight_dtype)
        return d_hidden_NH * d_total, d_weight_vH, *unused


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
