"""Files of records: JSONL, compressed or not, JSON arrays, and the tables that `datasets` reads.

Imports neither torch nor transformers, and `datasets` for tables only.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import os
import re
import shutil
import tempfile
import zlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import orjson
from zstandard import ZstdDecompressor, ZstdError

from nemo_kd.config import DataError
from nemo_kd.files import check_regular_file

BOM = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"
ZSTANDARD = b"\x28\xb5\x2f\xfd"
TABLES = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}
"""First bytes of files that the library `datasets` reads, and the name that it has for them."""

OTHER_KINDS = {
    b"/annex/objects": "a git-annex pointer; fetch the file: git annex get",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"BZh": "compressed by bzip2; unpack it, or compress it by gzip or zstd",
    b"\xfd7zXZ": "compressed by xz; unpack it, or compress it by gzip or zstd",
    b"\xff\xfe": "text in UTF-16; save it as UTF-8",
    b"\xfe\xff": "text in UTF-16; save it as UTF-8",
    b"ORC": "ORC; save it as Parquet",
    b"Obj\x01": "Avro; save it as Parquet",
    b"SQLite format 3": "an SQLite database; save a table as Parquet",
    b"\x80": "a pickle, which is never loaded; save the records as JSONL",
    b"<": "HTML or XML, perhaps an error page in place of a download",
}
"""First bytes of files that are refused, what they are and what to do."""

HEAD_BYTES = 64
BLOCK_BYTES = 1 << 20
LONG_INTEGER = re.compile(rb"[0-9]{19}")
OTHERWISE_ELSEWHERE = "the ranks read different content; give all machines the same"


class Source(ABC):
    """Records that are opened together: a file, or a folder of `datasets`.

    Attributes:
        name: the path or URL as the user gave it.
        path: its local copy.
    """

    fingerprint: str

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        self._stamp = self._status()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def record(self, place: int) -> dict[str, Any]:
        """Return a record.

        Raises:
            DataError: it cannot be read; with its place.
        """

    @abstractmethod
    def raw(self, place: int) -> bytes: ...

    @abstractmethod
    def where(self, place: int) -> str: ...

    def check_unchanged(self) -> None:
        if self._status() != self._stamp:
            raise DataError(
                f"{self.name}: the file was changed while it was in use; restore it and run the "
                "same command again, or start over with the new file and another output path"
            )

    def files(self) -> list[Path]:
        """Return the files that hold the records."""
        return [self.path]

    def _status(self) -> list[tuple[int, int]]:
        found = [path.stat() for path in self.files() if path.exists()]
        return [(each.st_size, each.st_mtime_ns) for each in found]


def open_source(name: str) -> Source:
    """Open one file, folder or URL by what its first bytes say.

    Raises:
        DataError: as `open_records`.
    """
    from nemo_kd.data.tables import FOLDER, Table  # which imports this module

    path = Path(_local_copy(name) if "://" in name else name)
    if path.is_dir():
        return Table(name, path, FOLDER)
    check_regular_file(path, DataError)
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    for start, what in OTHER_KINDS.items():
        if head.startswith(start):
            raise DataError(f"{name}: this is {what}")
    for start, kind in TABLES.items():
        if head.startswith(start):
            return Table(name, path, kind)
    if head.startswith((GZIP, ZSTANDARD)) or _begins_array(path):
        return UnpackedLines(name, path)
    return Lines(name, path)


def reopened(name: str, fingerprint: str) -> Source:
    """Open a source on another rank.

    Raises:
        DataError: it holds something else there.
    """
    source = open_source(name)
    if source.fingerprint != fingerprint:
        raise DataError(f"{name}: {OTHERWISE_ELSEWHERE}")
    return source


def _local_copy(url: str) -> str:
    """Download a file into a folder that is removed at the end of the process.

    Raises:
        DataError: it cannot be read.
    """
    import fsspec

    try:
        found = fsspec.open_local(f"simplecache::{url}")
        return found if isinstance(found, str) else str(found[0])
    except Exception as error:  # every protocol has its own errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise DataError(
            f"{url}: cannot be read ({reason}); check the address, the credentials in the "
            "environment, and that the package of its protocol is installed"
        ) from error


def _begins_array(path: Path) -> bool:
    with path.open("rb") as file:
        text = file.read(HEAD_BYTES).removeprefix(BOM)
    return text.lstrip().startswith(b"[")


class Lines(Source):
    """JSONL, one JSON object a line; blank lines do not count.

    Opening reads the file once, for line starts and its hash, and parses nothing. Reading a record
    touches its bytes only, from any process.

    Raises:
        DataError: the file is empty; on access: a line is not a JSON object.
    """

    def __init__(self, name: str, path: Path) -> None:
        super().__init__(name, path)
        self._starts = array("q")
        self._numbers = array("q")
        with path.open("rb") as file:
            self._scan(file)

    def _scan(self, file: BinaryIO) -> None:
        digest = hashlib.sha256()
        offset = 0
        for number, line in enumerate(file, start=1):
            digest.update(line)
            text = line.removeprefix(BOM) if number == 1 else line
            if text.strip():
                self._starts.append(offset + len(line) - len(text))
                self._numbers.append(number)
            offset += len(line)
        self.fingerprint = f"sha256:{digest.hexdigest()}"
        if not self._starts:
            raise DataError(
                f"{self.name}: the file has no records; a dataset holds one JSON object a line"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what another rank scanned; the local copy has a time of its own."""
        self.__dict__ |= state
        if "://" in self.name:
            self.path = Path(_local_copy(self.name))
        scanned = self._stamp
        self._stamp = self._status()
        if [size for size, _ in scanned] != [size for size, _ in self._stamp]:
            raise DataError(f"{self.name}: {OTHERWISE_ELSEWHERE}")

    def __len__(self) -> int:
        return len(self._starts)

    def record(self, place: int) -> dict[str, Any]:
        try:
            record = _parsed(self.raw(place))
        except orjson.JSONDecodeError as error:
            raise DataError(
                f"{self.where(place)}: not valid JSON ({error}); every line must be one JSON object"
            ) from error
        if not isinstance(record, dict):
            raise DataError(
                f"{self.where(place)}: found a JSON {type(record).__name__}; every record must be "
                "a JSON object"
            )
        return record

    def raw(self, place: int) -> bytes:
        self.check_unchanged()
        with self.path.open("rb") as file:
            file.seek(self._starts[place])
            return file.readline()

    def where(self, place: int) -> str:
        return f"{self.name}:{self._numbers[place]}"


class UnpackedLines(Lines):
    """Compressed JSONL, or a JSON array, as JSONL in a temporary file that has no name.

    Each process that opens it unpacks it, into the folder that TMPDIR names.
    """

    def __init__(self, name: str, path: Path) -> None:
        Source.__init__(self, name, path)
        self._starts = array("q")
        self._numbers = array("q")
        with tempfile.TemporaryFile() as plain:
            with path.open("rb") as packed:
                _unpack(name, packed, plain)
            self._is_array = _spread_array(name, plain)
            plain.seek(0)
            self._scan(plain)
            self._end = plain.tell()
            self._base = _unpacked().seek(0, os.SEEK_END)
            plain.seek(0)
            shutil.copyfileobj(plain, _unpacked())
            _unpacked().flush()
        self.fingerprint = fingerprint_of([path])

    def __reduce__(self) -> Any:
        return reopened, (self.name, self.fingerprint)

    def raw(self, place: int) -> bytes:
        self.check_unchanged()
        ends = self._starts[place + 1 : place + 2] or [self._end]
        start = self._starts[place]
        # Without a common offset, so that forked processes may read, too.
        read = os.pread(_unpacked().fileno(), ends[0] - start, self._base + start)
        return read.partition(b"\n")[0] + b"\n"

    def where(self, place: int) -> str:
        return (
            f"{self.name}, element {place}" if self._is_array else super().where(place)
        )


@functools.cache
def _unpacked() -> BinaryIO:
    """Return the one file that holds all unpacked lines of this process."""
    return tempfile.TemporaryFile()


def _unpack(name: str, packed: BinaryIO, target: BinaryIO) -> None:
    head = packed.read(HEAD_BYTES)
    packed.seek(0)
    try:
        if head.startswith(GZIP):
            shutil.copyfileobj(gzip.GzipFile(fileobj=packed), target)
        elif head.startswith(ZSTANDARD):
            target.writelines(_zstandard_blocks(packed))
        else:
            shutil.copyfileobj(packed, target)
    except (gzip.BadGzipFile, EOFError, zlib.error, ZstdError) as error:
        raise DataError(
            f"{name}: cannot be unpacked ({error}); fetch it again"
        ) from error


def _zstandard_blocks(packed: BinaryIO) -> Iterator[bytes]:
    """Yield the content of all frames. The library's reader takes a file that was cut for whole."""
    frame = ZstdDecompressor().decompressobj()
    is_whole = True
    while block := packed.read(BLOCK_BYTES):
        while block:
            yield frame.decompress(block)
            is_whole = frame.eof
            block = frame.unused_data
            if is_whole:
                frame = ZstdDecompressor().decompressobj()
    if not is_whole:
        raise EOFError("it ends inside a frame")


def _spread_array(name: str, file: BinaryIO) -> bool:
    """Write the elements of a JSON array a line each in the place of the array."""
    file.seek(0)
    if not file.read(HEAD_BYTES).removeprefix(BOM).lstrip().startswith(b"["):
        return False
    file.seek(0)
    try:
        elements = _parsed(file.read().removeprefix(BOM))
    except orjson.JSONDecodeError as error:
        raise DataError(
            f"{name}: begins like a JSON array, but is not one ({error})"
        ) from error
    file.seek(0)
    file.truncate()
    for element in elements:
        file.write(json.dumps(element).encode() + b"\n")
    return True


def _parsed(content: bytes) -> Any:
    """Return the content of a JSON text. orjson makes floats of integers beyond 64 bits."""
    value = orjson.loads(content)
    return json.loads(content) if LONG_INTEGER.search(content) else value


def fingerprint_of(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"
