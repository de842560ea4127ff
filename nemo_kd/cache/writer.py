"""Writes a cache segment by segment; nothing that is published can be lost or be half there.

A segment is a fixed run of records, computed and published by one process. Whoever holds the cache's lock puts the
segments of a chunk together in the order of their records as soon as all are there. What lies in the folder at any
instant is therefore: whole chunks that the manifest lists, whole segments, and hidden temporary files that the next run
removes. The same command continues from there, on any number of processes, and ends with the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from nemo_kd.batch import CachedExample
from nemo_kd.cache.files import Lock, atomic_file, explained, remove_abandoned, write_atomically
from nemo_kd.cache.index import LineFacts
from nemo_kd.cache.layout import CacheError, CacheLayout, index_name
from nemo_kd.cache.lines import lines_of
from nemo_kd.cache.manifest import ChunkSummary, Manifest
from nemo_kd.cache.record import encode, trimmed

log = logging.getLogger(__name__)

Segment = tuple[int, range]
"""(chunk id, record indices)."""


class CacheWriter:
    """The one process that holds a cache's lock: it says what is missing, puts chunks together and keeps the manifest.

    Attributes:
        missing: chunks that are not listed, or whose file is not there with the listed size.

    Args:
        manifest: what is about to be written. A cache that is there already is continued if it says the same.
        chunks: the record indices of every chunk.

    Raises:
        CacheError: another process writes this cache; or another teacher, dataset or setting wrote what is there, or
            nobody knows who did.
    """

    def __init__(self, layout: CacheLayout, manifest: Manifest, chunks: Sequence[range]) -> None:
        self.layout, self.manifest, self.chunks = layout, manifest, chunks
        self.missing: list[int] = []
        with explained(layout.folder):
            layout.folder.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(layout.lock_path)
        try:
            self._claim()
        except BaseException:
            self._lock.release()
            raise

    def close(self) -> None:
        """Lets others write the cache."""
        self._lock.release()

    def missing_segments(self) -> list[Segment]:
        """What has to be computed, in the order of the records. Damaged segments are removed and are among it."""
        missing: list[Segment] = []
        for chunk in self.missing:
            remove_abandoned(self.layout.segments_folder(chunk))
            for indices in segments(self.chunks[chunk], self.manifest.segment_examples):
                path = segment_path(self.layout, chunk, indices)
                if not _is_whole(path):
                    missing.append((chunk, indices))
        return missing

    def assemble_complete(self, up_to: int | None = None) -> None:
        """Publishes every chunk of which all segments are there; `up_to` spares the look at later chunks."""
        for chunk in list(self.missing):
            if up_to is not None and chunk > up_to:
                break
            parts = segments(self.chunks[chunk], self.manifest.segment_examples)
            paths = [segment_path(self.layout, chunk, indices) for indices in parts]
            if all(path.exists() for path in paths):
                self._assemble(chunk, paths)

    def _claim(self) -> None:
        layout, manifest = self.layout, self.manifest
        existing = Manifest.load(layout.manifest_path) if layout.manifest_path.exists() else None
        present = layout.existing_chunks()
        if existing is None and present:
            raise CacheError(
                f"output_path: {layout.chunk_path(present[0])} exists, but there is no manifest ({layout.manifest_path}) "
                "that tells what wrote it; write to another output_path, or delete the file"
            )
        # A manifest without any work done is what is left of a run that got no further: it binds nobody.
        work = existing is not None and (existing.chunks or present or self._segments_on_disk())
        if existing is not None and work:
            differences = existing.differences(manifest)
            if differences:
                raise CacheError(
                    f"{layout.manifest_path}: the cache there was written with other settings:\n  "
                    + "\n  ".join(differences)
                    + "\nWrite to another output_path, or delete that cache."
                )
            manifest.chunks = existing.chunks
        remove_abandoned(layout.folder)
        manifest.save(layout.manifest_path)  # before the first segment, so that none is ever of unknown origin
        self.missing = [chunk for chunk in range(len(self.chunks)) if not self._is_complete(chunk)]
        for chunk in set(range(len(self.chunks))) - set(self.missing):
            shutil.rmtree(layout.segments_folder(chunk), ignore_errors=True)

    def _segments_on_disk(self) -> bool:
        pattern = self.layout.segments_folder(0).name.replace("0", "*") if self.layout.is_template else None
        folders = self.layout.folder.glob(pattern) if pattern else [self.layout.segments_folder(0)]
        return any(folder.is_dir() and any(folder.glob("[0-9]*")) for folder in folders)

    def _is_complete(self, chunk: int) -> bool:
        summary, path = self.manifest.chunks.get(str(chunk)), self.layout.chunk_path(chunk)
        return summary is not None and path.is_file() and path.stat().st_size == summary.bytes

    def _assemble(self, chunk: int, paths: list[Path]) -> None:
        target, indices = self.layout.chunk_path(chunk), self.chunks[chunk]
        summary, facts, digest = ChunkSummary(indices[0], indices[-1]), LineFacts(), hashlib.sha256()
        with atomic_file(target) as file:
            for path in paths:
                part_summary, part_facts, payload = read_segment(path)
                file.write(payload)
                digest.update(payload)
                summary.add(part_summary)
                facts.extend(part_facts)
        summary.sha256 = f"sha256:{digest.hexdigest()}"
        write_atomically(target.with_name(index_name(target.name)), facts.index(digest.digest()).to_bytes())
        self.manifest.chunks[str(chunk)] = summary
        self.manifest.save(self.layout.manifest_path)
        self.missing.remove(chunk)
        shutil.rmtree(self.layout.segments_folder(chunk), ignore_errors=True)


class SegmentWriter:
    """The rows of one segment in the order of their indices; `publish` makes them part of the cache.

    Args:
        computed_with: what rounding depends on, for the manifest.
    """

    def __init__(
        self, layout: CacheLayout, manifest: Manifest, segment: Segment, computed_with: dict[str, Any]
    ) -> None:
        chunk, self.indices = segment
        self.path = segment_path(layout, chunk, self.indices)
        self.codec, self.positions = manifest.codec["name"], manifest.codec.get("positions", "all")
        self.top_k, self._lines = manifest.top_k, lines_of(layout.chunk_name(chunk))
        self.summary = ChunkSummary(self.indices[0], self.indices[-1], computed_with=[computed_with])
        self.facts, self._payload, self._digest = LineFacts(), list[bytes](), hashlib.sha256()
        self._last_index = self.indices[0] - 1

    def write(self, row: CachedExample) -> None:
        """Appends a row.

        Raises:
            CacheError: its index does not follow the last one's, or it holds more tokens a position than the cache.
        """
        example, teacher, summary = row.example, row.teacher, self.summary
        if teacher.topk_logits_SK.shape[1] > self.top_k:
            raise CacheError(
                f"example {example.index} has {teacher.topk_logits_SK.shape[1]} logits a position in a cache of top_k={self.top_k}"
            )
        if not self._last_index < example.index <= self.indices[-1]:
            raise CacheError(
                f"example {example.index} came after example {self._last_index} in the segment of {self.indices[0]} to {self.indices[-1]}"
            )
        self._last_index = example.index
        raw = self._lines.write(encode(row, self.codec, self.positions))
        row = trimmed(row)  # what a reader gets
        example, teacher = row.example, row.teacher
        self._payload.append(raw)
        self._digest.update(raw)
        self.facts.add(row, len(raw), self.positions)
        summary.examples += 1
        summary.tokens += example.num_tokens
        summary.loss_tokens += example.num_loss_tokens
        summary.bytes += len(raw)
        in_loss = example.loss_mask_S > 0
        ids_PK = teacher.topk_token_ids_SK[in_loss]
        summary.kept_tokens += int((ids_PK >= 0).sum())
        summary.kept_mass_sum += float((1 - teacher.tail_mass_TS[0, in_loss].astype(np.float64)).sum())
        summary.label_in_topk += int((ids_PK == example.labels_S[in_loss, None]).any(axis=1).sum())

    def skip(self, reason: str) -> None:
        """Counts a record that makes no row."""
        self.summary.skipped[reason] = self.summary.skipped.get(reason, 0) + 1

    def publish(self) -> None:
        """Makes the segment appear, whole.

        Raises:
            CacheError: records of its range are neither written nor skipped; or the file system refuses.
        """
        found = self.summary.examples + sum(self.summary.skipped.values())
        if found != len(self.indices):
            raise CacheError(
                f"the segment of examples {self.indices[0]} to {self.indices[-1]} got {found} of {len(self.indices)} records"
            )
        header = {
            "summary": dataclasses.asdict(self.summary),
            "facts": dataclasses.asdict(self.facts),
            "sha256": self._digest.hexdigest(),
        }
        with explained(self.path.parent):
            self.path.parent.mkdir(exist_ok=True)
        write_atomically(self.path, [orjson.dumps(header), b"\n", *self._payload])


def segments(indices: range, segment_examples: int) -> list[range]:
    """The segments of a chunk."""
    return [indices[start : start + segment_examples] for start in range(0, len(indices), segment_examples)]


def segment_path(layout: CacheLayout, chunk: int, indices: range) -> Path:
    """Where a segment is published."""
    return layout.segments_folder(chunk) / f"{indices[0]:012d}-{indices[-1]:012d}"


def read_segment(path: Path) -> tuple[ChunkSummary, LineFacts, bytes]:
    """(counts, index, bytes for the chunk) of a published segment.

    Raises:
        CacheError: it is damaged.
    """
    header, _, payload = path.read_bytes().partition(b"\n")
    try:
        fields = orjson.loads(header)
        if fields["sha256"] != hashlib.sha256(payload).hexdigest():
            raise ValueError("wrong checksum")
        return ChunkSummary(**fields["summary"]), LineFacts(**fields["facts"]), payload
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(
            f"{path}: the segment is damaged ({error}); run the same command again: it is computed anew"
        ) from error


def _is_whole(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        read_segment(path)
    except CacheError:
        log.warning("%s is damaged and is computed again", path)
        path.unlink()
        return False
    return True
