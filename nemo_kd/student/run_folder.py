"""The folder of a run of stage 2: one run at a time, and none starts over where another one has left something."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nemo_kd.config import UserInputError
from nemo_kd.files import Lock, explained, open_lock_file, read_holder, release_lock, try_lock
from nemo_kd.student.checkpoint_folder import CheckpointError, Contents, checkpoints

log = logging.getLogger(__name__)

LOCK = Path(".nemo_kd") / "lock"
"""Inside a folder: NeMo's exp_manager moves the files of a log folder away when a run resumes, but no folders."""

WAIT_S = 3.0
WAIT_AFTER_REQUEUE_S = 30.0
"""Time in which the processes of a run that was killed, or of the job before a requeued one, come to their end."""

REFUSAL = (
    "is training there; two runs in one folder would destroy each other's checkpoints. Wait until it ends, stop it, or give "
    "another exp_manager.explicit_log_dir"
)


@contextlib.contextmanager
def own_run_folder(settings: dict[str, Any], name: str) -> Iterator[None]:
    """Hold the right to use the run's folders, in which nothing was read or changed before; every rank takes part.

    Raises:
        UserInputError: on all ranks: another process holds it, or the run would start over where another one has left
            something.
    """
    problem: list[Any] = [None]
    with contextlib.ExitStack() as stack:
        if torch.distributed.get_rank() == 0:
            try:
                log_dir, parent = _folders(settings, name)
                apart = (
                    None if log_dir is not None and parent == log_dir / "checkpoints" else parent
                )
                for folder in dict.fromkeys(path for path in (log_dir, apart) if path is not None):
                    stack.enter_context(_locked(folder))
                _check_not_trained_over(settings, log_dir, parent)
            except UserInputError as error:
                problem = [error]
        torch.distributed.broadcast_object_list(problem, src=0)
        if problem[0] is not None:
            raise problem[0]
        yield


def _folders(settings: dict[str, Any], name: str) -> tuple[Path | None, Path | None]:
    """Return the folder of logs and that of checkpoints; None for those that NeMo makes anew, with date and time."""
    log_dir = None
    if settings["explicit_log_dir"]:
        log_dir = Path(settings["explicit_log_dir"])
    elif settings["resume_if_exists"] or settings["version"]:
        parent = Path(settings["exp_dir"] or "nemo_experiments") / (settings["name"] or name)
        log_dir = parent / (settings["version"] or "")
    dirpath = settings["checkpoint_callback_params"]["dirpath"]
    checkpoint_dir = Path(dirpath) if dirpath else log_dir and log_dir / "checkpoints"
    return log_dir and log_dir.absolute(), checkpoint_dir and checkpoint_dir.absolute()


def _locked(folder: Path) -> Lock:
    path = folder / LOCK
    with explained(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
    wait_s = WAIT_AFTER_REQUEUE_S if "SLURM_RESTART_COUNT" in os.environ else WAIT_S
    limit_s = time.monotonic() + wait_s
    file = open_lock_file(path)
    has_told = False
    while try_lock(file, fcntl.LOCK_EX) is False and time.monotonic() < limit_s:
        if not has_told:
            log.warning(
                "%s: %s is training there; waiting up to %g s for its end",
                folder,
                read_holder(file),
                wait_s,
            )
            has_told = True
        time.sleep(0.2)
    release_lock(file)
    return Lock(path, REFUSAL)


def _check_not_trained_over(
    settings: dict[str, Any], log_dir: Path | None, parent: Path | None
) -> None:
    """
    Raises:
        CheckpointError: the run would start over beside what another one has left.
    """
    found = checkpoints(parent) if parent is not None else []
    other = settings["resume_from_checkpoint"]
    resumes = settings["resume_if_exists"]
    if (resumes and any(_may_resume(path) for path in found)) or (
        other and Path(other).absolute() in found
    ):
        return
    left = [*found, *sorted(parent.glob("*.nemo") if parent is not None else [])]
    metrics = log_dir / "metrics" / "metrics.jsonl" if log_dir is not None else None
    if metrics is not None and not resumes and metrics.exists() and metrics.stat().st_size:
        left.append(metrics)
    if not left:
        return
    if resumes:
        raise CheckpointError(
            f"exp_manager.resume_if_exists: {parent} holds what another run has left ({left[0].name}), but no checkpoint to go on "
            "from, so this run would start over and replace it. Give another exp_manager.explicit_log_dir, or move it away"
        )
    raise CheckpointError(
        f"exp_manager.resume_if_exists: False, but {log_dir or parent} holds a run ({left[0].name}), which this one would train "
        "over. Give another exp_manager.explicit_log_dir, or go on with that run: exp_manager.resume_if_exists=true"
    )


def _may_resume(folder: Path) -> bool:
    try:
        return Contents.read(folder).resumable
    except CheckpointError:
        return True  # it is damaged, which is told where checkpoints are chosen
