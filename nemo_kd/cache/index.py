"""The offset index beside a chunk: where each line begins, and what the lines hold together.

It says nothing that the data file does not: where it is missing or belongs to another state of that file it is built
again. docs/cache_format.md specifies the file.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from nemo_kd.batch import CachedExample

MAGIC = b"NKDIDX02"
_HEADER = struct.Struct("<8s32s8q")
_CRC_BYTES = 4
BYTES_PER_LINE = 16


class ChunkFacts(NamedTuple):
    """What the header of an index says about a chunk.

    Attributes:
        bytes: size of the data file.
        mtime_ns: its modification time where the index was built from a file without a manifest, else 0.
        max_token_id: the largest of tokens and labels; max_topk_id: of the teacher's ids,
            tail samples included.
        smallest_k, largest_k: over the lines, of the largest number of tokens kept at one position.
        max_positions: of the longest line.
    """

    bytes: int
    mtime_ns: int
    max_token_id: int
    max_topk_id: int
    smallest_k: int
    largest_k: int
    max_positions: int
    num_lines: int


@dataclass(frozen=True)
class ChunkIndex:
    """Attributes: `starts` int64 [n + 1] byte offsets, `num_positions` int64 [n], `sha256` of the data file (32 bytes)."""

    facts: ChunkFacts
    sha256: bytes
    starts: np.ndarray
    num_positions: np.ndarray

    def __len__(self) -> int:
        return self.facts.num_lines

    def to_bytes(self) -> bytes:
        """The file's content."""
        body = np.concatenate([self.starts, self.num_positions]).astype("<i8")
        content = _HEADER.pack(MAGIC, self.sha256, *self.facts) + body.tobytes()
        return content + zlib.crc32(content).to_bytes(_CRC_BYTES, "little")

    @classmethod
    def of(cls, raw: bytes) -> ChunkIndex | None:
        """The index in a file's content; None if it is none or damaged."""
        if len(raw) < _HEADER.size + _CRC_BYTES:
            return None
        magic, sha256, *numbers = _HEADER.unpack_from(raw)
        facts = ChunkFacts(*numbers)
        if magic != MAGIC or len(raw) != _HEADER.size + 8 * (2 * facts.num_lines + 1) + _CRC_BYTES:
            return None
        if zlib.crc32(memoryview(raw)[:-_CRC_BYTES]) != int.from_bytes(raw[-_CRC_BYTES:], "little"):
            return None
        values = np.frombuffer(raw, dtype="<i8", offset=_HEADER.size, count=2 * facts.num_lines + 1)
        starts = values[: facts.num_lines + 1]
        num_positions = values[facts.num_lines + 1 :]
        # A checksum proves no honesty: places outside the file would ask for any amount of memory.
        if starts[0] != 0 or starts[-1] != facts.bytes or (starts[1:] <= starts[:-1]).any():
            return None
        if facts.num_lines and (
            num_positions.min() < 1 or num_positions.max() != facts.max_positions
        ):
            return None
        return cls(facts, sha256, starts, num_positions)


@dataclass
class LineFacts:
    """Gathers an index line by line."""

    line_bytes: list[int] = field(default_factory=list)
    num_positions: list[int] = field(default_factory=list)
    max_token_id: int = -1
    max_topk_id: int = -1
    ks: list[int] = field(default_factory=list)
    """Smallest and largest K of the lines so far; empty before the first."""

    def add(self, row: CachedExample, num_bytes: int, positions: str = "all") -> None:
        """Takes in a line of `num_bytes` that readers decode as `row`, of which `positions` (loss or all) are stored."""
        stored = row.loss_rows() if positions == "loss" else row.teacher
        ids_PK, samples_PM = stored.topk_token_ids_PK, stored.tail_token_ids_PM
        k = int((ids_PK >= 0).sum(axis=1).max(initial=0))
        self.line_bytes.append(num_bytes)
        self.num_positions.append(row.example.num_tokens)
        self.max_token_id = max(
            self.max_token_id, int(row.example.tokens_S.max()), int(row.example.labels_S.max())
        )
        self.max_topk_id = max(self.max_topk_id, int(ids_PK.max(initial=-1)))
        if samples_PM is not None:
            self.max_topk_id = max(self.max_topk_id, int(samples_PM.max(initial=-1)))
        self.ks = [min([*self.ks, k]), max([*self.ks, k])]

    def extend(self, other: LineFacts) -> None:
        """Takes in all lines of another one, behind its own."""
        self.line_bytes += other.line_bytes
        self.num_positions += other.num_positions
        self.max_token_id = max(self.max_token_id, other.max_token_id)
        self.max_topk_id = max(self.max_topk_id, other.max_topk_id)
        self.ks = [min(self.ks + other.ks), max(self.ks + other.ks)] if self.ks + other.ks else []

    def index(self, sha256: bytes, mtime_ns: int = 0) -> ChunkIndex:
        """The index of all lines taken in."""
        starts = np.concatenate([[0], np.cumsum(self.line_bytes, dtype=np.int64)]).astype(np.int64)
        num_positions = np.array(self.num_positions, dtype=np.int64)
        smallest_k, largest_k = self.ks or (0, 0)
        facts = ChunkFacts(
            int(starts[-1]), mtime_ns, self.max_token_id, self.max_topk_id, smallest_k, largest_k,
            int(num_positions.max(initial=0)), len(num_positions),
        )  # fmt: skip
        return ChunkIndex(facts, sha256, starts, num_positions)
