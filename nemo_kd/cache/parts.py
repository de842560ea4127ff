"""Decide who may write a cache: one job alone, or n jobs at once, one for each of its n parts.

A job that writes holds the cache's lock, exclusively when alone and shared as a part, and its
part's own lock too.
"""

from __future__ import annotations

import fcntl
import logging
import os

from nemo_kd.cache.layout import CacheError, CacheLayout
from nemo_kd.files import (
    Lock,
    open_lock_file,
    read_holder,
    release_lock,
    this_process,
    try_lock,
    write_holder,
)

log = logging.getLogger(__name__)

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
        CacheError: another job, which the message names, does this work or some of it; or the file
            system keeps no locks, which parts need.
    """

    def __init__(self, layout: CacheLayout, part: Part) -> None:
        self._layout = layout
        lock = open_lock_file(layout.lock_path)
        self._locks = [lock]
        try:
            free = try_lock(lock, fcntl.LOCK_EX)
            self.is_alone = free is not False
            if part[1] > 1:
                self._take_part(free, *part)
            elif free is False:
                raise self._refusal()
            else:
                write_holder(lock, this_process())
        except BaseException:
            self.release()
            raise
        if free is None:
            log.warning(
                "%s: this file system keeps no locks; make sure that no other job writes this "
                "cache",
                layout.lock_path,
            )
        # Otherwise a child, for example one that reads ahead, keeps the lock when this process is
        # killed.
        for file in self._locks:
            os.register_at_fork(after_in_child=file.close)

    def release(self) -> None:
        """Let others write."""
        for file in reversed(self._locks):
            release_lock(file)

    def _take_part(self, free: bool | None, number: int, count: int) -> None:
        lock = self._locks[0]
        group = f"one of {count} parts"
        if free is None:
            raise CacheError(
                f"{self._layout.lock_path}: this file system keeps no locks (flock), without "
                "which jobs cannot share one cache; mount it with locks, or give every job a "
                "range of records (start_from_idx, end_at_idx) and its own output_path and put "
                "the caches together with `logit_cache merge`"
            )
        if free:
            write_holder(lock, group)
            for _, path in self._layout.part_lock_paths():
                path.unlink()
        if not try_lock(lock, fcntl.LOCK_SH) or read_holder(lock) != group:
            raise self._refusal()
        refusal = f"is writing part {number}/{count} of this cache; {WAIT_OR_SHARE}"
        self._locks.append(Lock(self._layout.part_lock_path(number), refusal).file)

    def _refusal(self) -> CacheError:
        """Return the error that names the jobs that write the cache."""
        holder = read_holder(self._locks[0])
        if not holder.endswith(" parts"):
            return CacheError(f"{self._layout.lock_path}: {holder} {IS_WRITTEN}")
        writers = []
        for number, path in self._layout.part_lock_paths():
            file = open_lock_file(path)
            if try_lock(file, fcntl.LOCK_SH) is False:
                writers.append(f"part {number} by {read_holder(file)}")
            release_lock(file)
        return CacheError(
            f"{self._layout.lock_path}: this cache is being written as "
            f"{holder.removeprefix('one of ')}: {'; '.join(writers)}; {WAIT_OR_SHARE}"
        )
