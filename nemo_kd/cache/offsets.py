"""The offset index beside a chunk: where each line begins and how many positions it holds.

File: 8 bytes magic, then little-endian int64: size of the data file, its mtime in nanoseconds, largest token id, number
of lines n; then n + 1 offsets and n position counts. It holds nothing that the data file does not: where it is missing
or belongs to another state of that file, it is built again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemo_kd.cache.files import write_atomically
from nemo_kd.cache.json_codec import decode
from nemo_kd.cache.layout import CacheError

MAGIC = b"NKDIDX01"
_HEADER = 4


@dataclass(frozen=True)
class Offsets:
    """Attributes: `starts` int64 [n + 1], `num_positions` int64 [n], `max_token_id` over tokens, labels and teacher ids."""

    starts: np.ndarray
    num_positions: np.ndarray
    max_token_id: int

    def __len__(self) -> int:
        return len(self.num_positions)

    def save(self, path: Path, data_path: Path) -> None:
        """Writes the index of `data_path` as that file is now."""
        stat = data_path.stat()
        header = np.array([stat.st_size, stat.st_mtime_ns, self.max_token_id, len(self)], dtype="<i8")
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
        size, mtime_ns, max_token_id, count = (int(number) for number in numbers[:_HEADER])
        stat = data_path.stat()
        # A copied cache has new times; its size still has to agree.
        if size != stat.st_size or stat.st_mtime_ns < mtime_ns or len(numbers) != _HEADER + 2 * count + 1:
            return None
        starts = numbers[_HEADER : _HEADER + count + 1]
        return cls(starts, numbers[_HEADER + count + 1 :], max_token_id)

    @classmethod
    def scan(cls, data_path: Path) -> Offsets:
        """Builds the index by reading every line once.

        Raises:
            CacheError: a line is damaged or cut off.
        """
        starts, lengths, max_token_id = [0], [], -1
        with data_path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                where = f"{data_path}:{number}"
                if not line.endswith(b"\n"):
                    raise CacheError(
                        f"{where}: the last line has no line break after {len(line)} bytes, so it was cut off while writing; "
                        "delete that line, or write the chunk again"
                    )
                row = decode(line, where, index=number - 1)
                starts.append(starts[-1] + len(line))
                lengths.append(row.example.num_tokens)
                ids = (row.example.tokens_S, row.example.labels_S, row.teacher.topk_token_ids_SK)
                max_token_id = max(max_token_id, *(int(array.max()) for array in ids))
        return cls(np.array(starts, dtype=np.int64), np.array(lengths, dtype=np.int64), max_token_id)
