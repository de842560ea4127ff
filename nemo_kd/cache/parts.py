"""Who may write a cache: one job alone, or n jobs beside each other, each of which writes one of its n shards.

Whoever writes holds the cache's lock, exclusively when alone and shared as a shard, and a shard a lock of its own too.
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
    "Several jobs write one cache as its shards, each another one of the same number: shard=0/2 and shard=1/2"
)
IS_WRITTEN = f"is writing this cache; {WAIT_OR_SHARE}"
"""The refusal of a process that asks for a cache's lock."""

Shard = tuple[int, int]
"""(i, n): the i-th of n parts of the work, from 0."""


class WriteLock:
    """The right to write a cache, or one shard of it, until `release` or the end of this very process.

    To be asked for with the manifest's lock in hand, so that jobs that start at once ask one after the other.

    Attributes:
        is_alone: nobody else was writing the cache when the right was given.

    Raises:
        CacheError: another job does this work or part of it, the message says which; or the file system keeps no locks,
            which only a job alone can do without.
    """

    def __init__(self, layout: CacheLayout, shard: Shard) -> None:
        self._layout = layout
        self._locks = [open_lock_file(layout.lock_path)]
        try:
            free = try_lock(self._locks[0], fcntl.LOCK_EX)
            self.is_alone = free is not False
            if shard[1] == 1:
                self._take_whole(free)
            else:
                self._take_shard(free, *shard)
        except BaseException:
            self.release()
            raise
        # Else a child, such as one that reads ahead, kept the lock when this process is killed.
        for file in self._locks:
            os.register_at_fork(after_in_child=file.close)

    def release(self) -> None:
        """Gives the right back."""
        for file in reversed(self._locks):
            release_lock(file)

    def _take_whole(self, free: bool | None) -> None:
        if free is False:
            raise self._refusal()
        if free is None:
            log.warning(
                "%s: this file system keeps no locks; make sure that no other job writes this cache",
                self._layout.lock_path,
            )
        write_holder(self._locks[0], this_process())

    def _take_shard(self, free: bool | None, number: int, count: int) -> None:
        lock, path, group = self._locks[0], self._layout.lock_path, f"one of {count} shards"
        if free is None:
            raise CacheError(
                f"{path}: this file system keeps no locks (flock), without which shards cannot write one cache; mount it "
                "with locks, or give every job a range of records (start_from_idx, end_at_idx) and an output_path of its "
                "own and put the caches together with `logit_cache merge`"
            )
        if free:
            write_holder(lock, group)
            for _, shard_path in self._layout.shard_lock_paths():
                shard_path.unlink()
        if not try_lock(lock, fcntl.LOCK_SH) or read_holder(lock) != group:
            raise self._refusal()
        refusal = f"is writing shard {number}/{count} of this cache; {WAIT_OR_SHARE}"
        self._locks.append(Lock(self._layout.shard_lock_path(number), refusal).file)

    def _refusal(self) -> CacheError:
        return CacheError(f"{self._layout.lock_path}: {self._writers()}; {WAIT_OR_SHARE}")

    def _writers(self) -> str:
        """Who writes the cache, as a sentence."""
        holder = read_holder(self._locks[0])
        if not holder.endswith(" shards"):
            return f"{holder} is writing this cache"
        shards = []
        for number, path in self._layout.shard_lock_paths():
            file = open_lock_file(path)
            if try_lock(file, fcntl.LOCK_SH) is False:
                shards.append(f"shard {number} by {read_holder(file)}")
            release_lock(file)
        return (
            f"this cache is being written as {holder.removeprefix('one of ')}: {'; '.join(shards)}"
        )
