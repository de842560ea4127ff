"""A training checkpoint on disk, and the choice of the one that a run resumes.

A checkpoint is a folder that appears when it is whole: it is written under a hidden name and then
renamed. `contents.json` lists every file with its length and checksum, which show later damage.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_kd.config import UserInputError
from nemo_kd.config.exp_manager import ExpManagerConfig
from nemo_kd.files import (
    abandoned,
    owner_name,
    read_file,
    remove,
    sync,
    write_atomically,
)
from nemo_kd.mcore.checkpoint_write import file_sum
from nemo_kd.run.collective import gather, on_rank_zero, rank

log = logging.getLogger(__name__)

CONTENTS = "contents.json"
FORMAT_VERSION = 1
LAST = "-last"
PREVIOUS = "-previous"
UNFINISHED = ".unfinished"
DAMAGED = ".damaged"


class CheckpointError(UserInputError):
    """A training checkpoint cannot be written, or none can be used."""


@dataclass(frozen=True)
class Contents:
    """The file `contents.json` of a checkpoint.

    Attributes:
        step: completed optimizer steps.
        resumable: False if it holds weights only.
        layout: sizes of the process groups that wrote it.
        files: name -> (bytes, crc32) of all other files.
        experiment: the record that is compared on resume; None in the first versions.
    """

    step: int
    resumable: bool
    layout: dict[str, int]
    files: dict[str, Any]
    experiment: dict[str, Any] | None = None
    format_version: int = FORMAT_VERSION

    @staticmethod
    def read(folder: Path) -> Contents:
        """
        Raises:
            CheckpointError: the file is missing, damaged or of another version.
        """
        try:
            contents = Contents(**json.loads(read_file(folder / CONTENTS)))
            if contents.format_version != FORMAT_VERSION:
                raise ValueError(f"format version {contents.format_version}")
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{CONTENTS} cannot be read ({error})") from error
        return contents


def read_contents(folder: Path) -> Contents | None:
    """Return the contents of a checkpoint, or None if they are missing or damaged."""
    try:
        return Contents.read(folder)
    except CheckpointError:
        return None


def unfinished_folder(folder: Path) -> Path:
    """Return a new hidden name beside `folder`, with machine and process in it."""
    return folder.with_name(
        f".{folder.name}.{uuid.uuid4().hex[:8]}.{owner_name()}{UNFINISHED}"
    )


def seal(folder: Path, contents: Contents) -> None:
    """Add `contents.json`; sums that `contents.files` lacks are computed. Everything is synced."""
    for path in folder.iterdir():
        if path.name not in contents.files:
            sync(path)
            contents.files[path.name] = file_sum(path)
    write_atomically(
        folder / CONTENTS, json.dumps(asdict(contents), indent=1).encode()
    )


def publish(written: Path, targets: Sequence[Path]) -> None:
    """Give a sealed folder its names, several by hard links, and replace what had them.

    The earlier `-last` checkpoint becomes `-previous` and is kept until the next one.
    """
    targets = sorted(set(targets), key=lambda target: not target.name.endswith(LAST))
    for target in targets:
        folder = written if target == targets[-1] else _twin(written)
        if target.name.endswith(LAST):
            _retire_last(target.parent)
        else:
            discard(target)
        folder.rename(target)
        sync(target.parent)


def discard(folder: Path) -> None:
    """Delete a checkpoint if it is there; its name is gone at once."""
    if not folder.is_dir():
        return
    hidden = unfinished_folder(folder)
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def checkpoints(parent: Path) -> list[Path]:
    """Return the folders that are named as checkpoints, in the order in which a run tries them.

    First the latest `-last`, then the others, latest step first.
    """
    found = [
        path
        for path in parent.glob("[!.]*")
        if path.is_dir()
        and not path.name.endswith(DAMAGED)
        and (path.name.endswith((LAST, PREVIOUS)) or (path / CONTENTS).exists())
    ]
    return sorted(
        found,
        key=lambda path: (
            path.name.endswith(LAST),
            getattr(read_contents(path), "step", -1),
            path.name,
        ),
        reverse=True,
    )


def resumable(parent: Path) -> list[Path]:
    """Return the `checkpoints` that hold more than weights; damaged ones are among them."""
    return [
        folder
        for folder in checkpoints(parent)
        if getattr(read_contents(folder), "resumable", True)
    ]


def check_whole(folder: Path) -> Contents:
    """Return the contents of a checkpoint; every rank calls it and checks some of the files.

    Raises:
        CheckpointError, OSError: on every rank, something is damaged.
    """
    num_ranks = len(gather(rank))

    def check() -> Contents:
        contents = Contents.read(folder)
        for name in list(contents.files)[rank() :: num_ranks]:
            num_bytes, crc32 = contents.files[name]
            found = file_sum(folder / name)
            if found != (num_bytes, crc32):
                raise CheckpointError(
                    f"{name} is not as it was written: {found.num_bytes:,} of {num_bytes:,} bytes"
                )
        return contents

    return gather(check)[0]


def put_aside(damaged: Mapping[Path, Exception]) -> None:
    """Rename damaged checkpoints so that nothing uses them any more."""
    for folder, problem in damaged.items():
        aside = folder.with_name(folder.name + DAMAGED)
        while aside.exists():
            aside = aside.with_name(aside.name + DAMAGED)
        folder.rename(aside)
        log.warning(
            "%s is damaged (%s) and now called %s", folder, problem, aside.name
        )


def _retire_last(parent: Path) -> None:
    """Rename the `-last` checkpoint to `-previous`; at every moment one of the two is there."""
    found = checkpoints(parent)
    if not found or not found[0].name.endswith(LAST):
        return
    for path in found[1:]:
        if path.name.endswith((LAST, PREVIOUS)):
            discard(path)
    found[0].rename(found[0].with_name(found[0].name.removesuffix(LAST) + PREVIOUS))


def _twin(folder: Path) -> Path:
    """Return a hidden folder with the same files, as hard links if possible."""
    twin = unfinished_folder(folder)
    twin.mkdir()
    for path in folder.iterdir():
        try:
            os.link(path, twin / path.name)
        except OSError:
            shutil.copyfile(path, twin / path.name)
    sync(twin)
    return twin


def choose_checkpoint(parent: Path, manager: ExpManagerConfig) -> Path | None:
    """Return the checkpoint to resume, or None to start; every rank calls it and reads some files.

    It is the latest whole one in `parent`, the folder of this run's checkpoints; damaged ones are
    renamed. If `parent` has none, it is `manager.resume_from_checkpoint`.

    Raises:
        CheckpointError: there is none, or no whole one.
    """
    found: list[Path] = []
    if manager.resume_if_exists:
        found = on_rank_zero(lambda: _candidates(parent))
    if not found and manager.resume_from_checkpoint:
        found = [Path(manager.resume_from_checkpoint)]
    damaged: dict[Path, Exception] = {}
    for folder in found:
        try:
            if not check_whole(folder).resumable:
                raise CheckpointError(
                    "it holds weights only, without the optimizer's state"
                )
        except (CheckpointError, OSError) as error:
            damaged[folder] = error
            continue
        on_rank_zero(lambda: put_aside(damaged))
        log.info("resuming from %s", folder)
        return folder
    must_resume = manager.resume_if_exists and not manager.resume_ignore_no_checkpoint
    if damaged or must_resume:
        listed = "".join(
            f"\n  {folder}: {problem}" for folder, problem in damaged.items()
        )
        raise CheckpointError(
            f"exp_manager.resume_if_exists: no whole checkpoint to resume in {parent}{listed}\n"
            "Restore one; to start over remove all of them, and set "
            "exp_manager.resume_ignore_no_checkpoint=true"
        )
    return None


def _candidates(parent: Path) -> list[Path]:
    """Remove what killed runs did not finish, and return what can be resumed."""
    for path in abandoned(parent, UNFINISHED):
        log.warning("removing %s, which a run that was killed did not finish", path)
        remove(path)
    return resumable(parent)
