"""The index beside a chunk: its summary, and the place of each line.

The presence of an index with a summary makes a chunk complete. Files of other programs get an index
without a summary, which is only a shortcut. docs/cache_format.md specifies the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import orjson

from nemo_kd.cache.layout import (
    CacheError,
    LocalStorage,
    Storage,
    index_name,
    lines_of,
)
from nemo_kd.files import read_file

if TYPE_CHECKING:  # it imports torch
    from nemo_kd.batch import CachedExample

MAGIC = b"NKDIDX03"
OLDER_MAGIC = b"NKDIDX02"
"""Of format 2, which has no summary."""
_HEADER = struct.Struct("<8s32s8q")
_CRC_BYTES = 4
BYTES_PER_LINE = 16
IN_HEADER = ("examples", "bytes", "sha256")
"""Fields of a summary that the header of an index holds."""
SUMMED = (
    "examples",
    "tokens",
    "loss_tokens",
    "bytes",
    "kept_tokens",
    "kept_mass_sum",
    "label_in_topk",
    "selected_tokens",
)
"""Counts of a summary."""


@dataclass
class ChunkSummary:
    """One complete chunk. Token counts are positions; `bytes` and `sha256` are the data file's."""

    first_index: int
    last_index: int
    examples: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    bytes: int = 0
    sha256: str = ""
    skipped: dict[str, int] = field(default_factory=dict)
    """Records of the range that are not in the chunk, by reason."""
    kept_tokens: int = 0
    """Teacher entries stored for loss tokens."""
    kept_mass_sum: float = 0.0
    """Teacher probability inside the kept ids, summed over loss tokens."""
    label_in_topk: int = 0
    """Loss tokens whose label is among the kept ids."""
    selected_tokens: int = 0
    """Loss tokens with teacher entries, where the cache holds selected positions; 0 elsewhere."""
    computed_with: list[dict[str, Any]] = field(default_factory=list)
    """Settings of the runs that computed the rows, as far as rounding depends on them: batch size,
    layout, precision.
    """

    @classmethod
    def parse(cls, payload: dict[str, Any]) -> ChunkSummary:
        """Return the summary in a JSON object; fields of a later version are ignored.

        Raises:
            TypeError, AttributeError: it is not an object, or a field is missing.
        """
        names = {one.name for one in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in payload.items() if name in names})

    @classmethod
    def total(cls, chunks: Iterable[ChunkSummary]) -> ChunkSummary:
        """Return the sums over chunks."""
        total = cls(0, 0)
        for chunk in chunks:
            total.add(chunk)
        return total

    def add(self, other: ChunkSummary) -> None:
        """Add the counts of a segment that follows."""
        for name in SUMMED:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, count in other.skipped.items():
            self.skip(reason, count)
        self.computed_with += [
            settings
            for settings in other.computed_with
            if settings not in self.computed_with
        ]

    @property
    def target_tokens(self) -> int:
        """Return the loss tokens with teacher entries."""
        return self.selected_tokens or self.loss_tokens

    def skip(self, reason: str, count: int = 1) -> None:
        """Count records that make no row."""
        self.skipped[reason] = self.skipped.get(reason, 0) + count


class ChunkFacts(NamedTuple):
    """Numbers in the header of an index.

    Attributes:
        bytes: size of the data file.
        mtime_ns: its modification time in an index without a summary, else 0.
        max_token_id: largest id among tokens and labels.
        max_topk_id: largest of the teacher's ids, tail samples included.
        smallest_k: smallest, over the lines, of the most tokens that a position of the line keeps.
        largest_k: largest of the same.
        max_positions: positions of the longest line.
        num_lines: number of lines.
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
    """Index of a chunk.

    Attributes:
        sha256: of the data file (32 bytes).
        starts: int64 [n + 1], offset of each line, and the size of the file.
        num_positions: int64 [n].
        summary: None for a file of another program, and in an index of format 2.
    """

    facts: ChunkFacts
    sha256: bytes
    starts: np.ndarray
    num_positions: np.ndarray
    summary: ChunkSummary | None = None

    @property
    def checksum(self) -> str:
        return f"sha256:{self.sha256.hex()}"

    def to_bytes(self) -> bytes:
        """Encode the index as a file."""
        places = np.concatenate([self.starts, self.num_positions]).astype("<i8")
        content = _HEADER.pack(MAGIC, self.sha256, *self.facts) + places.tobytes()
        if self.summary is not None:
            fields = dataclasses.asdict(self.summary)
            content += orjson.dumps(
                {
                    name: value
                    for name, value in fields.items()
                    if name not in IN_HEADER
                }
            )
        return content + zlib.crc32(content).to_bytes(_CRC_BYTES, "little")

    @classmethod
    def parse(cls, raw: bytes) -> ChunkIndex | None:
        """Return the index in a file's content; None if it is damaged or something else."""
        content = raw[:-_CRC_BYTES]
        if raw[: len(MAGIC)] not in (MAGIC, OLDER_MAGIC) or zlib.crc32(
            content
        ) != int.from_bytes(raw[-_CRC_BYTES:], "little"):
            return None
        _, sha256, *numbers = _HEADER.unpack_from(content)
        facts = ChunkFacts(*numbers)
        end = _HEADER.size + 8 * (2 * facts.num_lines + 1)
        places = np.frombuffer(content[_HEADER.size : end], dtype="<i8")
        index = cls(
            facts, sha256, places[: facts.num_lines + 1], places[facts.num_lines + 1 :]
        )
        if end == len(content):
            return index
        in_header = {
            "examples": facts.num_lines,
            "bytes": facts.bytes,
            "sha256": index.checksum,
        }
        summary = ChunkSummary.parse(orjson.loads(content[end:]) | in_header)
        return dataclasses.replace(index, summary=summary)


@dataclass
class LineFacts:
    """Facts for an index, gathered line by line; a part of the header of a segment."""

    line_bytes: list[int] = field(default_factory=list)
    num_positions: list[int] = field(default_factory=list)
    max_token_id: int = -1
    max_topk_id: int = -1
    ks: list[int] = field(default_factory=list)
    """Smallest and largest K of the lines so far; empty before the first."""


@dataclass
class ChunkBuilder:
    """Gathers summary and index of a chunk, or of a segment of one, row by row."""

    summary: ChunkSummary
    facts: LineFacts = field(default_factory=LineFacts)

    def add(self, row: CachedExample, num_bytes: int, positions: str = "all") -> None:
        """Add a line of `num_bytes` that readers decode as `row`, of which `positions` (loss,
        selected or all) are stored.
        """
        example = row.example
        targets = row.loss_rows()
        stored = row.teacher if positions == "all" else targets
        ids_PK = targets.topk_token_ids_PK
        labels_P = example.labels_S[targets.positions_P]
        k = int((stored.topk_token_ids_PK >= 0).sum(axis=1).max(initial=0))
        of_teacher = [stored.topk_token_ids_PK]
        if stored.tail_token_ids_PM is not None:
            of_teacher.append(stored.tail_token_ids_PM)
        summary = ChunkSummary(
            example.index,
            example.index,
            examples=1,
            tokens=example.num_tokens,
            loss_tokens=example.num_loss_tokens,
            bytes=num_bytes,
            kept_tokens=int((ids_PK >= 0).sum()),
            kept_mass_sum=float(
                (1 - targets.tail_mass_PT[:, 0].astype(np.float64)).sum()
            ),
            label_in_topk=int((ids_PK == labels_P[:, None]).any(axis=1).sum()),
            selected_tokens=len(targets) if row.is_selected else 0,
        )
        facts = LineFacts(
            [num_bytes],
            [example.num_tokens],
            max(int(example.tokens_S.max()), int(example.labels_S.max())),
            max(int(ids.max(initial=-1)) for ids in of_teacher),
            [k, k],
        )
        self.extend(ChunkBuilder(summary, facts))

    def extend(self, other: ChunkBuilder) -> None:
        """Add a segment that follows."""
        self.summary.add(other.summary)
        facts = self.facts
        facts.line_bytes += other.facts.line_bytes
        facts.num_positions += other.facts.num_positions
        facts.max_token_id = max(facts.max_token_id, other.facts.max_token_id)
        facts.max_topk_id = max(facts.max_topk_id, other.facts.max_topk_id)
        ks = facts.ks + other.facts.ks
        facts.ks = [min(ks), max(ks)] if ks else []

    def index(self, sha256: bytes, mtime_ns: int | None = None) -> ChunkIndex:
        """Return the index of all rows; with `mtime_ns` the shortcut without a summary."""
        facts = self.facts
        starts = np.concatenate(
            [[0], np.cumsum(facts.line_bytes, dtype=np.int64)]
        ).astype(np.int64)
        num_positions = np.array(facts.num_positions, dtype=np.int64)
        header = ChunkFacts(
            bytes=int(starts[-1]),
            mtime_ns=mtime_ns or 0,
            max_token_id=facts.max_token_id,
            max_topk_id=facts.max_topk_id,
            smallest_k=min(facts.ks, default=0),
            largest_k=max(facts.ks, default=0),
            max_positions=int(num_positions.max(initial=0)),
            num_lines=len(num_positions),
        )
        self.summary.sha256 = f"sha256:{sha256.hex()}"
        summary = self.summary if mtime_ns is None else None
        return ChunkIndex(header, sha256, starts, num_positions, summary)


def read_index(path: Path) -> ChunkIndex | None:
    """Return the index beside a data file; None if there is none, or a damaged one."""
    index_path = path.with_name(index_name(path.name))
    return ChunkIndex.parse(read_file(index_path)) if index_path.exists() else None


def complete_chunk(path: Path) -> ChunkSummary | None:
    """Return the summary of a complete chunk, else None.

    Its index has one, and the data file has the size that it states.
    """
    if not path.is_file():
        return None
    index = read_index(path)
    summary = index.summary if index is not None else None
    return summary if summary and summary.bytes == path.stat().st_size else None


def index_of(path: Path, summary: ChunkSummary) -> ChunkIndex:
    """Return a complete chunk's index with its summary; the file is read if its index is another's.

    Raises:
        CacheError: the file is not the one that `summary` describes.
    """
    index = read_index(path)
    if index is None or index.checksum != summary.sha256:
        index = scan_chunk(LocalStorage(str(path.parent)), path.name)
    if index.checksum != summary.sha256:
        raise CacheError(f"{path}: is not what it was when it was written")
    return replace(index, summary=summary)


def describes(index: ChunkIndex, size: int, mtime_ns: int) -> bool:
    """Return True if an index belongs to the file of this size and time; one with a summary needs
    no time.
    """
    return index.facts.bytes == size and (
        index.summary is not None or index.facts.mtime_ns == mtime_ns
    )


def scan_chunk(storage: Storage, name: str, mtime_ns: int | None = None) -> ChunkIndex:
    """Return the index of a chunk by decoding every line once.

    Its summary lacks what the lines do not hold: the records of the range without a line, and
    `computed_with`.

    Args:
        mtime_ns: modification time of the file, for an index without a summary.

    Raises:
        CacheError: a line is damaged or cut off, or there is none.
    """
    from nemo_kd.cache.record import decode  # it imports torch

    where = f"{storage.folder}/{name}"
    builder = ChunkBuilder(ChunkSummary(0, 0))
    digest = hashlib.sha256()
    lines = lines_of(name)
    indices: list[int] = []
    with storage.open(name) as file:
        for number, raw in enumerate(lines.split(file, where)):
            line = f"{where}:{number + 1}"
            row = decode(lines.read(raw, line), line, index=number)
            builder.add(row, len(raw))
            indices.append(row.example.index)
            digest.update(raw)
    if not indices:
        raise CacheError(f"{where}: the file is empty")
    builder.summary.first_index = indices[0]
    builder.summary.last_index = indices[-1]
    return builder.index(digest.digest(), mtime_ns)
