"""Atomic files, locks between processes, and text that is safe for a terminal."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import shutil
import socket
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TextIO

from nemo_kd.config import ConfigError, UserInputError

ABANDONED_AFTER_S = 3600.0
LFS_POINTER = b"version https://git-lfs"
NO_LOCKS = (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS)

REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "your quota is used up: free some space",
    errno.EROFS: "the file system is read-only: give another path, or mount it for writing",
    errno.EACCES: "give another path, or have its owner permit it",
    errno.ENOENT: "check the path, or restore its folder",
    errno.EMFILE: "raise the limit (`ulimit -n`), or set fewer data workers",
}
"""Next step by errno, for those whose name does not say it."""

log = logging.getLogger(__name__)


class FileError(UserInputError):
    """A file that cannot be opened, locked or written; the message says what to do."""


def remedy(error: OSError) -> str:
    """Return the next step after an error of the operating system."""
    step = REMEDIES.get(error.errno or 0, "check the path and its file system")
    return f"{step}, then run the same command again"


@contextlib.contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """Raise an OSError of the block as a FileError that names `path` and the remedy."""
    try:
        yield
    except OSError as error:
        raise FileError(
            f"{path}: cannot be written ({error.strerror or error}); {remedy(error)}"
        ) from error


def check_regular_file(
    path: Path, error_type: type[UserInputError] = ConfigError
) -> None:
    """Refuse a path that cannot be read as a file; opening a pipe would block.

    Raises:
        error_type: it is missing, not a regular file, unreadable, or a Git LFS pointer.
    """
    try:
        if not path.is_file():
            raise error_type(
                f"{path}: expected a regular file, found none; check the path"
            )
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError as error:
        raise error_type(f"{path}: cannot be read ({error.strerror})") from error
    if start == LFS_POINTER:
        raise error_type(
            f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
        )


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading; a pipe would block.

    Raises:
        FileNotFoundError: there is none.
        FileError: it is a pipe, device or folder, or cannot be read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # one look: others may remove it
            raise FileError(
                f"{path}: is not a regular file; give another path, or remove it"
            )
        return open(path, "rb")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise FileError(
            f"{path}: cannot be read ({error.strerror}); {remedy(error)}"
        ) from error


def read_file(path: str | Path, start: int = 0) -> bytes:
    """Return the content of a regular file from byte `start`; raise as `open_regular` does."""
    with open_regular(path) as file:
        file.seek(start)
        return file.read()


def write_atomically(path: str | Path, data: bytes | Iterable[bytes]) -> None:
    """Replace the content of `path`; a crash leaves either the old or the new content."""
    with atomic_file(path) as file:
        file.writelines([data] if isinstance(data, bytes) else data)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a file that takes the name `path`, durably, when the block ends without an error.

    Until then the bytes are in the hidden file `temporary_path(path)`. An error in the block
    removes it; `remove_abandoned` removes those of killed processes. Errors are those of
    `explained`.
    """
    path = Path(path)
    temporary = temporary_path(path)
    with explained(path):
        try:
            # The tempfile module would make a file that only its owner can read.
            with temporary.open("wb", buffering=1 << 20) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync(path.parent)


def new_folder(path: Path) -> Path:
    """Create an empty folder beside `path`, to which `replace_folder` can give that name.

    Removes leftovers of killed processes there, and restores a folder that one moved aside.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.replaced")
    if aside.is_dir() and not path.exists():
        os.rename(aside, path)
    remove(aside)
    remove_abandoned(path.parent)
    folder = temporary_path(path)
    remove(folder)  # of a dead process that had this one's id
    folder.mkdir()
    return folder


def replace_folder(new: Path, path: Path) -> None:
    """Give the folder `new` the name `path`, durably; remove the folder of that name afterwards.

    A kill leaves either the old or the new folder. Where the file system cannot exchange two names
    at once, the old folder moves aside first, and `new_folder` restores it.
    """
    for inner in [*new.rglob("*"), new]:
        sync(inner)
    aside = path.with_name(f".{path.name}.replaced")
    if not path.exists():
        os.rename(new, path)
    elif _exchange(new, path):
        remove(new)
    else:
        os.rename(path, aside)
        os.rename(new, path)
    sync(path.parent)
    remove(aside)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names at once; return False where the system or file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    # -100 and 2 are Linux's AT_FDCWD and RENAME_EXCHANGE.
    return rename(-100, os.fsencode(first), -100, os.fsencode(second), 2) == 0


def temporary_path(path: str | Path) -> Path:
    """Return the hidden name of a file or folder that will become `path`: with host and PID."""
    path = Path(path)
    return path.with_name(f".{path.name}.{owner_name()}.tmp")


def owner_name() -> str:
    """Return host and PID, as in the names of temporary files."""
    return f"{socket.gethostname()}-{os.getpid()}"


def remove_abandoned(folder: Path) -> None:
    """Delete temporary files and folders of dead processes in a folder."""
    for path in abandoned(folder):
        remove(path)


def remove(path: Path) -> None:
    """Delete a file, a symbolic link (not its target), or a folder with its content."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def abandoned(folder: Path, suffix: str = ".tmp") -> list[Path]:
    """Return temporary files and folders of dead processes in a folder.

    A process of this machine is dead if its PID is unused. A file of another machine counts as
    abandoned after an hour without a change.
    """
    found = []
    for path in sorted(folder.glob(f".*{suffix}")):
        owner, _, pid = path.name.removesuffix(suffix).rpartition("-")
        is_abandoned = False
        if pid.isdecimal() and owner.endswith(f".{socket.gethostname()}"):
            is_abandoned = not _is_alive(int(pid))
        elif pid.isdecimal():
            with contextlib.suppress(
                FileNotFoundError
            ):  # another job removes it as well
                is_abandoned = time.time() - path.lstat().st_mtime > ABANDONED_AFTER_S
        if is_abandoned:
            found.append(path)
    return found


class Lock(contextlib.AbstractContextManager["Lock"]):
    """An exclusive lock on a file, held until `release` or the end of the process.

    The operating system keeps the lock (flock), so a killed job leaves none behind. The file's
    content only names the holder.

    Args:
        refusal: end of the error message, after the holder's name.
        wait_s: seconds to wait for the holder before refusing; `math.inf` waits without limit.

    Raises:
        FileError: another process holds the lock, for example "PATH: process 7 on node-1 is
            writing this cache; wait until it ends".
    """

    def __init__(
        self,
        path: Path,
        refusal: str = "is using it; wait until it ends",
        wait_s: float = 0.0,
    ) -> None:
        self.file = open_lock_file(path)
        deadline_s = time.monotonic() + wait_s
        while (free := try_lock(self.file, fcntl.LOCK_EX)) is False:
            if time.monotonic() >= deadline_s:
                with self.file:
                    raise FileError(f"{path}: {read_holder(self.file)} {refusal}")
            time.sleep(0.05)
        if free is None:
            log.warning(
                "%s: this file system keeps no locks; make sure that no other job writes there",
                path,
            )
        write_holder(self.file, this_process())

    def release(self) -> None:
        """Release the lock and keep the file, which another process may be waiting for."""
        release_lock(self.file)

    def __exit__(self, *_: object) -> None:
        self.release()


def open_lock_file(path: Path) -> TextIO:
    """Open or create a lock file."""
    with explained(path):
        return path.open("a+")


def try_lock(file: TextIO, operation: int) -> bool | None:
    """Return True if the lock (`LOCK_EX` or `LOCK_SH`) was acquired, False if it is held.

    Return None on a file system without locks.
    """
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
    """Release a file's lock, also in forked processes, and close the file."""
    if not file.closed:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_UN)
        file.close()


def write_holder(file: TextIO, holder: str) -> None:
    """Write the holder's name into a lock file."""
    with explained(file.name):
        file.truncate(0)
        file.write(holder)
        file.flush()


def read_holder(file: TextIO) -> str:
    """Read the holder's name from a lock file."""
    file.seek(0)
    return file.read().strip() or "another process"


def this_process() -> str:
    """Describe this process for messages: PID, host, Slurm job."""
    job = os.environ.get("SLURM_JOB_ID")
    where = f"{socket.gethostname()}, Slurm job {job}" if job else socket.gethostname()
    return f"process {os.getpid()} on {where}"


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a folder, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems cannot sync a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def printable(text: str, keep: str = "\t\n") -> str:
    """Escape control characters and other invisible ones, for example as `\\x1b`.

    A manifest, a record or a file name may hold escape sequences that move the cursor, rename
    the window or write to the clipboard.

    Args:
        keep: characters to leave unescaped.
    """
    return "".join(
        character
        if character.isprintable() or character in keep
        else repr(character)[1:-1]
        for character in text
    )


def print_text(text: str, stream: TextIO | None = None) -> None:
    """Print text, escaping control characters; ignore a closed pipe."""
    stream = sys.stdout if stream is None else stream
    try:
        print(printable(text), file=stream, flush=True)
    except BrokenPipeError:
        # Python flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_error(error: object) -> None:
    """Print an error as one line on stderr."""
    print_text(f"error: {error}", sys.stderr)


def size_text(num_bytes: float) -> str:
    """Format a number of bytes with a decimal unit."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"


def print_table(lines: Sequence[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    width = max(len(name) for name, _ in lines)
    print_text("\n".join(f"{name:<{width}}  {value}" for name, value in lines))
