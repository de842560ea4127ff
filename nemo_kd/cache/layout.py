"""File names of a cache: chunks, their indexes, the manifest, and what a run keeps meanwhile."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from nemo_kd.config import UserInputError

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
