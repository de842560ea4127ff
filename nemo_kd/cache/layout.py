"""File names of a cache, and access to its files: a folder on a disk or behind a URL, and the lines
of chunks in both containers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, BinaryIO, cast

import zstandard

from nemo_kd.config import UserInputError
from nemo_kd.files import open_regular, write_atomically

CHUNK_ID = "CHUNK_ID"
SUFFIXES = (".jsonl.zst", ".jsonl", ".json")
SEGMENTS = ".segments"
INDEX = ".idx"
SUBSET = re.compile(r"(?P<path>.+)\[(?P<start>-?\d+%?)?:(?P<end>-?\d+%?)?\]")
"""Matches a path with a selection of rows behind it."""


class CacheError(UserInputError):
    """A cache file, or a request to one, cannot be used; the message names the place, the value
    found and the next step.
    """


class CacheLayout:
    """The file names that follow from one `output_path`.

    A path whose file name holds `CHUNK_ID` is a template: chunk 3 of `train_CHUNK_ID.jsonl` is
    `train_3.jsonl`. Any other path is one file, which is its own chunk 0. Ids are plain integers
    without zero padding. The suffix selects the container: `.jsonl` for plain lines, `.jsonl.zst`
    for one compressed frame per line.
    """

    def __init__(self, output_path: str) -> None:
        self.output_path = output_path
        folder, name = os.path.split(output_path)
        self._name = name
        self.folder = Path(folder)
        if CHUNK_ID in folder:
            raise CacheError(
                f"{output_path}: {CHUNK_ID} stands in the folder; put it in the file name, e.g. "
                f"folder/train_{CHUNK_ID}.jsonl"
            )
        if self._name in ("", ".", "..") or os.path.isdir(output_path):
            raise CacheError(
                f"{output_path!r} is not a file name; give a file such as "
                f"folder/train_{CHUNK_ID}.jsonl"
            )

    @property
    def is_template(self) -> bool:
        return CHUNK_ID in self._name

    def chunk_name(self, chunk_id: int) -> str:
        if not self.is_template and chunk_id != 0:
            raise CacheError(
                f"{self.output_path} names one file, so there is no chunk {chunk_id}; put "
                f"{CHUNK_ID} into its name for several"
            )
        return self._name.replace(CHUNK_ID, str(chunk_id))

    def chunk_path(self, chunk_id: int) -> Path:
        return self.folder / self.chunk_name(chunk_id)

    def index_path(self, chunk_id: int) -> Path:
        return self.folder / index_name(self.chunk_name(chunk_id))

    def segments_folder(self, chunk_id: int) -> Path:
        """Segments of a chunk wait here until all of them are there."""
        return self.folder / f".{self.chunk_name(chunk_id)}{SEGMENTS}"

    def segment_names(self, chunk_id: int) -> set[str]:
        """Return the names in the folder of a chunk's segments."""
        # A listing is fetched from the server of a network file system; the absence of a single
        # name may be cached.
        try:
            return set(os.listdir(self.segments_folder(chunk_id)))
        except FileNotFoundError:
            return set()

    @property
    def suffix(self) -> str:
        """The one of SUFFIXES that the name ends in; empty without one."""
        return next((suffix for suffix in SUFFIXES if self._name.endswith(suffix)), "")

    @property
    def manifest_name(self) -> str:
        """`train_CHUNK_ID.jsonl` -> `train_manifest.json`, `train_0.jsonl` ->
        `train_0.manifest.json`.
        """
        stem = self._name.removesuffix(self.suffix)
        return (
            stem.replace(CHUNK_ID, "manifest")
            if self.is_template
            else f"{stem}.manifest"
        ) + ".json"

    @property
    def manifest_path(self) -> Path:
        return self.folder / self.manifest_name

    @property
    def lock_path(self) -> Path:
        """Locked by jobs that write: exclusively by a job alone, shared by the parts."""
        return self.folder / f".{self.manifest_name}.lock"

    def part_lock_path(self, number: int) -> Path:
        """Locked by the job that writes a part."""
        return self.folder / f".{self.manifest_name}.part-{number}.lock"

    @property
    def start_lock_path(self) -> Path:
        """Locked while a job starts; this serializes jobs that start together."""
        return self.folder / f".{self.manifest_name}.start.lock"

    def chunk_ids(self, names: Iterable[str]) -> list[int]:
        """Return the chunks among the names of files in the folder, ascending."""
        if not self.is_template:
            return [0] if self._name in names else []
        before, after = self._name.split(CHUNK_ID, 1)
        pattern = re.compile(
            re.escape(before)
            + "(0|[1-9][0-9]*)"
            + re.escape(after).replace(CHUNK_ID, r"\1")
        )
        matches = (pattern.fullmatch(name) for name in names)
        return sorted(int(match[1]) for match in matches if match)

    def existing_chunks(self, prefix: str = "", suffix: str = "") -> list[int]:
        """Return the chunks whose data files are in the folder, ascending.

        With `prefix` and `suffix` those that have something of this name beside them.
        """
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return self.chunk_ids(
            [
                name.removeprefix(prefix).removesuffix(suffix)
                for name in names
                if name.startswith(prefix) and name.endswith(suffix)
            ]
        )

    def chunks_in_work(self) -> list[int]:
        """Return the chunks that have a folder of segments, ascending."""
        return self.existing_chunks(".", SEGMENTS)


def index_name(chunk_name: str) -> str:
    return chunk_name + INDEX


def path_of(path: str) -> str:
    """Return a path without its selection of rows."""
    subset = SUBSET.fullmatch(path)
    return subset["path"] if subset else path


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
