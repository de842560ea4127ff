"""Read the records of a dataset file."""

from __future__ import annotations

import hashlib
from array import array
from pathlib import Path
from typing import Any

import orjson

from nemo_kd.config import DataError
from nemo_kd.nemo_archive import check_regular_file


class JsonlRecords:
    """The records of a JSONL file, one JSON object per line; blank lines do not count.

    Opening reads the file once, for line starts and its hash, and parses nothing. Reading a record
    touches its bytes only, from any process.

    Attributes:
        fingerprint: SHA-256 of the file's bytes, as they were when it was opened.

    Raises:
        DataError: the file is missing, unreadable or empty; on access: a line is not a JSON object.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._starts = array("q")
        self._lines = array("q")
        digest = hashlib.sha256()
        offset = 0
        check_regular_file(self.path, DataError)
        self._stamp = self._status()
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                digest.update(line)
                if line.strip():
                    self._starts.append(offset)
                    self._lines.append(number)
                offset += len(line)
        self.fingerprint = f"sha256:{digest.hexdigest()}"
        if not self._starts:
            raise DataError(
                f"{self.path}: the file has no records; a dataset holds one JSON object a line"
            )

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            record = orjson.loads(self.raw(index))
        except orjson.JSONDecodeError as error:
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
        """Return the line of a record.

        Raises:
            DataError: the file was changed.
        """
        self.check_unchanged()
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            return file.readline()

    def where(self, index: int) -> str:
        """Return `file:line` of a record, for messages."""
        return f"{self.path}:{self._lines[index]}"

    def check_unchanged(self) -> None:
        """Check that the file still has the size and modification time that it was opened with.

        Raises:
            DataError: it was changed.
        """
        if self._status() != self._stamp:
            raise DataError(
                f"{self.path}: the file was changed while it was in use; restore it and run the same "
                "command again, or start over with the new file and another output path"
            )

    def _status(self) -> tuple[int, int] | None:
        if not self.path.exists():
            return None
        status = self.path.stat()
        return status.st_size, status.st_mtime_ns
