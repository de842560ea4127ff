"""A training checkpoint on disk: a folder that appears when it is whole, and that tells what it should hold.

`contents.json` lists every file with its length and checksum. A checkpoint is written into a hidden folder beside its
place and renamed when all of it is there, so a name without a leading dot stands for a whole checkpoint, unless its
files were damaged later; then lengths and checksums show it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_kd.config import UserInputError
from nemo_kd.files import abandoned, owner_name, read_file, sync
from nemo_kd.mcore.checkpoint_write import FileSum, file_sum

CONTENTS = "contents.json"
FORMAT_VERSION = 1
LAST, PREVIOUS = "-last", "-previous"
UNFINISHED, DAMAGED = ".unfinished", ".damaged"
PARTS = (CONTENTS, "common.pt", ".metadata", "metadata.json")


class CheckpointError(UserInputError):
    """A training checkpoint cannot be written, or none of those that are there can be used."""


@dataclass(frozen=True)
class Contents:
    """What a checkpoint says about itself.

    Attributes:
        step: completed optimizer steps.
        resumable: False where it has weights only.
        layout: the sizes of the process groups that wrote it.
        files: name -> (bytes, crc32) of all files but `contents.json`.
        experiment: what determines the result of the run; None where an earlier version wrote the checkpoint.
    """

    step: int
    resumable: bool
    layout: dict[str, int]
    files: dict[str, Sequence[int]]
    experiment: dict[str, Any] | None = None

    @staticmethod
    def read(folder: Path) -> Contents:
        """
        Raises:
            CheckpointError: the folder does not tell, or not in a way that is known here.
        """
        path = folder / CONTENTS
        try:
            fields: dict[str, Any] = json.loads(read_file(path))
            version = fields.pop("format_version")
            if version != FORMAT_VERSION:
                raise CheckpointError(f"{path}: format version {version} is not {FORMAT_VERSION}")
            contents = Contents(**fields)
            _check_types(contents)
            return contents
        except FileNotFoundError as error:
            raise CheckpointError(f"{CONTENTS} is missing") from error
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{CONTENTS} cannot be read ({error})") from error


def _check_types(contents: Contents) -> None:
    """Raise a ValueError where one that somebody wrote by hand would be stumbled over, or lists files of other folders."""
    if type(contents.step) is not int or not isinstance(contents.layout, dict):
        raise ValueError("step or layout is none")
    if contents.experiment is not None and not isinstance(contents.experiment, dict):
        raise ValueError("experiment is no mapping")
    for name, sums in contents.files.items():
        if (
            Path(name).name != name
            or len(sums) != 2
            or not all(type(number) is int for number in sums)
        ):
            raise ValueError(
                f"files: {name[:80]!r} is no file of this folder with length and checksum"
            )


def unfinished_folder(folder: Path) -> Path:
    """A new hidden name beside `folder` with machine and process in it; no two runs get the same."""
    return folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.{owner_name()}{UNFINISHED}")


def seal(
    folder: Path,
    step: int,
    resumable: bool,
    layout: dict[str, int],
    sums: Mapping[str, FileSum],
    experiment: dict[str, Any] | None = None,
) -> None:
    """Adds `contents.json`, with the sums of the files that are not in `sums`; all of it is on the disk then."""
    files = dict(sums)
    for path in folder.iterdir():
        if path.name not in files:
            sync(path)
            files[path.name] = file_sum(path)
    contents = Contents(
        step, resumable, layout, {name: list(files[name]) for name in sorted(files)}, experiment
    )
    (folder / CONTENTS).write_text(
        json.dumps({"format_version": FORMAT_VERSION, **asdict(contents)}, indent=1)
    )
    sync(folder / CONTENTS)
    sync(folder)


def publish(written: Path, targets: Sequence[Path]) -> None:
    """Gives a sealed folder its names, several of them by hard links; what had a name before gives way.

    The `-last` checkpoint before it becomes `-previous`, and is kept until the next one.
    """
    targets = sorted(set(targets), key=lambda target: not target.name.endswith(LAST))
    for number, target in enumerate(targets):
        folder = written if number == len(targets) - 1 else _twin(written)
        if target.name.endswith(LAST):
            _retire_last(target.parent)
        elif target.exists():
            discard(target)
        folder.rename(target)
        sync(target.parent)


def link(folder: Path, target: Path) -> None:
    """Gives a published checkpoint another name."""
    publish(_twin(folder), [target])


def discard(folder: Path) -> None:
    """Deletes a checkpoint; it stops being one at once."""
    hidden = unfinished_folder(folder)
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def unfinished(parent: Path) -> list[Path]:
    """What dead processes have left of checkpoints they wrote or deleted; never what a live one is writing."""
    return [path for path in abandoned(parent, UNFINISHED) if path.is_dir()]


def checkpoints(parent: Path) -> list[Path]:
    """The folders that are named as checkpoints, those first that a run resumes from first.

    The latest `-last`, and then the others by their steps, latest first.
    """
    found = [
        path
        for path in parent.glob("[!.]*")
        if path.is_dir()
        and not path.name.endswith(DAMAGED)
        and (path.name.endswith((LAST, PREVIOUS)) or any((path / name).exists() for name in PARTS))
    ]
    return sorted(
        found, key=lambda path: (path.name.endswith(LAST), _step(path), path.name), reverse=True
    )


def damage(folder: Path, part: int = 0, num_parts: int = 1) -> str | None:
    """What is wrong with a checkpoint, None if nothing; of the files whose number modulo `num_parts` is `part`."""
    try:
        contents = Contents.read(folder)
    except CheckpointError as error:
        return str(error)
    for path in folder.iterdir():
        if not path.is_file():  # reading a pipe would never end
            return f"{path.name} is not a regular file"
    for name in list(contents.files)[part::num_parts]:
        num_bytes, crc32 = contents.files[name]
        try:
            found = (folder / name).stat().st_size
            if found != num_bytes:
                return f"{name} has {found:,} of {num_bytes:,} bytes"
            if file_sum(folder / name).crc32 != crc32:
                return f"{name} has another checksum than when it was written"
        except OSError as error:
            return (
                f"{name} is missing"
                if isinstance(error, FileNotFoundError)
                else f"{name}: {error.strerror}"
            )
    return None


def put_aside(folder: Path) -> Path:
    """Renames a damaged checkpoint, so that nothing takes it for one any more."""
    aside, number = folder.with_name(folder.name + DAMAGED), 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.{number}{DAMAGED}")
    folder.rename(aside)
    return aside


def _step(folder: Path) -> int:
    try:
        return Contents.read(folder).step
    except CheckpointError:
        match = re.search(r"step=(\d+)", folder.name)
        return int(match[1]) if match else -1


def _retire_last(parent: Path) -> None:
    """The `-last` checkpoints of a folder become the one `-previous`; at every moment there is one of them."""
    last = [path for path in checkpoints(parent) if path.name.endswith(LAST)]
    if not last:
        return
    for path in checkpoints(parent):
        if path.name.endswith(PREVIOUS):
            discard(path)
    for path in last[1:]:
        discard(path)
    last[0].rename(last[0].with_name(last[0].name.removesuffix(LAST) + PREVIOUS))


def _twin(folder: Path) -> Path:
    """A hidden folder with the same files; they take no room where the file system has hard links."""
    twin = unfinished_folder(folder)
    twin.mkdir()
    copy: Callable[[Path, Path], object] = os.link
    for path in folder.iterdir():
        try:
            copy(path, twin / path.name)
        except OSError:
            copy = shutil.copy2
            copy(path, twin / path.name)
    sync(twin)
    return twin
