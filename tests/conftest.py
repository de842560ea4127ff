from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest

from tests.ranks import Ranks

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As shells start what they put into the background; the runs under test would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """`ranks(2).run(function, *args)`: runs a function on two gloo ranks that the whole test session shares."""
    pools: dict[int, Ranks] = {}

    def of_size(world_size: int) -> Ranks:
        return pools.setdefault(world_size, Ranks(world_size))

    yield of_size
    for pool in pools.values():
        pool.stop()
