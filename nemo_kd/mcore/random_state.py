"""The state of every random generator of a process, as a part of a distributed checkpoint."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel import get_cuda_rng_tracker


def sharded_random_state() -> ShardedObject:
    """This rank's state; it loads only where there are as many ranks as when it was saved."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()
    name, keys, position, has_gauss, cached_gaussian = numpy_state
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [
            name,
            torch.from_numpy(keys.astype(np.int64)),
            position,
            has_gauss,
            cached_gaussian,
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": get_cuda_rng_tracker().get_states(),
    }
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return ShardedObject("random_state", state, (world_size,), (rank,))


def set_random_state(state: dict[str, Any]) -> None:
    """Every generator goes on as it would have when `state` was saved."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached_gaussian = state["numpy"]
    np.random.set_state(
        (name, keys.numpy().astype(np.uint32), position, has_gauss, cached_gaussian)
    )
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["megatron"])
