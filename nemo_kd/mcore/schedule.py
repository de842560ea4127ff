"""Passes over batches: forward alone through the pipeline, or forward and backward through Megatron's schedules.

Shape legend: B rows, S positions, H hidden size, v this rank's part of the vocabulary. With context parallelism S is cut
among the context-parallel ranks, with sequence parallelism what is left among the tensor-parallel ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from nemo_kd.batch import Batch
from nemo_kd.mcore.attention import SDPACoreAttention
from nemo_kd.mcore.groups import ProcessGroups, schedule_groups
from nemo_kd.mcore.model import chunks

LossFunction = Callable[[torch.Tensor, Batch], tuple[torch.Tensor, torch.Tensor | None]]
"""(hidden states [S, B, H], micro-batch) -> (loss summed over its loss tokens, sums to report or None)."""
Shape = tuple[int, int, int]


def forward(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Logits [B, S, v] of this rank's vocabulary columns, padding columns included."""
    gpt: GPTModel = getattr(model, "module", model)
    return model(
        batch.tokens_BS,
        batch.position_ids_BS,
        None,
        packed_seq_params=_packed_seq_params(gpt, batch),
    )


def run_batch(model: MegatronModule, batch: Batch, groups: ProcessGroups) -> torch.Tensor | None:
    """One batch, forward, through this rank's pipeline stage: receives from the stage before, computes, sends on.

    All ranks of a replica call it with the same batches in the same order, whole ones; context-parallel ranks take
    their columns of them. A stage waits for the one before, and while it sends for the one after to be done with the
    batch before, so that the stages work on successive batches at a time and nothing has to be flushed between them.
    The length has to be a multiple of `config.model.length_multiple`.

    Returns:
        On the last stage hidden states [S, B, H] as `hidden_states` gives them, of this rank's columns; else None.
    """
    gpt: GPTModel = getattr(model, "module", model)
    mine = _context_part(batch, groups)
    stages = P2PCommunicator(groups.pipeline, gpt.config)
    gpt.set_input_tensor(stages.recv_forward(_stage_shape(gpt, mine), groups.is_first_stage))
    hidden_SBH = hidden_states(model, mine).contiguous()
    gpt.set_input_tensor(None)  # or it lives until the next batch
    stages.send_forward(hidden_SBH, groups.is_last_stage)
    return hidden_SBH if groups.is_last_stage else None


def loss_positions(
    batch: Batch, groups: ProcessGroups, every: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions of this context-parallel rank that teacher rows are wanted for.

    On a GPU it waits for it: better called with the batch as it is on the CPU.

    Args:
        every: not only those whose label counts in the loss but all of the rows that stand for an example, padding
            on their right included.

    Returns:
        (positions for `hidden_at` of `run_batch`'s result, the same positions as b * S + s in the whole batch).
    """
    wanted_BS = batch.loss_mask_BS > 0
    if every and batch.cu_seqlens is not None:
        wanted_BS = torch.zeros_like(wanted_BS)
        wanted_BS[:, : int(batch.cu_seqlens[len(batch.indices_B)])] = True
    elif every:
        wanted_BS = (batch.indices_B >= 0)[:, None].expand_as(wanted_BS)
    num_positions = wanted_BS.shape[1]
    columns_s = context_positions(num_positions, groups.context_rank, groups.context_size).to(
        wanted_BS.device
    )
    rows_N, local_N = wanted_BS[:, columns_s].nonzero(as_tuple=True)
    return rows_N * len(columns_s) + local_N, rows_N * num_positions + columns_s[local_N]


def context_positions(num_positions: int, rank: int, size: int) -> torch.Tensor:
    """The columns of a batch that a context-parallel rank holds, in its order, int64.

    Chunks r and 2 * size - 1 - r of 2 * size: an early one, which sees little, and a late one, so that all ranks have
    as much to do. Megatron and Transformer Engine count on this order.
    """
    if size == 1:
        return torch.arange(num_positions)
    assert num_positions % (2 * size) == 0
    chunks = torch.arange(num_positions).chunk(2 * size)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


def hidden_states(model: MegatronModule, batch: Batch) -> torch.Tensor:
    """What the output layer would take in: [S, B, H], with sequence parallelism this rank's part of S."""
    gpt: GPTModel = getattr(model, "module", model)
    post_process, gpt.post_process = gpt.post_process, False
    try:
        return forward(model, batch)
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


def hidden_at(
    hidden_SBH: torch.Tensor, positions_N: torch.Tensor, batch_size: int, gpt: GPTModel
) -> torch.Tensor:
    """Hidden states [N, H] at positions b * S + s, whose gradients are summed over the tensor-parallel ranks.

    With sequence parallelism all tensor-parallel ranks take part, and each gets the whole of S for the moment.
    """
    if gpt.config.sequence_parallel:
        hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH)
    length = len(hidden_SBH)
    hidden_NH = hidden_SBH.flatten(0, 1)[positions_N % length * batch_size + positions_N // length]
    return (
        hidden_NH
        if gpt.config.sequence_parallel
        else copy_to_tensor_model_parallel_region(hidden_NH)
    )


def forward_backward(
    model: torch.nn.Module,
    micro_batches: Sequence[Batch],
    loss_function: LossFunction,
    forward_only: bool = False,
) -> torch.Tensor | None:
    """Runs all micro-batches through the pipeline, one forward and one backward step at a time.

    `model` is what `wrap_for_training` made. All ranks call it with equally many micro-batches, those of a replica with the same ones, whatever their lengths;
    context-parallel ranks with their columns of them (`Batch.columns`). A batch goes to the model's device when its turn
    comes. With gradients: they are reduced over data- and context-parallel ranks and divided once by the global number
    of loss tokens, so they depend neither on the size nor on the number of micro-batches.

    Returns:
        The sum of what `loss_function` reports for this rank's columns (float64); None before the last stage, and
        where it reported nothing.
    """
    parts = chunks(model)
    gpt: GPTModel = getattr(parts[-1], "module", parts[-1])
    device = next(gpt.parameters()).device

    def step(
        micro_batches: Iterator[Batch], model: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(micro_batches)
        # Megatron asks none but the last part of the model for a loss.
        if not getattr(model, "module", model).post_process:
            batch = replace(batch, teacher=None)
        batch = batch.to(device)
        return hidden_states(model, batch), lambda hidden: _loss(loss_function, hidden, batch)

    model.train(not forward_only)
    groups = schedule_groups()
    stages: P2PCommunicator
    if len(parts) == 1:
        stages = _Stages(
            groups.pp, gpt.config, [_stage_shape(gpt, batch) for batch in micro_batches]
        )
    else:
        # Here it is Megatron that tells shapes, tensor by tensor. Its configuration refuses that with experts, needlessly.
        config = copy.copy(gpt.config)
        config.variable_seq_lengths = True
        stages = P2PCommunicator(groups.pp, config)
        # Interleaved stages take as many at a time as there are stages.
        micro_batches = [
            *micro_batches,
            *[_without_loss(micro_batches)] * (-len(micro_batches) % groups.pp.size()),
        ]
    iterators = [iter(micro_batches) for _ in parts]
    reports = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(parts) > 1 else iterators[0],
        model=list(parts),
        num_microbatches=len(micro_batches),
        seq_length=0,  # stands for nothing: `_Stages` knows the shapes, interleaved stages are told them
        micro_batch_size=0,
        forward_only=forward_only,
        p2p_communicator=stages,
        pg_collection=groups,
    )
    sums = [report["sums"] for report in reports if report["sums"] is not None]
    return torch.stack(sums).sum(dim=0) if sums else None


class _Stages(P2PCommunicator):
    """What pipeline stages send each other for micro-batches of different shapes.

    Every stage knows all of them, so nothing has to be told: Megatron's `variable_seq_lengths` exchanges each shape
    before each tensor, and waits for the GPU to do so.
    """

    def __init__(
        self,
        group: torch.distributed.ProcessGroup,
        config: TransformerConfig,
        shapes: Sequence[Shape],
    ) -> None:
        super().__init__(group, config)
        self._forward, self._backward = iter(shapes), iter(shapes)

    def recv_forward(self, tensor_shapes: Any, is_first_stage: bool) -> Any:
        return super().recv_forward([next(self._forward)], is_first_stage)

    def recv_backward(self, tensor_shapes: Any, is_last_stage: bool) -> Any:
        return super().recv_backward([next(self._backward)], is_last_stage)

    def send_forward_recv_backward(
        self, output_tensors: Any, tensor_shapes: Any, is_last_stage: bool
    ) -> Any:
        return super().send_forward_recv_backward(
            output_tensors, [next(self._backward)], is_last_stage
        )

    def send_backward_recv_forward(
        self, input_tensor_grads: Any, tensor_shapes: Any, is_first_stage: bool
    ) -> Any:
        return super().send_backward_recv_forward(
            input_tensor_grads, [next(self._forward)], is_first_stage
        )


def _without_loss(micro_batches: Sequence[Batch]) -> Batch:
    """The shortest micro-batch, with nothing to learn from it."""
    shortest = min(micro_batches, key=lambda batch: batch.tokens_BS.numel())
    return replace(
        shortest,
        loss_mask_BS=torch.zeros_like(shortest.loss_mask_BS),
        loss_positions_N=shortest.loss_positions_N[:0],
        teacher=None,
    )


def _stage_shape(gpt: GPTModel, batch: Batch) -> Shape:
    """Of the activations between stages."""
    num_rows, num_positions = batch.tokens_BS.shape
    if gpt.config.sequence_parallel:
        assert num_positions % gpt.config.tensor_model_parallel_size == 0
        num_positions //= gpt.config.tensor_model_parallel_size
    return num_positions, num_rows, gpt.config.hidden_size


def _context_part(batch: Batch, groups: ProcessGroups) -> Batch:
    """The batch with this context-parallel rank's columns of tokens and positions."""
    if groups.context_size == 1:
        return batch
    assert batch.cu_seqlens is None, "packed sequences are not shared among context-parallel ranks"
    columns_s = context_positions(
        batch.tokens_BS.shape[1], groups.context_rank, groups.context_size
    )
    columns_s = columns_s.to(batch.tokens_BS.device)
    return replace(
        batch,
        tokens_BS=batch.tokens_BS[:, columns_s],
        position_ids_BS=batch.position_ids_BS[:, columns_s],
    )


def _packed_seq_params(gpt: GPTModel, batch: Batch) -> PackedSeqParams | None:
    if batch.cu_seqlens is None:
        return None
    bounds = batch.cu_seqlens
    if not isinstance(gpt.decoder.layers[0].self_attention.core_attention, SDPACoreAttention):
        bounds = bounds.to(
            batch.tokens_BS.device
        )  # Transformer Engine reads it there; ours must not wait for the GPU
    # The exact length: Megatron takes rotary frequencies of the length of the whole row for those of its positions.
    longest = int(batch.cu_seqlens.diff().max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _loss(
    loss_function: LossFunction, hidden: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor | None]]:
    loss_sum, sums = loss_function(hidden, batch)
    num_tokens = loss_sum.new_full((), batch.loss_positions_N.numel(), dtype=torch.int)
    return loss_sum, num_tokens, {"sums": None if sums is None else sums.detach().double()}
