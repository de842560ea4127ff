"""JSONL datasets by index."""

from __future__ import annotations

import hashlib
import os
from array import array
from pathlib import Path
from typing import Any

import orjson

from nemo_kd.config import UserInputError
from nemo_kd.nemo_archive import check_regular_file


class DataError(UserInputError):
    """A dataset file or one of its records cannot be used."""


class JsonlRecords:
    """The records of a JSONL file, one JSON object per line; blank lines do not count.

    Opening reads the file once, for line starts and its hash, and parses nothing. Reading a record
    touches its bytes only, from any process.

    Raises:
        DataError: the file is missing, unreadable or empty; on access: a line is not a JSON object.
    """

    def __init__(self, path: str | Path, key: str = "data.data.file_path") -> None:
        self.path = Path(path)
        self._starts = array("q")
        self._ends = array("q")
        self._lines = array("q")
        self._file: tuple[int, int] | None = None  # (process, descriptor)
        digest = hashlib.sha256()
        try:
            if self.path.exists():
                check_regular_file(self.path, DataError)  # opening a pipe would block
            with self.path.open("rb") as file:
                self._stamp = _stamp(os.fstat(file.fileno()))
                offset = 0
                for number, line in enumerate(file, start=1):
                    digest.update(line)
                    if line.strip():
                        self._starts.append(offset)
                        self._ends.append(offset + len(line))
                        self._lines.append(number)
                    offset += len(line)
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror}; check {key}") from error
        self._fingerprint = f"sha256:{digest.hexdigest()}"
        if not self._starts:
            raise DataError(
                f"{self.path}: the file has no records; a dataset holds one JSON object a line"
            )

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: record {index} of {len(self)}")
        try:
            record = orjson.loads(self.raw(index))
        except orjson.JSONDecodeError as error:
            self.check_unchanged()
            raise DataError(
                f"{self.where(index)}: not valid JSON ({error}); every line must be one JSON object"
            ) from error
        if not isinstance(record, dict):
            raise DataError(
                f"{self.where(index)}: found a JSON {type(record).__name__}; every line must be "
                "one JSON object"
            )
        return record

    def raw(self, index: int) -> bytes:
        """Return the line of a record."""
        if self._file is None or self._file[0] != os.getpid():
            self._file = (os.getpid(), os.open(self.path, os.O_RDONLY))
        start = self._starts[index]
        return os.pread(self._file[1], self._ends[index] - start, start)

    def where(self, index: int) -> str:
        """Return `file:line` of a record, for messages."""
        return f"{self.path}:{self._lines[index]}"

    def fingerprint(self) -> str:
        """Return the SHA-256 of the file's bytes, as they were when it was opened."""
        return self._fingerprint

    def check_unchanged(self, read_all: bool = False) -> None:
        """Check that the records read so far are those of `fingerprint`.

        Read the content again only if size, modification time or inode differ, or with `read_all`.

        Raises:
            DataError: the content differs, or the file is gone.
        """
        try:
            if not read_all and _stamp(os.stat(self.path)) == self._stamp:
                return
            fingerprint, stamp = self._hash()
        except OSError as error:
            raise self._changed(error.strerror or "it cannot be read") from error
        if fingerprint != self._fingerprint:
            raise self._changed("its content differs")
        self._stamp = stamp  # touched, or replaced by a copy

    def _hash(self) -> tuple[str, tuple[int, ...]]:
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            stamp = _stamp(os.fstat(file.fileno()))
            while block := file.read(1 << 20):
                digest.update(block)
        return f"sha256:{digest.hexdigest()}", stamp

    def _changed(self, how: str) -> DataError:
        return DataError(
            f"{self.path}: the file was changed while it was in use ({how}); restore it and run "
            "the same command again, or start over with the new file and another output path"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    """Return what changes with a file's content, on all common file systems."""
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev
