"""Processes: joining them, and cutting them into tensor- and data-parallel groups. The only reader of parallel_state."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from nemo_kd.config import ConfigError
from nemo_kd.config.model import ParallelConfig
from nemo_kd.mcore.cpu import install_cpu_support


@dataclass(frozen=True)
class ProcessGroups:
    """Where this process stands.

    Attributes:
        tensor: ranks that hold the shards of one model replica.
        data: ranks that hold the same shard in different replicas.
        device: this process's GPU, or the CPU.
    """

    tensor: dist.ProcessGroup
    data: dist.ProcessGroup
    tensor_rank: int
    tensor_size: int
    data_rank: int
    data_size: int
    device: torch.device


def init_process_group(num_nodes: int, devices: int, accelerator: str) -> None:
    """Joins this process to the others that the launcher started, and binds it to its GPU if there is one.

    torchrun, srun and Lightning's own launcher are recognised; a process that none of them started is a world of its
    own. Does nothing but check the number of ranks where a process group exists already.

    Raises:
        ConfigError: the devices are not there, or the launcher started another number of processes.
    """
    use_gpu = _check_devices(devices, accelerator)
    if dist.is_initialized():
        _check_world_size(dist.get_world_size(), num_nodes, devices, "the process group")
        return
    environment = cluster_environment(num_nodes, devices)
    if environment is None:
        _check_world_size(1, num_nodes, devices, "this process, started without a launcher,")
        rank, world_size, local_rank, store = 0, 1, 0, dist.HashStore()
    else:
        rank, world_size, local_rank = environment.global_rank(), environment.world_size(), environment.local_rank()
        _check_world_size(world_size, num_nodes, devices, type(environment).__name__)
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
        store = None
    if use_gpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if use_gpu else "gloo", rank=rank, world_size=world_size, store=store)


def cluster_environment(num_nodes: int, devices: int) -> ClusterEnvironment | None:
    """Who started this process, as Lightning describes it: torchrun, srun or a launcher that set LOCAL_RANK; else None.

    torchrun goes first: inside a Slurm job it starts the ranks that count. Slurm's variables alone prove nothing, a
    job's batch script has them too.
    """
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    step_tasks = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1"))
    if "SLURM_STEP_ID" in os.environ and int(step_tasks) > 1 and SLURMEnvironment.detect():
        return SLURMEnvironment()
    if "LOCAL_RANK" not in os.environ:
        return None
    environment = LightningEnvironment()
    environment.set_world_size(int(os.environ.get("WORLD_SIZE", num_nodes * devices)))
    environment.set_global_rank(environment.node_rank() * devices + environment.local_rank())
    return environment


def initialize_model_parallel(parallel: ParallelConfig, seed: int) -> ProcessGroups:
    """Cuts the ranks into groups and seeds every random generator that Megatron uses; all ranks take part.

    Groups of the same sizes are kept, others replaced. Needs a process group (`init_process_group`).

    Raises:
        ConfigError: the tensor-parallel size does not divide the number of ranks.
    """
    install_cpu_support()
    parallel.data_parallel_size(dist.get_world_size())
    tensor_size = parallel.tensor_model_parallel_size
    initialized = parallel_state.model_parallel_is_initialized()
    if initialized and parallel_state.get_tensor_model_parallel_world_size() != tensor_size:
        destroy_model_parallel()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_size)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return ProcessGroups(
        tensor=parallel_state.get_tensor_model_parallel_group(),
        data=parallel_state.get_data_parallel_group(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=tensor_size,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        device=torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu"),
    )


def destroy_model_parallel() -> None:
    """Forgets the groups; the process group of all ranks stays."""
    parallel_state.destroy_model_parallel()


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


def _check_world_size(world_size: int, num_nodes: int, devices: int, found_by: str) -> None:
    if world_size != num_nodes * devices:
        raise ConfigError(
            f"trainer.num_nodes x trainer.devices: {num_nodes} x {devices} = {num_nodes * devices} processes are asked "
            f"for, but {found_by} has {world_size}. Make the launcher (torchrun --nproc-per-node, srun "
            "--ntasks-per-node) and the configuration agree"
        )
