"""Identity of stored weights: a hash over samples of every tensor's bytes."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from nemo_kd.config import ConfigError
from nemo_kd.nemo_archive import Files

WHOLE_BYTES = 1 << 16
BLOCK_BYTES = 1 << 13
STRIDE_BYTES = 1 << 23


class StoredBytes(NamedTuple):
    """Where a tensor, or a part of one, lies in a file.

    Attributes:
        label: name, dtype and shape.
    """

    label: str
    file: str
    offset: int
    num_bytes: int


def sample_tensors(files: Files, parts: Iterable[StoredBytes]) -> str:
    """Return a hash of every part: of all its bytes up to 64 KiB, else of 8 KiB at both ends and about every 8 MiB.

    It does not depend on how tensors are spread over files. Reads 1 to 5 MB of a GB.

    Raises:
        ConfigError: a file is unreadable or ends too early.
    """
    digest = hashlib.sha256()
    by_label = sorted(parts)
    for part in by_label:
        digest.update(f"{part.label}:{part.num_bytes}".encode())
        try:
            with files.open(part.file) as file:
                for start, length in _blocks(part.num_bytes):
                    file.seek(part.offset + start)
                    block = file.read(length)
                    if len(block) < length:
                        raise ConfigError(
                            f"{files.root / part.file}: ends inside {part.label}; copy or download it again"
                        )
                    digest.update(block)
        except OSError as error:
            raise ConfigError(
                f"{files.root / part.file}: cannot be read ({error.strerror})"
            ) from error
    return f"sha256:{digest.hexdigest()}"


def _blocks(num_bytes: int) -> list[tuple[int, int]]:
    if num_bytes <= WHOLE_BYTES:
        return [(0, num_bytes)]
    last = num_bytes - BLOCK_BYTES
    count = 3 + num_bytes // STRIDE_BYTES
    return [(number * last // (count - 1), BLOCK_BYTES) for number in range(count)]


def safetensors_parts(files: Files, names: Iterable[str]) -> Iterator[StoredBytes]:
    """Yield the tensors of safetensors files that were opened before, so that their headers are sound."""
    for file_name in names:
        with files.open(file_name) as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_bytes))
        for name, entry in header.items():
            if name != "__metadata__":
                first, end = entry["data_offsets"]
                label = f"{name} {entry['dtype']} {entry['shape']}"
                yield StoredBytes(label, file_name, 8 + header_bytes + first, end - first)
