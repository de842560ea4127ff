"""Check every byte of a cache, and its numbers against index and manifest."""

from __future__ import annotations

import hashlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from nemo_kd.batch import CachedExample
from nemo_kd.cache.index import ChunkBuilder, ChunkIndex, ChunkSummary, read_index
from nemo_kd.cache.layout import CacheError, CacheLayout, index_name, lines_of
from nemo_kd.cache.manifest import Manifest
from nemo_kd.cache.record import check_selection, check_vocabulary, decode
from nemo_kd.files import open_regular

MOST_PROBLEMS_OF_A_CHUNK = 20
MASS_TOLERANCE = 0.1
"""Error of kept probabilities + tail = 1. NeMo-Aligner rounds to bf16."""
COUNTS = ("examples", "tokens", "loss_tokens", "kept_tokens", "label_in_topk")
AGAIN = "restore the file, or delete it and run compute_topk_logits again"


class Chunk(NamedTuple):
    """A chunk on disk: chunk `number` of the cache that `manifest`, if there is one, describes."""

    layout: CacheLayout
    number: int
    manifest: Manifest | None

    @property
    def path(self) -> Path:
        return self.layout.chunk_path(self.number)

    @property
    def summary(self) -> ChunkSummary | None:
        """Of a complete chunk."""
        if self.manifest is None:
            return None
        return self.manifest.summary_of(self.number, read_index(self.path))


def chunks_of(path: str) -> tuple[list[Chunk], int]:
    """Return the chunks of a file or template, and how many there should be.

    Without a manifest for all each may have its own.

    Raises:
        CacheError: there are none, or a manifest is damaged.
    """
    layout = CacheLayout(path)
    numbers = layout.existing_chunks()
    if not numbers:
        raise CacheError(
            f"{path}: there is no such file, and no chunk of such a template"
        )
    if layout.manifest_path.exists():
        manifest = Manifest.load(layout.manifest_path)
        return [
            Chunk(layout, number, manifest) for number in numbers
        ], manifest.num_chunks
    chunks = []
    for number in numbers:
        own = CacheLayout(str(layout.chunk_path(number)))
        has_manifest = own.manifest_path.exists()
        own_manifest = Manifest.load(own.manifest_path) if has_manifest else None
        chunks.append(Chunk(own, 0, own_manifest))
    return chunks, numbers[-1] + 1


@dataclass
class ChunkReport:
    """Counts of the lines of a chunk that could be read, and its problems.

    Attributes:
        found: its last index is that of the last line; a line without one follows the line before.
        problems: sentences that begin with file:line.
    """

    path: Path
    found: ChunkSummary = field(default_factory=lambda: ChunkSummary(-1, -1))
    problems: list[str] = field(default_factory=list)


def verify(path: str, num_workers: int = 1) -> list[ChunkReport]:
    """Read all chunks of a file or template; every problem is in the reports. Shows a progress bar.

    Returns:
        A report of every chunk in their order, then one of the first chunk that is missing.

    Raises:
        CacheError: there is nothing to verify, or the manifest is damaged.
    """
    chunks, expected = chunks_of(path)
    reports = verify_chunks(chunks, num_workers)
    if len(chunks) < expected:
        layout = CacheLayout(path)
        present = layout.existing_chunks()
        first = next(number for number in range(expected) if number not in present)
        report = ChunkReport(layout.chunk_path(first))
        report.problems.append(
            f"{report.path}: the chunk is missing ({len(present)} of {expected} are there); run "
            "compute_topk_logits again"
        )
        reports.append(report)
    return reports


def verify_chunks(chunks: list[Chunk], num_workers: int) -> list[ChunkReport]:
    """Run `verify_chunk` in processes; the reports come in the order of the chunks."""
    with ProcessPoolExecutor(min(num_workers, len(chunks))) as pool:
        reports = pool.map(verify_chunk, chunks)
        return list(tqdm(reports, "verifying", len(chunks), unit=" chunks"))


def verify_chunk(chunk: Chunk) -> ChunkReport:
    """Read one chunk whole, up to its first damaged frame."""
    path = chunk.path
    manifest = chunk.manifest
    report = ChunkReport(path)
    problems = report.problems
    builder = ChunkBuilder(report.found)
    digest = hashlib.sha256()
    lines = lines_of(path)
    try:
        with open_regular(path) as file:
            for number, raw in enumerate(lines.split(file, str(path)), start=1):
                digest.update(raw)
                where = f"{path}:{number}"
                try:
                    following = report.found.last_index + 1
                    row = decode(lines.read(raw, where), where, following)
                    _check_row(row, where, manifest, report)
                    builder.add(row, len(raw))
                except CacheError as error:
                    problems.append(str(error))
    except CacheError as error:
        problems.append(str(error))
    report.found.sha256 = f"sha256:{digest.hexdigest()}"
    report.found.bytes = path.stat().st_size
    index = read_index(path)
    if manifest is not None:
        _check_summary(report, manifest, chunk.number, index)
    elif index is not None and index.checksum != report.found.sha256:
        problems.append(
            f"{path}: {index_name(path.name)} does not describe it; delete the index: "
            "`logit_cache repair` makes it again"
        )
    del problems[MOST_PROBLEMS_OF_A_CHUNK:]
    return report


def _check_row(
    row: CachedExample, where: str, manifest: Manifest | None, report: ChunkReport
) -> None:
    example = row.example
    teacher = row.teacher
    found = report.found
    if example.index <= found.last_index:
        report.problems.append(
            f"{where}: example {example.index} stands behind example {found.last_index}; the "
            "lines are out of order"
        )
    found.last_index = max(found.last_index, example.index)
    # Decoding has made sure that ids are distinct and masses between 0 and 1.
    used_PK = teacher.topk_token_ids_PK >= 0
    log_p_PK = teacher.topk_logits_PK - teacher.log_sum_exp_logits_P[:, None]
    mass_P = np.exp(np.where(used_PK, log_p_PK, -np.inf), dtype=np.float64).sum(axis=1)
    mass_P += teacher.tail_mass_PT[:, 0]
    error_P = np.abs(mass_P - 1) * used_PK[:, 0]
    if error_P.max(initial=0) > MASS_TOLERANCE:
        worst = mass_P[error_P.argmax()]
        report.problems.append(
            f"{where}: kept probabilities and tail sum to {worst:.4g}, expected 1"
        )
    check_selection(row, manifest.codec.get("select") if manifest else None, where)
    if manifest is None:
        return
    k = used_PK.sum(axis=1).max(initial=0)
    if k > manifest.top_k:
        report.problems.append(
            f"{where}: {k} tokens at one position, but the manifest states top_k={manifest.top_k}"
        )
    check_vocabulary(row, manifest.vocab_size, where)


def _check_summary(
    report: ChunkReport, manifest: Manifest, number: int, index: ChunkIndex | None
) -> None:
    path = report.path
    found = report.found
    stated = manifest.summary_of(number, index)
    if stated is None:
        report.problems.append(
            f"{path}: the chunk is not complete: it has no whole index with a summary, and no "
            "manifest lists it; `logit_cache repair`, or run compute_topk_logits again"
        )
        return
    for name in ("bytes", "sha256", *COUNTS):
        if getattr(found, name) != getattr(stated, name):
            report.problems.append(
                f"{path}: {getattr(found, name)} {name}, but its summary says "
                f"{getattr(stated, name)}; {AGAIN}"
            )
    covered = (stated.first_index, stated.last_index)
    num_records = stated.examples + sum(stated.skipped.values())
    if num_records != covered[1] - covered[0] + 1 or (
        manifest.merged_chunks is None and covered != manifest.records_of(number)
    ):
        report.problems.append(
            f"{path}: its summary says {num_records} records, {covered[0]} to {covered[1]}; the "
            f"manifest, {manifest.records_of(number)}; {AGAIN}"
        )
