"""Progress of stage 1 while it runs, and the report of the cache at its end."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from torch.distributed import Store, get_world_size

from nemo_kd.cache.index import ChunkSummary
from nemo_kd.cache.layout import CacheError, CacheLayout
from nemo_kd.cache.publisher import SegmentPublisher
from nemo_kd.cache.writer import CacheWriter
from nemo_kd.config.cache import CacheConfig
from nemo_kd.data.records import DataError
from nemo_kd.files import explained
from nemo_kd.flops import forward_flops, peak_flops
from nemo_kd.run.metrics import (
    MetricsFile,
    Progress,
    ProgressLine,
    SharedCounters,
    Sink,
    WandbSink,
)
from nemo_kd.teacher.job import Job, Run
from nemo_kd.teacher.model import Pass
from nemo_kd.terminal import print_table, size_text

log = logging.getLogger(__name__)

T = TypeVar("T")

POOR_KEPT_MASS = 0.9
"""Warn if the kept ids hold less than this share of the teacher's probability."""


class TeacherProgress:
    """Counts this replica's work on one cache; the first replica's writer shows the sum of all.

    Args:
        store: keys of this cache and this run of the command.
        total_tokens: of the missing segments.
    """

    def __init__(self, run: Run, job: Job, store: Store, total_tokens: int) -> None:
        groups = run.groups
        settings = run.config.exp_manager
        self._counts = groups.is_writer
        self._flops = forward_flops(run.pretrained.architecture)
        self._num_published = 0
        self._waited_s = 0.0
        sinks: list[Sink] = []
        if groups.is_writer and groups.data_rank == 0:
            name = f"teacher, {job.split}" if job.split else "teacher"
            sinks += [ProgressLine(name, total_tokens), metrics_file(job)]
            if settings.create_wandb_logger:
                sinks.append(
                    WandbSink({"name": run.config.name, **settings.wandb_logger_kwargs})
                )
        peak = None
        if groups.device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(), run.config.trainer.precision)
        self._progress = Progress(
            total_tokens,
            settings.log_interval_s,
            sinks,
            SharedCounters(store, groups.data_rank, groups.data_size),
            None if peak is None else peak * get_world_size(),
        )

    def waiting_for(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items; the time until each arrives counts as waiting for data."""
        iterator = iter(items)
        while True:
            started_s = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            if self._counts:
                self._progress.add(data_wait_s=time.perf_counter() - started_s)
            yield item

    def computed(self, started: Pass) -> None:
        """Count a pass whose rows have arrived."""
        examples = started.examples
        tokens = sum(example.num_tokens for example in examples)
        self._progress.add(
            examples=len(examples),
            tokens=tokens,
            loss_tokens=sum(example.num_loss_tokens for example in examples),
            padding_tokens=started.computed_tokens - tokens,
            flops=sum(
                self._flops.example(one.num_tokens, one.num_loss_tokens)
                for one in examples
            ),
        )

    def published(self, publisher: SegmentPublisher) -> None:
        """Count what reached the disk since the last call, and how long the publisher blocked."""
        for summary in publisher.done[self._num_published :]:
            self._progress.add(
                cached_tokens=summary.tokens,
                cached_loss_tokens=summary.loss_tokens,
                kept_mass_sum=summary.kept_mass_sum,
                bytes=summary.bytes,
            )
        self._num_published = len(publisher.done)
        self._progress.add(data_wait_s=publisher.waited_s - self._waited_s)
        self._waited_s = publisher.waited_s

    def report(self) -> None:
        """Share this replica's counters with the first replica."""
        if self._counts:
            self._progress.report()

    def __enter__(self) -> TeacherProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._counts:
            self._progress.close()
        elif self._counts:  # another report could fail as well and hide the error
            for sink in self._progress.sinks:
                sink.close()


def metrics_file(job: Job) -> MetricsFile:
    """Open the metrics of one cache.

    For `train_CHUNK_ID.jsonl` the name is `train_metrics.log`, for a part
    `train_metrics_1_of_4.log`; no pattern of chunk files matches it.

    Raises:
        CacheError: the file cannot be written.
    """
    path = _beside_cache(job, "metrics", ".log")
    with explained(path):
        return MetricsFile(path)


def config_path(job: Job) -> Path:
    """Return the path of the job's configuration, beside the metrics."""
    return _beside_cache(job, "config", ".yaml")


def _beside_cache(job: Job, name: str, suffix: str) -> Path:
    layout = CacheLayout(job.config.output_path)
    number, count = job.config.part_number()
    folder = Path(job.config.exp_manager.explicit_log_dir or layout.folder)
    part = f"_{number}_of_{count}" if count > 1 else ""
    return folder / layout.manifest_name.replace("manifest.json", f"{name}{part}{suffix}")


@dataclass(frozen=True)
class CacheReport:
    """A cache as it is on disk when a run ends, with the chunks of other parts.

    Attributes:
        split: key of the dataset in `data.data.file_path`, empty for a single dataset.
        output_path: with its CHUNK_ID; `CacheReader(output_path)` reads the cache.
        chunk_paths: files of the complete chunks, in order.
        num_tokens: positions in the cache; num_loss_tokens: those in the loss.
        num_skipped: records without a row, by reason.
        num_computed_tokens: tokens that this run computed, in `seconds`.
        is_complete: False while other parts are at work.
    """

    split: str
    output_path: str
    manifest_path: Path
    chunk_paths: tuple[Path, ...]
    num_examples: int
    num_tokens: int
    num_loss_tokens: int
    num_bytes: int
    num_skipped: dict[str, int]
    num_computed_tokens: int
    seconds: float
    is_complete: bool


def report_cache(
    job: Job,
    writer: CacheWriter,
    num_complete_before: int,
    num_computed_tokens: int,
    seconds: float,
) -> CacheReport:
    """Compare the cache on disk with the job, print its summary and warnings, and return it.

    Raises:
        CacheError: a part of this job's own work is missing.
        DataError: the cache is complete and has no rows.
    """
    waiting_for = _other_parts_work(job, writer)
    chunks = writer.manifest.chunks
    total = ChunkSummary(0, 0)
    for summary in chunks.values():
        total.add(summary)
    if not waiting_for and not total.examples:
        raise DataError(
            f"{job.config.output_path}: the cache is complete and has no rows: every record was "
            "skipped"
        )
    report = CacheReport(
        split=job.split,
        output_path=job.config.output_path,
        manifest_path=writer.layout.manifest_path,
        chunk_paths=tuple(
            writer.layout.chunk_path(chunk) for chunk in sorted(map(int, chunks))
        ),
        num_examples=total.examples,
        num_tokens=total.tokens,
        num_loss_tokens=total.loss_tokens,
        num_bytes=total.bytes,
        num_skipped=dict(sorted(total.skipped.items())),
        num_computed_tokens=num_computed_tokens,
        seconds=seconds,
        is_complete=not waiting_for,
    )
    chunk_counts = (
        f"{len(chunks)} of {len(job.chunks)} ({num_complete_before} were complete before)"
    )
    warnings = []
    quality = []
    if total.loss_tokens:  # else all segments are other parts'
        top_k = writer.manifest.top_k
        kept_mass = total.kept_mass_sum / total.loss_tokens
        kept_ids = total.kept_tokens / total.loss_tokens
        quality = [
            (f"mass of the kept ids (at most {top_k})", f"{kept_mass:.4f}"),
            (
                "label among the kept ids",
                f"{total.label_in_topk / total.loss_tokens:.4f}",
            ),
            ("kept ids per position", f"{kept_ids:.1f}"),
        ]
        warnings.append(kept_mass_advice(kept_mass, kept_ids, top_k, job.config.cache))
    if waiting_for:
        warnings.append(f"this cache is not complete: {waiting_for}")
    print_table(_summary(report, chunk_counts, quality))
    for warning in filter(None, warnings):
        log.warning("warning: %s%s", job.label, warning)
    return report


def _summary(
    report: CacheReport, chunk_counts: str, quality: list[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Return the lines of a report, with those about chunks and quality where they belong."""
    tokens = report.num_computed_tokens
    rate = f"{tokens:,} tokens in {timedelta(seconds=round(report.seconds))}"
    if tokens:
        rate += f", {tokens / max(report.seconds, 1e-9):,.0f} tokens/s"
    bytes_per_token = report.num_bytes / max(1, report.num_tokens)
    skipped = [
        (f"skipped: {reason}", f"{n:,}") for reason, n in report.num_skipped.items()
    ]
    return [
        *([("split", report.split)] if report.split else []),
        ("cache", report.output_path),
        ("chunks", chunk_counts),
        ("examples", f"{report.num_examples:,}"),
        ("tokens", f"{report.num_tokens:,} ({report.num_loss_tokens:,} in the loss)"),
        (
            "size",
            f"{size_text(report.num_bytes)}, {bytes_per_token:,.1f} bytes per token",
        ),
        ("computed now", rate),
        *quality,
        *(skipped or [("skipped", "0")]),
    ]


def _other_parts_work(job: Job, writer: CacheWriter) -> str:
    """Return what other parts still have to do, empty if the cache is complete.

    Raises:
        CacheError: a part of this job's own work is missing: files were removed while it ran.
    """
    if not writer.incomplete():
        return ""
    part, num_parts = job.config.part_number()
    by_part = writer.missing_by_part()
    incomplete = (
        writer.missing
    )  # without chunks that other parts have published meanwhile
    names = ", ".join(map(str, incomplete[:5])) + (", ..." if len(incomplete) > 5 else "")
    if num_parts == 1 or by_part.get(part):
        raise CacheError(
            f"{writer.layout.folder}: {len(incomplete)} of {len(job.chunks)} chunks are missing at "
            f"the end of this job ({names}), and {by_part.get(part, 0)} segments of its work are "
            "not on disk: files were removed while it ran; find out what removes them, then run the "
            "same command again: it computes what is missing"
        )
    if not incomplete:
        return ""
    others = ", ".join(
        f"{other}/{num_parts} ({count} segments)"
        for other, count in sorted(by_part.items())
        if count
    )
    return (
        f"{len(incomplete)} of {len(job.chunks)} chunks ({names}) wait for other parts: "
        f"{others or 'being assembled'}. Part {part}/{num_parts} is done and on disk; the part "
        "that ends last assembles the chunks. If one of them failed, run it again, or run the same "
        "command with part=0/1 once no part runs"
    )


def next_commands(reports: Sequence[CacheReport]) -> list[str]:
    """Return command lines that check the caches and train a student on them."""
    paths = {report.split or "train": report.output_path for report in reports}
    prefixes = {"train": "TRAIN_CACHE", "validation": "VALIDATION_CACHE"} | paths
    data = ", ".join(f"{split}: [{path}]" for split, path in prefixes.items())
    return [
        *(f"check: logit_cache verify {shlex.quote(path)}" for path in paths.values()),
        "next:  train_gpt_knowledge_distillation pretrained_checkpoint.restore_from_path=STUDENT "
        + shlex.quote(f"model.data.data_prefix={{{data}}}"),
    ]


def kept_mass_advice(
    kept_mass: float, kept_ids: float, top_k: int, cache: CacheConfig
) -> str:
    """Return advice if a position's `kept_ids` hold little probability, else an empty text."""
    if kept_mass >= POOR_KEPT_MASS:
        return ""
    if cache.tail_samples:
        support = (
            f"train with support=sampled: the {cache.tail_samples} tail samples per position stand "
            "for the rest"
        )
    else:
        support = (
            "train with support=tail (the default), or write the cache again with "
            "cache.tail_samples=4 and train with support=sampled"
        )
    if cache.codec == "json" or kept_ids > 0.9 * top_k:
        remedy = f"a larger top_k (now {top_k})"
    elif cache.top_p < 1:
        remedy = f"a larger cache.top_p (now {cache.top_p:g})"
    else:
        remedy = f"a lower cache.min_probability (now {cache.probability_floor:g})"
    return (
        f"the kept ids hold {kept_mass:.1%} of the teacher's probability: {support}; {remedy} "
        "keeps more. support=renormalize sees nothing outside them: with it keep sft_loss_weight "
        "above 0"
    )
