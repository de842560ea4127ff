"""Lines of a chunk in its file: plain (`.jsonl`), or one zstd frame each (`.jsonl.zst`).

Either way a line is one range of bytes, so one read gives one example; `zstdcat` turns a compressed
chunk into plain JSONL.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from typing import BinaryIO

import zstandard

from nemo_kd.cache.layout import CacheError

ZST_LEVEL = 3
MAX_LINE_BYTES = 1 << 31
_BLOCK_BYTES = 1 << 16


class TornError(CacheError):
    """A file ends inside a line, as after a crash; the lines before it are whole."""


def lines_of(name: str | PurePath) -> _Plain | _Zst:
    """Return the container that a file of this name is."""
    return _Zst() if str(name).endswith(".zst") else _Plain()


class _Plain:
    def write(self, line: bytes) -> bytes:
        """Return the bytes that stand for a JSON line, which ends in a line break."""
        return line

    def read(self, raw: bytes, where: str) -> bytes:
        """Return the JSON line that `raw` stands for.

        Raises:
            CacheError: the bytes are damaged or cut off.
        """
        return raw

    def split(self, file: BinaryIO, where: str) -> Iterator[bytes]:
        """Yield the raw bytes of every line from the file's position on.

        Raises:
            TornError: the file ends inside a line.
        """
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                raise TornError(
                    f"{where}:{number}: the last line has no line break, so it may be cut off; "
                    "check it, then add the break, or cut it with `logit_cache repair`"
                )
            yield line


class _Zst:
    def write(self, line: bytes) -> bytes:
        compressor = zstandard.ZstdCompressor(level=ZST_LEVEL, write_checksum=True)
        return compressor.compress(line)

    def read(self, raw: bytes, where: str) -> bytes:
        try:
            line = b"\n\n"
            if zstandard.frame_content_size(raw) <= MAX_LINE_BYTES:
                line = zstandard.decompress(raw, max_output_size=MAX_LINE_BYTES)
        except zstandard.ZstdError as error:
            raise CacheError(
                f"{where}: {len(raw)} bytes are not a whole zstd frame ({error}): they are damaged; "
                "restore the file or write it again"
            ) from error
        if line.find(b"\n", 0, -1) >= 0:
            raise CacheError(
                f"{where}: one zstd frame holds several lines, so none can be read alone; "
                "decompress the file (zstd -d) and compress it line by line with `logit_cache "
                "convert`"
            )
        return line

    def split(self, file: BinaryIO, where: str) -> Iterator[bytes]:
        block = file.read(_BLOCK_BYTES)
        number = 1
        while block:
            frame = zstandard.ZstdDecompressor().decompressobj()
            parts = []
            while not frame.eof:
                if not block:
                    raise TornError(
                        f"{where}:{number}: the file ends inside a zstd frame, so its last line "
                        "is cut off; cut it with `logit_cache repair`"
                    )
                try:
                    frame.decompress(block)
                except zstandard.ZstdError as error:
                    raise CacheError(
                        f"{where}:{number}: not a zstd frame ({error}): the bytes are damaged; "
                        "restore the file, write it again, or see `logit_cache repair`"
                    ) from error
                parts.append(block)
                block = frame.unused_data or file.read(_BLOCK_BYTES)
            raw = b"".join(parts)
            yield raw[: len(raw) - len(frame.unused_data)]
            number += 1
