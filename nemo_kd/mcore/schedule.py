"""Forward and backward passes over micro-batches, through Megatron's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule

from nemo_kd.batch import Batch

LossFunction = Callable[[torch.Tensor, Batch], tuple[torch.Tensor, torch.Tensor]]
"""(hidden states [S, B, H], micro-batch) -> (loss summed over its loss tokens, sums to report; the last is the token count)."""


def forward(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Logits [B, S, v] of this rank's vocabulary columns, padding columns included."""
    return model(batch.tokens_BS, batch.position_ids_BS, None)


def hidden_states(model: MegatronModule, batch: Batch) -> torch.Tensor:
    """What the output layer would take in: [S, B, H], with sequence parallelism this rank's part of S."""
    gpt: GPTModel = getattr(model, "module", model)
    post_process, gpt.post_process = gpt.post_process, False
    try:
        return model(batch.tokens_BS, batch.position_ids_BS, None)
    finally:
        gpt.post_process = post_process


def output_weight(gpt: GPTModel) -> torch.nn.Parameter:
    """This rank's rows of the output projection, the embedding's where both are tied: [v, H]."""
    if gpt.share_embeddings_and_output_weights:
        return gpt.shared_embedding_or_output_weight()
    return gpt.output_layer.weight


def project(gpt: GPTModel, hidden_SBH: torch.Tensor) -> torch.Tensor:
    """Logits [B, S, v] of `hidden_states`."""
    logits_SBv, _ = gpt.output_layer(hidden_SBH, weight=output_weight(gpt))
    return logits_SBv.transpose(0, 1).contiguous()


def hidden_at(hidden_SBH: torch.Tensor, positions_N: torch.Tensor, batch_size: int, gpt: GPTModel) -> torch.Tensor:
    """Hidden states [N, H] at positions b * S + s, whose gradients are summed over the tensor-parallel ranks."""
    if gpt.config.sequence_parallel:
        hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH)
    length = len(hidden_SBH)
    hidden_NH = hidden_SBH.flatten(0, 1)[positions_N % length * batch_size + positions_N // length]
    return hidden_NH if gpt.config.sequence_parallel else copy_to_tensor_model_parallel_region(hidden_NH)


def forward_backward(
    model: MegatronModule, micro_batches: Sequence[Batch], loss_function: LossFunction, forward_only: bool = False
) -> torch.Tensor:
    """Runs all micro-batches and returns the sum of what `loss_function` reports (float64, this data-parallel rank).

    With gradients: they are reduced over data-parallel ranks and divided once by the global number of loss tokens, so
    they depend neither on the size nor on the number of micro-batches.
    """

    def step(micro_batches: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(micro_batches)
        return hidden_states(model, batch), lambda hidden: _loss(loss_function, hidden, batch)

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
    loss_function: LossFunction, hidden: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    loss_sum, sums = loss_function(hidden, batch)
    return loss_sum, sums[-1].round().int(), {"sums": sums.detach().double()}
