"""Brings a cache back to a state that can be read and continued, without losing a byte."""

from __future__ import annotations

import hashlib
from pathlib import Path

from nemo_kd.cache.files import Lock, remove_abandoned, write_atomically
from nemo_kd.cache.index import ChunkIndex
from nemo_kd.cache.layout import CacheError, CacheLayout, index_name
from nemo_kd.cache.lines import TornError, lines_of
from nemo_kd.cache.manifest import Manifest
from nemo_kd.cache.scan import scan_chunk
from nemo_kd.cache.storage import LocalStorage


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
    lock = None if dry_run else Lock(layout.lock_path)
    try:
        done = [text for chunk in chunks for text in _repair_chunk(layout, chunk, dry_run)]
        if not dry_run:
            remove_abandoned(layout.folder)
    finally:
        if lock is not None:
            lock.release()
    return done


def _repair_chunk(layout: CacheLayout, chunk: int, dry_run: bool) -> list[str]:
    path, done = layout.chunk_path(chunk), list[str]()
    listing = _listing(layout, chunk)
    summary = listing[1].chunks[listing[2]] if listing is not None else None
    if summary is not None and summary.sha256 == f"sha256:{_sha256(path)}":
        return _make_index(path, is_listed=True, sha256=summary.sha256, dry_run=dry_run)
    end, size = _whole_bytes(path), path.stat().st_size
    if end < size:
        done.append(f"{path}: the last line is torn: {size - end} bytes cut off and kept as {path.name}.torn")
        if not dry_run:
            content = path.read_bytes()
            write_atomically(path.with_name(f"{path.name}.torn"), content[end:])
            write_atomically(path, content[:end])
    if listing is not None:
        manifest_path, manifest, key = listing
        done.append(
            f"{manifest_path}: chunk {chunk} is not what it was when it was written and is no longer listed; "
            "compute_topk_logits with the same keys computes it again"
        )
        if not dry_run:
            del manifest.chunks[key]
            manifest.save(manifest_path)
        return done
    return done + (_make_index(path, is_listed=False, sha256="", dry_run=dry_run) if end else [])


def _make_index(path: Path, is_listed: bool, sha256: str, dry_run: bool) -> list[str]:
    index_path, stat = path.with_name(index_name(path.name)), path.stat()
    index = ChunkIndex.of(index_path.read_bytes()) if index_path.exists() else None
    if index is not None and index.facts.bytes == stat.st_size:
        if is_listed and f"sha256:{index.sha256.hex()}" == sha256:
            return []
        if not is_listed and index.facts.mtime_ns == stat.st_mtime_ns:
            return []
    if not dry_run:
        try:
            index = scan_chunk(LocalStorage(str(path.parent)), path.name, 0 if is_listed else stat.st_mtime_ns)
        except CacheError as error:
            return [f"not repaired: {error}"]
        write_atomically(index_path, index.to_bytes())
    return [f"{path}: index made anew"]


def _whole_bytes(path: Path) -> int:
    """Bytes of the file up to the end of its last whole line."""
    end = 0
    with path.open("rb") as file:
        try:
            for raw in lines_of(path).split(file, str(path)):
                end += len(raw)
        except TornError:
            return end
        except CacheError:
            return path.stat().st_size  # damage in the middle: nothing to cut
    return end


def _listing(layout: CacheLayout, chunk: int) -> tuple[Path, Manifest, str] | None:
    """(path of the manifest that lists the chunk, the manifest, the chunk's key in it)."""
    own = CacheLayout(str(layout.chunk_path(chunk)))
    for manifest_path, key in ((layout.manifest_path, str(chunk)), (own.manifest_path, "0")):
        if manifest_path.exists():
            manifest = Manifest.load(manifest_path)
            if key in manifest.chunks:
                return manifest_path, manifest, key
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
