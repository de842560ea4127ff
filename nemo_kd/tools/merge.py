"""Makes one cache of several that were written apart, without touching their rows."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nemo_kd.cache.layout import SUFFIXES, CacheError, CacheLayout, index_name
from nemo_kd.cache.manifest import ChunkSummary, Manifest
from nemo_kd.cache.parts import IS_WRITTEN
from nemo_kd.files import Lock, explained, open_regular, remove_abandoned, write_atomically
from nemo_kd.tools.salvage import blocks
from nemo_kd.tools.verify import verify_chunks

NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS, errno.EACCES)
"""What file systems answer that cannot give a file a second name there."""

Part = tuple[Path, Manifest, ChunkSummary]


def merge(
    sources: Sequence[str], target: str, allow_gaps: bool = False, num_workers: int = 1
) -> Manifest:
    """One template cache of the chunks of all sources, in the order of their records; files are hard links where possible.

    Killed and run again, it continues: until all chunks are there, the manifest lists none.

    Raises:
        CacheError: a source is incomplete or damaged, sources differ in more than their records, records are there twice,
            or some are missing between the sources.
    """
    layout = CacheLayout(target)
    parts = sorted(
        (part for source in sources for part in _parts(source)),
        key=lambda part: part[2].first_index,
    )
    if not layout.is_template and len(parts) > 1:
        raise CacheError(
            f"{target}: has no CHUNK_ID, which several chunks need; for example merged_CHUNK_ID.jsonl.zst"
        )
    merged = _merged(parts, layout, allow_gaps)
    tasks = [
        (path, manifest, summary, number) for number, (path, manifest, summary) in enumerate(parts)
    ]
    problems = [
        problem for report in verify_chunks(tasks, num_workers) for problem in report.problems
    ]
    if problems:
        raise CacheError("\n".join(problems))
    with explained(layout.folder):
        layout.folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(layout.lock_path, IS_WRITTEN)
    try:
        _claim(layout, merged)
        for number, (path, _, summary) in enumerate(parts):
            _place(path, layout.chunk_path(number))
            _place(
                path.with_name(index_name(path.name)),
                layout.folder / index_name(layout.chunk_name(number)),
            )
            merged.chunks[str(number)] = summary
        merged.save(layout.manifest_path)
    finally:
        lock.release()
    return merged


def _merged(parts: list[Part], layout: CacheLayout, allow_gaps: bool) -> Manifest:
    """The manifest of the merged cache, which lists no chunk yet."""
    first = parts[0][1]
    for path, _, _ in parts:
        if _suffix(path.name) != _suffix(layout.output_path):
            raise CacheError(
                f"{path}: ends in {_suffix(path.name)}, the target in {_suffix(layout.output_path)}; merging changes no file, so name "
                "the target alike, or bring the source into the other form with `logit_cache convert`"
            )
    for (path, _, summary), (next_path, manifest, next_summary) in itertools.pairwise(parts):
        if next_summary.first_index <= summary.last_index:
            raise CacheError(
                f"{path} and {next_path} both hold record {next_summary.first_index}; give each record once"
            )
        if next_summary.first_index != summary.last_index + 1 and not allow_gaps:
            raise CacheError(
                f"records {summary.last_index + 1} to {next_summary.first_index - 1} are missing between {path} and {next_path}; "
                "give their cache too, or --allow-gaps"
            )
        differences = [
            line
            for line in first.differences(manifest)
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
                f"{parts[0][0]} and {next_path} were written with other settings:\n  "
                + "\n  ".join(differences)
            )
    dataset = first.dataset | {
        "start_from_idx": parts[0][2].first_index,
        "end_at_idx": parts[-1][2].last_index,
    }
    origins = list(
        dict.fromkeys(manifest.teacher.get("converted_from") for _, manifest, _ in parts)
    )
    teacher = first.teacher if len(origins) == 1 else first.teacher | {"converted_from": origins}
    return replace(
        first,
        teacher=teacher,
        dataset=dataset,
        n_examples_per_chunk=None,
        merged_chunks=len(parts),
        chunks={},
    )


def _claim(layout: CacheLayout, merged: Manifest) -> None:
    """Makes the target's manifest, unless something else is there."""
    there = Manifest.load(layout.manifest_path) if layout.manifest_path.exists() else None
    is_unfinished = there is not None and not there.chunks and not there.differences(merged)
    if not is_unfinished and (there is not None or layout.existing_chunks()):
        raise CacheError(f"{layout.output_path}: exists; give another target")
    remove_abandoned(layout.folder)
    merged.save(layout.manifest_path)


def _suffix(name: str) -> str:
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "no suffix of a cache")


def _parts(source: str) -> list[Part]:
    layout = CacheLayout(source)
    parts: list[Part] = []
    shared = Manifest.load(layout.manifest_path) if layout.manifest_path.exists() else None
    numbers = range(shared.num_chunks) if shared is not None else layout.existing_chunks()
    for number in numbers:
        path, manifest, key = layout.chunk_path(number), shared, str(number)
        own = CacheLayout(str(path)).manifest_path
        if manifest is None and own.exists():
            manifest, key = Manifest.load(own), "0"
        if manifest is None or key not in manifest.chunks or not path.exists():
            raise CacheError(
                f"{path}: the chunk is not complete or has no manifest; write it with compute_topk_logits first"
            )
        parts.append((path, manifest, manifest.chunks[key]))
    if not parts:
        raise CacheError(f"{source}: there is no such cache")
    return parts


def _place(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`, or a copy where file systems do not allow that."""
    open_regular(source).close()  # a pipe or device could be linked too
    with explained(target):
        target.unlink(missing_ok=True)  # of a merge that was killed
        try:
            os.link(
                source.resolve(), target
            )  # a relative link would lead elsewhere from the target's folder
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            write_atomically(target, blocks(source))
