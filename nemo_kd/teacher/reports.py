"""Reports of stage 1: an estimate of its cost, progress, and the report of a cache."""

from __future__ import annotations

import logging
import resource
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed import Store

from nemo_kd.batch import Example
from nemo_kd.cache.index import BYTES_PER_LINE, ChunkBuilder, ChunkSummary
from nemo_kd.cache.layout import CacheError, CacheLayout, lines_of
from nemo_kd.cache.record import encode, trimmed
from nemo_kd.cache.writer import CacheWriter
from nemo_kd.config.teacher import ComputeTopkLogitsConfig
from nemo_kd.files import print_table, print_text, size_text
from nemo_kd.mcore.architecture import peak_flops
from nemo_kd.run.metrics import MetricsFile, Progress, WandbRun
from nemo_kd.teacher.job import Job, Run, nothing_to_train, open_run
from nemo_kd.teacher.model import Teacher

log = logging.getLogger(__name__)

NUM_PROBES = 96

POOR_KEPT_MASS = 0.9
"""Warn if the kept ids hold less than this share of the teacher's probability."""


def open_progress(run: Run, job: Job, store: Store) -> Progress:
    """Return the progress of this replica; the first replica's writer shows the sum of all."""
    groups = run.groups
    settings = run.config.exp_manager
    name = None
    sinks: list[Any] = []
    if groups.is_writer and groups.data_rank == 0:
        name = f"teacher {job.split}".strip()
        sinks.append(MetricsFile(path_beside(job, "metrics.log")))
        if settings.create_wandb_logger:
            sinks.append(
                WandbRun({"name": run.config.name, **settings.wandb_logger_kwargs})
            )
    return Progress(
        name,
        job.num_tokens,
        settings.log_interval_s,
        sinks,
        store if groups.is_writer else None,
        groups.data_rank,
        groups.data_size,
        peak_flops(groups.device, run.config.trainer.precision),
    )


def path_beside(job: Job, name: str) -> Path:
    """Return the path of a job's metrics.log or config.yaml, beside the cache.

    For `train_CHUNK_ID.jsonl` it is `train_metrics.log`, for a part `train_metrics_1_of_4.log`; no
    pattern of chunk files matches it.
    """
    layout = CacheLayout(job.config.output_path)
    number, count = job.config.part_number()
    folder = Path(job.config.exp_manager.explicit_log_dir or layout.folder)
    path = folder / layout.manifest_name.replace("manifest.json", name)
    return path.with_stem(f"{path.stem}_{number}_of_{count}") if count > 1 else path


@dataclass(frozen=True)
class CacheReport:
    """A cache as it is on disk when a run ends, with the chunks of other parts.

    Attributes:
        split: key of the dataset in `data.data.file_path`, empty for a single dataset.
        output_path: with its CHUNK_ID; `CacheReader(output_path)` reads the cache.
        chunk_paths: files of the complete chunks, in order.
        summary: counts of the complete chunks: examples, tokens, loss_tokens, bytes, and skipped
            records by reason.
        is_complete: False while other parts are at work.
    """

    split: str
    output_path: str
    chunk_paths: tuple[Path, ...]
    summary: ChunkSummary
    is_complete: bool


def report_cache(job: Job, seconds: float) -> CacheReport:
    """Assemble the last chunks, compare the cache with the job, print and return a summary.

    Raises:
        CacheError: a part of this job's own work is missing.
    """
    writer = job.writer
    assert writer is not None
    writer.assemble_complete()
    waiting_for = _other_parts_work(job, writer)
    chunks = writer.manifest.chunks
    total = ChunkSummary.total(chunks.values())
    report = CacheReport(
        split=job.split,
        output_path=job.config.output_path,
        chunk_paths=tuple(writer.layout.chunk_path(chunk) for chunk in sorted(chunks)),
        summary=total,
        is_complete=not waiting_for,
    )
    rate = job.num_tokens / max(seconds, 1e-9)
    print_table(
        [
            ("cache", report.output_path),
            ("chunks", f"{len(chunks)} of {len(job.chunks)}"),
            ("examples", f"{total.examples:,}"),
            ("tokens", f"{total.tokens:,} ({total.loss_tokens:,} in the loss)"),
            (
                "size",
                f"{size_text(total.bytes)}, {total.bytes / max(1, total.tokens):,.1f} bytes per "
                "token",
            ),
            (
                "computed now",
                f"{job.num_tokens:,} tokens in {timedelta(seconds=round(seconds))}, "
                f"{rate:,.0f} tokens/s",
            ),
            *quality(total, job.config.top_k),
            *(
                (f"skipped: {reason}", f"{count:,}")
                for reason, count in sorted(total.skipped.items())
            ),
        ]
    )
    if waiting_for:
        log.warning("warning: this cache is not complete: %s", waiting_for)
    warn_of_kept_mass(total, job.config)
    return report


def _other_parts_work(job: Job, writer: CacheWriter) -> str:
    """Return what other parts still have to do, empty if the cache is complete.

    Raises:
        CacheError: a part of this job's own work is missing: files were removed while it ran.
    """
    lost = writer.missing_segments() if writer.incomplete() else []
    # Without chunks that other parts have published meanwhile.
    if not writer.missing:
        return ""
    part, num_parts = job.config.part_number()
    chunks = f"{len(writer.missing)} of {len(job.chunks)} chunks"
    if num_parts == 1 or lost:
        raise CacheError(
            f"{writer.layout.folder}: {chunks} are missing at the end of this job (the first is "
            f"{writer.missing[0]}): files were removed while it ran; find out what removes them, "
            "then run the same command again: it computes what is missing"
        )
    return (
        f"{chunks} wait for other parts. Part {part}/{num_parts} is done and on disk; the part "
        "that ends last assembles the chunks. If one of them failed, run it again"
    )


def print_next_commands(reports: Sequence[CacheReport]) -> None:
    """Print command lines that check the caches and train a student on them."""
    caches = {report.split or "train": report.output_path for report in reports}
    for path in caches.values():
        print_text(f"check: logit_cache verify {shlex.quote(path)}")
    prefixes = {"train": "TRAIN_CACHE", "validation": "VALIDATION_CACHE"} | caches
    data = ", ".join(f"{split}: [{path}]" for split, path in prefixes.items())
    print_text(
        "next:  train_gpt_knowledge_distillation pretrained_checkpoint.restore_from_path=STUDENT "
        + shlex.quote(f"model.data.data_prefix={{{data}}}")
    )


def estimate_cost(config: ComputeTopkLogitsConfig) -> None:
    """Run the teacher on a few records of each dataset and print disk, time and memory of all.

    Writes nothing.

    Raises:
        ConfigError, DataError: something the user gave cannot work.
    """
    with open_run(config) as run:
        teacher = Teacher(run)
        for job in run.jobs:
            _estimate(run, job, teacher)


def _estimate(run: Run, job: Job, teacher: Teacher) -> None:
    """Run the teacher on a few examples; the first replica's writer prints the costs of all."""
    num_records = len(job.indices)
    size = min(NUM_PROBES, num_records)
    chosen = np.random.default_rng(0).choice(job.indices, size, replace=False)
    records = [job.dataset[index] for index in sorted(chosen.tolist())]
    examples = [record for record in records if isinstance(record, Example)]
    if not examples:
        raise nothing_to_train(job, Counter(map(str, records)))
    teacher.finish(teacher.start(examples[:2]))
    started_s = time.perf_counter()
    rows = teacher.finish(teacher.start(examples))
    probe_s = time.perf_counter() - started_s
    if not (run.groups.is_writer and run.groups.data_rank == 0):
        return
    cache = job.config.cache
    lines = lines_of(job.config.output_path)
    builder = ChunkBuilder(ChunkSummary(0, 0))
    for row in rows:
        line = lines.write(encode(row, cache.codec, cache.stored_positions))
        builder.add(trimmed(row), len(line))
    probe = builder.summary
    scale = num_records / size
    tokens = scale * probe.tokens
    file_bytes = scale * probe.bytes + BYTES_PER_LINE * num_records
    chunk_bytes = max(map(len, job.chunks)) / num_records * file_bytes
    seconds = scale * probe_s / run.groups.data_size
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    gpu = ""
    if run.groups.device.type == "cuda":
        gpu = f", {size_text(torch.cuda.max_memory_allocated())} on its GPU"
    print_table(
        [
            (
                "cache",
                f"{job.config.output_path}, {num_records:,} records in {len(job.chunks)} chunks",
            ),
            (
                "tokens",
                f"{tokens:,.0f} ({scale * probe.loss_tokens:,.0f} in the loss)",
            ),
            *quality(probe, job.config.top_k),
            (
                "disk",
                f"{size_text(file_bytes)}, {size_text(chunk_bytes)} more meanwhile",
            ),
            (
                "time",
                f"{timedelta(seconds=round(seconds))} on {run.groups.data_size} data-parallel ranks "
                f"({tokens / seconds:,.0f} tokens/s)",
            ),
            ("memory of a rank", f"{size_text(memory)}{gpu}"),
        ]
    )
    warn_of_kept_mass(probe, job.config)


def quality(total: ChunkSummary, top_k: int) -> list[tuple[str, str]]:
    """Return lines about the kept ids; none if no token is in the loss."""
    tokens = total.target_tokens
    if not tokens:  # all segments are other parts'
        return []
    return [
        (
            f"mass of the kept ids (at most {top_k})",
            f"{total.kept_mass_sum / tokens:.4f}",
        ),
        ("label among the kept ids", f"{total.label_in_topk / tokens:.4f}"),
    ]


def warn_of_kept_mass(total: ChunkSummary, config: ComputeTopkLogitsConfig) -> None:
    """Say what to do if the kept ids hold little of the teacher's probability."""
    kept_mass = total.kept_mass_sum / max(1, total.target_tokens)
    if not total.target_tokens or kept_mass >= POOR_KEPT_MASS:
        return
    log.warning(
        "warning: the kept ids hold %.1f%% of the teacher's probability: train with support=tail, "
        "or with support=sampled and cache.tail_samples=4; a larger top_k (now %d) or cache.top_p, "
        "or a lower cache.min_probability keeps more. support=renormalize sees nothing outside "
        "them: with it keep sft_loss_weight above 0",
        100 * kept_mass,
        config.top_k,
    )
