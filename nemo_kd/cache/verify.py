"""Checks every byte and number of a cache against everything else that is known about it."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nemo_kd.batch import CachedExample
from nemo_kd.cache.index import ChunkIndex, LineFacts
from nemo_kd.cache.layout import CacheError, CacheLayout, index_name
from nemo_kd.cache.lines import lines_of
from nemo_kd.cache.manifest import ChunkSummary, Manifest
from nemo_kd.cache.record import decode, trimmed

log = logging.getLogger(__name__)

MOST_PROBLEMS_OF_A_CHUNK = 20
MASS_TOLERANCE = {"packed": 1e-4, "json": 0.1}
"""Of kept probabilities + tail = 1. NeMo-Aligner rounds to bf16."""


@dataclass
class ChunkReport:
    """What was found in one chunk; `problems` are sentences that begin with file:line."""

    path: Path
    bytes: int = 0
    sha256: str = ""
    first_index: int = -1
    last_index: int = -1
    counts: dict[str, int] = field(default_factory=lambda: {"examples": 0, "tokens": 0, "loss_tokens": 0})
    problems: list[str] = field(default_factory=list)

    def problem(self, text: str) -> None:
        """Notes a problem; of many only the first ones, and how many there are."""
        if len(self.problems) < MOST_PROBLEMS_OF_A_CHUNK:
            self.problems.append(text)
        elif len(self.problems) == MOST_PROBLEMS_OF_A_CHUNK:
            self.problems.append(f"{self.path}: and more problems")


def verify(path: str, num_workers: int = 1) -> list[ChunkReport]:
    """Reads all chunks of a file or template; every problem is in the reports. Shows a progress bar.

    Raises:
        CacheError: there is nothing to verify, or the manifest cannot be read.
    """
    layout = CacheLayout(path)
    chunks = layout.existing_chunks()
    manifest = Manifest.load(layout.manifest_path) if layout.manifest_path.exists() else None
    if not chunks and manifest is None:
        raise CacheError(f"{path}: there is no such file, and no chunk of such a template")
    expected = range(manifest.num_chunks) if manifest is not None else range(max(chunks) + 1)
    reports = []
    total = sum(layout.chunk_path(chunk).stat().st_size for chunk in chunks)
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="verifying") as progress,
        ProcessPoolExecutor(max_workers=num_workers) as pool,
    ):
        tasks = [
            pool.submit(verify_chunk, layout.chunk_path(chunk), *_said(layout, manifest, chunk)) for chunk in chunks
        ]
        for task in as_completed(tasks):
            report = task.result()
            reports.append(report)
            progress.update(report.bytes)
    for chunk in sorted(set(expected) - set(chunks)):
        missing = ChunkReport(layout.chunk_path(chunk))
        missing.problem(f"{missing.path}: the chunk is missing; run compute_topk_logits again")
        reports.append(missing)
    reports.sort(key=lambda report: _number(layout, report.path))
    _check_order(reports)
    return reports


def verify_chunk(path: Path, manifest: Manifest | None, summary: ChunkSummary | None) -> ChunkReport:
    """Reads one chunk whole. A damaged line does not hide those behind it, as long as the index tells where they begin.

    Args:
        summary: what the manifest says of the chunk; None where it says nothing.
    """
    report, facts, digest = ChunkReport(path, bytes=path.stat().st_size), LineFacts(), hashlib.sha256()
    index_path = path.with_name(index_name(path.name))
    index = ChunkIndex.of(index_path.read_bytes()) if index_path.exists() else None
    if index is not None and index.facts.bytes != report.bytes:
        report.problem(
            f"{index_path}: made for {index.facts.bytes} bytes, but {path.name} has {report.bytes}; `logit_cache repair`"
        )
        index = None
    lines = lines_of(path)
    for number, raw in enumerate(_raw_lines(path, index, report)):
        where = f"{path}:{number + 1}"
        digest.update(raw)
        try:
            row = decode(lines.read(raw, where), where, index=number)
        except CacheError as error:
            report.problem(str(error))
            continue
        facts.add(trimmed(row), len(raw))
        _check_row(row, where, manifest, report)
    report.sha256 = f"sha256:{digest.hexdigest()}"
    if manifest is not None:
        _check_summary(report, summary)
    if not report.problems:
        _check_index(index_path, index, facts, digest.digest(), report)
    return report


def _said(layout: CacheLayout, shared: Manifest | None, chunk: int) -> tuple[Manifest | None, ChunkSummary | None]:
    """(the manifest that covers a chunk, what it says of the chunk)."""
    if shared is not None:
        return shared, shared.chunks.get(str(chunk))
    own = CacheLayout(str(layout.chunk_path(chunk))).manifest_path
    if not own.exists():
        return None, None
    manifest = Manifest.load(own)
    return manifest, manifest.chunks.get("0")


def _number(layout: CacheLayout, path: Path) -> int:
    return layout.chunk_ids([path.name])[0]


def _raw_lines(path: Path, index: ChunkIndex | None, report: ChunkReport) -> Iterator[bytes]:
    end = 0
    with path.open("rb") as file:
        try:
            for raw in lines_of(path).split(file, str(path)):
                end += len(raw)
                yield raw
            return
        except CacheError as error:
            report.problem(str(error))
        # Behind a damaged frame only the index knows where the next one begins.
        for start, stop in itertools.pairwise(index.starts.tolist() if index is not None else []):
            if start > end:
                file.seek(start)
                yield file.read(stop - start)


def _check_row(row: CachedExample, where: str, manifest: Manifest | None, report: ChunkReport) -> None:
    example, teacher = row.example, row.teacher
    if example.index <= report.last_index:
        report.problem(
            f"{where}: example {example.index} stands behind example {report.last_index}; the lines are out of order"
        )
    if report.first_index < 0:
        report.first_index = example.index
    report.last_index = max(report.last_index, example.index)
    for name, count in (("examples", 1), ("tokens", example.num_tokens), ("loss_tokens", example.num_loss_tokens)):
        report.counts[name] += count
    ids_SK = teacher.topk_token_ids_SK
    used_SK = ids_SK >= 0
    known_S = used_SK[:, 0]
    sorted_SK = np.sort(np.where(used_SK, ids_SK, -1 - np.arange(ids_SK.shape[1])), axis=1)
    if (sorted_SK[:, 1:] == sorted_SK[:, :-1]).any():
        report.problem(f"{where}: an id is kept twice at one position")
    log_p_SK = np.where(used_SK, teacher.topk_logits_SK, -np.inf) - teacher.log_sum_exp_logits_S[:, None]
    mass_S = np.exp(log_p_SK, dtype=np.float64).sum(axis=1) + teacher.tail_mass_TS[0]
    tolerance = MASS_TOLERANCE["packed" if manifest is not None and manifest.codec["name"] == "packed" else "json"]
    if (np.abs(mass_S - 1)[known_S] > tolerance).any():
        worst = mass_S[known_S][np.abs(mass_S - 1)[known_S].argmax()]
        report.problem(f"{where}: kept probabilities and tail sum to {worst:.4g}, expected 1")
    if manifest is None:
        return
    largest = max(int(ids_SK.max()), int(example.tokens_S.max()), int(example.labels_S.max()))
    if largest >= manifest.vocab_size:
        report.problem(
            f"{where}: token id {largest} exceeds the vocabulary of {manifest.vocab_size} that the manifest states"
        )
    if used_SK.sum(axis=1).max() > manifest.top_k:
        report.problem(
            f"{where}: {used_SK.sum(axis=1).max()} tokens at one position, but the manifest says top_k={manifest.top_k}"
        )


def _check_summary(report: ChunkReport, summary: ChunkSummary | None) -> None:
    path, again = report.path, "restore the file, or delete it and run compute_topk_logits again"
    if summary is None:
        report.problem(
            f"{path}: the manifest does not list this chunk, so it is not complete; run compute_topk_logits again"
        )
        return
    if report.sha256 != summary.sha256 or report.bytes != summary.bytes:
        report.problem(
            f"{path}: {report.bytes} bytes of {report.sha256}, but the manifest says {summary.bytes} of {summary.sha256}; {again}"
        )
    for name, count in report.counts.items():
        if count != getattr(summary, name):
            report.problem(f"{path}: {count} {name}, but the manifest says {getattr(summary, name)}; {again}")
    if (
        report.first_index >= 0
        and not summary.first_index <= report.first_index <= report.last_index <= summary.last_index
    ):
        report.problem(
            f"{path}: examples {report.first_index} to {report.last_index}, but the manifest says {summary.first_index} to "
            f"{summary.last_index}; {again}"
        )


def _check_index(path: Path, index: ChunkIndex | None, facts: LineFacts, sha256: bytes, report: ChunkReport) -> None:
    if index is None:
        report.problem(f"{path}: there is no usable index; `logit_cache repair` makes one")
    elif index.to_bytes() != facts.index(sha256, index.facts.mtime_ns).to_bytes():
        report.problem(f"{path}: the index does not describe {report.path.name}; `logit_cache repair` makes it anew")


def _check_order(reports: list[ChunkReport]) -> None:
    last, last_path = -1, Path()
    for report in reports:
        if 0 <= report.first_index <= last:
            report.problem(
                f"{report.path}: begins with example {report.first_index}, but {last_path.name} ends with {last}: examples are there twice"
            )
        if report.last_index >= 0:
            last, last_path = report.last_index, report.path
