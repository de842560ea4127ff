"""Files that appear whole or not at all, and one writer at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from nemo_kd.cache.layout import CacheError

ABANDONED_AFTER_S = 3600.0
NO_LOCKS = (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS)

log = logging.getLogger(__name__)

_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space (`logit_cache plan` tells how much a cache needs)",
    errno.EDQUOT: "your quota is used up: free some space (`logit_cache plan` tells how much a cache needs)",
    errno.EFBIG: "the file system or a limit (`ulimit -f`) allows no larger file: raise it, or write smaller chunks",
    errno.EROFS: "the file system is read-only: give another output_path, or mount it for writing",
    errno.EACCES: "you may not write there: give another output_path, or have its owner permit it",
    errno.EPERM: "you may not write there: give another output_path, or have its owner permit it",
    errno.ENOENT: "its folder is not there and cannot be made: restore it or give another output_path",
    errno.ENAMETOOLONG: "the name is too long: give a shorter output_path",
    errno.ENOTDIR: "its folder is no folder: give another output_path",
    errno.ESTALE: "its folder has vanished from the network file system: mount it again",
    errno.EIO: "the disk reports an error: check it",
}


@contextlib.contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """Turns what the operating system says against writing `path` into a CacheError with a remedy."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0)
        if remedy is None:
            raise
        raise CacheError(
            f"{path}: cannot be written ({error.strerror}); {remedy}, then run the same command again; "
            "what is published stays and is not computed again"
        ) from error


def write_atomically(path: str | Path, data: bytes | Iterable[bytes]) -> None:
    """Replaces the content of `path`; a crash at any instant leaves the old content or the new one."""
    with atomic_file(path) as file:
        file.writelines([data] if isinstance(data, bytes) else data)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to that takes the name `path`, durably, when the block ends without an error.

    Until then the bytes lie in a hidden file of the same folder whose name tells the machine and the process. An
    error in the block removes it; what a killed process leaves behind, `remove_abandoned` removes.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{_machine()}-{os.getpid()}.tmp")
    with explained(path):
        try:
            # Not the tempfile module: its files are readable by their owner only, and a cache is shared.
            with open(temporary, "wb", buffering=1 << 20) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(path.parent)


def remove_abandoned(folder: Path) -> None:
    """Deletes the temporary files that dead processes left in a folder."""
    for path in abandoned(folder):
        path.unlink(missing_ok=True)


def abandoned(folder: Path) -> list[Path]:
    """The temporary files that dead processes left in a folder.

    A process of this machine is dead when no process has its id. About another machine's process nothing is known, so
    its file counts as abandoned once it has not grown for an hour.
    """
    found = []
    for path in sorted(folder.glob(".*.tmp")):
        owner, dash, pid = path.name.removesuffix(".tmp").rpartition("-")
        if not (dash and pid.isdecimal()):
            continue
        if owner.endswith(f".{_machine()}"):
            is_abandoned = int(pid) != os.getpid() and not _is_alive(int(pid))
        else:
            is_abandoned = time.time() - path.stat().st_mtime > ABANDONED_AFTER_S
        if is_abandoned:
            found.append(path)
    return found


class Lock:
    """The right to do something alone, held until `release`, the end of a with block or that of the process.

    The operating system keeps the lock, so a killed job leaves none behind; the file only tells whose it is.

    Args:
        what: the right, for who is refused.
        wait: until the holder gives it back, instead of refusing.

    Raises:
        CacheError: another process holds it; the message says which.
    """

    def __init__(self, path: Path, what: str = "this cache", wait: bool = False) -> None:
        self.path = path
        self.file = open_lock_file(path)
        free = try_lock(self.file, fcntl.LOCK_EX)
        if free is None and not wait:
            log.warning("%s: this file system keeps no locks; make sure that no other job writes %s", path, what)
        if free is False and not wait:
            holder = told(self.file)
            self.file.close()
            raise refusal(path, f"{holder} is writing {what}")
        if free is False:
            fcntl.flock(self.file, fcntl.LOCK_EX)
        tell(self.file, this_process())

    def release(self) -> None:
        """Gives the right back. The file stays: deleting it could take the lock away from who waits for it."""
        release_lock(self.file)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def refusal(path: Path, who_does_what: str) -> CacheError:
    """What a job is told that may not write."""
    return CacheError(
        f"{path}: {who_does_what}; wait until it ends, stop it, or give another output_path. "
        "Several jobs write one cache as its shards, each another one of the same number: shard=0/2 and shard=1/2"
    )


def open_lock_file(path: Path) -> TextIO:
    """The file that a lock is about, made if there is none."""
    with explained(path):
        return open(path, "a+", encoding="utf-8")


def try_lock(file: TextIO, operation: int) -> bool | None:
    """Takes a file's lock, `LOCK_EX` or `LOCK_SH`, unless others hold it; None where the file system keeps no locks."""
    try:
        fcntl.flock(file, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return True


def release_lock(file: TextIO) -> None:
    """Gives a file's lock back and closes the file; processes forked meanwhile do not keep it."""
    if not file.closed:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_UN)
        file.close()


def tell(file: TextIO, text: str) -> None:
    """Makes `text` the content of a lock file."""
    file.truncate(0)
    file.write(text)
    file.flush()


def told(file: TextIO) -> str:
    """What the holder of a lock told in its file."""
    file.seek(0)
    return file.read().strip() or "another process"


def this_process() -> str:
    """Process, machine and job, for who is refused a lock."""
    environment = os.environ
    job = f", Slurm job {environment['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in environment else ""
    return f"process {os.getpid()} on {_machine()}{job}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"


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
