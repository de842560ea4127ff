"""Decide who may write a cache: one job alone, or n jobs at once, one for each of its n parts.

A job that writes holds the cache's lock, exclusively when alone and shared as a part, and its
part's own lock too.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TextIO

from nemo_kd.cache.layout import CacheError, CacheLayout
from nemo_kd.files import (
    Lock,
    open_lock_file,
    read_holder,
    release_lock,
    try_lock,
    write_holder,
)

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
