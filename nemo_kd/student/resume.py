"""From which checkpoint a run goes on."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from nemo_kd.student.checkpoint_folder import (
    CheckpointError,
    Contents,
    checkpoints,
    damage,
    put_aside,
    unfinished,
)

log = logging.getLogger(__name__)


def choose_checkpoint(
    parent: Path, if_exists: bool, none_is_fine: bool, otherwise: str | None
) -> Path | None:
    """The checkpoint to go on from, None to begin; every rank takes part, and reads its share of the files.

    Args:
        parent: where this run's checkpoints lie.
        if_exists: goes on from the latest of them that is whole; damaged ones are put aside.
        none_is_fine: begins where there is none.
        otherwise: a checkpoint to go on from where `parent` gives none.

    Raises:
        CheckpointError: there is none, or no whole one.
    """
    found = _latest(parent) if if_exists else None
    if found is None and otherwise:
        found = Path(otherwise)
        problem = agreed_damage(found)
        if problem is None and _has_weights_only(found):
            problem = "it holds weights only, without the optimizer's state"
        if problem is not None:
            raise CheckpointError(
                f"exp_manager.resume_from_checkpoint: {otherwise}: {problem}; give another one"
            )
    if found is None and if_exists and not none_is_fine:
        raise CheckpointError(
            f"exp_manager.resume_if_exists: no checkpoint in {parent}; to begin anew where there is none set "
            "exp_manager.resume_ignore_no_checkpoint=true"
        )
    if found is not None:
        log.info("going on from %s", found)
    return found


def _latest(parent: Path) -> Path | None:
    """
    Raises:
        CheckpointError: there are checkpoints, but all of them are damaged.
    """
    damaged: list[tuple[Path, str]] = []
    chosen = None
    for folder in _agreed(_candidates(parent)):
        problem = agreed_damage(folder)
        if problem is None:
            chosen = folder
            break
        damaged.append((folder, problem))
    listed = "".join(f"\n  {folder.name}: {problem}" for folder, problem in damaged)
    if damaged and chosen is None:
        raise CheckpointError(
            f"exp_manager.resume_if_exists: no checkpoint in {parent} is whole:{listed}\nRestore one, or remove all of "
            "them to begin anew"
        )
    if damaged:
        log.warning("damaged checkpoints in %s:%s\nthe run goes on from %s", parent, listed, chosen)
        if torch.distributed.get_rank() == 0:
            for folder, _ in damaged:
                log.warning(
                    "%s is now called %s; nothing uses it any more", folder, put_aside(folder).name
                )
    torch.distributed.barrier()
    return chosen


def _candidates(parent: Path) -> list[Path]:
    """On rank 0 what can be resumed from, after removing what killed runs did not finish."""
    if torch.distributed.get_rank() != 0:
        return []
    for folder in unfinished(parent):
        log.warning("removing %s, which a run that was killed did not finish", folder)
        shutil.rmtree(folder, ignore_errors=True)
    return [folder for folder in checkpoints(parent) if not _has_weights_only(folder)]


def _has_weights_only(folder: Path) -> bool:
    try:
        return not Contents.read(folder).resumable
    except CheckpointError:
        return False  # it is damaged, which will be told


def _agreed(folders: list[Path]) -> list[Path]:
    box: list[Any] = [folders]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def agreed_damage(folder: Path) -> str | None:
    """What any rank found wrong with its share of a checkpoint's files; every rank takes part."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(found, damage(folder, rank, world_size))
    return next((problem for problem in found if problem is not None), None)
