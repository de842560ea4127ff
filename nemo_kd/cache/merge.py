"""Makes one cache of several that were written apart, without touching their rows."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from nemo_kd.cache.files import Lock, explained, write_atomically
from nemo_kd.cache.layout import CacheError, CacheLayout, index_name
from nemo_kd.cache.manifest import ChunkSummary, Manifest
from nemo_kd.cache.verify import verify_chunk

Part = tuple[Path, Manifest, ChunkSummary]


def merge(sources: Sequence[str], target: str, allow_gaps: bool = False) -> Manifest:
    """One template cache of the chunks of all sources, in the order of their records; files are hard links where possible.

    Raises:
        CacheError: a source is incomplete or damaged, sources differ in more than their records, records are there twice,
            or some are missing between the sources.
    """
    layout = CacheLayout(target)
    if not layout.is_template and sum(len(_parts(source)) for source in sources) > 1:
        raise CacheError(f"{target}: has no CHUNK_ID, which several chunks need; for example merged_CHUNK_ID.jsonl.zst")
    if layout.existing_chunks() or layout.manifest_path.exists():
        raise CacheError(f"{target}: exists; give another target")
    parts = sorted((part for source in sources for part in _parts(source)), key=lambda part: part[2].first_index)
    first = parts[0][1]
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
            if not line.startswith(("dataset.start", "dataset.end", "n_examples"))
        ]
        if differences:
            raise CacheError(
                f"{parts[0][0]} and {next_path} were written with other settings:\n  " + "\n  ".join(differences)
            )
    with explained(layout.folder):
        layout.folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(layout.lock_path)
    try:
        chunks = {}
        for number, (path, manifest, summary) in enumerate(tqdm(parts, unit=" chunks", desc="merging")):
            problems = verify_chunk(path, manifest, summary).problems
            if problems:
                raise CacheError("\n".join(problems))
            _place(path, layout.chunk_path(number))
            index = path.with_name(index_name(path.name)).read_bytes()
            write_atomically(layout.chunk_path(number).with_name(index_name(layout.chunk_name(number))), index)
            chunks[str(number)] = summary
        dataset = first.dataset | {"start_from_idx": parts[0][2].first_index, "end_at_idx": parts[-1][2].last_index}
        merged = replace(first, dataset=dataset, n_examples_per_chunk=None, merged_chunks=len(parts), chunks=chunks)
        merged.save(layout.manifest_path)
    finally:
        lock.release()
    return merged


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
    with explained(target):
        try:
            os.link(source, target)
        except OSError:  # another file system
            temporary = target.with_name(f".{target.name}.copy.tmp")
            shutil.copyfile(source, temporary)
            os.replace(temporary, target)
