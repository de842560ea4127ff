"""The launcher that started this process: torchrun, srun, the command itself, or none."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from nemo_kd.config import ConfigError

if TYPE_CHECKING:
    from torch.distributed import TCPStore

LOOPBACK = "127.0.0.1"
LISTEN_BACKLOG = 2048
MAX_PORT = 65_535

FIRST_PORT = 12_000
NUM_PORTS = 16_000
"""Ports of Slurm steps; Linux hands out others, from 32768 on, to whoever asks for any."""

MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class Ranks:
    """One rank among those that a launcher started.

    Attributes:
        launcher: its name in messages; empty where nobody started other ranks.
        main_port: port of the store on `main_address`; 0 where it has none.
        local_size: ranks on this machine; 0 where the launcher does not tell.
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
    """Return this process's place among the ranks, read from the variables of its launcher.

    torchrun goes first: inside a Slurm job it starts the ranks that count. A Slurm job's batch script and its
    interactive shell are steps of one task and start nothing. Containers set RANK and WORLD_SIZE for a single
    process too (enroot's PyTorch hook), which counts as no launcher.

    Raises:
        ConfigError: a launcher is there and does not say what a rank needs to know.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        return _named_ranks("torchrun", environment)
    if "SLURM_STEP_ID" in environment and _slurm_tasks(environment) > 1:
        return _slurm_ranks(environment)
    if _number(environment, "WORLD_SIZE", 1) > 1:
        return _named_ranks("the launcher that set RANK and WORLD_SIZE", environment)
    for name in MPI_SIZES:
        if _number(environment, name, 1) > 1:
            raise ConfigError(
                f"{name}: {environment[name]} processes were started by an MPI launcher, and each would do the whole work; "
                "start the command with srun or torchrun, or alone with trainer.devices=N"
            )
    return Ranks()


def check_world_size(world_size: int, num_nodes: int, devices: int, found_by: str) -> None:
    """Refuse a launcher that starts another number of ranks than the configuration asks for.

    Raises:
        ConfigError: names both numbers.
    """
    if world_size != num_nodes * devices:
        raise ConfigError(
            f"trainer.num_nodes x trainer.devices: {num_nodes} x {devices} = {num_nodes * devices} processes are asked "
            f"for, but {found_by} has {world_size}. Make the launcher (torchrun --nproc-per-node, srun "
            "--ntasks-per-node) and the configuration agree"
        )


def listen_on_loopback(port: int, num_ranks: int | None, timeout: timedelta) -> TCPStore:
    """Return a store that this machine alone can reach: torch's own listens, unauthenticated, on all addresses.

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


def _named_ranks(launcher: str, environment: Mapping[str, str]) -> Ranks:
    missing = [
        name
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if name not in environment
    ]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)}: not set, though {launcher} is there; unset its other variables, or use torchrun or srun"
        )
    return _checked(
        Ranks(
            launcher=launcher,
            rank=_number(environment, "RANK"),
            size=_number(environment, "WORLD_SIZE"),
            local_rank=_number(environment, "LOCAL_RANK"),
            local_size=_number(environment, "LOCAL_WORLD_SIZE", 0),
            main_address=environment["MASTER_ADDR"],
            main_port=_number(environment, "MASTER_PORT"),
        )
    )


def _checked(ranks: Ranks) -> Ranks:
    if ranks.rank >= ranks.size:
        raise ConfigError(
            f"RANK: {ranks.launcher} numbers this process {ranks.rank}, but starts {ranks.size}, numbered from 0; correct "
            "RANK or WORLD_SIZE"
        )
    if ranks.main_port > MAX_PORT:
        raise ConfigError(
            f"MASTER_PORT: {ranks.main_port} is not a port; set it to one from 1024 to {MAX_PORT}"
        )
    return ranks


def _slurm_tasks(environment: Mapping[str, str]) -> int:
    return _number(
        environment,
        "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS",
        1,
    )


def _slurm_ranks(environment: Mapping[str, str]) -> Ranks:
    """Read a step's own variables: those of the job (SLURM_NTASKS_PER_NODE, its name) describe other steps too."""
    of_step = "SLURM_STEP_NUM_NODES" in environment
    num_nodes = _number(environment, "SLURM_STEP_NUM_NODES" if of_step else "SLURM_NNODES", 1)
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    size = _slurm_tasks(environment)
    port = (
        _number(environment, "MASTER_PORT")
        if environment.get("MASTER_PORT")
        else _port_of_step(environment)
    )
    return _checked(
        Ranks(
            launcher="srun",
            rank=_number(environment, "SLURM_PROCID"),
            size=size,
            local_rank=_number(environment, "SLURM_LOCALID"),
            local_size=size if num_nodes == 1 else 0,
            main_address=environment.get("MASTER_ADDR")
            or (LOOPBACK if num_nodes == 1 else _first_host(nodes)),
            main_port=port,
        )
    )


def _first_host(nodes: str) -> str:
    """Return the first name of a Slurm host list: `a[03-05,9],b` starts with a03.

    Raises:
        ConfigError: there is none.
    """
    host = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodes).split(",")[0]
    if not host:
        raise ConfigError(
            "MASTER_ADDR: not set, and Slurm names no machines (SLURM_STEP_NODELIST); set it to rank 0's"
        )
    return host


def _port_of_step(environment: Mapping[str, str]) -> int:
    """Return a port that differs between the steps of a job, which may run on one machine at a time."""
    job = _number(environment, "SLURM_JOB_ID", 0)
    step = _number(environment, "SLURM_STEP_ID")
    return FIRST_PORT + (101 * job + step) % NUM_PORTS


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environment.get(name, "" if default is None else str(default))
    if not re.fullmatch(r"\d+", value):
        raise ConfigError(
            f"{name}: {value!r} is not a number; whoever starts the ranks sets this variable, or unset it"
        )
    return int(value)
