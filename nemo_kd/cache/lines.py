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
SMALL_LINE_BYTES = 1 << 26
MOST_INFLATION = 1024
"""Bytes of a line for each of its frame, above SMALL_LINE_BYTES; numbers as text never reach it."""
_PIECE_BYTES = 1 << 10
"""Fed to the decompressor at once: at most 32 MiB come out."""
_BLOCK_BYTES = 1 << 20


class TornError(CacheError):
    """A file ends inside a line, as after a crash; the lines before it are whole."""


def lines_of(name: str | PurePath) -> _Plain | _Zst:
    """Return the container that a file of this name is."""
    return _Zst() if str(name).endswith(".zst") else _Plain()


def most_line_bytes(frame_bytes: int) -> int:
    """Return the longest line that a frame may hold: a few bytes must not fill the memory."""
    return min(MAX_LINE_BYTES, max(SMALL_LINE_BYTES, MOST_INFLATION * frame_bytes))


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

    def split(self, file: BinaryIO, where: str, first: int = 1) -> Iterator[bytes]:
        """Yield the raw bytes of every line from the file's position on, which begins line `first`.

        Raises:
            TornError: the file ends inside a line.
        """
        for number, line in enumerate(file, start=first):
            if not line.endswith(b"\n"):
                raise TornError(
                    f"{where}:{number}: the last line has no line break, so it may be cut off; "
                    "check it, then add the break, or cut it with `logit_cache repair`"
                )
            yield line


class _Zst:
    def __init__(self) -> None:
        self._compressor = zstandard.ZstdCompressor(
            level=ZST_LEVEL, write_checksum=True, write_content_size=True
        )
        self._decompressor = zstandard.ZstdDecompressor()

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__()  # type: ignore[misc]

    def write(self, line: bytes) -> bytes:
        return self._compressor.compress(line)

    def read(self, raw: bytes, where: str) -> bytes:
        try:
            size = zstandard.frame_content_size(raw)
            if size > most_line_bytes(len(raw)):
                raise CacheError(
                    f"{where}: a frame of {size} bytes is not a line of a cache"
                )
            line = self._decompressor.decompress(
                raw, max_output_size=0 if size >= 0 else most_line_bytes(len(raw))
            )
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

    def split(self, file: BinaryIO, where: str, first: int = 1) -> Iterator[bytes]:
        pending = b""
        number = first
        while True:
            if not pending:
                pending = file.read(_BLOCK_BYTES)
                if not pending:
                    return
            frame, pending = self._frame(pending, file, f"{where}:{number}")
            yield frame
            number += 1

    def _frame(self, block: bytes, file: BinaryIO, where: str) -> tuple[bytes, bytes]:
        """Return the frame that `block` begins with, and the bytes behind it."""
        parts: list[bytes] = []
        frame = zstandard.ZstdDecompressor().decompressobj()
        num_read = num_inflated = used = 0
        while True:
            try:
                for start in range(0, len(block), _PIECE_BYTES):
                    piece = block[start : start + _PIECE_BYTES]
                    used = start + len(piece)
                    num_read += len(piece)
                    num_inflated += len(frame.decompress(piece))
                    if num_inflated > most_line_bytes(num_read):
                        raise CacheError(
                            f"{where}: a frame of more than {num_inflated} bytes is not a line of a "
                            "cache"
                        )
                    if frame.eof:
                        break
            except zstandard.ZstdError as error:
                raise CacheError(
                    f"{where}: not a zstd frame ({error}): the bytes are damaged; restore the "
                    "file, write it again, or see `logit_cache repair`"
                ) from error
            parts.append(block)
            if frame.eof:
                rest = frame.unused_data + block[used:]
                raw = b"".join(parts)
                return raw[: len(raw) - len(rest)], rest
            block = file.read(_BLOCK_BYTES)
            if not block:
                raise TornError(
                    f"{where}: the file ends inside a zstd frame, so its last line is cut off; "
                    "cut it with `logit_cache repair`"
                )
