"""Where the files of a cache lie: chunks, their offset indexes and the manifest."""

from __future__ import annotations

import os
import re
from pathlib import Path

from nemo_kd.config import UserInputError

CHUNK_ID = "CHUNK_ID"


class CacheError(UserInputError):
    """A cache file, or a request to one, cannot be used; the message says where, what was found and what to do."""


class CacheLayout:
    """The file names that follow from one `output_path`.

    A path whose file name holds `CHUNK_ID` is a template: chunk 3 of `train_CHUNK_ID.jsonl` is `train_3.jsonl`. Any
    other path is one file, which is its own chunk 0. Ids are plain integers without zero padding.
    """

    def __init__(self, output_path: str) -> None:
        self.output_path = output_path
        folder, self._name = os.path.split(output_path)
        self.folder = Path(folder)
        if CHUNK_ID in folder:
            raise CacheError(
                f"{output_path}: {CHUNK_ID} stands in the folder; put it in the file name, e.g. folder/train_{CHUNK_ID}.jsonl"
            )
        if self._name in ("", ".", "..") or os.path.isdir(output_path):
            raise CacheError(f"{output_path!r} is no file name; give a file such as folder/train_{CHUNK_ID}.jsonl")

    @property
    def is_template(self) -> bool:
        """Whether the path stands for any number of chunks."""
        return CHUNK_ID in self._name

    def chunk_path(self, chunk_id: int) -> Path:
        """The data file of a chunk."""
        if not self.is_template and chunk_id != 0:
            raise CacheError(
                f"{self.output_path} names one file, so there is no chunk {chunk_id}; put {CHUNK_ID} into its name for several"
            )
        return self.folder / self._name.replace(CHUNK_ID, str(chunk_id))

    def index_path(self, chunk_path: Path) -> Path:
        """The offset index beside a data file."""
        return chunk_path.with_name(chunk_path.name + ".idx")

    @property
    def manifest_path(self) -> Path:
        """The manifest: `train_CHUNK_ID.jsonl` -> `train_manifest.json`, `train_0.jsonl` -> `train_0.manifest.json`."""
        stem = self._name
        for suffix in (".jsonl", ".json"):
            if stem.endswith(suffix) and stem != suffix:
                stem = stem.removesuffix(suffix)
                break
        name = stem.replace(CHUNK_ID, "manifest") if self.is_template else f"{stem}.manifest"
        return self.folder / f"{name}.json"

    def existing_chunks(self) -> list[int]:
        """The ids of the data files on disk, ascending."""
        if not self.is_template:
            return [0] if self.chunk_path(0).is_file() else []
        if not self.folder.is_dir():
            return []
        before, after = self._name.split(CHUNK_ID, 1)
        pattern = re.compile(re.escape(before) + "(0|[1-9][0-9]*)" + re.escape(after).replace(CHUNK_ID, r"\1"))
        matches = (pattern.fullmatch(entry.name) for entry in os.scandir(self.folder) if entry.is_file())
        return sorted(int(match[1]) for match in matches if match)
