"""Write a cache segment by segment; published files are whole and stay.

A segment is a fixed run of records, computed and published by one process. As soon as all segments
of a chunk are there, a job that writes the cache concatenates them in the order of their records
and publishes first the chunk, then its index. At any instant the folder holds complete chunks with
their indexes, whole segments, and hidden temporary files that the next run removes. The same
command continues from there, with any number of processes and parts, and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import shutil
from collections.abc import Sequence
from typing import TextIO

from nemo_kd.cache.index import ChunkBuilder, ChunkSummary, complete_chunk, index_of
from nemo_kd.cache.layout import INDEX, SEGMENTS, CacheError, CacheLayout
from nemo_kd.cache.manifest import FORMAT_2, JOURNAL_SUFFIX, Manifest
from nemo_kd.cache.segment import (
    Segment,
    is_whole,
    read_segment,
    segment_path,
    segments,
)
from nemo_kd.config import UserInputError
from nemo_kd.files import (
    Lock,
    atomic_file,
    explained,
    open_lock_file,
    read_holder,
    release_lock,
    remove_abandoned,
    try_lock,
    write_atomically,
    write_holder,
)


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
        with explained(layout.folder):
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
        everything = [
            (chunk, indices)
            for chunk, records in enumerate(self.chunks)
            for indices in segments(records, self.manifest.segment_examples)
        ]
        number, count = self._part
        missing = [
            segment
            for segment in everything[number::count]
            if segment[0] not in self.manifest.chunks
            and not is_whole(segment_path(self.layout, *segment))
        ]
        # Segments vanish behind a chunk that another part has published meanwhile.
        self._look()
        return [
            segment for segment in missing if segment[0] not in self.manifest.chunks
        ]

    def incomplete(self) -> list[int]:
        """Return the chunks that are not complete on disk; looks at all of them again."""
        self.manifest.chunks = {}
        self._look()
        return self.missing

    def assemble_complete(self) -> None:
        """Publish every chunk whose segments are all there, and look at what others published.

        Raises:
            CacheError: a segment is damaged, or the file system refuses.
        """
        with explained(self.layout.folder):
            # A file that is named like a chunk may be another cache.
            ours = range(len(self.chunks))
            in_work = [each for each in self.layout.chunks_in_work() if each in ours]
            self._look()
            for chunk in in_work:
                if chunk in self.manifest.chunks or self._assemble(chunk):
                    shutil.rmtree(
                        self.layout.segments_folder(chunk), ignore_errors=True
                    )
            self._look()  # for chunks whose segments another part removed meanwhile

    def _claim(self) -> None:
        """Create the manifest, or adopt the existing one if it describes the same cache."""
        layout = self.layout
        if layout.manifest_path.exists():
            existing = Manifest.load(layout.manifest_path)
            differences = existing.differences(self.manifest)
            # A manifest that stands alone is left from a run that stopped early.
            if differences and (
                not self._lock.is_alone or _has_files(layout, existing)
            ):
                raise CacheError(
                    f"{layout.manifest_path}: the cache there was written with other settings:\n  "
                    + "\n  ".join(differences)
                    + "\nWrite to another output_path, or delete that cache."
                )
            if differences:
                self.manifest.save(layout.manifest_path)
            else:
                upgrade(layout, existing)
        elif layout.existing_chunks():
            raise CacheError(
                f"output_path: {layout.output_path} exists, but there is no manifest "
                f"({layout.manifest_path}) that names its teacher; write to another output_path, or "
                "delete the files"
            )
        else:
            # Before the first segment, so that the origin of every segment is known.
            self.manifest.save(layout.manifest_path)
        for folder in (layout.folder, *layout.folder.glob(f".*{SEGMENTS}")):
            remove_abandoned(folder)
        self._look()

    def _look(self) -> None:
        """Find the chunks that became complete since the last look."""
        indexes = self.layout.existing_chunks(suffix=INDEX)
        for chunk in set(self.missing).intersection(indexes):
            records = self.chunks[chunk]
            summary = complete_chunk(self.layout.chunk_path(chunk))
            ends = summary and (summary.first_index, summary.last_index)
            if summary is not None and ends == (records[0], records[-1]):
                self.manifest.chunks[chunk] = summary

    def _assemble(self, chunk: int) -> bool:
        """Publish a chunk, then the index that makes it complete; False if segments are missing."""
        indices = self.chunks[chunk]
        paths = [
            segment_path(self.layout, chunk, each)
            for each in segments(indices, self.manifest.segment_examples)
        ]
        if not self.layout.segment_names(chunk).issuperset(
            path.name for path in paths
        ):
            return False
        builder = ChunkBuilder(ChunkSummary(indices[0], indices[-1]))
        digest = hashlib.sha256()
        try:
            with atomic_file(self.layout.chunk_path(chunk)) as file:
                for path in paths:
                    segment, payload = read_segment(path)
                    file.write(payload)
                    digest.update(payload)
                    builder.extend(segment)
        except UserInputError:
            # Another part may have been faster and have removed the segments.
            self._look()
            if chunk not in self.manifest.chunks:
                raise
            return True
        index = builder.index(digest.digest())
        write_atomically(self.layout.index_path(chunk), index.to_bytes())
        self.manifest.chunks[chunk] = builder.summary
        return True


def _has_files(layout: CacheLayout, manifest: Manifest) -> bool:
    """Return True if something was computed: for this cache, or another one in its folder."""
    others = [*layout.folder.glob(f"*{INDEX}"), *layout.folder.glob(f".*{SEGMENTS}")]
    return bool(manifest.chunks or layout.existing_chunks() or others)


def upgrade(layout: CacheLayout, manifest: Manifest) -> None:
    """Make a cache of format 2 one of format 3; others stay as they are.

    Every whole chunk gets an index with a summary. Then the manifest is written without its list,
    and its journal is removed.
    """
    if manifest.format_version == FORMAT_2:
        for chunk, summary in manifest.chunks.items():
            try:
                index = index_of(layout.chunk_path(chunk), summary)
            except (CacheError, FileNotFoundError):
                continue  # a damaged chunk is computed again
            write_atomically(layout.index_path(chunk), index.to_bytes())
        manifest.save(layout.manifest_path)
    journal = layout.manifest_path.with_name(layout.manifest_name + JOURNAL_SUFFIX)
    journal.unlink(missing_ok=True)


WAIT_OR_SHARE = (
    "wait until it ends, stop it, or give another output_path. "
    "Several jobs share one cache as its parts, for example part=0/2 and part=1/2"
)
IS_WRITTEN = f"is writing this cache; {WAIT_OR_SHARE}"
"""Refusal of a process that asks for a cache's lock."""

Part = tuple[int, int]
"""(i, n): the i-th of n parts of the work, from 0."""


class WriteLock:
    """Right to write a cache, or one part of it, until `release` or the end of this process.

    Acquire while holding the start lock; this serializes jobs that start together.

    Attributes:
        is_alone: no other job was writing the cache when the lock was taken.

    Raises:
        UserInputError: another job, which the message names, does this work or some of it; or the
            file system keeps no locks, which parts need.
    """

    def __init__(self, layout: CacheLayout, part: Part) -> None:
        number, count = part
        self.is_alone = True
        with contextlib.ExitStack() as stack:
            if count == 1:
                locks = [Lock(layout.lock_path, IS_WRITTEN).file]
            else:
                shared = open_lock_file(layout.lock_path)
                stack.callback(release_lock, shared)
                self.is_alone = _share(shared, f"one of {count} parts")
                refusal = (
                    f"is writing part {number}/{count} of this cache; {WAIT_OR_SHARE}"
                )
                locks = [shared, Lock(layout.part_lock_path(number), refusal).file]
            for file in locks:
                stack.callback(release_lock, file)
                # Otherwise a child, for example one that reads ahead, keeps the lock when this
                # process is killed.
                os.register_at_fork(after_in_child=file.close)
            self.release = stack.pop_all().close


def _share(lock: TextIO, group: str) -> bool:
    """Take a cache's lock as one of a group of parts; return True for the first of them."""
    free = try_lock(lock, fcntl.LOCK_EX)
    if free is None:
        raise CacheError(
            f"{lock.name}: this file system keeps no locks (flock), without which jobs cannot "
            "share one cache; mount it with locks, or give every job a range of records "
            "(start_from_idx, end_at_idx) and its own output_path and put the caches together with "
            "`logit_cache merge`"
        )
    if free:
        write_holder(lock, group)
    if not try_lock(lock, fcntl.LOCK_SH) or read_holder(lock) != group:
        raise CacheError(f"{lock.name}: {read_holder(lock)} {IS_WRITTEN}")
    return free
