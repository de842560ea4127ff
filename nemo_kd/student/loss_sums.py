"""Sums of the losses and other figures of a micro-batch, and the means that are reported.

Shape legend: N positions in the loss, R sources of the data and all of them together, M sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_kd.batch import Batch
from nemo_kd.ops.distillation import TokenLosses
from nemo_kd.ops.token_losses import COMPARED
from nemo_kd.student.token_weights import token_weights

REPORTED = ("loss", "kd_loss", "sft_loss", *COMPARED, "entropy", "response_length")
"""Names of the sums of which means are reported."""
COLUMNS = (
    *REPORTED,
    "kd_part",
    "in_kd",
    "compared",
    "examples",
    "in_sft",
    "positions",
)
"""Columns of the sums: `REPORTED`; the KD term's part of `loss`; then what means divide by: sums of
the token weights, tokens with teacher targets, examples with tokens in the loss, and positions."""
DIVISORS = {
    "kd_loss": "in_kd",
    "entropy": "positions",
    "response_length": "examples",
} | dict.fromkeys(COMPARED, "compared")
"""Columns that means divide by; `in_sft` for others."""


def sums_of(
    losses: TokenLosses,
    batch: Batch,
    weights: tuple[Tensor, Tensor],
    objective: tuple[Tensor, Tensor],
    num_sources: int,
) -> Tensor:
    """Return the sums [R, M] of a micro-batch, float64.

    Args:
        weights: token weights of the cross-entropy and of the KD term.
        objective: the same times the weights of both terms.
        num_sources: 0 for all sources together only.
    """
    ce_N = losses.ce_N.detach().double()
    zeros_N = torch.zeros_like(ce_N)
    kd_N = zeros_N if losses.kd_N is None else losses.kd_N.detach().double()
    is_label_N = (weights[0] > 0).double()
    of_examples_N = token_weights(batch, batch.loss_lengths_B, "sample")
    values = {
        "loss": objective[0] * ce_N + objective[1] * kd_N,
        "kd_loss": weights[1] * kd_N,
        "sft_loss": weights[0] * ce_N,
        "response_length": is_label_N,
        "kd_part": objective[1] * kd_N,
        "in_kd": weights[1],
        "examples": is_label_N * of_examples_N,
        "in_sft": weights[0],
        "positions": torch.ones_like(ce_N),
    }
    if losses.entropy_N is not None:
        values["entropy"] = losses.entropy_N
    if losses.compared is not None:  # else no cache, or nothing but filler
        compared = losses.compared.unbind(dim=-1)
        values |= dict(zip(("compared", *COMPARED), compared, strict=True))
    columns = [values.get(name, zeros_N).double() for name in COLUMNS]
    values_NM = torch.stack(columns, dim=-1)
    sums_RM = values_NM.new_zeros(num_sources + 1, len(COLUMNS))
    sums_RM[-1] = values_NM.sum(dim=0)
    if num_sources:
        sources_N = batch.sources_of(batch.loss_positions_N)
        sums_RM[:-1].index_add_(0, sources_N, values_NM)
    return sums_RM


def means_of(row: Sequence[float]) -> dict[str, float]:
    """Return the means of a row of sums, in the order of `REPORTED`; none over no tokens."""
    sums = dict(zip(COLUMNS, row, strict=True))
    means = {}
    for name in REPORTED:
        divisor = sums[DIVISORS.get(name, "in_sft")]
        if divisor:
            means[name] = sums[name] / divisor
    if "loss" in means and sums["in_kd"]:
        # Each term is divided by its own count.
        kd_part = sums["kd_part"]
        means["loss"] += kd_part / sums["in_kd"] - kd_part / sums["in_sft"]
    return means
