"""A command whose ranks wait, end, die and hang as the environment variable MODE says; run by the tests of launching."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from nemo_kd.cli.run import Command, run
from nemo_kd.config import ConfigError
from nemo_kd.config.teacher import ComputeTopkLogitsConfig
from nemo_kd.run.interruption import Interruption, Requeue, Watchdog
from nemo_kd.run.ranks import find_ranks

FOLDER = Path(os.environ["FOLDER"])


def tell(what: str) -> None:
    (FOLDER / f"{what}.{find_ranks().rank}").write_text(str(os.getpid()))


def finish(interruption: Interruption) -> None:
    """Waits for a reason, works on for a moment as a rank does that publishes a segment, and leaves."""
    tell("ready")
    while interruption.reason is None:
        time.sleep(0.01)
    time.sleep(0.3 * (1 + find_ranks().rank))
    tell("saved")
    raise Requeue(interruption.reason)


def finish_together(interruption: Interruption) -> None:
    """The same with a real process group, in which a signal to one rank stops all."""
    import torch
    import torch.distributed as dist

    from nemo_kd.run.collective import gather

    tell("ready")
    stops = torch.zeros(1)
    while not stops:
        stops = torch.tensor([float(interruption.reason is not None)])
        dist.all_reduce(stops)
        time.sleep(0.01)
    tell("saved")
    reasons = gather(lambda: interruption.reason)
    raise Requeue(next(reason for reason in reasons if reason))


def meet(interruption: Interruption) -> None:
    """The ranks as both stages start them; they exchange something, then wait."""
    import torch.distributed as dist

    dist.barrier()
    tell("ready")
    time.sleep(1000)


def lose_the_other(interruption: Interruption) -> None:
    """Rank 1 is killed while rank 0 waits for it in a collective."""
    import torch
    import torch.distributed as dist

    with Watchdog(60, find_ranks().rank) as watchdog:
        dist.barrier()
        if find_ranks().rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        watchdog.step("batch 12 of segment 640-703: examples [641, 650]: forward")
        dist.all_reduce(torch.ones(1))


def hang(interruption: Interruption) -> None:
    with Watchdog(1.0, find_ranks().rank) as watchdog:
        if find_ranks().rank == 1:
            watchdog.step("batch 3: reading examples [7, 8]")
            time.sleep(1000)
        while True:
            watchdog.step("waiting for the other")
            time.sleep(0.05)


def ignore(interruption: Interruption) -> None:
    """A rank deep in something that no signal reaches."""
    tell("ready")
    time.sleep(1000)


def dies(interruption: Interruption) -> None:
    if find_ranks().rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ignore(interruption)


def refuses(interruption: Interruption) -> None:
    raise ConfigError("top_k: not today")


def fails(interruption: Interruption) -> None:
    if find_ranks().rank == 1:
        sys.exit(3)
    ignore(interruption)


def trains(interruption: Interruption) -> None:
    """What Lightning does between two batches once SIGTERM has come."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    raise SIGTERMException


def succeeds(interruption: Interruption) -> None:
    tell("done")


def main(config: ComputeTopkLogitsConfig) -> None:
    mode = os.environ["MODE"]
    if mode == "early":
        os.kill(os.getpid(), signal.SIGUSR1)
        mode = "finish"
    if mode == "before":
        tell("ready")
        time.sleep(1000)
    try:
        with Interruption(
            os.environ.get("MAX_TIME"), find_ranks().rank
        ) as interruption:
            globals()[mode](interruption)
    finally:
        if find_ranks().rank == 0 and "CLEAN_UP" in os.environ:
            tell("cleaning")
            time.sleep(float(os.environ["CLEAN_UP"]))
            tell("clean")


if __name__ == "__main__":
    sys.modules["rank_program"] = sys.modules["__main__"]
    run(
        Command(
            name="compute_topk_logits",
            summary="",
            config_class=ComputeTopkLogitsConfig,
            check=lambda config: None,
            function="rank_program:main",
            example="",
        )
    )
