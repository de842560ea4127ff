"""Check every byte of a cache, and its numbers against index and manifest."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nemo_kd.batch import CachedExample
from nemo_kd.cache.index import ChunkBuilder, ChunkIndex, ChunkSummary
from nemo_kd.cache.layout import CacheError, CacheLayout, index_name
from nemo_kd.cache.lines import TornError, lines_of
from nemo_kd.cache.manifest import Manifest
from nemo_kd.cache.record import check_vocabulary, decode, trimmed
from nemo_kd.cache.scan import read_index
from nemo_kd.config.errors import UserInputError
from nemo_kd.files import FileError
from nemo_kd.tools.salvage import file_sha256, stretches

MOST_PROBLEMS_OF_A_CHUNK = 20
MOST_MISSING_CHUNKS = 1000
MASS_TOLERANCE = 0.1
"""Error of kept probabilities + tail = 1. NeMo-Aligner rounds to bf16."""
KEPT_MASS_TOLERANCE = 0.02
"""Error of a chunk's mean kept mass: the packed codec rounds tails, the summary has the mass
before.
"""
COUNTS = ("examples", "tokens", "loss_tokens", "kept_tokens", "label_in_topk")
AGAIN = "restore the file, or delete it and run compute_topk_logits again"
WITHOUT_INDEX = 1 << 62
"""Stands, with the line's number added, for the index of a line that has none."""

Task = tuple[Path, Manifest | None, int, int]
"""The arguments of `verify_chunk`."""


@dataclass
class ChunkReport:
    """What one chunk, or a manifest, holds; `problems` are sentences that begin with file:line.

    Attributes:
        chunk: its number; -1 for a manifest.
        found: counts of the lines that could be read; first and last index are -1 where the lines
            have none.
    """

    path: Path
    chunk: int = -1
    bytes: int = 0
    found: ChunkSummary = field(default_factory=lambda: ChunkSummary(-1, -1))
    problems: list[str] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        return {name: getattr(self.found, name) for name in COUNTS}

    def problem(self, text: str) -> None:
        """Add a problem; after the first MOST_PROBLEMS_OF_A_CHUNK, one note that there are more."""
        if len(self.problems) < MOST_PROBLEMS_OF_A_CHUNK:
            self.problems.append(text)
        elif len(self.problems) == MOST_PROBLEMS_OF_A_CHUNK:
            self.problems.append(f"{self.path}: and more problems")


def verify(path: str, num_workers: int = 1) -> list[ChunkReport]:
    """Read all chunks of a file or template; every problem is in the reports. Shows a progress bar.

    Returns:
        A report of every manifest that has problems, then of every chunk in their order.

    Raises:
        CacheError: there is nothing to verify, or a process was ended from outside.
    """
    layout = CacheLayout(path)
    chunks = layout.existing_chunks()
    if not chunks and not layout.manifest_path.exists():
        raise CacheError(
            f"{path}: there is no such file, and no chunk of such a template"
        )
    of_manifests = [ChunkReport(layout.manifest_path)]
    shared = _load_manifest(of_manifests[0])
    has_shared = os.path.lexists(layout.manifest_path)
    tasks: list[Task] = []
    for chunk in chunks:
        chunk_path = layout.chunk_path(chunk)
        manifest = shared
        if not has_shared:  # every chunk may have its own
            of_manifests.append(ChunkReport(CacheLayout(str(chunk_path)).manifest_path))
            manifest = _load_manifest(of_manifests[-1])
        tasks.append((chunk_path, manifest, chunk if has_shared else 0, chunk))
    reports = verify_chunks(tasks, num_workers)
    expected = shared.num_chunks if shared is not None else max(chunks, default=-1) + 1
    present = set(chunks)
    absent = (chunk for chunk in range(expected) if chunk not in present)
    for chunk in itertools.islice(absent, MOST_MISSING_CHUNKS):
        missing = ChunkReport(layout.chunk_path(chunk), chunk)
        missing.problem(
            f"{missing.path}: the chunk is missing; run compute_topk_logits again"
        )
        reports.append(missing)
    if expected - len(present) > MOST_MISSING_CHUNKS:
        reports[-1].problem(
            f"{path}: {len(present)} chunks are there, {expected} expected; not all missing ones "
            "are listed"
        )
    reports.sort(key=lambda report: report.chunk)
    _check_order(reports)
    return [report for report in of_manifests if report.problems] + reports


def verify_chunks(tasks: Sequence[Task], num_workers: int) -> list[ChunkReport]:
    """Run `verify_chunk` with each of the tasks as its arguments; the reports come in the order of
    the chunks.

    Raises:
        CacheError: a process was ended from outside.
    """
    reports = []
    total = sum(path.stat().st_size for path, _, _, _ in tasks)
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="verifying") as progress,
        ProcessPoolExecutor(max_workers=max(1, min(num_workers, len(tasks)))) as pool,
    ):
        try:
            jobs = [
                pool.submit(verify_chunk, path, _of_chunk(manifest, key), key, chunk)
                for path, manifest, key, chunk in tasks
            ]
            for job in as_completed(jobs):
                reports.append(job.result())
                progress.update(reports[-1].bytes)
        except BrokenProcessPool as error:
            raise CacheError(
                "a verifying process was ended from outside, which is what a machine out of "
                "memory does; take fewer --num-workers"
            ) from error
    return sorted(reports, key=lambda report: report.chunk)


def verify_chunk(
    path: Path, manifest: Manifest | None, key: int = 0, chunk: int = 0
) -> ChunkReport:
    """Read one chunk whole; a damaged line does not hide those behind it.

    Args:
        key: number of the chunk in its manifest.
        chunk: number of the chunk in the path that is verified.
    """
    report = ChunkReport(path, chunk, path.stat().st_size)
    try:
        _check_bytes(report, manifest, key)
    except FileError as error:
        # The chunk or its index is a pipe, folder or device, or cannot be read.
        report.problem(str(error))
    return report


def _of_chunk(manifest: Manifest | None, key: int) -> Manifest | None:
    """Return the manifest with one chunk only, since each task is sent to a process."""
    if manifest is None:
        return None
    alone = copy.copy(manifest)
    alone.chunks = {key: manifest.chunks[key]} if key in manifest.chunks else {}
    return alone


def _check_bytes(report: ChunkReport, manifest: Manifest | None, key: int) -> None:
    path = report.path
    builder = ChunkBuilder(report.found)
    index_path = path.with_name(index_name(path.name))
    index = read_index(path)
    fits = index is not None and index.facts.bytes == report.bytes
    if index is not None and not fits:
        report.problem(
            f"{index_path}: made for {index.facts.bytes} bytes, but {path.name} has "
            f"{report.bytes}; `logit_cache repair`"
        )
    lines = lines_of(path)
    for line in stretches(
        path, index.starts[:-1].tolist() if index is not None and fits else ()
    ):
        where = f"{path}:{line.number}"
        if line.error is not None:
            report.problem(str(line.error))
            if not isinstance(line.error, TornError) or line.end < report.bytes:
                report.problem(f"{where}: bytes {line.start} to {line.end - 1} are lost")
            continue
        try:
            row = decode(
                lines.read(line.raw, where), where, index=WITHOUT_INDEX + line.number
            )
        except CacheError as error:
            report.problem(str(error))
            continue
        builder.add(trimmed(row), len(line.raw))
        _check_row(row, where, manifest, report)
    digest = file_sha256(path)
    found = builder.index(digest)
    if manifest is not None:
        _check_summary(report, manifest, key, index)
    if report.problems or (manifest is None and index is None):
        return
    if index is None:
        report.problem(
            f"{index_path}: there is no usable index; `logit_cache repair` makes one"
        )
    elif not found.has_places_of(index):
        report.problem(
            f"{index_path}: the index does not describe {path.name}; delete it: `logit_cache "
            "repair` makes it again"
        )


def _load_manifest(report: ChunkReport) -> Manifest | None:
    """Return the manifest at the report's path, if there is a usable one."""
    if not os.path.lexists(report.path):
        return None
    try:
        return Manifest.load(report.path)
    except UserInputError as error:  # it is damaged, or not a file
        report.problem(str(error))
        return None


def _check_row(
    row: CachedExample, where: str, manifest: Manifest | None, report: ChunkReport
) -> None:
    example = row.example
    teacher = row.teacher
    found = report.found
    if example.index < WITHOUT_INDEX:
        if example.index <= found.last_index:
            report.problem(
                f"{where}: example {example.index} stands behind example {found.last_index}; the "
                "lines are out of order"
            )
        if found.first_index < 0:
            found.first_index = example.index
        found.last_index = max(found.last_index, example.index)
    # Decoding has made sure that ids are distinct and masses between 0 and 1.
    ids_PK = teacher.topk_token_ids_PK
    used_PK = ids_PK >= 0
    log_p_PK = teacher.topk_logits_PK - teacher.log_sum_exp_logits_P[:, None]
    mass_P = np.exp(np.where(used_PK, log_p_PK, -np.inf), dtype=np.float64).sum(axis=1)
    mass_P += teacher.tail_mass_PT[:, 0]
    error_P = np.abs(mass_P - 1) * used_PK[:, 0]
    if error_P.max(initial=0) > MASS_TOLERANCE:
        worst = mass_P[error_P.argmax()]
        report.problem(
            f"{where}: kept probabilities and tail sum to {worst:.4g}, expected 1"
        )
    if manifest is None:
        return
    try:
        check_vocabulary(row, manifest.vocab_size, where)
    except CacheError as error:
        report.problem(str(error))
    k = used_PK.sum(axis=1).max(initial=0)
    if k > manifest.top_k:
        report.problem(
            f"{where}: {k} tokens at one position, but the manifest states top_k={manifest.top_k}"
        )


def _check_summary(
    report: ChunkReport, manifest: Manifest, key: int, index: ChunkIndex | None
) -> None:
    path = report.path
    found = report.found
    if key >= manifest.num_chunks:
        report.problem(
            f"{path}: is chunk {key}, but the cache has {manifest.num_chunks} chunks"
        )
    stated = manifest.summary_of(key, index)
    if stated is None:
        report.problem(
            f"{path}: the chunk is not complete: it has no whole index with a summary, and no "
            "manifest lists it; `logit_cache repair`, or run compute_topk_logits again"
        )
        return
    records = stated.examples + sum(stated.skipped.values())
    if records != stated.last_index - stated.first_index + 1:
        report.problem(
            f"{path}: {stated.examples} examples and {records - stated.examples} skipped records "
            f"are not the records {stated.first_index} to {stated.last_index}; {AGAIN}"
        )
    first, last = manifest.records_of(key)
    if manifest.merged_chunks is None and (stated.first_index, stated.last_index) != (
        first,
        last,
    ):
        report.problem(
            f"{path}: covers records {stated.first_index} to {stated.last_index}, expected "
            f"{first} to {last}; {AGAIN}"
        )
    if (found.sha256, report.bytes) != (stated.sha256, stated.bytes):
        report.problem(
            f"{path}: {report.bytes} bytes of {found.sha256}, but its summary says {stated.bytes} "
            f"of {stated.sha256}; {AGAIN}"
        )
    for name, count in report.counts.items():
        if count != getattr(stated, name):
            report.problem(
                f"{path}: {count} {name}, but its summary says {getattr(stated, name)}; {AGAIN}"
            )
    difference = abs(found.kept_mass_sum - stated.kept_mass_sum)
    if difference > KEPT_MASS_TOLERANCE * max(1, found.loss_tokens):
        report.problem(
            f"{path}: kept_mass_sum {found.kept_mass_sum:.4g}, but its summary says "
            f"{stated.kept_mass_sum:.4g}; {AGAIN}"
        )
    if found.first_index >= 0 and not (
        stated.first_index <= found.first_index and found.last_index <= stated.last_index
    ):
        report.problem(
            f"{path}: examples {found.first_index} to {found.last_index}, but its summary says "
            f"{stated.first_index} to {stated.last_index}; {AGAIN}"
        )


def _check_order(reports: list[ChunkReport]) -> None:
    last = -1
    last_path = Path()
    for report in reports:
        if 0 <= report.found.first_index <= last:
            report.problem(
                f"{report.path}: begins with example {report.found.first_index}, but "
                f"{last_path.name} ends with {last}: examples are there twice"
            )
        if report.found.last_index >= 0:
            last = report.found.last_index
            last_path = report.path
