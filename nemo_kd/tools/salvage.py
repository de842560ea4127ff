"""Walk a chunk line by line, past damage."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from nemo_kd.cache.layout import CacheError
from nemo_kd.cache.lines import lines_of
from nemo_kd.files import open_regular

ZST_MAGIC = b"\x28\xb5\x2f\xfd"
_BLOCK_BYTES = 1 << 20


class Stretch(NamedTuple):
    """One line of a chunk, or damaged bytes.

    Attributes:
        number: of the line, from 1.
        start, end: its bytes in the file.
        raw: these bytes; empty where they are damaged.
        error: what is wrong with them; TornError where the file ends inside the line.
    """

    number: int
    start: int
    end: int
    raw: bytes
    error: CacheError | None


def stretches(path: Path, starts: Sequence[int] = ()) -> Iterator[Stretch]:
    """Yield all bytes of a chunk; after a damaged frame continue with the next whole one.

    A plain line is whole when it ends in a line break; a compressed one, when its frame decodes.

    Args:
        starts: offsets of the lines from an index; they only number lines after damage.

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
            place = bisect_left(starts, end)
            number = (
                place + 1 if place < len(starts) and starts[place] == end else number + 1
            )
            start = end


def file_sha256(path: Path) -> bytes:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    for block in blocks(path):
        digest.update(block)
    return digest.digest()


def blocks(path: Path, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """Yield the bytes of a file from `start` to before `end`, in pieces."""
    with open_regular(path) as file:
        remaining = (os.fstat(file.fileno()).st_size if end is None else end) - start
        file.seek(start)
        while remaining > 0 and (block := file.read(min(remaining, _BLOCK_BYTES))):
            remaining -= len(block)
            yield block


def _next_frame(file: BinaryIO, path: Path, start: int) -> int:
    """Return where the first whole frame behind `start` begins; the end of the file without one."""
    position = start + 1
    while True:
        file.seek(position)
        block = file.read(_BLOCK_BYTES)
        found = block.find(ZST_MAGIC)
        if found < 0:
            if len(block) < _BLOCK_BYTES:
                return position + len(block)
            position += len(block) - len(ZST_MAGIC) + 1
            continue
        position += found
        file.seek(position)
        try:
            next(lines_of(path).split(file, str(path)))
            return position
        except CacheError:
            position += 1
