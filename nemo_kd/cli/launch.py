"""Starts a command once per device where neither torchrun nor srun did."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid

from nemo_kd.config import ConfigError
from nemo_kd.config.teacher import TrainerConfig


def needs_launch(trainer: TrainerConfig) -> bool:
    """Whether this process has to start the others.

    Raises:
        ConfigError: several machines, on which only srun or torchrun can start processes.
    """
    # A step of one task is no launcher: an interactive shell of Slurm's is one.
    step_tasks = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1"))
    in_step = "SLURM_STEP_ID" in os.environ and int(step_tasks) > 1
    if in_step or "TORCHELASTIC_RUN_ID" in os.environ or "LOCAL_RANK" in os.environ:
        return False
    if trainer.num_nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes: {trainer.num_nodes} machines need a launcher: run the command under srun (see scripts/slurm) or torchrun"
        )
    return trainer.devices > 1


def launch(num_processes: int, subcommand: str = "") -> int:
    """Runs this very command line, with the subcommand that its keys belong to, in `num_processes` processes; returns the exit status of the first that failed, or 0."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks have told what went wrong
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-u", sys.argv[0], *subcommand.split(), *sys.argv[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        hint = " (SIGKILL is what a machine out of memory sends)" if name == "SIGKILL" else ""
        print(f"error: rank {rank} was ended by {name}{hint}", file=sys.stderr, flush=True)
        return 1
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def global_rank() -> int:
    """This process's rank as its launcher numbers it; 0 without one."""
    for variable in ("RANK", "SLURM_PROCID"):
        if variable in os.environ:
            return int(os.environ[variable])
    return 0
