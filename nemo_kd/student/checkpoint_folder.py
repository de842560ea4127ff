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

import torch

from nemo_kd.config import UserInputError
from nemo_kd.files import abandoned, owner_name, read_file, remove, sync, write_atomically
from nemo_kd.mcore.checkpoint_write import FileSum, file_sum
from nemo_kd.run.collective import gather, on_rank_zero

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
    files: dict[str, Sequence[int]]
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
        except FileNotFoundError as error:
            raise CheckpointError(f"{CONTENTS} is missing") from error
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{CONTENTS} cannot be read ({error})") from error
        if contents.format_version != FORMAT_VERSION:
            raise CheckpointError(
                f"{CONTENTS}: format version {contents.format_version} is not {FORMAT_VERSION}"
            )
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


def seal(
    folder: Path,
    step: int,
    resumable: bool,
    layout: dict[str, int],
    sums: Mapping[str, FileSum],
    experiment: dict[str, Any] | None = None,
) -> None:
    """Add `contents.json`; sums that are not in `sums` are computed. Everything is synced."""
    files = {name: list(found) for name, found in sums.items()}
    for path in folder.iterdir():
        if path.name not in files:
            sync(path)
            files[path.name] = list(file_sum(path))
    contents = Contents(step, resumable, layout, dict(sorted(files.items())), experiment)
    write_atomically(folder / CONTENTS, json.dumps(asdict(contents), indent=1).encode())


def publish(written: Path, targets: Sequence[Path]) -> None:
    """Give a sealed folder its names, several by hard links, and replace what had them.

    The earlier `-last` checkpoint becomes `-previous` and is kept until the next one.
    """
    targets = sorted(set(targets), key=lambda target: not target.name.endswith(LAST))
    for number, target in enumerate(targets):
        folder = written if number == len(targets) - 1 else _twin(written)
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
        key=lambda path: (path.name.endswith(LAST), _step(path), path.name),
        reverse=True,
    )


def resumable(parent: Path) -> list[Path]:
    """Return the `checkpoints` that hold more than weights; damaged ones are among them."""
    found = [(folder, read_contents(folder)) for folder in checkpoints(parent)]
    return [
        folder for folder, contents in found if contents is None or contents.resumable
    ]


def damage(folder: Path, part: int = 0, num_parts: int = 1) -> str | None:
    """Return the damage of a checkpoint, or None; checks every `num_parts`-th file from `part`."""
    try:
        contents = Contents.read(folder)
    except CheckpointError as error:
        return str(error)
    for name in list(contents.files)[part::num_parts]:
        num_bytes, crc32 = contents.files[name]
        try:
            found = file_sum(folder / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found != (num_bytes, crc32):
            return f"{name} is not as it was written: {found.num_bytes:,} of {num_bytes:,} bytes"
    return None


def put_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint so that nothing uses it any more; return the new name."""
    aside = folder.with_name(folder.name + DAMAGED)
    while aside.exists():
        aside = aside.with_name(aside.name + DAMAGED)
    folder.rename(aside)
    return aside


def _step(folder: Path) -> int:
    contents = read_contents(folder)
    return -1 if contents is None else contents.step


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

    def link_or_copy(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    shutil.copytree(folder, twin, copy_function=link_or_copy)
    sync(twin)
    return twin


def choose_checkpoint(
    parent: Path, if_exists: bool, none_is_fine: bool, otherwise: str | None
) -> Path | None:
    """Return the checkpoint to resume, or None to start; every rank calls it and reads some files.

    Args:
        parent: folder of this run's checkpoints.
        if_exists: resume the latest whole checkpoint in it; damaged ones are renamed.
        none_is_fine: start if there is none.
        otherwise: a checkpoint to resume if `parent` gives none.

    Raises:
        CheckpointError: there is none, or no whole one.
    """
    found = _latest_whole(parent) if if_exists else None
    if found is None and otherwise:
        found = Path(otherwise)
        problem = agreed_damage(found)
        if problem is None and not Contents.read(found).resumable:
            problem = "it holds weights only, without the optimizer's state"
        if problem is not None:
            raise CheckpointError(
                f"exp_manager.resume_from_checkpoint: {otherwise}: {problem}; give another one"
            )
    if found is None and if_exists and not none_is_fine:
        raise CheckpointError(
            f"exp_manager.resume_if_exists: no checkpoint in {parent}; to start over where there "
            "is none set exp_manager.resume_ignore_no_checkpoint=true"
        )
    if found is not None:
        log.info("resuming from %s", found)
    return found


def agreed_damage(folder: Path) -> str | None:
    """Return the damage that any rank finds in its share of the files; every rank calls it."""
    part = torch.distributed.get_rank()
    num_parts = torch.distributed.get_world_size()
    found = gather(lambda: damage(folder, part, num_parts))
    return next((problem for problem in found if problem is not None), None)


def _latest_whole(parent: Path) -> Path | None:
    """
    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    damaged: list[tuple[Path, str]] = []
    chosen = None
    for folder in on_rank_zero(lambda: _candidates(parent)):
        problem = agreed_damage(folder)
        if problem is None:
            chosen = folder
            break
        damaged.append((folder, problem))
    if not damaged:
        return chosen
    listed = "".join(f"\n  {folder.name}: {problem}" for folder, problem in damaged)
    if chosen is None:
        raise CheckpointError(
            f"exp_manager.resume_if_exists: no checkpoint in {parent} is whole:{listed}\nRestore "
            "one, or remove all of them to start over"
        )

    def put_all_aside() -> None:
        for folder, problem in damaged:
            name = put_aside(folder).name
            log.warning("%s is damaged (%s) and now called %s", folder, problem, name)

    on_rank_zero(put_all_aside)
    return chosen


def _candidates(parent: Path) -> list[Path]:
    """Remove what killed runs did not finish, and return what can be resumed."""
    for path in abandoned(parent, UNFINISHED):
        log.warning("removing %s, which a run that was killed did not finish", path)
        remove(path)
    return resumable(parent)
