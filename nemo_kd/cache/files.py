"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

ABANDONED_AFTER_S = 3600.0


def write_atomically(path: str | Path, data: bytes | Iterable[bytes]) -> None:
    """Replaces the content of `path`; a crash at any instant leaves the old content or the new one."""
    with atomic_file(path) as file:
        file.writelines([data] if isinstance(data, bytes) else data)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to that takes the name `path`, durably, when the block ends without an error.

    Until then the bytes lie in a hidden file of the same folder whose name tells the machine and the process. An
    error in the block removes it; what a killed process leaves behind, `remove_abandoned` removes.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{_machine()}-{os.getpid()}.tmp")
    try:
        # Not the tempfile module: its files are readable by their owner only, and a cache is shared.
        with open(temporary, "wb", buffering=1 << 20) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def remove_abandoned(path: Path) -> list[Path]:
    """Deletes what dead processes left of writing `path`, and returns it.

    A process of this machine is dead when no process has its id. About another machine's process nothing is known, so
    its file counts as abandoned once it has not grown for an hour.
    """
    removed = []
    prefix, machine = f".{path.name}.", _machine()
    for entry in path.parent.glob("*.tmp") if path.parent.is_dir() else ():
        owner, dash, pid = entry.name[len(prefix) : -len(".tmp")].rpartition("-")
        if not (entry.name.startswith(prefix) and dash and pid.isdecimal()):
            continue
        if owner == machine:
            abandoned = int(pid) != os.getpid() and not _is_alive(int(pid))
        else:
            abandoned = time.time() - entry.stat().st_mtime > ABANDONED_AFTER_S
        if abandoned:
            entry.unlink(missing_ok=True)
            removed.append(entry)
    return removed


def _machine() -> str:
    return socket.gethostname().replace("/", "_")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems cannot sync a folder; their renames are durable by themselves or never.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
