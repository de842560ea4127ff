"""Bring a cache back to a state that can be read and continued, without losing a byte."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from nemo_kd.cache.index import ChunkIndex
from nemo_kd.cache.layout import CacheError, CacheLayout, index_name
from nemo_kd.cache.lines import TornError
from nemo_kd.cache.manifest import Manifest
from nemo_kd.cache.parts import IS_WRITTEN
from nemo_kd.cache.record import is_json
from nemo_kd.cache.scan import read_index, scan_chunk
from nemo_kd.cache.storage import LocalStorage
from nemo_kd.cache.writer import upgrade
from nemo_kd.files import Lock, abandoned, remove, write_atomically
from nemo_kd.tools.salvage import blocks, stretches

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
    chunks = layout.existing_chunks()
    if not chunks:
        raise CacheError(
            f"{path}: there is no such file, and no chunk of such a template"
        )
    if not layout.manifest_path.exists():
        for template, number in layout.templates():
            if template.manifest_path.exists():
                layout = template
                chunks = [number]
                break
    layouts = [layout, *(CacheLayout(str(layout.chunk_path(chunk))) for chunk in chunks)]
    with contextlib.ExitStack() as stack:
        for lock_path in sorted(
            {
                one.lock_path
                for one in layouts
                if one is layout or one.manifest_path.exists()
            }
        ):
            if not dry_run:
                stack.callback(Lock(lock_path, IS_WRITTEN).release)
        for one in layouts:
            if not dry_run and one.manifest_path.exists():
                upgrade(one, Manifest.load(one.manifest_path))
        done = [
            text for chunk in chunks for text in _repair_chunk(layout, chunk, dry_run)
        ]
        for folder in [layout.folder, *sorted(layout.folder.glob(".*.segments"))]:
            for left in abandoned(folder):
                done.append(f"{left}: removed, a dead process left it")
                if not dry_run:
                    remove(left)
    return done


class _Whole(NamedTuple):
    """Whole part of a file: its bytes before `end`, then `addition`."""

    end: int
    addition: bytes = b""


def _repair_chunk(layout: CacheLayout, chunk: int, dry_run: bool) -> list[str]:
    path = layout.chunk_path(chunk)
    manifest, key = _manifest_of(layout, chunk)
    index = read_index(path)
    summary = manifest.summary_of(key, index) if manifest is not None else None
    size = path.stat().st_size
    done = []
    # A complete chunk is whole, also where something was appended to it.
    whole = _Whole(summary.bytes) if summary is not None else None
    if (
        summary is None
        or whole is None
        or size < whole.end
        or _sha256(path, whole) != summary.sha256
    ):
        whole = _whole(path)
    if whole.addition:
        done.append(
            f"{path}: the last line had no line break, but is whole; the break was added"
        )
    elif whole.end < size:
        torn = _unused(path)
        done.append(
            f"{path}: the last line is torn: {size - whole.end} bytes cut off and kept as "
            f"{torn.name}"
        )
        if not dry_run:
            write_atomically(torn, blocks(path, whole.end))
    sha256 = _sha256(path, whole)
    if whole != _Whole(size) and not dry_run:
        write_atomically(path, _content(path, whole))
    if summary is not None and summary.sha256 == sha256:
        return done
    if summary is not None:
        done.append(
            f"{path}: is not what it was when it was written, so its index was deleted; "
            f"{COMPUTED_AGAIN}"
        )
        if not dry_run:
            layout.index_path(chunk).unlink(missing_ok=True)
    elif whole.end + len(whole.addition):
        done += _make_index(path, manifest, key, index, sha256, dry_run)
    return done


def _make_index(
    path: Path,
    manifest: Manifest | None,
    key: int,
    index: ChunkIndex | None,
    sha256: str,
    dry_run: bool,
) -> list[str]:
    """Make the index of a file without a manifest, or of a chunk with all records of its range."""
    mtime_ns = path.stat().st_mtime_ns if manifest is None else None
    if (
        manifest is None
        and index is not None
        and index.checksum == sha256
        and (index.summary is not None or index.facts.mtime_ns == mtime_ns)
    ):
        return []
    try:
        index = scan_chunk(LocalStorage(str(path.parent)), path.name, mtime_ns)
    except CacheError as error:
        return [f"not repaired: {error}"]
    if manifest is not None:
        first, last = manifest.records_of(key)
        found = index.summary
        assert found is not None
        is_complete = (
            manifest.merged_chunks is None
            and (found.first_index, found.last_index) == (first, last)
            and found.examples == last - first + 1
        )
        if not is_complete:
            return [
                f"{path}: not all records are there, so it gets no index; {COMPUTED_AGAIN}"
            ]
    if not dry_run:
        write_atomically(path.with_name(index_name(path.name)), index.to_bytes())
    return [f"{path}: index made again"]


def _whole(path: Path) -> _Whole:
    """Return the whole part of a file: up to its last whole line, or all if a line is damaged."""
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
    """Return the first free name of `<name>.torn`, `<name>.torn.1` and so on."""
    names = itertools.chain(
        [f"{path.name}.torn"],
        (f"{path.name}.torn.{number}" for number in itertools.count(1)),
    )
    return next(torn for torn in map(path.with_name, names) if not torn.exists())


def _manifest_of(layout: CacheLayout, chunk: int) -> tuple[Manifest | None, int]:
    """Return the manifest that a chunk belongs to, and its number there."""
    own = CacheLayout(str(layout.chunk_path(chunk))).manifest_path
    for manifest_path, key in ((layout.manifest_path, chunk), (own, 0)):
        if manifest_path.exists():
            return Manifest.load(manifest_path), key
    return None, 0
