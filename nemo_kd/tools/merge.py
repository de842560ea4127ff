"""Make one cache of several that were written apart, without touching their rows."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from nemo_kd.cache.index import ChunkSummary
from nemo_kd.cache.layout import SUFFIXES, CacheError, CacheLayout
from nemo_kd.cache.manifest import Manifest
from nemo_kd.cache.parts import IS_WRITTEN
from nemo_kd.cache.scan import complete_chunk, read_index
from nemo_kd.files import (
    Lock,
    explained,
    open_regular,
    remove_abandoned,
    write_atomically,
)
from nemo_kd.tools.salvage import blocks
from nemo_kd.tools.verify import verify_chunks

NO_LINKS = (
    errno.EXDEV,
    errno.EPERM,
    errno.EMLINK,
    errno.ENOTSUP,
    errno.ENOSYS,
    errno.EACCES,
)
"""Errors of file systems that cannot give a file a second name there."""


class SourceChunk(NamedTuple):
    """One chunk of a source; `key` is its number in `manifest`."""

    path: Path
    manifest: Manifest
    key: int
    summary: ChunkSummary


def merge(
    sources: Sequence[str], target: str, allow_gaps: bool = False, num_workers: int = 1
) -> Manifest:
    """Make one template cache of the chunks of all sources, in the order of their records.

    Data files become hard links where possible. Killed and run again, it continues.

    Raises:
        CacheError: a source is incomplete or damaged, sources differ in more than their records,
            records are there twice, or some are missing between the sources.
    """
    layout = CacheLayout(target)
    chunks = sorted(
        (chunk for source in sources for chunk in _chunks_of(source)),
        key=lambda chunk: chunk.summary.first_index,
    )
    if not layout.is_template and len(chunks) > 1:
        raise CacheError(
            f"{target}: has no CHUNK_ID, which several chunks need; for example "
            "merged_CHUNK_ID.jsonl.zst"
        )
    merged = _merged(chunks, layout, allow_gaps)
    tasks = [
        (chunk.path, chunk.manifest, chunk.key, number)
        for number, chunk in enumerate(chunks)
    ]
    problems = [
        problem
        for report in verify_chunks(tasks, num_workers)
        for problem in report.problems
    ]
    if problems:
        raise CacheError("\n".join(problems))
    with explained(layout.folder):
        layout.folder.mkdir(parents=True, exist_ok=True)
    with Lock(layout.lock_path, IS_WRITTEN):
        _claim(layout, merged)
        for number, chunk in enumerate(chunks):
            _place(chunk.path, layout.chunk_path(number))
            index = read_index(chunk.path)
            assert index is not None  # verified above
            index = replace(index, summary=chunk.summary)
            write_atomically(layout.index_path(number), index.to_bytes())
            merged.chunks[number] = chunk.summary
    return merged


def _merged(chunks: list[SourceChunk], layout: CacheLayout, allow_gaps: bool) -> Manifest:
    """Return the manifest of the merged cache."""
    first = chunks[0].manifest
    suffix = _suffix(layout.output_path)
    for chunk in chunks:
        if _suffix(chunk.path.name) != suffix:
            raise CacheError(
                f"{chunk.path}: ends in {_suffix(chunk.path.name)}, the target in {suffix}; "
                "merging changes no file, so name the target alike, or bring the source into the "
                "other form with `logit_cache convert`"
            )
    for chunk, following in itertools.pairwise(chunks):
        last = chunk.summary.last_index
        start = following.summary.first_index
        if start <= last:
            raise CacheError(
                f"{chunk.path} and {following.path} both hold record {start}; give each record once"
            )
        if start != last + 1 and not allow_gaps:
            raise CacheError(
                f"records {last + 1} to {start - 1} are missing between {chunk.path} and "
                f"{following.path}; give their cache too, or --allow-gaps"
            )
        differences = [
            line
            for line in first.differences(following.manifest)
            if not line.startswith(
                (
                    "dataset.start",
                    "dataset.end",
                    "n_examples",
                    "merged_chunks",
                    "teacher.converted_from",
                )
            )
        ]
        if differences:
            raise CacheError(
                f"{chunks[0].path} and {following.path} were written with other settings:\n  "
                + "\n  ".join(differences)
            )
    dataset = first.dataset | {
        "start_from_idx": chunks[0].summary.first_index,
        "end_at_idx": chunks[-1].summary.last_index,
    }
    origins = list(
        dict.fromkeys(chunk.manifest.teacher.get("converted_from") for chunk in chunks)
    )
    teacher = (
        first.teacher
        if len(origins) == 1
        else first.teacher | {"converted_from": origins}
    )
    return replace(
        first,
        teacher=teacher,
        dataset=dataset,
        n_examples_per_chunk=None,
        merged_chunks=len(chunks),
        chunks={},
    )


def _claim(layout: CacheLayout, merged: Manifest) -> None:
    """Create the target's manifest, unless something else is there."""
    there = Manifest.load(layout.manifest_path) if layout.manifest_path.exists() else None
    is_unfinished = there is not None and not there.differences(merged)
    numbers = range(merged.num_chunks)
    if is_unfinished and all(
        complete_chunk(layout.chunk_path(number)) for number in numbers
    ):
        is_unfinished = False
    if not is_unfinished and (there is not None or layout.existing_chunks()):
        raise CacheError(f"{layout.output_path}: exists; give another target")
    remove_abandoned(layout.folder)
    if there is None:
        merged.save(layout.manifest_path)


def _suffix(name: str) -> str:
    return next(
        (suffix for suffix in SUFFIXES if name.endswith(suffix)), "no suffix of a cache"
    )


def _chunks_of(source: str) -> list[SourceChunk]:
    layout = CacheLayout(source)
    shared = (
        Manifest.load(layout.manifest_path) if layout.manifest_path.exists() else None
    )
    numbers = range(shared.num_chunks) if shared is not None else layout.existing_chunks()
    chunks = []
    for number in numbers:
        path = layout.chunk_path(number)
        own = CacheLayout(str(path)).manifest_path
        manifest = shared
        if manifest is None and own.exists():
            manifest = Manifest.load(own)
        key = number if shared is not None else 0
        summary = (
            manifest.summary_of(key, read_index(path)) if manifest is not None else None
        )
        if manifest is None or summary is None or not path.exists():
            raise CacheError(
                f"{path}: the chunk is not complete or has no manifest; write it with "
                "compute_topk_logits first"
            )
        chunks.append(SourceChunk(path, manifest, key, summary))
    if not chunks:
        raise CacheError(f"{source}: there is no such cache")
    return chunks


def _place(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy where file systems do not allow that."""
    open_regular(source).close()  # a pipe or device could be linked too
    with explained(target):
        target.unlink(missing_ok=True)  # of a merge that was killed
        try:
            # Resolved: a relative link would lead elsewhere from the target's folder.
            os.link(source.resolve(), target)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            write_atomically(target, blocks(source))
