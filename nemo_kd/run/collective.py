"""What ranks do together without one of them waiting for ever for another that failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from nemo_kd.config import UserInputError

T = TypeVar("T")


def raise_together(error: OSError | UserInputError | None) -> None:
    """Raise the error of the lowest rank that has one, on every rank; every rank calls this."""
    errors: list[OSError | UserInputError | None] = [error]
    if is_distributed():
        errors *= torch.distributed.get_world_size()
        torch.distributed.all_gather_object(errors, error)
    for found in errors:
        if found is not None:
            raise found


def on_rank_zero(function: Callable[[], T]) -> T:
    """Return on every rank what `function` returns on rank 0; its OSError or UserInputError is raised on all."""
    outcome: list[T | OSError | UserInputError | None] = [None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except (OSError, UserInputError) as error:
            outcome[0] = error
    if is_distributed():
        torch.distributed.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], OSError | UserInputError):
        raise outcome[0]
    return outcome[0]  # type: ignore[return-value]


def on_every_rank(function: Callable[[], T]) -> T:
    """Return what `function` returns here; every rank raises where it fails on one."""
    result: T | None = None
    problem: OSError | UserInputError | None = None
    try:
        result = function()
    except (OSError, UserInputError) as error:
        problem = error
    raise_together(problem)
    return result  # type: ignore[return-value]


def is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    return torch.distributed.get_rank() if is_distributed() else 0


def shared_store(name: str) -> torch.distributed.Store:
    """Return a store of all ranks whose keys no earlier run of this process used; all ranks call it."""
    group = torch.distributed.group.WORLD
    assert group is not None
    store = group.get_group_store()
    number = on_rank_zero(lambda: store.add(name, 1))
    return torch.distributed.PrefixStore(f"{name}/{number}", store)
