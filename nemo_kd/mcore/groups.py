"""Processes: joining them, and cutting them into groups. The only reader of parallel_state but `mcore.model`."""

from __future__ import annotations

import functools
import gc
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from nemo_kd.config.model import PARALLEL_SIZES, ParallelConfig
from nemo_kd.mcore.cpu import install_cpu_support

RANK_ORDER = "tp-cp-ep-dp-pp"
"""Which neighbours share what: tensor-parallel ranks are adjacent, pipeline stages farthest apart."""


@dataclass(frozen=True)
class ProcessGroups:
    """Where this process stands. A replica is the tensor x pipeline x context ranks that hold one copy of the model.

    Attributes:
        tensor: ranks that share this rank's layers.
        pipeline: this rank and those that stand at its place in the other stages, first stage to last.
        context: ranks with the same weights that share every sequence.
        data: ranks that hold the same shard in different replicas and share no sequence.
        replica: all ranks of this rank's replica; gloo, whatever the other groups use: for Python objects and agreement.
        replica_ranks: their global ranks.
        lockstep: all ranks that have to run every forward pass together, as one of them may hold experts that another's
            tokens need: several replicas with expert parallelism across them, else one; gloo.
        lockstep_lanes: number of replicas, and so of data-parallel ranks, in it.
        lane: number of this rank's replica among them.
        writer_rank: global rank of the one rank that speaks for the replica: last stage, tensor rank 0, context rank 0.
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
        """How the ranks are divided; where it is the same, a rank stands at the same place."""
        return {
            "tensor": self.tensor_size,
            "pipeline": self.pipeline_size,
            "context": self.context_size,
            "data": self.data_size,
            "replicas in lockstep": self.lockstep_lanes,
        }

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds (its part of) the output layer."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def is_writer(self) -> bool:
        """Whether this rank speaks for its replica."""
        return dist.get_rank() == self.writer_rank


def initialize_model_parallel(parallel: ParallelConfig, seed: int) -> ProcessGroups:
    """Cuts the ranks into groups and seeds every random generator that Megatron uses; all ranks take part.

    Groups of the same sizes are kept, others replaced. Needs a process group (`init_process_group`).

    Raises:
        ConfigError: the sizes do not divide the number of ranks.
    """
    install_cpu_support()
    data_size = parallel.data_parallel_size(dist.get_world_size())
    sizes = {name: getattr(parallel, name) for name in PARALLEL_SIZES}
    if parallel_state.model_parallel_is_initialized() and _sizes() != sizes:
        destroy_model_parallel()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(**sizes, order=RANK_ORDER)
    chunks = parallel.chunks_per_stage
    parallel_state.set_virtual_pipeline_model_parallel_world_size(chunks if chunks > 1 else None)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    tensor_size, pipeline_size, context_size, _ = sizes.values()
    data_rank = parallel_state.get_data_parallel_rank()
    replicas = _replicas(dist.group.WORLD, tensor_size, pipeline_size, context_size, data_size)
    replica, replica_ranks = replicas[data_rank]
    lanes = parallel.replicas_in_lockstep
    teams = (
        _joined(dist.group.WORLD, tuple(ranks for _, ranks in replicas), lanes)
        if lanes > 1
        else None
    )
    return ProcessGroups(
        tensor=parallel_state.get_tensor_model_parallel_group(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        context=parallel_state.get_context_parallel_group(),
        data=parallel_state.get_data_parallel_group(),
        replica=replica,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=tensor_size,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=pipeline_size,
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=context_size,
        data_rank=data_rank,
        data_size=data_size,
        replica_ranks=replica_ranks,
        lockstep=teams[data_rank // lanes] if teams else replica,
        lockstep_lanes=lanes,
        lane=data_rank % lanes,
        writer_rank=replica_ranks[-tensor_size * context_size],
        device=torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu"),
    )


def schedule_groups() -> ProcessGroupCollection:
    """The groups that Megatron's schedules and `finalize_model_grads` take; needs `initialize_model_parallel`."""
    return ProcessGroupCollection.use_mpu_process_groups(
        ["tp", "pp", "cp", "dp_cp", "embd", "pos_embd"]
    )


def destroy_model_parallel() -> None:
    """Ends all groups but the one of all ranks; every gloo group that is left would wake a thread a hundred times a second."""
    parallel_state.destroy_model_parallel()
    _replicas.cache_clear()
    _joined.cache_clear()
    gc.collect()  # a model that is in a cycle keeps its groups
    # torch lists its groups nowhere else, and Megatron forgets them without ending them.
    for group in list(dist.distributed_c10d._world.pg_map):  # noqa: SLF001
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _sizes() -> dict[str, int]:
    """The sizes of the groups that exist, by `PARALLEL_SIZES`."""
    found = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
    )
    return dict(zip(PARALLEL_SIZES, found, strict=True))


@functools.lru_cache(maxsize=4)
def _replicas(
    world: dist.ProcessGroup, tensor: int, pipeline: int, context: int, data: int
) -> list[tuple[dist.ProcessGroup, tuple[int, ...]]]:
    """A gloo group and the global ranks, last stage at the end, of every replica; all ranks take part the first time."""
    ranks = parallel_state.RankGenerator(tensor, 1, data, pipeline, context, RANK_ORDER).get_ranks(
        "tp-cp-pp"
    )
    return [(dist.new_group(replica, backend="gloo"), tuple(replica)) for replica in ranks]


@functools.lru_cache(maxsize=4)
def _joined(
    world: dist.ProcessGroup, replicas: tuple[tuple[int, ...], ...], lanes: int
) -> list[dist.ProcessGroup]:
    """A gloo group of every `lanes` neighbouring replicas; all ranks take part the first time."""
    teams = [replicas[first : first + lanes] for first in range(0, len(replicas), lanes)]
    return [
        dist.new_group(sorted(rank for replica in team for rank in replica), backend="gloo")
        for team in teams
    ]
