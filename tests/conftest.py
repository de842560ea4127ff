from __future__ import annotations

import os
from collections.abc import Callable, Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest

from tests.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """`ranks(2).run(function, *args)`: runs a function on two gloo ranks that the whole test session shares."""
    pools: dict[int, Ranks] = {}

    def of_size(world_size: int) -> Ranks:
        return pools.setdefault(world_size, Ranks(world_size))

    yield of_size
    for pool in pools.values():
        pool.stop()
