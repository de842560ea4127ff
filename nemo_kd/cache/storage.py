"""Read files of one folder, on a disk or behind a URL of fsspec (s3://, gs://, ...), and the lines
of chunks in both containers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any, BinaryIO, cast

import zstandard

from nemo_kd.cache.layout import CacheError
from nemo_kd.files import open_regular, write_atomically

Range = tuple[str, int, int | None]
"""(name of a file, first byte, last byte + 1 or None for the end of the file)."""


def open_storage(folder: str) -> Storage:
    """Return the storage of a folder or URL."""
    return RemoteStorage(folder) if "://" in folder else LocalStorage(folder or ".")


class LocalStorage:
    """Read access to a folder on a disk."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        """Return the names of the files in the folder; none without such a folder."""
        return os.listdir(self.folder) if os.path.isdir(self.folder) else []

    def stat(self, name: str) -> tuple[int, int]:
        """Return size in bytes and modification time in ns."""
        found = os.stat(os.path.join(self.folder, name))
        return found.st_size, found.st_mtime_ns

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Return the bytes from `start` to before `end`; without `end` the whole file."""
        with self.open(name) as file:
            if end is None:
                return file.read()
            return os.pread(file.fileno(), end - start, start)

    def open(self, name: str) -> BinaryIO:
        """Open the whole file."""
        return open_regular(os.path.join(self.folder, name))

    def will_read(self, ranges: Sequence[Range]) -> None:
        """Fetch these ranges ahead where each read would cost a round trip: not here."""

    def save(self, name: str, content: bytes) -> bool:
        """Save a file that can be made again; return False if nothing can be written."""
        if not os.access(self.folder, os.W_OK):
            return False
        write_atomically(os.path.join(self.folder, name), content)
        return True


class RemoteStorage:
    """Read access to a folder behind a URL, with the methods of `LocalStorage`."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._ahead: dict[Range, bytes] = {}

    def names(self) -> list[str]:
        try:
            self._fs().invalidate_cache()
            found = self._fs().ls(self.folder, detail=False)
        except FileNotFoundError:
            return []
        return [path.rstrip("/").rsplit("/", 1)[-1] for path in found]

    def stat(self, name: str) -> tuple[int, int]:
        """Return the size, and no time."""
        return int(self._fs().size(self._path(name))), 0

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
        import fsspec  # not at the top: a cache on a disk needs no such package

        try:
            return fsspec.filesystem(
                self.folder.split("://")[0]
            )  # one for each process
        except (
            ValueError,
            ImportError,
        ) as error:  # an unknown protocol, a missing package
            raise CacheError(f"{self.folder}: {error}") from error


Storage = LocalStorage | RemoteStorage


ZST_LEVEL = 3
MAX_LINE_BYTES = 1 << 31
_BLOCK_BYTES = 1 << 16


class TornError(CacheError):
    """A file ends inside a line, as after a crash; the lines before it are whole."""


def lines_of(name: str | PurePath) -> _Plain | _Zst:
    """Return the container that a file of this name is."""
    return _Zst() if str(name).endswith(".zst") else _Plain()


class _Plain:
    def write(self, line: bytes) -> bytes:
        """Return the bytes that stand for a JSON line, which ends in a line break."""
        return line

    def read(self, raw: bytes, where: str) -> bytes:
        """Return the JSON line that `raw` stands for.

        Raises:
            CacheError: the bytes are damaged or cut off.
        """
        return raw

    def split(self, file: BinaryIO, where: str) -> Iterator[bytes]:
        """Yield the raw bytes of every line from the file's position on.

        Raises:
            TornError: the file ends inside a line.
        """
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                raise TornError(
                    f"{where}:{number}: the last line has no line break, so it may be cut off; "
                    "check it, then add the break, or cut it with `logit_cache repair`"
                )
            yield line


class _Zst:
    def write(self, line: bytes) -> bytes:
        compressor = zstandard.ZstdCompressor(level=ZST_LEVEL, write_checksum=True)
        return compressor.compress(line)

    def read(self, raw: bytes, where: str) -> bytes:
        try:
            line = b"\n\n"
            if zstandard.frame_content_size(raw) <= MAX_LINE_BYTES:
                line = zstandard.decompress(raw, max_output_size=MAX_LINE_BYTES)
        except zstandard.ZstdError as error:
            raise CacheError(
                f"{where}: {len(raw)} bytes are not a whole zstd frame ({error}): they are damaged; "
                "restore the file or write it again"
            ) from error
        if line.find(b"\n", 0, -1) >= 0:
            raise CacheError(
                f"{where}: one zstd frame holds several lines, so none can be read alone; "
                "decompress the file (zstd -d) and compress it line by line with `logit_cache "
                "convert`"
            )
        return line

    def split(self, file: BinaryIO, where: str) -> Iterator[bytes]:
        block = file.read(_BLOCK_BYTES)
        number = 1
        while block:
            frame = zstandard.ZstdDecompressor().decompressobj()
            parts = []
            while not frame.eof:
                if not block:
                    raise TornError(
                        f"{where}:{number}: the file ends inside a zstd frame, so its last line "
                        "is cut off; cut it with `logit_cache repair`"
                    )
                try:
                    frame.decompress(block)
                except zstandard.ZstdError as error:
                    raise CacheError(
                        f"{where}:{number}: not a zstd frame ({error}): the bytes are damaged; "
                        "restore the file, write it again, or see `logit_cache repair`"
                    ) from error
                parts.append(block)
                block = frame.unused_data or file.read(_BLOCK_BYTES)
            raw = b"".join(parts)
            yield raw[: len(raw) - len(frame.unused_data)]
            number += 1
