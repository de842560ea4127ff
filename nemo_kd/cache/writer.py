"""Write a cache segment by segment; published files are whole and stay.

A segment is a fixed run of records, computed and published by one process. As soon as all segments
of a chunk are there, a job that writes the cache concatenates them in the order of their records
and publishes first the chunk, then its index. At any instant the folder holds complete chunks with
their indexes, whole segments, and hidden temporary files that the next run removes. The same
command continues from there, with any number of processes and parts, and ends with the same bytes.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_kd.cache.index import ChunkBuilder, ChunkSummary
from nemo_kd.cache.layout import CacheError, CacheLayout
from nemo_kd.cache.manifest import FORMAT_VERSION, Manifest
from nemo_kd.cache.parts import Part, WriteLock
from nemo_kd.cache.scan import complete_chunk, read_index, scan_chunk
from nemo_kd.cache.segment import (
    PUBLISHED_STAYS,
    Segment,
    is_whole,
    read_segment,
    segment_path,
    segments,
)
from nemo_kd.cache.storage import LocalStorage
from nemo_kd.config.errors import UserInputError
from nemo_kd.files import (
    Lock,
    atomic_file,
    explained,
    remove_abandoned,
    write_atomically,
)

log = logging.getLogger(__name__)


class CacheWriter:
    """Publishes the chunks of a cache, and finds the missing segments.

    One process of a job has it and holds the cache's lock. Several jobs may write one cache, each
    one part of it. Part i of n computes segments i, i + n, i + 2n ... of all segments of the cache.
    Whichever job finds a chunk's segments complete publishes the chunk; two that do so at once
    publish the same bytes.

    Attributes:
        manifest: identity of the cache; `chunks` has the chunks that were complete when last
            looked.

    Args:
        manifest: identity of the cache to write. An existing cache is continued if it has the same
            identity.
        chunks: the record indices of every chunk.
        part: (i, n); (0, 1) is a job alone.

    Raises:
        CacheError: another job writes this cache or part; or another teacher, dataset or setting
            wrote the existing files, or there is no manifest of them.
    """

    def __init__(
        self,
        layout: CacheLayout,
        manifest: Manifest,
        chunks: Sequence[range],
        part: Part = (0, 1),
    ) -> None:
        self.layout = layout
        self.manifest = manifest
        self.chunks = chunks
        self._part = part
        self._waiting: dict[int, None] = {}
        self._first_segments = list(
            itertools.accumulate(
                (-(-len(one) // manifest.segment_examples) for one in chunks), initial=0
            )
        )
        self._assembling = threading.Lock()
        with explained(layout.folder, PUBLISHED_STAYS):
            layout.folder.mkdir(parents=True, exist_ok=True)
        with Lock(layout.start_lock_path, wait_s=math.inf):
            self._lock = WriteLock(layout, part)
            try:
                self._claim()
            except BaseException:
                self._lock.release()
                raise

    def close(self) -> None:
        """Let others write the cache."""
        with self._assembling:
            self._lock.release()

    @property
    def missing(self) -> list[int]:
        """Chunks that were not complete when last looked."""
        return [
            chunk
            for chunk in range(len(self.chunks))
            if chunk not in self.manifest.chunks
        ]

    def missing_segments(self) -> list[Segment]:
        """Return the segments that this job has to compute, in the order of the records.

        Damaged segments are removed and included.
        """
        missing: list[Segment] = []
        for chunk in self.missing:
            for indices in self._of_this_part(chunk, self._segments(chunk)):
                if not is_whole(segment_path(self.layout, chunk, indices)):
                    missing.append((chunk, indices))
        # Segments vanish behind a chunk that another part has published meanwhile.
        self._look()
        return [segment for segment in missing if segment[0] not in self.manifest.chunks]

    def incomplete(self) -> list[int]:
        """Return the chunks that are not complete on disk; looks at all of them again."""
        with self._assembling:
            self.manifest.chunks = {}
            self._look()
        return self.missing

    def missing_by_part(self) -> dict[int, int]:
        """Return for each part how many segments of incomplete chunks are not on disk."""
        count = self._part[1]
        missing: dict[int, list[int]] = {}
        for chunk in self.missing:
            names = self.layout.segment_names(chunk)
            first = self._first_segments[chunk]
            missing[chunk] = [
                (first + number) % count
                for number, path in enumerate(self._segment_paths(chunk))
                if path.name not in names
            ]
        self._look()  # a chunk published meanwhile misses nothing
        return dict(Counter(part for chunk in self.missing for part in missing[chunk]))

    def assemble_complete(self, up_to: int | None = None) -> None:
        """Publish every chunk whose segments are all there.

        May run in a thread beside the one that computes.

        Args:
            up_to: last chunk to look at; None looks at all, and at what other parts have published.

        Raises:
            CacheError: a segment is damaged, or the file system refuses.
        """
        with self._assembling, explained(self.layout.folder, PUBLISHED_STAYS):
            if up_to is None:
                for chunk in sorted(
                    set(self.layout.chunks_in_work()).intersection(self.missing)
                ):
                    self._assemble_if_whole(chunk)
                self._look()
                return
            for chunk in list(
                itertools.takewhile(lambda chunk: chunk <= up_to, self._waiting)
            ):
                if self._assemble_if_whole(chunk):
                    del self._waiting[chunk]

    def _claim(self) -> None:
        """Create the manifest, or adopt the existing one if it describes the same cache."""
        layout = self.layout
        manifest = self.manifest
        existing = (
            Manifest.load(layout.manifest_path) if layout.manifest_path.exists() else None
        )
        if existing is not None:
            self._refuse_sibling(existing)
        present = layout.existing_chunks()
        in_work = layout.chunks_in_work()
        if existing is None and present:
            raise CacheError(
                f"output_path: {layout.chunk_path(present[0])} exists, but there is no manifest "
                f"({layout.manifest_path}) that names its teacher; write to another "
                "output_path, or delete the file"
            )
        # A manifest without segments and chunks is left from a run that stopped early; replace it.
        has_segments = any(
            any(layout.segments_folder(chunk).glob("[0-9]*")) for chunk in in_work
        )
        is_bound = bool(present) or has_segments or not self._lock.is_alone
        if existing is not None and (is_bound or existing.chunks):
            self._check_same(existing)
        remove_abandoned(layout.folder)
        if self._lock.is_alone:
            for chunk in set(layout.existing_indexes()).difference(present):
                # It must not describe another file.
                layout.index_path(chunk).unlink(missing_ok=True)
        if existing is None or existing.differences(manifest):
            # Before the first segment, so that the origin of every segment is known.
            manifest.save(layout.manifest_path)
        elif existing.format_version != FORMAT_VERSION and not self._lock.is_alone:
            raise CacheError(
                f"{layout.manifest_path}: an older version of nemo_kd writes this cache; wait "
                "until it ends, or give another output_path"
            )
        else:
            upgrade(layout, existing)
        self._look()
        self._waiting = dict.fromkeys(self.missing)
        for chunk in in_work:
            if chunk in manifest.chunks:
                shutil.rmtree(layout.segments_folder(chunk), ignore_errors=True)
            else:
                remove_abandoned(layout.segments_folder(chunk))

    def _refuse_sibling(self, existing: Manifest) -> None:
        """Refuse a manifest whose chunks have another suffix. A dataset with the name of a chunk
        does not count.
        """
        if self.layout.chunks_in_work() or _has_chunks(self.layout, existing):
            return
        for sibling in self.layout.siblings():
            if sibling.chunks_in_work() or _has_chunks(sibling, existing):
                raise CacheError(
                    f"output_path: {self.layout.manifest_path} belongs to the cache "
                    f"{sibling.output_path}; two caches cannot share a manifest: give another "
                    "name, or delete that cache"
                )

    def _check_same(self, existing: Manifest) -> None:
        differences = existing.differences(self.manifest)
        if differences:
            raise CacheError(
                f"{self.layout.manifest_path}: the cache there was written with other settings:\n  "
                + "\n  ".join(differences)
                + "\nWrite to another output_path, or delete that cache."
            )

    def _look(self) -> None:
        """Find the chunks that became complete since the last look."""
        for chunk in set(self.missing).intersection(self.layout.existing_indexes()):
            self._is_complete(chunk)

    def _is_complete(self, chunk: int) -> bool:
        if chunk not in self.manifest.chunks:
            index = complete_chunk(self.layout.chunk_path(chunk))
            if index is not None and index.summary is not None:
                self.manifest.chunks[chunk] = index.summary
        return chunk in self.manifest.chunks

    def _of_this_part(self, chunk: int, whole: list[Any]) -> list[Any]:
        """Return this job's items of `whole`, which has one item for each segment of a chunk."""
        return whole[
            (self._part[0] - self._first_segments[chunk]) % self._part[1] :: self._part[1]
        ]

    def _segments(self, chunk: int) -> list[range]:
        return segments(self.chunks[chunk], self.manifest.segment_examples)

    def _segment_paths(self, chunk: int) -> list[Path]:
        return [
            segment_path(self.layout, chunk, indices) for indices in self._segments(chunk)
        ]

    def _assemble_if_whole(self, chunk: int) -> bool:
        """Publish a chunk if all its segments are there.

        Returns:
            True if this job is done with it: it is complete, or lacks segments of other parts
            only. The part that publishes the last segment then assembles it.
        """
        if not self._is_complete(chunk):
            paths = self._segment_paths(chunk)
            names = self.layout.segment_names(chunk)
            if not all(path.name in names for path in paths):
                return all(
                    path.name in names for path in self._of_this_part(chunk, paths)
                )
            self._check_same(Manifest.load(self.layout.manifest_path))
            try:
                self.manifest.chunks[chunk] = self._assembled(chunk, paths)
            except UserInputError:
                # Another part may have been faster and have removed the segments.
                if not self._is_complete(chunk):
                    raise
        shutil.rmtree(self.layout.segments_folder(chunk), ignore_errors=True)
        return True

    def _assembled(self, chunk: int, paths: list[Path]) -> ChunkSummary:
        """Publish a chunk, then the index that makes it complete."""
        target = self.layout.chunk_path(chunk)
        indices = self.chunks[chunk]
        builder = ChunkBuilder(ChunkSummary(indices[0], indices[-1]))
        digest = hashlib.sha256()
        with atomic_file(target, PUBLISHED_STAYS) as file:
            for path in paths:
                segment, payload = read_segment(path)
                file.write(payload)
                digest.update(payload)
                builder.extend(segment)
        index = builder.index(digest.digest())
        write_atomically(self.layout.index_path(chunk), index.to_bytes())
        return builder.summary


def upgrade(layout: CacheLayout, manifest: Manifest) -> None:
    """Make a cache of format 2 one of format 3; others stay as they are.

    Every whole chunk gets an index with a summary. Then the manifest is written without its list,
    and its journal is removed.
    """
    for chunk, summary in manifest.chunks.items():
        path = layout.chunk_path(chunk)
        if not _has_listed_size(path, summary):
            continue
        index = read_index(path)
        if index is None or index.checksum != summary.sha256:
            try:
                index = scan_chunk(LocalStorage(str(layout.folder)), path.name)
            except CacheError:
                continue  # a damaged chunk is computed again
        if index.checksum == summary.sha256:
            write_atomically(
                layout.index_path(chunk),
                dataclasses.replace(index, summary=summary).to_bytes(),
            )
    if manifest.format_version != FORMAT_VERSION:
        manifest.save(layout.manifest_path)
    layout.journal_path.unlink(missing_ok=True)


def _has_listed_size(path: Path, summary: ChunkSummary) -> bool:
    return path.is_file() and path.stat().st_size >= summary.bytes


def _has_chunks(layout: CacheLayout, manifest: Manifest) -> bool:
    """Return True if a chunk of the cache is on disk: one with an index, or listed by a manifest
    of format 2.
    """
    for chunk in layout.existing_chunks():
        path = layout.chunk_path(chunk)
        listed = manifest.chunks.get(chunk)
        if complete_chunk(path) is not None or (
            listed and _has_listed_size(path, listed)
        ):
            return True
    return False
