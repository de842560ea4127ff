"""Walk over the chunks of a cache, and over their lines past damage."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from nemo_kd.cache.index import ChunkSummary
from nemo_kd.cache.layout import CacheError, CacheLayout
from nemo_kd.cache.lines import lines_of
from nemo_kd.cache.manifest import Manifest
from nemo_kd.cache.scan import read_index
from nemo_kd.files import open_regular

ZST_MAGIC = b"\x28\xb5\x2f\xfd"
_BLOCK_BYTES = 1 << 20


class Chunk(NamedTuple):
    """A chunk on disk: chunk `number` of the cache that `manifest`, if there is one, describes."""

    layout: CacheLayout
    number: int
    manifest: Manifest | None

    @property
    def path(self) -> Path:
        return self.layout.chunk_path(self.number)

    @property
    def summary(self) -> ChunkSummary | None:
        """Of a complete chunk."""
        if self.manifest is None:
            return None
        return self.manifest.summary_of(self.number, read_index(self.path))


def chunks_of(path: str) -> tuple[list[Chunk], int]:
    """Return the chunks of a file or template, and how many there should be.

    Without a manifest for all each may have its own.

    Raises:
        CacheError: there are none, or a manifest is damaged.
    """
    layout = CacheLayout(path)
    numbers = layout.existing_chunks()
    if not numbers:
        raise CacheError(
            f"{path}: there is no such file, and no chunk of such a template"
        )
    if layout.manifest_path.exists():
        manifest = Manifest.load(layout.manifest_path)
        return [
            Chunk(layout, number, manifest) for number in numbers
        ], manifest.num_chunks
    chunks = []
    for number in numbers:
        own = CacheLayout(str(layout.chunk_path(number)))
        has_manifest = own.manifest_path.exists()
        own_manifest = Manifest.load(own.manifest_path) if has_manifest else None
        chunks.append(Chunk(own, 0, own_manifest))
    return chunks, numbers[-1] + 1


class Stretch(NamedTuple):
    """One line of a chunk, or damaged bytes.

    Attributes:
        number: of the line, from 1; damaged bytes count as one line.
        start, end: its bytes in the file.
        raw: these bytes; empty where they are damaged.
        error: what is wrong with them; TornError where the file ends inside the line.
    """

    number: int
    start: int
    end: int
    raw: bytes
    error: CacheError | None


def stretches(path: Path) -> Iterator[Stretch]:
    """Yield all bytes of a chunk; after a damaged frame continue with the next whole one.

    A plain line is whole when it ends in a line break; a compressed one, when its frame decodes.

    Raises:
        FileError: the chunk is not a regular file, or cannot be read.
    """
    lines = lines_of(path)
    start = 0
    number = 1
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        while start < size:
            file.seek(start)
            try:
                for raw in lines.split(file, str(path), number):
                    yield Stretch(number, start, start + len(raw), raw, None)
                    start += len(raw)
                    number += 1
                return
            except CacheError as error:
                damage = error
            end = _next_frame(file, path, start) if path.suffix == ".zst" else size
            yield Stretch(number, start, end, b"", damage)
            number += 1
            start = end


def file_sha256(path: Path) -> bytes:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.digest()


def _next_frame(file: BinaryIO, path: Path, start: int) -> int:
    """Return where the first whole frame behind `start` begins; the end of the file without one."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        position = content.find(ZST_MAGIC, start + 1)
        while position >= 0:
            file.seek(position)
            with contextlib.suppress(CacheError):
                next(lines_of(path).split(file, str(path)))
                return position
            position = content.find(ZST_MAGIC, position + 1)
        return len(content)
