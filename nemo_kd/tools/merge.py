"""Make one cache of several that were written apart, without touching their rows."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from nemo_kd.cache.index import ChunkSummary, complete_chunk, index_of
from nemo_kd.cache.layout import CacheError, CacheLayout
from nemo_kd.cache.manifest import Manifest
from nemo_kd.cache.writer import IS_WRITTEN
from nemo_kd.files import Lock, atomic_file, explained, open_regular, write_atomically
from nemo_kd.tools.verify import Chunk, chunks_of, verify_chunks

MAY_DIFFER = (
    "dataset.start",
    "dataset.end",
    "n_examples",
    "merged_chunks",
    "teacher.converted_from",
)
"""Beginnings of the fields of manifests that sources may differ in."""


class _Source(NamedTuple):
    """A complete chunk of a source."""

    chunk: Chunk
    manifest: Manifest
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
    found = sorted(
        (chunk for source in sources for chunk in _complete_chunks(source)),
        key=lambda one: one.summary.first_index,
    )
    targets = [layout.chunk_path(number) for number in range(len(found))]
    _check(found, layout.suffix, allow_gaps)
    merged = _merged(found)
    reports = verify_chunks([one.chunk for one in found], num_workers)
    problems = [problem for report in reports for problem in report.problems]
    if problems:
        raise CacheError("\n".join(problems))
    with explained(layout.folder):
        layout.folder.mkdir(parents=True, exist_ok=True)
    with Lock(layout.lock_path, IS_WRITTEN):
        _claim(layout, merged, targets)
        for number, one in enumerate(found):
            _place(one.chunk.path, targets[number])
            index = index_of(one.chunk.path, one.summary)
            write_atomically(layout.index_path(number), index.to_bytes())
            merged.chunks[number] = one.summary
    return merged


def _complete_chunks(source: str) -> list[_Source]:
    chunks, expected = chunks_of(source)
    found = [
        _Source(chunk, chunk.manifest, chunk.summary)
        for chunk in chunks
        if chunk.manifest is not None and chunk.summary is not None
    ]
    if len(found) < expected:
        raise CacheError(
            f"{source}: only {len(found)} of {expected} chunks are complete and have a manifest; "
            "write the others with compute_topk_logits first"
        )
    return found


def _check(found: list[_Source], suffix: str, allow_gaps: bool) -> None:
    """Refuse sources that do not fit together."""
    first = found[0]
    for one in found:
        path = one.chunk.path
        if one.chunk.layout.suffix != suffix:
            raise CacheError(
                f"{path}: ends in another suffix than the target ({suffix}); merging changes no "
                "file, so name the target alike, or bring the source into the other form with "
                "`logit_cache convert`"
            )
        differences = [
            line
            for line in first.manifest.differences(one.manifest)
            if not line.startswith(MAY_DIFFER)
        ]
        if differences:
            raise CacheError(
                f"{first.chunk.path} and {path} were written with other settings:\n  "
                + "\n  ".join(differences)
            )
    for one, following in itertools.pairwise(found):
        last = one.summary.last_index
        start = following.summary.first_index
        paths = f"{one.chunk.path} and {following.chunk.path}"
        if start <= last:
            raise CacheError(
                f"{paths} both hold record {start}; give each record once"
            )
        if start != last + 1 and not allow_gaps:
            raise CacheError(
                f"records {last + 1} to {start - 1} are missing between {paths}; give their cache "
                "too, or --allow-gaps"
            )


def _merged(found: list[_Source]) -> Manifest:
    """Return the manifest of the merged cache."""
    first = found[0].manifest
    records = {
        "start_from_idx": found[0].summary.first_index,
        "end_at_idx": found[-1].summary.last_index,
    }
    origins = list(
        dict.fromkeys(one.manifest.teacher.get("converted_from") for one in found)
    )
    origin = {} if len(origins) == 1 else {"converted_from": origins}
    return replace(
        first,
        teacher=first.teacher | origin,
        dataset=first.dataset | records,
        n_examples_per_chunk=None,
        merged_chunks=len(found),
        chunks={},
    )


def _claim(layout: CacheLayout, merged: Manifest, targets: list[Path]) -> None:
    """Create the target's manifest, or find that of the same merge, which was killed."""
    if not layout.manifest_path.exists() and not layout.existing_chunks():
        merged.save(layout.manifest_path)
        return
    if (
        not layout.manifest_path.exists()
        or Manifest.load(layout.manifest_path).differences(merged)
        or all(map(complete_chunk, targets))
    ):
        raise CacheError(f"{layout.output_path}: exists; give another target")


def _place(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy where file systems do not allow that."""
    target.unlink(missing_ok=True)  # of a merge that was killed
    try:
        # Resolved: a relative link would lead elsewhere from the target's folder.
        os.link(source.resolve(), target)
    except OSError:
        with open_regular(source) as file, atomic_file(target) as copy:
            shutil.copyfileobj(file, copy)
