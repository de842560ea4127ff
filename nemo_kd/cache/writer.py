"""Writes a cache segment by segment; nothing that is published can be lost or be half there.

A segment is a fixed run of records, computed and published by one process. As soon as all segments of a chunk are there,
a job that writes the cache puts them together in the order of their records. What lies in the folder at any instant is
therefore: whole chunks that the manifest or its journal lists, whole segments, and hidden temporary files that the next run removes.
The same command continues from there, with any number of processes and of shards, and ends with the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import math
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from nemo_kd.batch import CachedExample
from nemo_kd.cache.index import LineFacts
from nemo_kd.cache.layout import CacheError, CacheLayout, index_name
from nemo_kd.cache.lines import lines_of
from nemo_kd.cache.listing import ChunkList
from nemo_kd.cache.manifest import ChunkSummary, Manifest
from nemo_kd.cache.parts import Shard, WriteLock
from nemo_kd.cache.record import encode, trimmed
from nemo_kd.files import (
    Lock,
    atomic_file,
    explained,
    read_file,
    remove_abandoned,
    write_atomically,
)

log = logging.getLogger(__name__)

PUBLISHED_STAYS = "; what is published stays and is not computed again"

Segment = tuple[int, range]
"""(chunk id, record indices)."""


class CacheWriter:
    """The process of a job that holds its lock: it says what is missing, puts chunks together and keeps the manifest.

    Several jobs may write one cache at a time, each a shard of it. Shard i of n computes segments i, i + n, i + 2n ... of
    all segments of the cache; whichever comes first puts a chunk together.

    Args:
        manifest: what is about to be written. A cache that is there already is continued if it says the same.
        chunks: the record indices of every chunk.
        shard: (i, n); (0, 1) is a job alone.
        check_before_listing: called before each chunk is put together; what it raises keeps the chunk from being listed.

    Raises:
        CacheError: another job writes this cache or shard; or another teacher, dataset or setting wrote what is there,
            or nobody knows who did.
    """

    def __init__(
        self,
        layout: CacheLayout,
        manifest: Manifest,
        chunks: Sequence[range],
        shard: Shard = (0, 1),
        check_before_listing: Callable[[], None] | None = None,
    ) -> None:
        self.layout, self.manifest, self.chunks, self._shard = layout, manifest, chunks, shard
        self._missing: set[int] = set()
        self._waiting: dict[int, None] = {}
        self._first_parts = list(
            itertools.accumulate(
                (-(-len(one) // manifest.segment_examples) for one in chunks), initial=0
            )
        )
        self._assembling = threading.Lock()
        self._check_before_listing = check_before_listing
        with explained(layout.folder, PUBLISHED_STAYS):
            layout.folder.mkdir(parents=True, exist_ok=True)
        with Lock(layout.manifest_lock_path, wait_s=math.inf):
            self._lock = WriteLock(layout, shard)
            try:
                self._claim()
            except BaseException:
                self._lock.release()
                raise

    def close(self) -> None:
        """Lets others write the cache."""
        with self._assembling:
            self._lock.release()

    @property
    def missing(self) -> list[int]:
        """Chunks that are not listed, or whose file is not there with the listed size, when last looked."""
        return sorted(self._missing)

    def missing_segments(self) -> list[Segment]:
        """What this job has to compute, in the order of the records. Damaged segments are removed and are among it."""
        missing: list[Segment] = []
        for chunk in self.missing:
            mine = self._of_this_shard(
                chunk, segments(self.chunks[chunk], self.manifest.segment_examples)
            )
            missing += [
                (chunk, part)
                for part in mine
                if not _is_whole(segment_path(self.layout, chunk, part))
            ]
        # A chunk that another shard has put together meanwhile misses no segments: they are removed after it is listed.
        with self._assembling:
            self._refresh()
        return [(chunk, part) for chunk, part in missing if chunk in self._missing]

    def incomplete(self) -> list[int]:
        """Return the chunks that are not listed, or not there with the listed size; looks at the disk again for all."""
        with self._assembling:
            self._listed.reload()
            self.manifest.chunks = self._listed.chunks
            self._missing = {
                chunk for chunk in range(len(self.chunks)) if not self._is_complete(chunk)
            }
        return self.missing

    def missing_by_shard(self) -> dict[int, int]:
        """Return for each shard how many segments of incomplete chunks are not on disk."""
        count = self._shard[1]
        missing: dict[int, list[int]] = {}
        for chunk in self.missing:
            names = self.layout.segment_names(chunk)
            paths = self._segment_paths(chunk)
            first = self._first_parts[chunk]
            missing[chunk] = [
                (first + n) % count for n, path in enumerate(paths) if path.name not in names
            ]
        with self._assembling:
            self._refresh()  # a chunk listed meanwhile misses nothing
        return dict(Counter(shard for chunk in self._missing for shard in missing[chunk]))

    def assemble_complete(self, up_to: int | None = None) -> None:
        """Publishes every chunk of which all segments are there; `up_to` spares the look at later chunks.

        May run in a thread beside the one that computes, once at a time.

        Raises:
            CacheError: a segment is damaged, or the file system refuses.
        """
        with self._assembling, explained(self.layout.folder, PUBLISHED_STAYS):
            if up_to is None:
                for chunk in sorted(self._missing.intersection(self.layout.chunks_in_work())):
                    self._assemble_if_whole(chunk)
                self._fold()
                return
            for chunk in list(itertools.takewhile(lambda chunk: chunk <= up_to, self._waiting)):
                if self._assemble_if_whole(chunk):
                    del self._waiting[chunk]
            self._refresh()

    def _claim(self) -> None:
        """Makes the manifest say what is about to be written; or this job accept what it says."""
        layout, manifest = self.layout, self.manifest
        existing = Manifest.load(layout.manifest_path) if layout.manifest_path.exists() else None
        if existing is not None:
            self._refuse_sibling(existing)
        present, in_work = layout.existing_chunks(), layout.chunks_in_work()
        if existing is None and present:
            raise CacheError(
                f"output_path: {layout.chunk_path(present[0])} exists, but there is no manifest ({layout.manifest_path}) "
                "that tells what wrote it; write to another output_path, or delete the file"
            )
        # A manifest without any work done is what is left of a run that got no further: it binds nobody.
        has_segments = any(any(layout.segments_folder(chunk).glob("[0-9]*")) for chunk in in_work)
        if existing is not None and (
            existing.chunks or present or has_segments or not self._lock.is_alone
        ):
            self._check_same(existing)
            manifest.chunks = existing.chunks
        remove_abandoned(layout.folder)
        if self._lock.is_alone:
            manifest.save(
                layout.manifest_path
            )  # before the first segment, so that none is ever of unknown origin
        self._listed = ChunkList(layout.manifest_path, PUBLISHED_STAYS)
        self.manifest.chunks = self._listed.chunks
        self._missing = {chunk for chunk in range(len(self.chunks)) if not self._is_complete(chunk)}
        self._waiting = dict.fromkeys(self.missing)
        for chunk in in_work:
            if chunk in self._missing:
                remove_abandoned(layout.segments_folder(chunk))
            else:
                shutil.rmtree(layout.segments_folder(chunk), ignore_errors=True)

    def _refuse_sibling(self, existing: Manifest) -> None:
        """Refuse a manifest whose chunks lie there with another suffix; a dataset of such a name is none of them."""
        if (
            any(_is_listed(self.layout, existing.chunks, key) for key in existing.chunks)
            or self.layout.chunks_in_work()
        ):
            return
        for sibling in self.layout.siblings():
            if sibling.chunks_in_work() or any(
                _is_listed(sibling, existing.chunks, key) for key in existing.chunks
            ):
                raise CacheError(
                    f"output_path: {self.layout.manifest_path} belongs to the cache {sibling.output_path}; two caches "
                    "cannot share a manifest: give another name, or delete that cache"
                )

    def _check_same(self, existing: Manifest) -> None:
        differences = existing.differences(self.manifest)
        if differences:
            raise CacheError(
                f"{self.layout.manifest_path}: the cache there was written with other settings:\n  "
                + "\n  ".join(differences)
                + "\nWrite to another output_path, or delete that cache."
            )

    def _refresh(self) -> None:
        """Takes in what other shards have done."""
        if self._shard[1] > 1:
            self._take_in()

    def _take_in(self) -> None:
        for key in self._listed.read_new():
            if _is_listed(self.layout, self._listed.chunks, key):
                self._missing.discard(int(key))
        self.manifest.chunks = self._listed.chunks

    def _is_complete(self, chunk: int) -> bool:
        return _is_listed(self.layout, self.manifest.chunks, str(chunk))

    def _of_this_shard(self, chunk: int, parts: list[Any]) -> list[Any]:
        """Return the part of a chunk's segments, or of a list in their order, that this job computes."""
        return parts[(self._shard[0] - self._first_parts[chunk]) % self._shard[1] :: self._shard[1]]

    def _segment_paths(self, chunk: int) -> list[Path]:
        parts = segments(self.chunks[chunk], self.manifest.segment_examples)
        return [segment_path(self.layout, chunk, part) for part in parts]

    def _assemble_if_whole(self, chunk: int) -> bool:
        """Put a chunk together if all its segments are there.

        Returns:
            True where it needs no further look: it is listed, or only segments of other shards are missing, and the
            shard that publishes the last of them looks at it then.
        """
        paths = self._segment_paths(chunk)
        names = self.layout.segment_names(chunk)
        if not all(path.name in names for path in paths):
            return chunk not in self._missing or all(
                path.name in names for path in self._of_this_shard(chunk, paths)
            )
        lock_path = self.layout.chunk_lock_path(chunk)
        with Lock(lock_path, wait_s=math.inf):
            self._refresh()  # another shard may have been faster
            if chunk in self._missing and self.layout.segment_names(chunk).issuperset(
                path.name for path in paths
            ):
                if self._check_before_listing is not None:
                    self._check_before_listing()
                self._list(chunk, self._assembled(chunk, paths))
            if (
                chunk not in self._missing
            ):  # so whoever waits for this lock, or makes the file anew, has nothing to do
                lock_path.unlink(missing_ok=True)
                shutil.rmtree(self.layout.segments_folder(chunk), ignore_errors=True)
        return chunk not in self._missing

    def _assembled(self, chunk: int, paths: list[Path]) -> ChunkSummary:
        """Publishes a chunk and its index, which do not count before the manifest lists them."""
        target, indices = self.layout.chunk_path(chunk), self.chunks[chunk]
        summary, facts, digest = (
            ChunkSummary(indices[0], indices[-1]),
            LineFacts(),
            hashlib.sha256(),
        )
        with atomic_file(target, PUBLISHED_STAYS) as file:
            for path in paths:
                part_summary, part_facts, payload = read_segment(path)
                file.write(payload)
                digest.update(payload)
                summary.add(part_summary)
                facts.extend(part_facts)
        summary.sha256 = f"sha256:{digest.hexdigest()}"
        write_atomically(
            target.with_name(index_name(target.name)), facts.index(digest.digest()).to_bytes()
        )
        return summary

    def _list(self, chunk: int, summary: ChunkSummary) -> None:
        """Add a chunk to those on disk, whatever other shards have added meanwhile."""
        with Lock(self.layout.manifest_lock_path, wait_s=math.inf):
            self._take_in()
            self._check_same(self._listed.manifest)
            self._listed.add(chunk, summary)
        self._missing.discard(chunk)

    def _fold(self) -> None:
        """Move the journal into the manifest, and look again at what is missing."""
        with Lock(self.layout.manifest_lock_path, wait_s=math.inf):
            self._take_in()
            self._check_same(self._listed.manifest)
            self._listed.fold()
        self.manifest.chunks = self._listed.chunks
        self._missing = {chunk for chunk in self._missing if not self._is_complete(chunk)}


class SegmentWriter:
    """The rows of one segment in the order of their indices; `publish` makes them part of the cache.

    Args:
        computed_with: what rounding depends on, for the manifest.
    """

    def __init__(
        self,
        layout: CacheLayout,
        manifest: Manifest,
        segment: Segment,
        computed_with: dict[str, Any],
    ) -> None:
        chunk, self.indices = segment
        self.path = segment_path(layout, chunk, self.indices)
        self.codec, self.positions = manifest.codec["name"], manifest.codec.get("positions", "all")
        self.top_k, self._lines = manifest.top_k, lines_of(layout.chunk_name(chunk))
        self.summary = ChunkSummary(
            self.indices[0], self.indices[-1], computed_with=[computed_with]
        )
        self.facts, self._payload, self._digest = LineFacts(), list[bytes](), hashlib.sha256()
        self._last_index = self.indices[0] - 1

    def write(self, row: CachedExample) -> None:
        """Appends a row.

        Raises:
            CacheError: its index does not follow the last one's, or it holds more tokens a position than the cache.
        """
        example, teacher, summary = row.example, row.teacher, self.summary
        if teacher.topk_logits_PK.shape[1] > self.top_k:
            raise CacheError(
                f"example {example.index} has {teacher.topk_logits_PK.shape[1]} logits a position in a cache of top_k={self.top_k}"
            )
        if not self._last_index < example.index <= self.indices[-1]:
            raise CacheError(
                f"example {example.index} came after example {self._last_index} in the segment of {self.indices[0]} to {self.indices[-1]}"
            )
        self._last_index = example.index
        raw = self._lines.write(encode(row, self.codec, self.positions))
        row = trimmed(row)  # what a reader gets
        example, targets = row.example, row.loss_rows()
        self._payload.append(raw)
        self._digest.update(raw)
        self.facts.add(row, len(raw), self.positions)
        summary.examples += 1
        summary.tokens += example.num_tokens
        summary.loss_tokens += example.num_loss_tokens
        summary.bytes += len(raw)
        ids_PK = targets.topk_token_ids_PK
        summary.kept_tokens += int((ids_PK >= 0).sum())
        summary.kept_mass_sum += float((1 - targets.tail_mass_PT[:, 0].astype(np.float64)).sum())
        labels_P = example.labels_S[targets.positions_P]
        summary.label_in_topk += int((ids_PK == labels_P[:, None]).any(axis=1).sum())

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
        with explained(self.path.parent, PUBLISHED_STAYS):
            self.path.parent.mkdir(exist_ok=True)
        write_atomically(self.path, [orjson.dumps(header), b"\n", *self._payload], PUBLISHED_STAYS)


def segments(indices: range, segment_examples: int) -> list[range]:
    """The segments of a chunk."""
    return [
        indices[start : start + segment_examples]
        for start in range(0, len(indices), segment_examples)
    ]


def segment_path(layout: CacheLayout, chunk: int, indices: range) -> Path:
    """Where a segment is published."""
    return layout.segments_folder(chunk) / f"{indices[0]:012d}-{indices[-1]:012d}"


def read_segment(path: Path) -> tuple[ChunkSummary, LineFacts, bytes]:
    """(counts, index, bytes for the chunk) of a published segment.

    Raises:
        CacheError: it is damaged.
    """
    header, _, payload = read_file(path).partition(b"\n")
    try:
        fields = orjson.loads(header)
        if fields["sha256"] != hashlib.sha256(payload).hexdigest():
            raise ValueError("wrong checksum")
        return ChunkSummary(**fields["summary"]), LineFacts(**fields["facts"]), payload
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(
            f"{path}: the segment is damaged ({error}); run the same command again (where shards write the cache, the one whose segment it is, or all as one job): it is computed anew"
        ) from error


def _is_listed(layout: CacheLayout, chunks: Mapping[str, ChunkSummary], key: str) -> bool:
    """Return True if a chunk is among those listed, and on disk with the listed size."""
    if key not in chunks or not (layout.is_template or key == "0"):
        return False
    path = layout.chunk_path(int(key))
    return path.is_file() and path.stat().st_size == chunks[key].bytes


def _is_whole(path: Path) -> bool:
    try:
        read_segment(path)
    except FileNotFoundError:
        return False
    except CacheError:
        log.warning("%s is damaged and is computed again", path)
        path.unlink(missing_ok=True)
        return False
    return True
