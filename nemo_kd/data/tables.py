"""Records in Parquet and Arrow files and in folders that `datasets` saved, read by that library."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

import orjson

from nemo_kd.config import DataError
from nemo_kd.data.sources import Source, fingerprint_of, reopened

FOLDER = "a folder of `datasets`"


class Table(Source):
    """Parquet, Arrow, or a folder that `datasets` saved, read by that library.

    Raises:
        DataError: the library cannot read it, or it has no rows.
    """

    def __init__(self, name: str, path: Path, kind: str) -> None:
        self._rows = _load_table(name, path, kind)
        self._files = [path]
        if kind == FOLDER:
            self._files = [Path(each["filename"]) for each in self._rows.cache_files]
        super().__init__(name, path)
        self.fingerprint = fingerprint_of(self._files)

    def __reduce__(self) -> Any:
        return reopened, (self.name, self.fingerprint)

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, place: int) -> dict[str, Any]:
        self.check_unchanged()
        record: dict[str, Any] = _without_nulls(self._rows[place])
        return record

    def raw(self, place: int) -> bytes:
        return orjson.dumps(self.record(place)) + b"\n"

    def where(self, place: int) -> str:
        return f"{self.name}, row {place}"

    def files(self) -> list[Path]:
        return self._files


def _without_nulls(value: Any) -> Any:
    """Drop the fields of objects that are null: a column holds a null where a row has no field."""
    if isinstance(value, dict):
        return {
            key: _without_nulls(each)
            for key, each in value.items()
            if each is not None
        }
    return (
        [_without_nulls(each) for each in value] if isinstance(value, list) else value
    )


def _load_table(name: str, path: Path, kind: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        if kind == FOLDER:
            rows: Any = datasets.load_from_disk(str(path))
        else:
            # The library knows a file by its path and time, which a new file may have, too.
            copies = Path(
                datasets.config.HF_DATASETS_CACHE, fingerprint_of([path])[7:23]
            )
            rows = datasets.load_dataset(
                kind,
                data_files=glob.escape(str(path)),
                split="train",
                cache_dir=str(copies),
            )
    except Exception as error:  # pyarrow's and the library's own have no common class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        remedy = "fetch the file again"
        if kind == FOLDER:
            remedy = (
                f"of a folder of other files give a pattern, as '{name}/*.parquet'"
            )
        raise DataError(
            f"{name}: cannot be read as {kind} ({reason}); {remedy}"
        ) from error
    if isinstance(rows, datasets.DatasetDict):
        raise DataError(
            f"{name}: holds the splits {', '.join(rows)}; give one of their folders, for example "
            f"{name}/{next(iter(rows))}"
        )
    if not len(rows):
        raise DataError(f"{name}: the table has no rows")
    return rows.with_format(None)  # a saved one may hide columns
