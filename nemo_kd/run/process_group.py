"""Join this process to the other ranks."""

from __future__ import annotations

import errno
import logging
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from nemo_kd.config.errors import ConfigError
from nemo_kd.config.model import AUTO_PRECISION
from nemo_kd.config.shared import TrainerConfig
from nemo_kd.run.ranks import LOOPBACK, Ranks, check_world_size, find_ranks, listen_on_loopback

log = logging.getLogger(__name__)

LOOPBACK_INTERFACE = "lo"

TORCH_TIMEOUT_FACTOR = 1.5
"""Torch's timeout over the watchdog's, which comes first because its message says more."""


def join_ranks(trainer: TrainerConfig) -> None:
    """Join the process group and resolve `trainer.precision`; do nothing if both are done.

    Needs torch only. The commands call it before they import Megatron and Lightning, so that wrong
    devices and ranks are reported at once.

    Raises:
        ConfigError: as `init_process_group`.
    """
    joined_before = dist.is_initialized()
    timeout_minutes = TORCH_TIMEOUT_FACTOR * trainer.distributed_timeout_minutes
    init_process_group(trainer.num_nodes, trainer.num_devices, trainer.accelerator, timeout_minutes)
    if trainer.precision == AUTO_PRECISION:
        # On most CPUs bf16 is slower than fp32, and it rounds a teacher's targets by 1e-3 nats.
        on_gpu = torch.cuda.is_available()
        trainer.precision = "bf16" if on_gpu else "32"
        reason = f"the default on a {'GPU' if on_gpu else 'CPU'} (trainer.precision)"
    elif joined_before:
        return
    else:
        reason = "as trainer.precision asks"
    log.info("precision: %s, %s", trainer.precision, reason)


def init_process_group(
    num_nodes: int, devices: int, accelerator: str, timeout_minutes: float = 15.0
) -> None:
    """Join this process to those that its launcher started, and bind it to its GPU if there is one.

    Without a launcher the world is this process. If a process group exists, only its size is
    checked. A collective that takes longer than `timeout_minutes` fails. On one machine the ranks
    meet on the loopback address, which no other machine reaches; several machines need a network
    that keeps others out.

    Raises:
        ConfigError: devices are missing, the launcher started another number of processes, or
            MASTER_ADDR and MASTER_PORT cannot be used.
    """
    use_gpu = _check_devices(devices, accelerator)
    if dist.is_initialized():
        check_world_size(dist.get_world_size(), num_nodes, devices, "the process group")
        return
    ranks = find_ranks()
    check_world_size(ranks.size, num_nodes, devices, ranks.found_by)
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


def _open_store(ranks: Ranks, timeout: timedelta) -> dist.Store | None:
    """Return the store in which the ranks meet.

    None leaves it to torch, which asks the launcher or listens on all addresses of rank 0's machine.
    """
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
    reason = str(error).strip().splitlines()[0]
    place = f"{ranks.main_address}:{ranks.main_port}"
    if "EADDRINUSE" in reason or getattr(error, "errno", None) == errno.EADDRINUSE:
        return (
            f"MASTER_PORT: {ranks.main_port} is taken on {ranks.main_address}, probably by another run; set MASTER_PORT to a free "
            "port for all ranks of this one, or leave it unset"
        )
    return (
        f"MASTER_ADDR, MASTER_PORT: rank {ranks.rank} cannot meet the others at {place} ({reason}); rank 0 has to run on that "
        "machine and the others have to reach it"
    )


def _check_devices(devices: int, accelerator: str) -> bool:
    """Return True if the ranks use GPUs.

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
