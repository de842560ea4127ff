"""Checks every byte and number of a cache against everything else that is known about it."""

from __future__ import annotations

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
from nemo_kd.cache.index import ChunkIndex, LineFacts
from nemo_kd.cache.layout import CacheError, CacheLayout, index_name
from nemo_kd.cache.lines import TornError, lines_of
from nemo_kd.cache.manifest import ChunkSummary, Manifest
from nemo_kd.cache.record import decode, trimmed
from nemo_kd.config import UserInputError
from nemo_kd.files import FileError, read_file
from nemo_kd.tools.salvage import file_sha256, stretches

MOST_PROBLEMS_OF_A_CHUNK = 20
MOST_MISSING_CHUNKS = 1000
MASS_TOLERANCE = {"packed": 1e-4, "json": 0.1}
"""Of kept probabilities + tail = 1. NeMo-Aligner rounds to bf16."""
KEPT_MASS_TOLERANCE = 0.02
"""Of a chunk's mean kept mass: the packed codec rounds tails, the manifest tells what it was before."""
COUNTS = ("examples", "tokens", "loss_tokens", "kept_tokens", "label_in_topk")
AGAIN = "restore the file, or delete it and run compute_topk_logits again"
WITHOUT_INDEX = 1 << 62
"""Stands, with the line's number added, for the index of a line that has none."""

Task = tuple[Path, Manifest | None, ChunkSummary | None, int]
"""The arguments of `verify_chunk`."""


@dataclass
class ChunkReport:
    """What was found in one chunk, or in a manifest; `problems` are sentences that begin with file:line.

    Attributes:
        chunk: its number; -1 for a manifest.
        first_index, last_index: of the examples; -1 where the lines have no index.
    """

    path: Path
    chunk: int = -1
    bytes: int = 0
    sha256: str = ""
    first_index: int = -1
    last_index: int = -1
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    kept_mass_sum: float = 0.0
    problems: list[str] = field(default_factory=list)

    def problem(self, text: str) -> None:
        """Notes a problem; of many only the first ones, and that there are more."""
        if len(self.problems) < MOST_PROBLEMS_OF_A_CHUNK:
            self.problems.append(text)
        elif len(self.problems) == MOST_PROBLEMS_OF_A_CHUNK:
            self.problems.append(f"{self.path}: and more problems")


def verify(path: str, num_workers: int = 1) -> list[ChunkReport]:
    """Reads all chunks of a file or template; every problem is in the reports. Shows a progress bar.

    Returns:
        A report of every manifest that has problems, then of every chunk in their order.

    Raises:
        CacheError: there is nothing to verify, or a process was ended from outside.
    """
    layout = CacheLayout(path)
    chunks = layout.existing_chunks()
    if not chunks and not layout.manifest_path.exists():
        raise CacheError(f"{path}: there is no such file, and no chunk of such a template")
    shared = ChunkReport(layout.manifest_path)
    manifest = _load_manifest(shared)
    of_manifests, tasks = [shared], list[Task]()
    for chunk in chunks:
        said, key = manifest, str(chunk)
        if not os.path.lexists(shared.path):  # every chunk may have one of its own
            of_manifests.append(
                ChunkReport(CacheLayout(str(layout.chunk_path(chunk))).manifest_path)
            )
            said, key = _load_manifest(of_manifests[-1]), "0"
        tasks.append(
            (
                layout.chunk_path(chunk),
                said,
                said.chunks.get(key) if said is not None else None,
                chunk,
            )
        )
    reports = verify_chunks(tasks, num_workers)
    expected = manifest.num_chunks if manifest is not None else max(chunks, default=-1) + 1
    there = set(chunks)
    absent = (chunk for chunk in range(expected) if chunk not in there)
    for chunk in itertools.islice(absent, MOST_MISSING_CHUNKS):
        missing = ChunkReport(layout.chunk_path(chunk), chunk)
        missing.problem(f"{missing.path}: the chunk is missing; run compute_topk_logits again")
        reports.append(missing)
    if expected - len(there) > MOST_MISSING_CHUNKS:
        reports[-1].problem(
            f"{path}: {len(there)} chunks are there, {expected} expected; not all missing ones are listed"
        )
    reports.sort(key=lambda report: report.chunk)
    _check_order(reports)
    return [report for report in of_manifests if report.problems] + reports


def verify_chunk(
    path: Path, manifest: Manifest | None, summary: ChunkSummary | None, chunk: int = 0
) -> ChunkReport:
    """Reads one chunk whole; a damaged line does not hide those behind it.

    Args:
        summary: what the manifest says of the chunk; None where it says nothing.
    """
    report = ChunkReport(path, chunk, path.stat().st_size)
    try:
        _check_bytes(report, manifest, summary)
    except (
        FileError
    ) as error:  # the chunk or its index is a pipe, folder or device, or cannot be read
        report.problem(str(error))
    return report


def _check_bytes(
    report: ChunkReport, manifest: Manifest | None, summary: ChunkSummary | None
) -> None:
    path, facts = report.path, LineFacts()
    index_path = path.with_name(index_name(path.name))
    index = ChunkIndex.of(read_file(index_path)) if index_path.exists() else None
    if index is not None and index.facts.bytes != report.bytes:
        report.problem(
            f"{index_path}: made for {index.facts.bytes} bytes, but {path.name} has {report.bytes}; `logit_cache repair`"
        )
        index = None
    lines = lines_of(path)
    for line in stretches(path, index.starts[:-1].tolist() if index is not None else ()):
        where = f"{path}:{line.number}"
        if line.error is not None:
            report.problem(str(line.error))
            if not isinstance(line.error, TornError) or line.end < report.bytes:
                report.problem(f"{where}: bytes {line.start} to {line.end - 1} are lost")
            continue
        try:
            row = decode(lines.read(line.raw, where), where, index=WITHOUT_INDEX + line.number)
        except CacheError as error:
            report.problem(str(error))
            continue
        facts.add(trimmed(row), len(line.raw))
        _check_row(row, where, manifest, report)
    digest = file_sha256(path)
    report.sha256 = f"sha256:{digest.hex()}"
    if manifest is not None:
        _check_summary(report, summary)
    if not report.problems and (manifest is not None or index_path.exists()):
        _check_index(index_path, index, facts, digest, report)


def _load_manifest(report: ChunkReport) -> Manifest | None:
    """The manifest at the report's path, if there is a usable one."""
    if not os.path.lexists(report.path):
        return None
    try:
        manifest = Manifest.load(report.path)
    except UserInputError as error:  # it is damaged, or no file
        report.problem(str(error))
        return None
    first, last = manifest.dataset["start_from_idx"], manifest.dataset["end_at_idx"]
    size = manifest.n_examples_per_chunk or last - first + 1
    for key, summary in manifest.chunks.items():
        where, found = f"{report.path}: chunk {key}", (summary.first_index, summary.last_index)
        if int(key) >= manifest.num_chunks:
            report.problem(
                f"{where}: is listed, but records {first} to {last} make {manifest.num_chunks} chunks"
            )
            continue
        expected = (first + int(key) * size, min(first + int(key) * size + size - 1, last))
        if manifest.merged_chunks is None and found != expected:
            report.problem(
                f"{where}: covers records {found[0]} to {found[1]}, expected {expected[0]} to {expected[1]}; restore the manifest"
            )
        records = summary.examples + sum(summary.skipped.values())
        if records != summary.last_index - summary.first_index + 1:
            report.problem(
                f"{where}: {summary.examples} examples and {records - summary.examples} skipped records are not the records "
                f"{found[0]} to {found[1]}; restore the manifest"
            )
    return manifest


def verify_chunks(tasks: Sequence[Task], num_workers: int) -> list[ChunkReport]:
    """Runs `verify_chunk` with each of the tasks as its arguments; the reports come in the order of the chunks.

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
            for task in as_completed([pool.submit(verify_chunk, *task) for task in tasks]):
                reports.append(task.result())
                progress.update(reports[-1].bytes)
        except BrokenProcessPool as error:
            raise CacheError(
                "a verifying process was ended from outside, which is what a machine out of memory does; take fewer --num-workers"
            ) from error
    return sorted(reports, key=lambda report: report.chunk)


def _check_row(
    row: CachedExample, where: str, manifest: Manifest | None, report: ChunkReport
) -> None:
    example, teacher = row.example, row.teacher
    if example.index < WITHOUT_INDEX:
        if example.index <= report.last_index:
            report.problem(
                f"{where}: example {example.index} stands behind example {report.last_index}; the lines are out of order"
            )
        if report.first_index < 0:
            report.first_index = example.index
        report.last_index = max(report.last_index, example.index)
    ids_PK = teacher.topk_token_ids_PK
    used_PK = ids_PK >= 0
    targets = row.loss_rows()
    labels_P = example.labels_S[targets.positions_P]
    counts = (
        1,
        example.num_tokens,
        example.num_loss_tokens,
        int((targets.topk_token_ids_PK >= 0).sum()),
        int((targets.topk_token_ids_PK == labels_P[:, None]).any(axis=1).sum()),
    )
    for name, count in zip(COUNTS, counts, strict=True):
        report.counts[name] += count
    report.kept_mass_sum += float((1 - targets.tail_mass_PT[:, 0].astype(np.float64)).sum())
    known_P = used_PK[:, 0]
    sorted_PK = np.sort(np.where(used_PK, ids_PK, -1 - np.arange(ids_PK.shape[1])), axis=1)
    if (sorted_PK[:, 1:] == sorted_PK[:, :-1]).any():
        report.problem(f"{where}: an id is kept twice at one position")
    log_p_PK = (
        np.where(used_PK, teacher.topk_logits_PK, -np.inf) - teacher.log_sum_exp_logits_P[:, None]
    )
    mass_P = np.exp(log_p_PK, dtype=np.float64).sum(axis=1) + teacher.tail_mass_PT[:, 0]
    tolerance = MASS_TOLERANCE[
        "packed" if manifest is not None and manifest.codec["name"] == "packed" else "json"
    ]
    if (np.abs(mass_P - 1)[known_P] > tolerance).any():
        worst = mass_P[known_P][np.abs(mass_P - 1)[known_P].argmax()]
        report.problem(f"{where}: kept probabilities and tail sum to {worst:.4g}, expected 1")
    if not ((teacher.tail_mass_PT >= 0) & (teacher.tail_mass_PT <= 1)).all():
        report.problem(f"{where}: a tail mass lies outside 0 to 1")
    if manifest is None:
        return
    samples = teacher.tail_token_ids_PM if teacher.tail_token_ids_PM is not None else ids_PK[:, :1]
    largest = max(
        int(ids.max(initial=-1)) for ids in (ids_PK, example.tokens_S, example.labels_S, samples)
    )
    if largest >= manifest.vocab_size:
        report.problem(
            f"{where}: token id {largest} exceeds the vocabulary of {manifest.vocab_size} that the manifest states"
        )
    if used_PK.sum(axis=1).max(initial=0) > manifest.top_k:
        report.problem(
            f"{where}: {used_PK.sum(axis=1).max(initial=0)} tokens at one position, but the manifest says top_k={manifest.top_k}"
        )


def _check_summary(report: ChunkReport, summary: ChunkSummary | None) -> None:
    path = report.path
    if summary is None:
        report.problem(
            f"{path}: the manifest does not list this chunk, so it is not complete; run compute_topk_logits again"
        )
        return
    if report.sha256 != summary.sha256 or report.bytes != summary.bytes:
        report.problem(
            f"{path}: {report.bytes} bytes of {report.sha256}, but the manifest says {summary.bytes} of {summary.sha256}; {AGAIN}"
        )
    for name, count in report.counts.items():
        if count != getattr(summary, name):
            report.problem(
                f"{path}: {count} {name}, but the manifest says {getattr(summary, name)}; {AGAIN}"
            )
    mass = abs(report.kept_mass_sum - summary.kept_mass_sum)
    if mass > KEPT_MASS_TOLERANCE * max(1, report.counts["loss_tokens"]):
        report.problem(
            f"{path}: kept_mass_sum {report.kept_mass_sum:.4g}, but the manifest says {summary.kept_mass_sum:.4g}; {AGAIN}"
        )
    if (
        report.first_index >= 0
        and not summary.first_index <= report.first_index <= report.last_index <= summary.last_index
    ):
        report.problem(
            f"{path}: examples {report.first_index} to {report.last_index}, but the manifest says {summary.first_index} to "
            f"{summary.last_index}; {AGAIN}"
        )


def _check_index(
    path: Path, index: ChunkIndex | None, facts: LineFacts, sha256: bytes, report: ChunkReport
) -> None:
    if index is None:
        report.problem(f"{path}: there is no usable index; `logit_cache repair` makes one")
    elif index.to_bytes() != facts.index(sha256, index.facts.mtime_ns).to_bytes():
        report.problem(
            f"{path}: the index does not describe {report.path.name}; delete it: `logit_cache repair`, or the next reader, makes it anew"
        )


def _check_order(reports: list[ChunkReport]) -> None:
    last, last_path = -1, Path()
    for report in reports:
        if 0 <= report.first_index <= last:
            report.problem(
                f"{report.path}: begins with example {report.first_index}, but {last_path.name} ends with {last}: examples are there twice"
            )
        if report.last_index >= 0:
            last, last_path = report.last_index, report.path
