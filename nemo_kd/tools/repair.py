"""Bring a cache back to a state that can be read and continued, without losing a byte."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from nemo_kd.cache.index import describes, read_index, scan_chunk
from nemo_kd.cache.layout import (
    CacheError,
    CacheLayout,
    LocalStorage,
    TornError,
    index_name,
    lines_of,
)
from nemo_kd.cache.record import is_json
from nemo_kd.cache.writer import IS_WRITTEN, upgrade
from nemo_kd.files import (
    Lock,
    abandoned,
    open_regular,
    read_file,
    remove,
    sync,
    write_atomically,
)
from nemo_kd.tools.verify import Chunk, chunks_of

ZST_MAGIC = b"\x28\xb5\x2f\xfd"
"""Begins every zstd frame."""
COMPUTED_AGAIN = "compute_topk_logits with the same keys computes it again"


def repair(path: str, dry_run: bool = False) -> list[str]:
    """Cut torn last lines, make or delete indexes, and remove what dead processes left; return what
    was done.

    What is cut off is kept beside the file, as `<name>.torn`. A chunk whose bytes are not those of
    its index loses the index, so that compute_topk_logits computes it again. Damage in the middle
    of a file is not touched.

    Raises:
        CacheError: another process writes the cache, or there is none.
    """
    layout = CacheLayout(path)
    done = []
    with contextlib.nullcontext() if dry_run else Lock(layout.lock_path, IS_WRITTEN):
        for chunk in chunks_of(path)[0]:
            if chunk.manifest is not None and not dry_run:
                upgrade(chunk.layout, chunk.manifest)
            done += _repair_end(chunk, dry_run) + _repair_index(chunk, dry_run)
        for folder in [layout.folder, *sorted(layout.folder.glob(".*.segments"))]:
            for left in abandoned(folder):
                done.append(f"{left}: removed, a dead process left it")
                if not dry_run:
                    remove(left)
    return done


def _repair_end(chunk: Chunk, dry_run: bool) -> list[str]:
    """Complete or cut the last line if the file ends inside it."""
    path = chunk.path
    summary = chunk.summary
    if summary is not None and path.stat().st_size > summary.bytes:
        return _cut(path, summary.bytes, dry_run)
    end = 0
    try:
        with open_regular(path) as file:
            for raw in lines_of(path).split(file, str(path)):
                end += len(raw)
        return []
    except TornError:
        tail = read_file(path, end)
    except CacheError:  # damage in the middle
        return []
    if tail.find(ZST_MAGIC, 1) >= 0:  # also that: a frame whose damage hides its end
        return []
    if path.suffix != ".zst" and is_json(tail):  # a line that is cut off never is
        if not dry_run:
            with path.open("ab") as file:
                file.write(b"\n")
        return [
            f"{path}: the last line had no line break, but is whole; the break was added"
        ]
    return _cut(path, end, dry_run)


def _cut(path: Path, end: int, dry_run: bool) -> list[str]:
    """Move what stands behind the byte `end` to `<name>.torn`."""
    tail = read_file(path, end)
    torn = path.with_name(f"{path.name}.torn")
    if not dry_run:
        with torn.open("ab") as file:
            file.write(tail)
        sync(torn)
        os.truncate(path, end)
        sync(path)
    return [
        f"{path}: the last line is torn: {len(tail)} bytes cut off and kept as {torn.name}"
    ]


def _repair_index(chunk: Chunk, dry_run: bool) -> list[str]:
    """Delete the index of a chunk that has changed since; make the one of a file without a
    manifest, or of a chunk with all records of its range.
    """
    path = chunk.path
    manifest = chunk.manifest
    index_path = path.with_name(index_name(path.name))
    index = read_index(path)
    summary = chunk.summary
    if summary is not None:
        if _sha256(path) == summary.sha256:
            return []
        if not dry_run:
            index_path.unlink(missing_ok=True)
        return [
            f"{path}: is not what it was when it was written, so its index was deleted; "
            f"{COMPUTED_AGAIN}"
        ]
    size = path.stat().st_size
    mtime_ns = path.stat().st_mtime_ns if manifest is None else None
    if not size or (
        mtime_ns and index is not None and describes(index, size, mtime_ns)
    ):
        return []
    try:
        index = scan_chunk(LocalStorage(str(path.parent)), path.name, mtime_ns)
    except CacheError as error:
        return [f"not repaired: {error}"]
    if manifest is not None:
        found = index.summary
        assert found is not None
        first, last = manifest.records_of(chunk.number)
        covered = (found.first_index, found.last_index, found.examples)
        if manifest.merged_chunks or covered != (first, last, last - first + 1):
            return [
                f"{path}: not all records are there, so it gets no index; {COMPUTED_AGAIN}"
            ]
    if not dry_run:
        write_atomically(index_path, index.to_bytes())
    return [f"{path}: index made again"]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return f"sha256:{digest.hexdigest()}"
