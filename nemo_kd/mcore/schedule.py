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
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from nemo_kd.batch import Batch, context_positions
from nemo_kd.mcore.groups import ProcessGroups
from nemo_kd.mcore.model import chunks, hidden_states, unwrapped

LossFunction = Callable[
    [torch.Tensor, Batch], tuple[torch.Tensor, torch.Tensor | None]
]
"""(hidden states [S, B, H], micro-batch) -> (loss summed over its loss tokens, sums or None)."""
_ANY_SHAPE = (0, 0, 0)
"""The sender's shape counts."""


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
    mine = batch.context_part(groups.context_rank, groups.context_size)
    return run_stages(
        model, groups, lambda stage: hidden_states(stage, mine.to(groups.device))
    )


def run_stages(
    model: torch.nn.Module,
    groups: ProcessGroups,
    compute: Callable[[torch.nn.Module], torch.Tensor],
) -> torch.Tensor | None:
    """Run `compute` on this rank's chunks, each between receiving and sending hidden states.

    Returns:
        On the last stage the last chunk's hidden states; else None.
    """
    parts = chunks(model)
    stages = _stages(groups.pipeline, unwrapped(parts[0]).config)
    for part in parts:
        is_first = groups.is_first_stage and part is parts[0]
        is_last = groups.is_last_stage and part is parts[-1]
        gpt = unwrapped(part)
        received = stages.recv_forward(_ANY_SHAPE, is_first)
        if received is not None:
            received = received.detach()  # Megatron asks for its gradient
        gpt.set_input_tensor(received)
        hidden_SBH = compute(part).contiguous()
        gpt.set_input_tensor(None)  # or it lives until the next batch
        stages.send_forward(hidden_SBH, is_last)
    return hidden_SBH if groups.is_last_stage else None


def loss_positions(
    batch: Batch, groups: ProcessGroups, every: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positions of this context-parallel rank that need teacher rows.

    Synchronizes with the GPU where the batch is on one: call it with the batch on the CPU.

    Args:
        every: include positions without a loss label, and padding.

    Returns:
        (positions for `hidden_at` of `run_batch`'s result, the same as b * S + s in the whole
        batch).
    """
    mask_BS = torch.ones_like(batch.loss_mask_BS) if every else batch.loss_mask_BS
    num_positions = mask_BS.shape[1]
    columns_s = context_positions(
        num_positions, groups.context_rank, groups.context_size
    )
    rows_N, local_N = (mask_BS[:, columns_s] > 0).nonzero(as_tuple=True)
    return rows_N * len(columns_s) + local_N, rows_N * num_positions + columns_s[
        local_N
    ]


GROUPS = ["tp", "pp", "cp", "dp_cp", "embd", "pos_embd"]
"""Groups that Megatron's schedules use."""


def forward_backward(
    model: torch.nn.Module,
    micro_batches: Sequence[Batch],
    loss_function: LossFunction,
    forward_only: bool = False,
) -> torch.Tensor | None:
    """Run all micro-batches through the pipeline, one forward and one backward step at a time.

    All ranks call it with equally many micro-batches of any lengths, the ranks of a replica with
    the same ones, context-parallel ranks with their columns. A batch moves to the model's device
    when its turn comes. Gradients are reduced over data- and context-parallel ranks and divided
    once by the global number of loss tokens, so they depend neither on the size nor on the number
    of micro-batches. `model` is the result of `wrap_for_training`.

    Returns:
        Float64 sum of the reports for this rank's columns; None without any, as before the last
        stage.
    """
    parts = chunks(model)
    device = next(parts[-1].parameters()).device

    def step(
        micro_batches: Iterator[Batch], model: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(micro_batches)
        if not unwrapped(model).post_process:  # only the last part computes a loss
            batch = replace(batch, teacher=None)
        batch = batch.to(device)

        def loss(hidden: torch.Tensor) -> tuple[Any, ...]:
            loss_sum, sums = loss_function(hidden, batch)
            count = len(batch.loss_positions_N)
            num_tokens = loss_sum.new_full((), count, dtype=torch.int)
            return (
                loss_sum,
                num_tokens,
                sums if sums is None else sums.detach().double(),
            )

        return hidden_states(model, batch), loss

    model.train(not forward_only)
    groups = ProcessGroupCollection.use_mpu_process_groups(GROUPS)
    if len(parts) > 1:
        micro_batches = _filled(micro_batches, groups.pp.size())
    reports = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(micro_batches) for _ in parts],
        model=list(parts),
        num_microbatches=len(micro_batches),
        seq_length=0,  # unused, as stages send the shapes
        micro_batch_size=0,
        forward_only=forward_only,
        p2p_communicator=_stages(groups.pp, unwrapped(parts[-1]).config),
        pg_collection=groups,
    )
    found = [report for report in reports if report is not None]
    return torch.stack(found).sum(dim=0) if found else None


def _filled(micro_batches: Sequence[Batch], num_stages: int) -> list[Batch]:
    """Add micro-batches without a loss: interleaved stages take `num_stages` at a time."""
    shortest = min(micro_batches, key=lambda batch: batch.tokens_BS.numel())
    filler = replace(
        shortest,
        loss_mask_BS=torch.zeros_like(shortest.loss_mask_BS),
        loss_positions_N=shortest.loss_positions_N[:0],
        in_kd_N=None,
        teacher=None,
    )
    missing = -len(micro_batches) % num_stages
    return [*micro_batches, *[filler] * missing]


def _stages(
    group: torch.distributed.ProcessGroup, config: TransformerConfig
) -> P2PCommunicator:
    """Return the exchange between pipeline stages, which sends each tensor's shape first."""
    config = copy.copy(config)  # Megatron needlessly refuses this option with experts
    config.variable_seq_lengths = True
    return P2PCommunicator(group, config)
