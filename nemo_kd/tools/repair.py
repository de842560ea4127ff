"""Brings a cache back to a state that can be read and continued, without losing a byte."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from nemo_kd.cache.index import ChunkIndex
from nemo_kd.cache.journal import journal_path
from nemo_kd.cache.layout import CacheError, CacheLayout, index_name
from nemo_kd.cache.lines import TornError
from nemo_kd.cache.manifest import Manifest
from nemo_kd.cache.parts import IS_WRITTEN
from nemo_kd.cache.record import is_json
from nemo_kd.cache.scan import scan_chunk
from nemo_kd.cache.storage import LocalStorage
from nemo_kd.files import Lock, abandoned, read_file, remove, write_atomically
from nemo_kd.tools.salvage import blocks, stretches


def repair(path: str, dry_run: bool = False) -> list[str]:
    """Cuts torn last lines, makes missing or stale indexes, removes what dead processes left; says what was done.

    What is cut off is kept beside the file, as `<name>.torn`. A chunk whose bytes are not those that the manifest lists is
    no longer listed, so that compute_topk_logits computes it again. Damage in the middle of a file is not touched.

    Raises:
        CacheError: another process writes the cache, or there is none.
    """
    layout = CacheLayout(path)
    chunks = layout.existing_chunks()
    if not chunks:
        raise CacheError(f"{path}: there is no such file, and no chunk of such a template")
    layouts = [layout, *(CacheLayout(str(layout.chunk_path(chunk))) for chunk in chunks)]
    with contextlib.ExitStack() as stack:
        for lock_path in sorted(
            {one.lock_path for one in layouts if one is layout or one.manifest_path.exists()}
        ):
            if not dry_run:
                stack.callback(Lock(lock_path, IS_WRITTEN).release)
        for one in layouts:
            # A chunk that is taken off the list must not be listed by the journal still.
            if (
                not dry_run
                and journal_path(one.manifest_path).exists()
                and one.manifest_path.exists()
            ):
                Manifest.load(one.manifest_path).save(one.manifest_path)
        done = [text for chunk in chunks for text in _repair_chunk(layout, chunk, dry_run)]
        for folder in [layout.folder, *sorted(layout.folder.glob(".*.segments"))]:
            for left in abandoned(folder):
                done.append(f"{left}: removed, a dead process left it")
                if not dry_run:
                    remove(left)
    return done


class _Whole(NamedTuple):
    """What is whole of a file: its bytes before `end`, with `addition` behind them."""

    end: int
    addition: bytes = b""


def _repair_chunk(layout: CacheLayout, chunk: int, dry_run: bool) -> list[str]:
    path, done = layout.chunk_path(chunk), list[str]()
    listing = _listing(layout, chunk)
    summary = listing[1].chunks[listing[2]] if listing is not None else None
    size = path.stat().st_size
    # What the manifest lists is whole, also where something was appended to it.
    if (
        summary is not None
        and size >= summary.bytes
        and _sha256(path, _Whole(summary.bytes)) == summary.sha256
    ):
        whole = _Whole(summary.bytes)
    else:
        whole = _whole(path)
    if whole.addition:
        done.append(f"{path}: the last line had no line break, but is whole; the break was added")
    elif whole.end < size:
        torn = _unused(path)
        done.append(
            f"{path}: the last line is torn: {size - whole.end} bytes cut off and kept as {torn.name}"
        )
        if not dry_run:
            write_atomically(torn, blocks(path, whole.end))
    sha256 = _sha256(path, whole)
    if whole != _Whole(size) and not dry_run:
        write_atomically(path, _content(path, whole))
    if listing is None or (summary is not None and summary.sha256 == sha256):
        length = whole.end + len(whole.addition)
        return done + (
            _make_index(path, length, sha256, listing is not None, dry_run) if length else []
        )
    manifest_path, manifest, key = listing
    done.append(
        f"{manifest_path}: chunk {chunk} is not what it was when it was written and is no longer listed; "
        "compute_topk_logits with the same keys computes it again"
    )
    if not dry_run:
        del manifest.chunks[key]
        manifest.save(manifest_path)
    return done


def _make_index(path: Path, size: int, sha256: str, is_listed: bool, dry_run: bool) -> list[str]:
    """Makes the index of a chunk anew unless it is that of its `size` bytes."""
    index_path, mtime_ns = path.with_name(index_name(path.name)), path.stat().st_mtime_ns
    index = ChunkIndex.of(read_file(index_path)) if index_path.exists() else None
    is_current = (
        index is not None and index.facts.bytes == size and f"sha256:{index.sha256.hex()}" == sha256
    )
    if is_current and index is not None and (is_listed or index.facts.mtime_ns == mtime_ns):
        return []
    if not dry_run:
        try:
            index = scan_chunk(
                LocalStorage(str(path.parent)), path.name, 0 if is_listed else mtime_ns
            )
        except CacheError as error:
            return [f"not repaired: {error}"]
        write_atomically(index_path, index.to_bytes())
    return [f"{path}: index made anew"]


def _whole(path: Path) -> _Whole:
    """What a file holds up to the end of its last whole line, unless something is damaged in front of it."""
    (last,) = deque(stretches(path), maxlen=1) or [None]
    if last is None or not isinstance(last.error, TornError):
        return _Whole(path.stat().st_size)
    if path.suffix != ".zst" and is_json(
        b"".join(blocks(path, last.start))
    ):  # a line that is cut off never is
        return _Whole(last.end, b"\n")
    return _Whole(last.start)


def _content(path: Path, whole: _Whole) -> Iterable[bytes]:
    return itertools.chain(blocks(path, 0, whole.end), [whole.addition])


def _sha256(path: Path, whole: _Whole) -> str:
    digest = hashlib.sha256()
    for block in _content(path, whole):
        digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def _unused(path: Path) -> Path:
    """`<name>.torn`, or with a number behind it: what was cut off before stays."""
    names = itertools.chain(
        [f"{path.name}.torn"], (f"{path.name}.torn.{number}" for number in itertools.count(1))
    )
    return next(torn for torn in map(path.with_name, names) if not torn.exists())


def _listing(layout: CacheLayout, chunk: int) -> tuple[Path, Manifest, str] | None:
    """(path of the manifest that lists the chunk, the manifest, the chunk's key in it)."""
    own = CacheLayout(str(layout.chunk_path(chunk)))
    for manifest_path, key in ((layout.manifest_path, str(chunk)), (own.manifest_path, "0")):
        if manifest_path.exists():
            manifest = Manifest.load(manifest_path)
            if key in manifest.chunks:
                return manifest_path, manifest, key
    return None
