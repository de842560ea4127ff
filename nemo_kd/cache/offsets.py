"""The offset index beside a chunk: where each line begins and what the lines hold together.

File: 8 bytes magic, then little-endian int64: size of the data file, its mtime in nanoseconds, a digest of samples of its
bytes, largest token id, smallest and largest K, number of lines n; then n + 1 offsets and n position counts. It holds
nothing that the data file does not: where it is missing or belongs to another state of that file, it is built again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemo_kd.batch import CachedExample
from nemo_kd.cache.files import write_atomically
from nemo_kd.cache.json_codec import decode
from nemo_kd.cache.layout import CacheError

MAGIC = b"NKDIDX01"
_HEADER = 7
_NUM_SAMPLES, _SAMPLE_BYTES = 16, 4096


@dataclass(frozen=True)
class Offsets:
    """Attributes: `starts` int64 [n + 1] and `num_positions` int64 [n] of the lines; over all lines the largest token id
    (tokens, labels, teacher ids) and the smallest and largest number of teacher logits a position."""

    starts: np.ndarray
    num_positions: np.ndarray
    max_token_id: int
    smallest_k: int
    largest_k: int

    def __len__(self) -> int:
        return len(self.num_positions)

    def save(self, path: Path, data_path: Path) -> None:
        """Writes the index of `data_path` as that file is now."""
        stat = data_path.stat()
        facts = [self.max_token_id, self.smallest_k, self.largest_k, len(self)]
        header = np.array([stat.st_size, stat.st_mtime_ns, digest(data_path), *facts], dtype="<i8")
        body = np.concatenate([header, self.starts, self.num_positions]).astype("<i8")
        write_atomically(path, MAGIC + body.tobytes())

    @classmethod
    def load(cls, path: Path, data_path: Path) -> Offsets | None:
        """The index in `path`; None where there is none for the data file's present state."""
        try:
            raw = path.read_bytes()
        except OSError:
            return None
        if raw[: len(MAGIC)] != MAGIC or (len(raw) - len(MAGIC)) % 8 or len(raw) < len(MAGIC) + 8 * _HEADER:
            return None
        numbers = np.frombuffer(raw, dtype="<i8", offset=len(MAGIC)).astype(np.int64)
        size, mtime_ns, samples, max_token_id, smallest_k, largest_k, count = (int(n) for n in numbers[:_HEADER])
        stat = data_path.stat()
        if size != stat.st_size or len(numbers) != _HEADER + 2 * count + 1:
            return None
        # A copy has another time and the same bytes.
        if mtime_ns != stat.st_mtime_ns and samples != digest(data_path):
            return None
        starts = numbers[_HEADER : _HEADER + count + 1]
        return cls(starts, numbers[_HEADER + count + 1 :], max_token_id, smallest_k, largest_k)

    @classmethod
    def scan(cls, data_path: Path) -> Offsets:
        """Builds the index by reading every line once.

        Raises:
            CacheError: a line is damaged or cut off.
        """
        facts = LineFacts()
        with data_path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                where = f"{data_path}:{number}"
                if not line.endswith(b"\n"):
                    raise CacheError(
                        f"{where}: the last line has no line break after {len(line)} bytes, so it was cut off while writing; "
                        "delete that line, or write the chunk again"
                    )
                row = decode(line, where, index=number - 1)
                facts.add(row, len(line), row.example.num_tokens)
        if not len(facts.num_positions):
            raise CacheError(f"{data_path}: the file is empty; write the chunk again")
        return facts.offsets()


class LineFacts:
    """Collects what an index says, line by line."""

    def __init__(self) -> None:
        self.starts, self.num_positions = [0], list[int]()
        self.max_token_id, self.ks = -1, set[int]()

    def add(self, row: CachedExample, num_bytes: int, num_positions: int) -> None:
        """Takes in a line of `num_bytes` that holds `row`, of which readers keep `num_positions`."""
        self.starts.append(self.starts[-1] + num_bytes)
        self.num_positions.append(num_positions)
        self.max_token_id = max(self.max_token_id, largest_id(row))
        self.ks.add(row.teacher.topk_token_ids_SK.shape[1])

    def offsets(self) -> Offsets:
        """The index of all lines taken in."""
        starts, num_positions = np.array(self.starts, dtype=np.int64), np.array(self.num_positions, dtype=np.int64)
        return Offsets(starts, num_positions, self.max_token_id, min(self.ks, default=0), max(self.ks, default=0))


def largest_id(row: CachedExample) -> int:
    """The largest token id anywhere in a row."""
    arrays = (row.example.tokens_S, row.example.labels_S, row.teacher.topk_token_ids_SK)
    return max(int(array.max()) for array in arrays)


def digest(path: Path) -> int:
    """A 63-bit digest of the file's size and of samples spread over it."""
    size, result = path.stat().st_size, hashlib.blake2b(digest_size=8)
    result.update(str(size).encode())
    with path.open("rb") as file:
        for sample in range(_NUM_SAMPLES):
            file.seek(sample * max(0, size - _SAMPLE_BYTES) // (_NUM_SAMPLES - 1))
            result.update(file.read(_SAMPLE_BYTES))
    return int.from_bytes(result.digest(), "little") >> 1
