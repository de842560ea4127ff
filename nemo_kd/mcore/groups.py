"""Processes: joining them, and cutting them into groups. The only reader of parallel_state but `mcore.model`."""

from __future__ import annotations

import errno
import functools
import gc
import logging
import os
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from nemo_kd.config import ConfigError
from nemo_kd.config.model import AUTO_PRECISION, PARALLEL_SIZES, ParallelConfig
from nemo_kd.config.teacher import TrainerConfig
from nemo_kd.mcore.cpu import install_cpu_support
from nemo_kd.run.ranks import LOOPBACK, Ranks, check_world_size, find_ranks, listen_on_loopback

log = logging.getLogger(__name__)

LOOPBACK_INTERFACE = "lo"

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


def init_process_group(
    num_nodes: int, devices: int, accelerator: str, timeout_minutes: float = 15.0
) -> None:
    """Join this process to the others that the launcher started, and bind it to its GPU if there is one.

    A process that no launcher started is a world of its own. Only checks the number of ranks where a process group
    exists already. A collective that takes longer than `timeout_minutes` is an error. On one machine the ranks meet on
    its loopback address, which no other machine reaches; several machines need a network that keeps others out.

    Raises:
        ConfigError: the devices are not there, the launcher started another number of processes, or their meeting place
            (MASTER_ADDR, MASTER_PORT) cannot be used.
    """
    use_gpu = _check_devices(devices, accelerator)
    if dist.is_initialized():
        check_world_size(dist.get_world_size(), num_nodes, devices, "the process group")
        return
    ranks = find_ranks()
    found_by = (
        f"{ranks.launcher}, which started this process,"
        if ranks.launcher
        else "this process, started without a launcher,"
    )
    check_world_size(ranks.size, num_nodes, devices, found_by)
    if ranks.is_one_machine and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK_INTERFACE)
    if use_gpu:
        torch.cuda.set_device(ranks.local_rank)
    timeout = timedelta(minutes=timeout_minutes)
    try:
        dist.init_process_group(
            "nccl" if use_gpu else "gloo",
            rank=ranks.rank,
            world_size=ranks.size,
            store=_open_store(ranks, timeout),
            timeout=timeout,
        )
    except (dist.DistNetworkError, dist.DistStoreError, OSError) as error:
        raise ConfigError(_meeting_problem(ranks, error)) from error


def resolve_precision(trainer: TrainerConfig) -> None:
    """Replace `trainer.precision=auto` by bf16 on a GPU and 32 on a CPU, and log which one and why.

    On a CPU bf16 is slower than fp32 on most machines, and rounds a teacher's targets by 1e-3 nats.
    """
    if trainer.precision != AUTO_PRECISION:
        log.info("precision: %s, as trainer.precision asks", trainer.precision)
        return
    on_gpu = torch.cuda.is_available()
    trainer.precision = "bf16" if on_gpu else "32"
    log.info(
        "precision: %s, the default on a %s (trainer.precision)",
        trainer.precision,
        "GPU" if on_gpu else "CPU",
    )


def _open_store(ranks: Ranks, timeout: timedelta) -> dist.Store | None:
    """Return the store in which the ranks meet; None leaves that to torch, which asks the launcher or listens on all
    addresses of rank 0's machine."""
    if not ranks.launcher:
        return dist.HashStore()
    os.environ["MASTER_ADDR"] = ranks.main_address
    os.environ["MASTER_PORT"] = str(ranks.main_port)
    if not ranks.is_one_machine or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):
        return None
    if ranks.rank != 0:
        return dist.TCPStore(
            LOOPBACK, ranks.main_port, ranks.size, is_master=False, timeout=timeout
        )
    return listen_on_loopback(ranks.main_port, ranks.size, timeout)


def _meeting_problem(ranks: Ranks, error: Exception) -> str:
    said = str(error).strip().splitlines()[0]
    place = f"{ranks.main_address}:{ranks.main_port}"
    if "EADDRINUSE" in said or getattr(error, "errno", None) == errno.EADDRINUSE:
        return (
            f"MASTER_PORT: {ranks.main_port} is taken on {ranks.main_address}, probably by another run; set MASTER_PORT to a free "
            "port for all ranks of this one, or leave it unset"
        )
    return (
        f"MASTER_ADDR, MASTER_PORT: rank {ranks.rank} cannot meet the others at {place} ({said}); rank 0 has to run on that "
        "machine and the others have to reach it"
    )


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


def _check_devices(devices: int, accelerator: str) -> bool:
    """Whether to use GPUs.

    Raises:
        ConfigError: as `init_process_group`.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if accelerator == "cpu" and num_gpus:
        raise ConfigError(
            f"trainer.accelerator: cpu, but torch finds {num_gpus} GPUs, which Megatron would use. Hide them: "
            "CUDA_VISIBLE_DEVICES= before the command"
        )
    if accelerator in ("gpu", "cuda") and not num_gpus:
        raise ConfigError(
            f"trainer.accelerator: {accelerator}, but torch finds no GPU here (torch.cuda.is_available() is False). "
            "Use trainer.accelerator=cpu, or a machine with a GPU and a CUDA build of torch"
        )
    if num_gpus and devices > num_gpus:
        raise ConfigError(
            f"trainer.devices: {devices}, but torch finds {num_gpus} GPUs on this machine. Use "
            f"trainer.devices={num_gpus} or fewer; under Slurm let every task see all GPUs of its node (--gpus-per-node)"
        )
    return num_gpus > 0
