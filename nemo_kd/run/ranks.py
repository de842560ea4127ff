"""The ranks of a run: the launcher that started this process, and the process group they form."""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from nemo_kd.config.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore

    from nemo_kd.config.shared import TrainerConfig

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
LOOPBACK_INTERFACE = "lo"
LISTEN_BACKLOG = 2048
MAX_PORT = 65_535

FIRST_PORT = 12_000
NUM_PORTS = 16_000
"""Ports of Slurm steps; Linux gives out others, from 32768 on."""

MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE", "MV2_COMM_WORLD_SIZE")
NAMED_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

TORCH_TIMEOUT_FACTOR = 1.5
"""Torch's timeout over the watchdog's, which comes first because its message says more."""


@dataclass(frozen=True)
class Ranks:
    """One rank among those that a launcher started.

    Attributes:
        launcher: its name in messages; empty without other ranks.
        main_port: port of the store on `main_address`; 0 without a store.
        local_size: ranks on this machine; 0 if unknown.
    """

    launcher: str = ""
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    main_address: str = LOOPBACK
    main_port: int = 0

    @property
    def is_one_machine(self) -> bool:
        """Return True if all ranks run on this machine."""
        return self.local_size == self.size

    @property
    def found_by(self) -> str:
        """Name the process that determined the number of ranks, for messages."""
        if self.launcher:
            return f"{self.launcher}, which started this process,"
        return "this process, started without a launcher,"


def find_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Return this process's place among the ranks, from the variables of its launcher.

    torchrun comes first: inside a Slurm job it starts the ranks that count. A Slurm job's batch
    script and its interactive shell are steps of one task and start nothing. Containers set RANK
    and WORLD_SIZE for a single process too (enroot's PyTorch hook); that does not count.

    Raises:
        ConfigError: the launcher leaves out a variable that a rank needs.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        ranks = _named_ranks("torchrun", environment)
    elif "SLURM_STEP_ID" in environment and _slurm_tasks(environment) > 1:
        ranks = _slurm_ranks(environment)
    elif _number(environment, "WORLD_SIZE", 1) > 1:
        ranks = _named_ranks("the launcher that set RANK and WORLD_SIZE", environment)
    else:
        for name in MPI_SIZES:
            if _number(environment, name, 1) > 1:
                raise ConfigError(
                    f"{name}: {environment[name]} processes were started by an MPI launcher, and "
                    "each would do the whole work; start the command with srun or torchrun, or "
                    "alone with trainer.devices=N"
                )
        return Ranks()
    if ranks.rank >= ranks.size:
        raise ConfigError(
            f"RANK: {ranks.launcher} numbers this process {ranks.rank}, but starts {ranks.size}, "
            "numbered from 0; correct RANK or WORLD_SIZE"
        )
    if ranks.main_port > MAX_PORT:
        raise ConfigError(
            f"MASTER_PORT: {ranks.main_port} is not a port; set it to one from 1024 to {MAX_PORT}"
        )
    return ranks


def check_world_size(
    world_size: int, num_nodes: int, devices: int, found_by: str
) -> None:
    """Refuse a number of ranks that differs from the configuration's.

    Raises:
        ConfigError: names both numbers.
    """
    if world_size != num_nodes * devices:
        raise ConfigError(
            f"trainer.num_nodes x trainer.devices: {num_nodes} x {devices} = "
            f"{num_nodes * devices} processes are asked for, but {found_by} has {world_size}. "
            "Make the launcher (torchrun --nproc-per-node, srun --ntasks-per-node) and the "
            "configuration agree"
        )


def join_ranks(trainer: TrainerConfig) -> None:
    """Join the process group and resolve `trainer.precision`; do nothing if both are done.

    Needs torch only. The commands call it before they import Megatron and Lightning, so that wrong
    devices and ranks are reported at once.

    Raises:
        ConfigError: as `init_process_group`.
    """
    import torch

    from nemo_kd.config.model import AUTO_PRECISION

    joined_before = torch.distributed.is_initialized()
    timeout_minutes = TORCH_TIMEOUT_FACTOR * trainer.distributed_timeout_minutes
    init_process_group(
        trainer.num_nodes, trainer.num_devices, trainer.accelerator, timeout_minutes
    )
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
    import torch
    import torch.distributed as dist

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


def listen_on_loopback(port: int, num_ranks: int | None, timeout: timedelta) -> TCPStore:
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
    os.environ["MASTER_ADDR"] = ranks.main_address
    os.environ["MASTER_PORT"] = str(ranks.main_port)
    if not ranks.is_one_machine or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(
        True
    ):
        return None
    if ranks.rank != 0:
        return TCPStore(
            LOOPBACK, ranks.main_port, ranks.size, is_master=False, timeout=timeout
        )
    return listen_on_loopback(ranks.main_port, ranks.size, timeout)


def _meeting_problem(ranks: Ranks, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0]
    place = f"{ranks.main_address}:{ranks.main_port}"
    if "EADDRINUSE" in reason or getattr(error, "errno", None) == errno.EADDRINUSE:
        return (
            f"MASTER_PORT: {ranks.main_port} is taken on {ranks.main_address}, probably by "
            "another run; set MASTER_PORT to a free port for all ranks of this one, or leave it "
            "unset"
        )
    return (
        f"MASTER_ADDR, MASTER_PORT: rank {ranks.rank} cannot meet the others at {place} "
        f"({reason}); rank 0 has to run on that machine and the others have to reach it"
    )


def _check_devices(devices: int, accelerator: str) -> bool:
    """Return True if the ranks use GPUs.

    Raises:
        ConfigError: as `init_process_group`.
    """
    import torch

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if accelerator == "cpu" and num_gpus:
        raise ConfigError(
            f"trainer.accelerator: cpu, but torch finds {num_gpus} GPUs, which Megatron would "
            "use. Hide them: CUDA_VISIBLE_DEVICES= before the command"
        )
    if accelerator in ("gpu", "cuda") and not num_gpus:
        raise ConfigError(
            f"trainer.accelerator: {accelerator}, but torch finds no GPU here "
            "(torch.cuda.is_available() is False). Use trainer.accelerator=cpu, or a machine "
            "with a GPU and a CUDA build of torch"
        )
    if num_gpus and devices > num_gpus:
        raise ConfigError(
            f"trainer.devices: {devices}, but torch finds {num_gpus} GPUs on this machine. Use "
            f"trainer.devices={num_gpus} or fewer; under Slurm let every task see all GPUs of "
            "its node (--gpus-per-node)"
        )
    return num_gpus > 0


def _named_ranks(launcher: str, environment: Mapping[str, str]) -> Ranks:
    missing = [name for name in NAMED_VARIABLES if name not in environment]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)}: not set, though {launcher} is there; unset its other "
            "variables, or use torchrun or srun"
        )
    return Ranks(
        launcher=launcher,
        rank=_number(environment, "RANK"),
        size=_number(environment, "WORLD_SIZE"),
        local_rank=_number(environment, "LOCAL_RANK"),
        local_size=_number(environment, "LOCAL_WORLD_SIZE", 0),
        main_address=environment["MASTER_ADDR"],
        main_port=_number(environment, "MASTER_PORT"),
    )


def _slurm_tasks(environment: Mapping[str, str]) -> int:
    name = "SLURM_STEP_NUM_TASKS"
    return _number(environment, name if name in environment else "SLURM_NTASKS", 1)


def _slurm_ranks(environment: Mapping[str, str]) -> Ranks:
    """Read the variables of a step; those of its job cover other steps too."""
    name = "SLURM_STEP_NUM_NODES"
    num_nodes = _number(environment, name if name in environment else "SLURM_NNODES", 1)
    size = _slurm_tasks(environment)
    address = environment.get("MASTER_ADDR")
    if not address:
        address = LOOPBACK if num_nodes == 1 else _first_host(environment)
    if environment.get("MASTER_PORT"):
        port = _number(environment, "MASTER_PORT")
    else:
        # Steps of one job may run on one machine at the same time.
        job = _number(environment, "SLURM_JOB_ID", 0)
        step = _number(environment, "SLURM_STEP_ID")
        port = FIRST_PORT + (101 * job + step) % NUM_PORTS
    return Ranks(
        launcher="srun",
        rank=_number(environment, "SLURM_PROCID"),
        size=size,
        local_rank=_number(environment, "SLURM_LOCALID"),
        local_size=size if num_nodes == 1 else 0,
        main_address=address,
        main_port=port,
    )


def _first_host(environment: Mapping[str, str]) -> str:
    """Return the first name of Slurm's host list: `a[03-05,9],b` starts with a03."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get(
        "SLURM_JOB_NODELIST", ""
    )
    host = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodes).split(",")[0]
    if not host:
        raise ConfigError(
            "MASTER_ADDR: not set, and Slurm names no machines (SLURM_STEP_NODELIST); set it to "
            "rank 0's"
        )
    return host


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environment.get(name, "" if default is None else str(default))
    if not re.fullmatch(r"\d+", value):
        raise ConfigError(
            f"{name}: {value!r} is not a number; whoever starts the ranks sets this variable, or "
            "unset it"
        )
    return int(value)
