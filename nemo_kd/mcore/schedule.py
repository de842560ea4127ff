"""Passes over batches: forward alone, or forward and backward through Megatron's schedules.

Shape legend: B rows, S positions, H hidden size. Context parallelism cuts S over its ranks,
sequence parallelism cuts the rest over the tensor-parallel ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from nemo_kd.batch import Batch
from nemo_kd.mcore.groups import ProcessGroups, schedule_groups
from nemo_kd.mcore.model import chunks, hidden_states, unwrapped

LossFunction = Callable[[torch.Tensor, Batch], tuple[torch.Tensor, torch.Tensor | None]]
"""(hidden states [S, B, H], micro-batch) -> (loss summed over its loss tokens, sums or None)."""
Shape = tuple[int, int, int]


def run_batch(
    model: MegatronModule, batch: Batch, groups: ProcessGroups
) -> torch.Tensor | None:
    """Run one batch forward through this rank's stage: receive, compute, send.

    All ranks of a replica call it with the same whole batches in the same order; context-parallel
    ranks take their columns. A stage waits for the one before it. Its send waits until the next
    stage is done with the batch before, so that stages work on successive batches without a flush.
    The length must be a multiple of `config.model.length_multiple`.

    Returns:
        On the last stage `hidden_states` [S, B, H] of this rank's columns; else None.
    """
    gpt = unwrapped(model)
    mine = _context_part(batch, groups)
    stages = P2PCommunicator(groups.pipeline, gpt.config)
    received = stages.recv_forward(_stage_shape(gpt.config, mine), groups.is_first_stage)
    gpt.set_input_tensor(received)
    hidden_SBH = hidden_states(model, mine).contiguous()
    gpt.set_input_tensor(None)  # or it lives until the next batch
    stages.send_forward(hidden_SBH, groups.is_last_stage)
    return hidden_SBH if groups.is_last_stage else None


def loss_positions(
    batch: Batch, groups: ProcessGroups, every: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positions of this context-parallel rank that need teacher rows.

    Synchronizes with the GPU where the batch is on one: call it with the batch on the CPU.

    Args:
        every: include positions without a loss label, and the padding on an example's right.

    Returns:
        (positions for `hidden_at` of `run_batch`'s result, the same as b * S + s in the whole
        batch).
    """
    wanted_BS = batch.loss_mask_BS > 0
    if every and batch.cu_seqlens is not None:
        wanted_BS = torch.zeros_like(wanted_BS)
        wanted_BS[:, : int(batch.cu_seqlens[len(batch.indices_B)])] = True
    elif every:
        wanted_BS = (batch.indices_B >= 0)[:, None].expand_as(wanted_BS)
    num_positions = wanted_BS.shape[1]
    columns_s = context_positions(num_positions, groups.context_rank, groups.context_size)
    columns_s = columns_s.to(wanted_BS.device)
    rows_N, local_N = wanted_BS[:, columns_s].nonzero(as_tuple=True)
    return rows_N * len(columns_s) + local_N, rows_N * num_positions + columns_s[local_N]


def context_positions(num_positions: int, rank: int, size: int) -> torch.Tensor:
    """Return the columns of a batch that a context-parallel rank holds, in its order, int64.

    Of 2 * size chunks, rank r holds r, which sees few positions, and 2 * size - 1 - r, which sees
    many: all ranks have the same work. Megatron and Transformer Engine expect this order.
    """
    if size == 1:
        return torch.arange(num_positions)
    assert num_positions % (2 * size) == 0
    parts = torch.arange(num_positions).chunk(2 * size)
    return torch.cat([parts[rank], parts[2 * size - 1 - rank]])


def forward_backward(
    model: torch.nn.Module,
    micro_batches: Sequence[Batch],
    loss_function: LossFunction,
    forward_only: bool = False,
) -> torch.Tensor | None:
    """Run all micro-batches through the pipeline, one forward and one backward step at a time.

    All ranks call it with equally many micro-batches of any lengths, the ranks of a replica with
    the same ones, context-parallel ranks with their columns (`Batch.columns`). A batch moves to
    the model's device when its turn comes. Gradients are reduced over data- and context-parallel
    ranks and divided once by the global number of loss tokens, so they depend neither on the size
    nor on the number of micro-batches. `model` is the result of `wrap_for_training`.

    Returns:
        Float64 sum of the reports for this rank's columns; None without any, as before the last
        stage.
    """
    parts = chunks(model)
    gpt = unwrapped(parts[-1])
    device = next(gpt.parameters()).device

    def step(
        micro_batches: Iterator[Batch], model: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(micro_batches)
        if not unwrapped(
            model
        ).post_process:  # only the model's last part computes a loss
            batch = replace(batch, teacher=None)
        batch = batch.to(device)
        return hidden_states(model, batch), lambda hidden: _loss(
            loss_function, hidden, batch
        )

    model.train(not forward_only)
    groups = schedule_groups()
    stages: P2PCommunicator
    if len(parts) == 1:
        shapes = [_stage_shape(gpt.config, batch) for batch in micro_batches]
        stages = _Stages(groups.pp, gpt.config, shapes)
    else:
        # Megatron sends the shape of each tensor; it needlessly refuses this option with experts.
        config = copy.copy(gpt.config)
        config.variable_seq_lengths = True
        stages = P2PCommunicator(groups.pp, config)
        # Interleaved stages take as many micro-batches at a time as there are stages.
        missing = -len(micro_batches) % groups.pp.size()
        micro_batches = [*micro_batches, *[_without_loss(micro_batches)] * missing]
    iterators = [iter(micro_batches) for _ in parts]
    reports = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(parts) > 1 else iterators[0],
        model=list(parts),
        num_microbatches=len(micro_batches),
        seq_length=0,  # unused: `_Stages` has the shapes, interleaved stages receive them
        micro_batch_size=0,
        forward_only=forward_only,
        p2p_communicator=stages,
        pg_collection=groups,
    )
    sums = [report["sums"] for report in reports if report["sums"] is not None]
    return torch.stack(sums).sum(dim=0) if sums else None


class _Stages(P2PCommunicator):
    """Exchange between pipeline stages of micro-batches of different shapes.

    Every stage has all shapes. Megatron's `variable_seq_lengths` would send each shape before its
    tensor, and wait for the GPU to do so.
    """

    def __init__(
        self,
        group: torch.distributed.ProcessGroup,
        config: TransformerConfig,
        shapes: Sequence[Shape],
    ) -> None:
        super().__init__(group, config)
        self._forward = iter(shapes)
        self._backward = iter(shapes)

    def recv_forward(self, tensor_shapes: Any, is_first_stage: bool) -> Any:
        return super().recv_forward([next(self._forward)], is_first_stage)

    def recv_backward(self, tensor_shapes: Any, is_last_stage: bool) -> Any:
        return super().recv_backward([next(self._backward)], is_last_stage)

    def send_forward_recv_backward(
        self, output_tensors: Any, tensor_shapes: Any, is_last_stage: bool
    ) -> Any:
        shapes = [next(self._backward)]
        return super().send_forward_recv_backward(output_tensors, shapes, is_last_stage)

    def send_backward_recv_forward(
        self, input_tensor_grads: Any, tensor_shapes: Any, is_first_stage: bool
    ) -> Any:
        shapes = [next(self._forward)]
        return super().send_backward_recv_forward(
            input_tensor_grads, shapes, is_first_stage
        )


def _without_loss(micro_batches: Sequence[Batch]) -> Batch:
    """Return the shortest micro-batch without its loss tokens."""
    shortest = min(micro_batches, key=lambda batch: batch.tokens_BS.numel())
    return replace(
        shortest,
        loss_mask_BS=torch.zeros_like(shortest.loss_mask_BS),
        loss_positions_N=shortest.loss_positions_N[:0],
        teacher=None,
    )


def _stage_shape(config: TransformerConfig, batch: Batch) -> Shape:
    """Return the shape of the activations between stages."""
    num_rows, num_positions = batch.tokens_BS.shape
    if config.sequence_parallel:
        assert num_positions % config.tensor_model_parallel_size == 0
        num_positions //= config.tensor_model_parallel_size
    return num_positions, num_rows, config.hidden_size


def _context_part(batch: Batch, groups: ProcessGroups) -> Batch:
    """Return the batch with this context-parallel rank's columns of tokens and positions."""
    if groups.context_size == 1:
        return batch
    assert batch.cu_seqlens is None, "context parallelism does not split packed sequences"
    num_positions = batch.tokens_BS.shape[1]
    columns_s = context_positions(num_positions, groups.context_rank, groups.context_size)
    columns_s = columns_s.to(batch.tokens_BS.device)
    return replace(
        batch,
        tokens_BS=batch.tokens_BS[:, columns_s],
        position_ids_BS=batch.position_ids_BS[:, columns_s],
    )


def _loss(
    loss_function: LossFunction, hidden: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor | None]]:
    loss_sum, sums = loss_function(hidden, batch)
    num_tokens = loss_sum.new_full((), batch.loss_positions_N.numel(), dtype=torch.int)
    return (
        loss_sum,
        num_tokens,
        {"sums": None if sums is None else sums.detach().double()},
    )
