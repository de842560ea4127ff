"""Megatron's distributed checkpoints: one folder, written and read by all ranks, loadable in any layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

from nemo_kd.mcore.optimizer import SHARDING_METADATA


def save_sharded(state: dict[str, Any], folder: Path) -> None:
    """Writes `state` (sharded tensors and plain values) into `folder`; every rank calls it, `folder` is replaced.

    Megatron forks writer processes: a script that gets here must guard its entry point with `__name__`.
    """
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(folder), content_metadata=SHARDING_METADATA)


def load_sharded(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What `folder` holds for the sharded tensors of `state`, and all its plain values; every rank calls it."""
    return dist_checkpointing.load(
        state, str(folder), strict=dist_checkpointing.validation.StrictHandling.RAISE_UNEXPECTED
    )
