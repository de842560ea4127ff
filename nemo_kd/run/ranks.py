"""The ranks of a run: the launcher that started this process, and the process group they form."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from nemo_kd.config import ConfigError

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore

    from nemo_kd.config.shared import TrainerConfig

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
LOOPBACK_INTERFACE = "lo"
LISTEN_BACKLOG = 2048

FIRST_PORT = 12_000
NUM_PORTS = 16_000
"""Ports of Slurm steps; Linux gives out others, from 32768 on."""

MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE", "MV2_COMM_WORLD_SIZE")

TORCH_TIMEOUT_FACTOR = 1.5
"""Torch's timeout over the watchdog's, which comes first because its message says more."""


@dataclass(frozen=True)
class Ranks:
    """One rank among those that a launcher started.

    Attributes:
        launcher: its name in messages; empty without other ranks.
        main_port: port of the store on `main_address`; 0 without a store.
        is_one_machine: all ranks run on this machine.
    """

    launcher: str = ""
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    is_one_machine: bool = True
    main_address: str = LOOPBACK
    main_port: int = 0


def find_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Return this process's place among the ranks, from the variables of its launcher.

    torchrun comes first: inside a Slurm job it starts the ranks that count. Batch scripts and
    interactive shells of Slurm are steps of one task and start nothing. Containers set RANK and
    WORLD_SIZE for a single process too (enroot's PyTorch hook); that does not count.

    Raises:
        ConfigError: the launcher leaves out a variable that a rank needs.
    """
    values = dict(environment)

    def number(name: str, default: int | None = None) -> int:
        value = values.get(name) or str(default)
        if not value.isdecimal():
            raise ConfigError(
                f"{name}: {value!r} is not a number; use torchrun or srun, or unset it"
            )
        return int(value)

    num_tasks = number("SLURM_STEP_NUM_TASKS", 1)
    if "TORCHELASTIC_RUN_ID" in values:
        launcher = "torchrun"
    elif "SLURM_STEP_ID" in values and num_tasks > 1:
        launcher = "srun"
        is_one_machine = number("SLURM_STEP_NUM_NODES", 1) == 1
        # `a[03-05,9],b` starts with a03.
        nodes = values.get("SLURM_STEP_NODELIST", "")
        first = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodes).split(",")[0]
        # Steps of one job may run on one machine at the same time.
        step = 101 * number("SLURM_JOB_ID", 0) + number("SLURM_STEP_ID")
        values = {
            "MASTER_ADDR": LOOPBACK if is_one_machine else first,
            "MASTER_PORT": str(FIRST_PORT + step % NUM_PORTS),
            **values,
            "RANK": values.get("SLURM_PROCID", ""),
            "LOCAL_RANK": values.get("SLURM_LOCALID", ""),
            "WORLD_SIZE": str(num_tasks),
            "LOCAL_WORLD_SIZE": str(num_tasks if is_one_machine else 0),
        }
    elif number("WORLD_SIZE", 1) > 1:
        launcher = "the launcher that set RANK and WORLD_SIZE"
    else:
        for name in MPI_SIZES:
            if number(name, 1) > 1:
                raise ConfigError(
                    f"{name}: each of {values[name]} MPI processes would do the whole work; use "
                    "srun, torchrun, or the command alone with trainer.devices=N"
                )
        return Ranks()
    size = number("WORLD_SIZE")
    return Ranks(
        launcher,
        rank=number("RANK"),
        size=size,
        local_rank=number("LOCAL_RANK"),
        is_one_machine=number("LOCAL_WORLD_SIZE", 0) == size,
        main_address=values.get("MASTER_ADDR", LOOPBACK),
        main_port=number("MASTER_PORT"),
    )


def join_ranks(trainer: TrainerConfig) -> None:
    """Join this process to those that its launcher started, and bind it to its GPU if there is one.

    Resolve `trainer.precision` too. Without a launcher the world is this process. If a process
    group exists, only its size is checked. On one machine the ranks meet on the loopback address,
    which no other machine reaches; several machines need a network that keeps others out. Needs
    torch only: the commands call it before they import Megatron and Lightning, so that wrong
    devices and ranks are reported at once.

    Raises:
        ConfigError: devices are missing, the launcher started another number of processes, or
            MASTER_ADDR and MASTER_PORT cannot be used.
    """
    import torch
    import torch.distributed as dist

    from nemo_kd.config.shared import AUTO_PRECISION

    num_gpus = _num_gpus(trainer)
    if trainer.precision == AUTO_PRECISION:
        # On most CPUs bf16 is slower than fp32, and it rounds a teacher's targets by 1e-3 nats.
        trainer.precision = "bf16" if num_gpus else "32"
        log.info("precision: %s (trainer.precision)", trainer.precision)
    ranks = find_ranks()
    has_joined = dist.is_initialized()
    size = dist.get_world_size() if has_joined else ranks.size
    if size != trainer.num_nodes * trainer.num_devices:
        raise ConfigError(
            f"trainer.num_nodes x trainer.devices: {trainer.num_nodes} x {trainer.num_devices} "
            f"processes are asked for, but there are {size}, started by "
            f"{ranks.launcher or 'no launcher'}. Make the launcher (torchrun --nproc-per-node, "
            "srun --ntasks-per-node) and the configuration agree"
        )
    if has_joined:
        return
    if ranks.is_one_machine and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK_INTERFACE)
    if num_gpus:
        torch.cuda.set_device(ranks.local_rank)
    minutes = TORCH_TIMEOUT_FACTOR * trainer.distributed_timeout_minutes
    timeout = timedelta(minutes=minutes)
    try:
        dist.init_process_group(
            "nccl" if num_gpus else "gloo",
            rank=ranks.rank,
            world_size=ranks.size,
            store=_open_store(ranks, timeout),
            timeout=timeout,
        )
    except (dist.DistNetworkError, dist.DistStoreError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"MASTER_ADDR, MASTER_PORT: rank {ranks.rank} cannot meet the others at "
            f"{ranks.main_address}:{ranks.main_port} ({reason}); rank 0 has to run there, and the "
            "port has to be free and in reach: set another one for all ranks, or leave it unset"
        ) from error


def _num_gpus(trainer: TrainerConfig) -> int:
    """Return the number of GPUs here.

    Raises:
        ConfigError: as `join_ranks`.
    """
    import torch

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if trainer.accelerator == "cpu" and num_gpus:
        raise ConfigError(
            f"trainer.accelerator: cpu, but torch finds {num_gpus} GPUs, which Megatron would "
            "use. Hide them: CUDA_VISIBLE_DEVICES= before the command"
        )
    if trainer.accelerator in ("gpu", "cuda") and not num_gpus:
        raise ConfigError(
            f"trainer.accelerator: {trainer.accelerator}, but torch finds no GPU here "
            "(torch.cuda.is_available() is False). Use trainer.accelerator=cpu, or a machine "
            "with a GPU and a CUDA build of torch"
        )
    if num_gpus and trainer.num_devices > num_gpus:
        raise ConfigError(
            f"trainer.devices: {trainer.num_devices}, but torch finds {num_gpus} GPUs on this "
            f"machine. Use trainer.devices={num_gpus} or fewer; under Slurm let every task see all GPUs of "
            "its node (--gpus-per-node)"
        )
    return num_gpus


def listen_on_loopback(
    port: int, num_ranks: int | None, timeout: timedelta
) -> TCPStore:
    """Return a store that only this machine can reach.

    Torch's own listens on all addresses, without authentication.

    Raises:
        OSError: the port is taken.
    """
    from torch.distributed import TCPStore

    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((LOOPBACK, port))
        listener.listen(LISTEN_BACKLOG)
        port = listener.getsockname()[1]
        store = TCPStore(
            LOOPBACK,
            port,
            num_ranks,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listener.fileno(),
        )
        listener.detach()  # the store closes it
    return store


def _open_store(ranks: Ranks, timeout: timedelta) -> Store | None:
    """Return the store in which the ranks meet.

    None leaves it to torch, which uses the launcher's store, or listens on all addresses of rank
    0's machine.
    """
    from torch.distributed import HashStore, TCPStore

    if not ranks.launcher:
        return HashStore()
    port = ranks.main_port
    os.environ["MASTER_ADDR"] = ranks.main_address
    os.environ["MASTER_PORT"] = str(port)
    uses_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    if uses_agent or not ranks.is_one_machine:
        return None
    if ranks.rank != 0:
        return TCPStore(LOOPBACK, port, ranks.size, is_master=False, timeout=timeout)
    return listen_on_loopback(port, ranks.size, timeout)
