"""A folder that takes the place of another one, which a kill at any instant leaves either old or new."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from nemo_kd.files import remove, sync, sync_folder

AT_FDCWD = -100  # linux/fcntl.h
RENAME_EXCHANGE = 2  # linux/fs.h
REPLACED = ".replaced"


def replace_folder(new: Path, folder: Path) -> None:
    """Give the folder `new` the name `folder`; what had that name is removed afterwards. Durable.

    Where the file system cannot exchange two names at once, the old folder steps aside first under a name that
    `restore_replaced` knows.
    """
    for path in [*new.rglob("*"), new]:
        if path.is_dir():
            sync_folder(path)
        else:
            sync(path)
    aside = _aside(folder)
    if not folder.exists():
        os.rename(new, folder)
    elif _exchange(new, folder):
        remove(new)
    else:
        remove(aside)
        os.rename(folder, aside)
        os.rename(new, folder)
    sync_folder(folder.parent)
    remove(aside)


def restore_replaced(folder: Path) -> None:
    """Give an old folder its name back if a process was killed after it had stepped aside."""
    aside = _aside(folder)
    if aside.is_dir() and not folder.exists():
        os.rename(aside, folder)
    remove(aside)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{REPLACED}")


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names at once; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0
