"""Read the records of datasets: lists of files, patterns, slices and URLs."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
from bisect import bisect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_kd.config import DataError
from nemo_kd.data.sources import Source, open_source
from nemo_kd.files import check_regular_file

_SLICE = re.compile(r"(?P<path>.+)@\[(?P<first>-?\d*):(?P<end>-?\d*)\]")

FOLDER_FILES = {"state.json", "dataset_dict.json"}
"""Files that `datasets` writes into a folder; one of both is in each."""


def open_records(file_path: str | Sequence[str]) -> Records:
    """Open files of records, one after the other.

    JSONL (also compressed by gzip or zstd), a JSON array, Parquet, Arrow, or a folder that
    `datasets` saved; `file_path` is one of them, a list, or has a pattern (`*`, `?`, `[a-c]`), a
    URL that fsspec knows, and `@[first:end]` to select records as Python slices a list.

    Raises:
        DataError: a file is missing, unreadable, empty or of another kind.
    """
    names = [file_path] if isinstance(file_path, str) else file_path
    parts: list[Source] = []
    selected: list[range] = []
    start = 0
    for name in names:
        path, chosen = _sliced(name)
        opened = [open_source(each) for each in _matches(path)]
        parts += opened
        end = start + sum(map(len, opened))
        selected.append(range(start, end)[chosen])
        start = end
    records = Records(", ".join(names), parts, selected)
    if not len(records.indices):
        raise DataError(
            f"{records.name}: the slice selects none of {len(records):,} records"
        )
    return records


def check_readable(file_path: str | Sequence[str]) -> None:
    """Refuse files that cannot be opened, without reading them; URLs are not looked up.

    Raises:
        DataError: one is missing or unreadable.
    """
    for name in [file_path] if isinstance(file_path, str) else file_path:
        path, _ = _sliced(name)
        if "://" in path:
            continue
        for each in map(Path, _matches(path)):
            if not os.path.isdir(each):
                check_regular_file(each, DataError)
            elif not os.access(each, os.R_OK | os.X_OK):
                raise DataError(f"{each}: the folder may not be read; change its mode")
            elif FOLDER_FILES.isdisjoint(os.listdir(each)):
                raise DataError(
                    f"{each}: a folder, but none that `datasets` saved; of a folder of files give a "
                    f"pattern, as '{each}/*.parquet'"
                )


def _sliced(name: str) -> tuple[str, slice]:
    found = _SLICE.fullmatch(name)
    if found is None:
        return name, slice(None)
    first = int(found["first"]) if found["first"] else None
    end = int(found["end"]) if found["end"] else None
    return found["path"], slice(first, end)


def _matches(path: str) -> list[str]:
    """Return the files of a pattern, sorted; the path itself if it has none.

    Raises:
        DataError: there are none.
    """
    is_web = path.startswith(("http://", "https://"))  # where ? begins a query
    if is_web or not glob.has_magic(path) or Path(path).exists():
        return [path]
    if "://" in path:
        import fsspec

        file_system, inner = fsspec.url_to_fs(path)
        found = [
            file_system.unstrip_protocol(each) for each in file_system.glob(inner)
        ]
    else:
        found = glob.glob(path, recursive=True)
    if not found:
        raise DataError(
            f"{path}: no file matches this pattern; records are selected by PATH@[first:end]"
        )
    return sorted(found)


class Records:
    """The records of one or more sources; each has its place in all of them as its index.

    Attributes:
        name: paths as given, for messages.
        indices: places of the selected records, ascending within each entry of the list.
        fingerprint: SHA-256 of the sources' bytes, as they were when they were opened.
    """

    def __init__(
        self, name: str, sources: Sequence[Source], selected: Sequence[range]
    ) -> None:
        self.name = name
        self._sources = sources
        self._starts = [0, *itertools.accumulate(map(len, sources))]
        stretches = [each for each in selected if len(each)]
        follow = all(a.stop == b.start for a, b in itertools.pairwise(stretches))
        self.indices: Sequence[int] = list(itertools.chain.from_iterable(stretches))
        if follow and stretches:
            self.indices = range(stretches[0].start, stretches[-1].stop)
        self.fingerprint = sources[0].fingerprint
        if len(sources) > 1:
            joined = " ".join(source.fingerprint for source in sources)
            self.fingerprint = _sha256(joined.encode())

    def __len__(self) -> int:
        """Return the number of records, those that are not selected included."""
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        source, place = self._find(index)
        return source.record(place)

    def raw(self, index: int) -> bytes:
        """Return a record as JSON; of JSONL its line, byte for byte."""
        source, place = self._find(index)
        return source.raw(place)

    def where(self, index: int) -> str:
        """Return the place of a record for messages: `file:line`, or the row of a table."""
        source, place = self._find(index)
        return source.where(place)

    def check_unchanged(self) -> None:
        """Check that every file still has the size and modification time it was opened with.

        Raises:
            DataError: one was changed.
        """
        for source in self._sources:
            source.check_unchanged()

    def files(self) -> list[Path]:
        """Return the local files of all sources."""
        return [path for source in self._sources for path in source.files()]

    def _find(self, index: int) -> tuple[Source, int]:
        number = bisect(self._starts, index) - 1
        return self._sources[number], index - self._starts[number]


def _sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
