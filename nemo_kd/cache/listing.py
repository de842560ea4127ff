"""Follows and extends the list of complete chunks: a manifest and its journal, which several jobs change."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import BinaryIO

from nemo_kd.cache import journal
from nemo_kd.cache.layout import CacheError
from nemo_kd.cache.manifest import ChunkSummary, Manifest, journaled_summaries, read_journal
from nemo_kd.files import open_regular


class ChunkList:
    """The complete chunks of a cache; a look at it and an addition cost the same however many chunks there are.

    Attributes:
        manifest: as last read, with no chunks.
        chunks: what the manifest and its journal list, as last read.

    Args:
        path: of the manifest, which must exist.
        note: added to errors of the file system, see `nemo_kd.files.explained`.
    """

    def __init__(self, path: Path, note: str = "") -> None:
        self._path = path
        self._note = note
        self._journal_path = journal.journal_path(path)
        self.reload()

    def reload(self) -> None:
        """Read manifest and journal whole."""
        listed = read_journal(self._path)  # before the manifest, see Manifest.load
        with self._open() as file:
            self._version = _version(os.fstat(file.fileno()))
            content = file.read()
        manifest = Manifest.parse(content, str(self._path), listed)
        self._digest = journal.manifest_digest(content)
        self.chunks = manifest.chunks
        self.manifest = dataclasses.replace(manifest, chunks={})
        part = journal.parse(listed, str(self._journal_path))
        self._end = part.end if part.manifest == self._digest else 0

    def read_new(self) -> list[str]:
        """Take in what was listed since the last look, and return the numbers of these chunks as text."""
        content = read_journal(self._path, self._end)
        with self._open() as file:
            version = _version(os.fstat(file.fileno()))
        if version != self._version:
            before = self.chunks
            self.reload()
            return [key for key, summary in self.chunks.items() if before.get(key) != summary]
        part = journal.parse(content, str(self._journal_path))
        if self._end == 0 and part.manifest != self._digest:
            return []  # the journal of an older manifest
        new = journaled_summaries(dict(part.chunks), str(self._journal_path))
        self._end += part.end
        self.chunks |= new
        return list(new)

    def add(self, chunk: int, summary: ChunkSummary) -> None:
        """List a chunk durably. The caller holds the manifest's lock, under which it has called `read_new`."""
        lines = [journal.chunk_line(str(chunk), dataclasses.asdict(summary))]
        if self._end == 0:
            lines.insert(0, journal.first_line(self._digest))
        self._end = journal.append(self._journal_path, self._end, lines, self._note)
        self.chunks[str(chunk)] = summary

    def fold(self) -> None:
        """Move the journal's chunks into the manifest. As for `add`."""
        if self._journal_path.exists():
            dataclasses.replace(self.manifest, chunks=self.chunks).save(self._path)
            self.reload()

    def _open(self) -> BinaryIO:
        try:
            return open_regular(self._path)
        except FileNotFoundError as error:
            raise CacheError(
                f"{self._path}: the manifest was removed while this job ran; restore it"
            ) from error


def _version(status: os.stat_result) -> tuple[int, int, int]:
    """Return what differs between two files that had the manifest's name one after the other."""
    return status.st_ino, status.st_mtime_ns, status.st_size
