"""Actions of all ranks in which a failure on one rank does not leave the others waiting."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from nemo_kd.config import UserInputError

T = TypeVar("T")

POLL_S = 0.02


def gather(function: Callable[[], T]) -> list[T]:
    """Return what `function` returns on each rank; every rank calls this.

    Raises:
        OSError, UserInputError: on every rank, the error of the lowest rank that has one.
    """
    outcome = _outcome(function)
    outcomes = [outcome]
    if dist.is_initialized():
        outcomes *= dist.get_world_size()
        dist.all_gather_object(outcomes, outcome)
    return [_value(found) for found in outcomes]


def on_every_rank(function: Callable[[], T]) -> T:
    """Return what `function` returns here; raise on every rank if it fails on one."""
    results: list[T] = []
    gather(lambda: results.append(function()))
    return results[0]


def raise_together(error: OSError | UserInputError | None) -> None:
    """Raise the error of the lowest rank that has one, on every rank; every rank calls this."""

    def fail() -> None:
        if error is not None:
            raise error

    gather(fail)


def on_rank_zero(function: Callable[[], T]) -> T:
    """Return on every rank what `function` returns on rank 0, however long that takes.

    Raises:
        OSError, UserInputError: on every rank, what the function raised on rank 0.
    """
    if not dist.is_initialized():
        return function()
    store = shared_store("on_rank_zero")
    outcome: list[Any] = [None]
    if rank() == 0:
        outcome = [_outcome(function)]
        store.set("done", "")
    while not store.check(["done"]):
        time.sleep(POLL_S)
    dist.broadcast_object_list(outcome, src=0)
    return _value(outcome[0])


def shared_store(name: str) -> dist.Store:
    """Return a part of the ranks' common store that is new and empty; every rank calls this."""
    assert dist.group.WORLD is not None
    store = dist.group.WORLD.get_group_store()
    number = store.add(f"{name}/calls of {rank()}", 1)
    return dist.PrefixStore(f"{name}/{number}", store)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _outcome(function: Callable[[], T]) -> T | OSError | UserInputError:
    try:
        return function()
    except (OSError, UserInputError) as error:
        return error


def _value(outcome: T | OSError | UserInputError) -> T:
    if isinstance(outcome, OSError | UserInputError):
        raise outcome
    return outcome
