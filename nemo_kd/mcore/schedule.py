"""Forward and backward passes over micro-batches, through Megatron's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule

from nemo_kd.batch import Batch

LossFunction = Callable[[torch.Tensor, Batch], tuple[torch.Tensor, torch.Tensor]]
"""(logits [B, S, v], micro-batch) -> (loss summed over its loss tokens, sums to report; the last is the token count)."""


def forward(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Logits [B, S, v] of this rank's vocabulary columns, padding columns included."""
    return model(batch.tokens_BS, batch.position_ids_BS, None)


def forward_backward(
    model: MegatronModule, micro_batches: Sequence[Batch], loss_function: LossFunction, forward_only: bool = False
) -> torch.Tensor:
    """Runs all micro-batches and returns the sum of what `loss_function` reports (float64, this data-parallel rank).

    With gradients: they are reduced over data-parallel ranks and divided once by the global number of loss tokens, so
    they depend neither on the size nor on the number of micro-batches.
    """

    def step(micro_batches: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(micro_batches)
        return forward(model, batch), lambda logits: _loss(loss_function, logits, batch)

    model.train(not forward_only)
    reports = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(micro_batches),
        model=[model],
        num_microbatches=len(micro_batches),
        seq_length=micro_batches[0].tokens_BS.shape[1],
        micro_batch_size=len(micro_batches[0].tokens_BS),
        forward_only=forward_only,
    )
    return torch.stack([report["sums"] for report in reports]).sum(dim=0)


def _loss(
    loss_function: LossFunction, logits: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    loss_sum, sums = loss_function(logits, batch)
    return loss_sum, sums[-1].round().int(), {"sums": sums.detach().double()}
