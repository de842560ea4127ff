"""Responses of a model to prompts, generated on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from nemo_kd.mcore.generation import (
    Response,
    Sampling,
    check_prompts,
    generate,
    num_positions,
)
from nemo_kd.mcore.groups import ProcessGroups
from nemo_kd.run.collective import gather


def respond(
    model: torch.nn.Module,
    groups: ProcessGroups,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    vocab_size: int,
    max_batch: int,
    numbers: Sequence[int] | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> list[Response]:
    """Return a response per prompt on every rank; replicas share the prompts.

    Every rank calls it with the same prompts. Arguments and errors are those of `check_prompts` and
    `generate`; a prompt has its place as its number by default.
    """
    numbers = range(len(prompts)) if numbers is None else numbers
    # Before replicas step together, so that all raise the same error.
    names = [f"prompt {number}" for number in numbers]
    check_prompts(prompts, names, num_positions(model))
    by_length = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    mine = by_length[groups.data_rank :: groups.data_size]

    def generate_mine() -> dict[int, Response]:
        responses = generate(
            model,
            groups,
            [prompts[place] for place in mine],
            sampling,
            vocab_size=vocab_size,
            max_batch=max_batch,
            numbers=[numbers[place] for place in mine],
            on_step=on_step,
        )
        return dict(zip(mine, responses, strict=True)) if groups.is_writer else {}

    found: dict[int, Response] = {}
    for part in gather(generate_mine):
        found |= part
    return [found[place] for place in range(len(prompts))]
