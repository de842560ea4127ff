"""Read the files of one folder, on a disk or behind a URL of fsspec (s3://, gs://, ...)."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, BinaryIO, cast

from nemo_kd.cache.layout import CacheError
from nemo_kd.files import open_regular, write_atomically

MAX_OPEN_FILES = 64

Range = tuple[str, int, int | None]
"""(name of a file, first byte, last byte + 1 or None for the end of the file)."""


def open_storage(folder: str) -> Storage:
    """Return the storage of a folder or URL.

    Raises:
        CacheError: the URL's protocol is not known, or its package is not installed.
    """
    if "://" not in folder:
        return LocalStorage(folder or ".")
    try:
        import fsspec

        fsspec.get_filesystem_class(folder.split("://")[0])
    except (ValueError, ImportError) as error:
        raise CacheError(f"{folder}: {error}") from error
    return RemoteStorage(folder)


class LocalStorage:
    """Read access to a folder on a disk; forked or pickled copies work independently."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._open: OrderedDict[str, int] = OrderedDict()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_open": OrderedDict(), "_process": -1}

    def __del__(self) -> None:
        if self._process == os.getpid():
            for descriptor in self._open.values():
                os.close(descriptor)

    def names(self) -> list[str]:
        """Return the names of the files in the folder; none without such a folder."""
        if not os.path.isdir(self.folder):
            return []
        # With pipes and folders: a manifest or chunk that is one must not be overlooked.
        return os.listdir(self.folder)

    def stat(self, name: str) -> tuple[int, int]:
        """Return size in bytes and modification time in ns."""
        with open_regular(os.path.join(self.folder, name)) as file:
            found = os.fstat(file.fileno())
        return found.st_size, found.st_mtime_ns

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Return the bytes from `start` to before `end`, or to the end of the file."""
        descriptor = self._descriptor(name)
        wanted = (os.fstat(descriptor).st_size if end is None else end) - start
        content = os.pread(descriptor, wanted, start)
        while 0 < len(content) < wanted:  # one call returns 2 GiB at most
            more = os.pread(descriptor, wanted - len(content), start + len(content))
            if not more:
                break
            content += more
        return content

    def open(self, name: str) -> BinaryIO:
        """Open the whole file."""
        return open_regular(os.path.join(self.folder, name))

    def will_read(self, ranges: Sequence[Range]) -> None:
        """Fetch these ranges ahead; only the last call counts."""
        if hasattr(os, "posix_fadvise"):
            for name, start, end in ranges:
                length = 0 if end is None else end - start  # 0: to the end of the file
                with contextlib.suppress(OSError):  # `read` reports it
                    os.posix_fadvise(
                        self._descriptor(name), start, length, os.POSIX_FADV_WILLNEED
                    )

    def save(self, name: str, content: bytes) -> bool:
        """Save a file that can be made again; return False if nothing can be written."""
        if not os.access(self.folder, os.W_OK):
            return False
        write_atomically(os.path.join(self.folder, name), content)
        if self._process == os.getpid() and name in self._open:
            os.close(self._open.pop(name))  # it belongs to the file that was replaced
        return True

    def _descriptor(self, name: str) -> int:
        if self._process != os.getpid():  # forked: the parent's descriptors are its own
            self._open = OrderedDict()
            self._process = os.getpid()
        if name not in self._open:
            if len(self._open) >= MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            with open_regular(os.path.join(self.folder, name)) as file:
                self._open[name] = os.dup(file.fileno())
        self._open.move_to_end(name)
        return self._open[name]


class RemoteStorage:
    """Read access to a folder behind a URL, with the methods of `LocalStorage`."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._process = -1
        self._filesystem = None
        self._sizes: dict[str, int] = {}
        self._ahead: dict[Range, bytes] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(RemoteStorage(self.folder))

    def names(self) -> list[str]:
        try:
            found = self._fs().ls(self.folder, detail=True)
        except FileNotFoundError:
            return []
        files = [entry for entry in found if entry["type"] == "file"]
        self._sizes = {
            entry["name"].rstrip("/").rsplit("/", 1)[-1]: int(entry["size"])
            for entry in files
        }
        return list(self._sizes)

    def stat(self, name: str) -> tuple[int, int]:
        """Return the size that `names` saw, one request for all files, and no time."""
        if name not in self._sizes:
            self._sizes[name] = int(self._fs().info(self._path(name))["size"])
        return self._sizes[name], 0

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        ahead = self._ahead.pop((name, start, end), None)
        if ahead is not None:
            return ahead
        return bytes(self._fs().cat_file(self._path(name), start=start, end=end))

    def open(self, name: str) -> BinaryIO:
        return cast(BinaryIO, self._fs().open(self._path(name), "rb"))

    def will_read(self, ranges: Sequence[Range]) -> None:
        """Fetch them at once: one after the other, each would cost a round trip."""
        contents = self._fs().cat_ranges(
            [self._path(name) for name, _, _ in ranges],
            [start for _, start, _ in ranges],
            [end for _, _, end in ranges],
            on_error="return",
        )
        # `read` fetches again what failed, and reports the reason.
        self._ahead = {
            wanted: content
            for wanted, content in zip(ranges, contents, strict=True)
            if isinstance(content, bytes)
        }

    def save(self, name: str, content: bytes) -> bool:
        return False

    def _path(self, name: str) -> str:
        return f"{self.folder}/{name}"

    def _fs(self) -> Any:
        if (
            self._process != os.getpid()
        ):  # connections and event loops do not survive a fork
            import fsspec  # not at the top: a cache on a disk needs no such package

            protocol = self.folder.split("://")[0]
            self._filesystem = fsspec.filesystem(protocol, skip_instance_cache=True)
            self._process = os.getpid()
        return self._filesystem


Storage = LocalStorage | RemoteStorage
