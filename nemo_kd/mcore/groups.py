"""Divide the ranks into Megatron's process groups, and seed, save and set random generators."""

from __future__ import annotations

import functools
import gc
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel import (
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
)

from nemo_kd.config.model import PARALLEL_SIZES, ParallelConfig
from nemo_kd.mcore.cpu import install_cpu_support

RANK_ORDER = "tp-cp-ep-dp-pp"
"""Tensor-parallel ranks are adjacent, pipeline stages farthest apart."""


@dataclass(frozen=True)
class ProcessGroups:
    """Place of this process. A replica is the tensor x pipeline x context ranks of one model copy.

    Attributes:
        tensor: ranks that share this rank's layers.
        pipeline: this rank and those at its place in the other stages, first stage to last.
        context: ranks with the same weights that share every sequence.
        data: ranks with the same shard in different replicas, which share no sequence.
        replica: all ranks of this rank's replica; always gloo, for Python objects.
        replica_ranks: their global ranks.
        lockstep: all ranks that must run every forward pass together, because one may hold experts
            that another's tokens need: several replicas with expert parallelism across them, else
            one; gloo.
        lockstep_lanes: number of replicas, hence of data-parallel ranks, in `lockstep`.
        lane: number of this rank's replica among them.
        writer_rank: global rank of the replica's writer: last stage, tensor and context rank 0.
        device: this process's GPU, or the CPU.
    """

    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    context: dist.ProcessGroup
    data: dist.ProcessGroup
    replica: dist.ProcessGroup
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    context_rank: int
    context_size: int
    data_rank: int
    data_size: int
    replica_ranks: tuple[int, ...]
    lockstep: dist.ProcessGroup
    lockstep_lanes: int
    lane: int
    writer_rank: int
    device: torch.device

    def layout(self) -> dict[str, int]:
        """Return the sizes of the groups; with equal sizes a rank has the same place."""
        return {
            "tensor": self.tensor_size,
            "pipeline": self.pipeline_size,
            "context": self.context_size,
            "data": self.data_size,
            "replicas in lockstep": self.lockstep_lanes,
        }

    @property
    def is_first_stage(self) -> bool:
        """True if this rank holds the embedding."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """True if this rank holds its part of the output layer."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def is_writer(self) -> bool:
        """True if this rank writes for its replica."""
        return dist.get_rank() == self.writer_rank


def initialize_model_parallel(parallel: ParallelConfig, seed: int) -> ProcessGroups:
    """Divide the ranks into groups and seed Megatron's random generators; every rank calls it.

    Groups of the same sizes are kept, others replaced. Needs a process group (`join_ranks`).

    Raises:
        ConfigError: the sizes do not divide the number of ranks.
    """
    install_cpu_support()
    parallel.data_parallel_size(dist.get_world_size())
    sizes = tuple(getattr(parallel, name) for name in PARALLEL_SIZES)
    groups = _process_groups(dist.group.WORLD, sizes, parallel.replicas_in_lockstep)
    chunks = parallel.chunks_per_stage
    parallel_state.set_virtual_pipeline_model_parallel_world_size(
        chunks if chunks > 1 else None
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return groups


@functools.lru_cache(maxsize=1)
def _process_groups(
    world: dist.ProcessGroup, sizes: tuple[int, ...], lanes: int
) -> ProcessGroups:
    """Replace all groups but the world; `lanes` replicas run in lockstep."""
    if parallel_state.model_parallel_is_initialized():
        _destroy_groups()
    parallel_state.initialize_model_parallel(
        **dict(zip(PARALLEL_SIZES, sizes, strict=True)), order=RANK_ORDER
    )
    tensor_size, pipeline_size, context_size, _ = sizes
    data = parallel_state.get_data_parallel_group()
    data_rank = data.rank()
    # A row a replica, in the order of `RANK_ORDER`.
    ranks = torch.arange(world.size()).view(
        pipeline_size, -1, context_size, tensor_size
    )
    replicas = ranks.transpose(0, 1).flatten(1)
    replica = _gloo_group(replicas, data_rank)
    lockstep = replica
    if lanes > 1:
        lockstep = _gloo_group(
            replicas.unflatten(0, (-1, lanes)).flatten(1), data_rank // lanes
        )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return ProcessGroups(
        tensor=parallel_state.get_tensor_model_parallel_group(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        context=parallel_state.get_context_parallel_group(),
        data=data,
        replica=replica,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=tensor_size,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=pipeline_size,
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=context_size,
        data_rank=data_rank,
        data_size=data.size(),
        replica_ranks=tuple(replicas[data_rank].tolist()),
        lockstep=lockstep,
        lockstep_lanes=lanes,
        lane=data_rank % lanes,
        writer_rank=int(ranks[-1, data_rank, 0, 0]),
        device=device,
    )


def _destroy_groups() -> None:
    """End all groups but the world: a gloo group wakes its thread a hundred times a second."""
    parallel_state.destroy_model_parallel()
    gc.collect()  # a model that is in a cycle keeps its groups
    # torch lists its groups nowhere else, and Megatron forgets them without ending them.
    for group in list(dist.distributed_c10d._world.pg_map):  # noqa: SLF001
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _gloo_group(members: torch.Tensor, mine: int) -> dist.ProcessGroup:
    """Make a gloo group for each row of global ranks, and return one of them."""
    return [dist.new_group(ranks, backend="gloo") for ranks in members.tolist()][mine]


def sharded_random_state() -> ShardedObject:
    """Return the state of this rank's random generators; it loads only into as many ranks."""
    state = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject(
        "random_state", state, (dist.get_world_size(),), (dist.get_rank(),)
    )


def set_random_state(state: dict[str, Any]) -> None:
    """Set every generator to the content of `sharded_random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["megatron"])
