"""What stage 1 is going to cost, from a short probe: `logit_cache plan` and `compute_topk_logits --dry-run`."""

from __future__ import annotations

import logging
import os
import resource
import time
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import psutil
import torch

from nemo_kd.batch import Example
from nemo_kd.cache.index import BYTES_PER_LINE
from nemo_kd.cache.layout import CacheLayout
from nemo_kd.cache.lines import lines_of
from nemo_kd.cache.record import encode
from nemo_kd.config.teacher import ComputeTopkLogitsConfig
from nemo_kd.teacher.job import Job, Run, nothing_to_train, open_run
from nemo_kd.teacher.model import Teacher
from nemo_kd.teacher.summary import advice
from nemo_kd.terminal import print_table, size_text

log = logging.getLogger(__name__)

NUM_PROBES, NUM_WARM_UPS = 48, 2
NUM_MEASURED_RECORDS = 2000


@dataclass(frozen=True)
class Probe:
    """Sums over the probed records, on the rank of a replica that writes.

    Attributes:
        seconds: of the teacher; encoding happens beside it.
        file_bytes: of the lines; loss_tokens: in them.
        computed_tokens: padding included.
    """

    records: int
    seconds: float
    file_bytes: int
    tokens: int
    computed_tokens: int
    loss_tokens: int
    kept_tokens: int
    kept_mass: float


@dataclass(frozen=True)
class Records:
    """Means over a sample of records.

    Attributes:
        tokens: that the teacher reads; stored_tokens: up to the last one in the loss; seconds: of tokenization.
    """

    tokens: float
    stored_tokens: float
    loss_tokens: float
    seconds: float


def plan_cache(config: ComputeTopkLogitsConfig) -> None:
    """Runs the teacher on some records spread over each dataset and prints what the whole of it takes; writes nothing.

    Raises:
        ConfigError, DataError: something the user gave cannot work.
    """
    with open_run(config) as run:
        started_s = time.perf_counter()
        samples = [_measure_records(job) for job in run.jobs]
        measured_s = time.perf_counter() - started_s
        teacher = run.load_teacher()
        start_up_s = time.time() - _started_at() - measured_s
        for job, records in zip(run.jobs, samples, strict=True):
            probe = _probe(run, job, teacher)
            if run.groups.is_writer and run.groups.data_rank == 0:
                print_table(
                    [("layout", run.layout()), *_estimates(run, job, probe, records, start_up_s)]
                )
                loss_tokens = max(1, probe.loss_tokens)
                kept_ids = probe.kept_tokens / loss_tokens
                warning = advice(
                    probe.kept_mass / loss_tokens, kept_ids, job.config.top_k, job.config.cache
                )
                if warning:
                    log.warning("warning: %s", warning)


def _started_at() -> float:
    """When the command was started: this process, or the one that launched the ranks."""
    process = psutil.Process()
    launcher = process.parent() if "TORCHELASTIC_RUN_ID" in os.environ else None
    return min(
        process.create_time(), launcher.create_time() if launcher is not None else float("inf")
    )


def _indices(job: Job) -> range:
    return range(job.chunks[0][0], job.chunks[-1][-1] + 1)


def _sample(job: Job, size: int) -> list[Example]:
    """Up to `size` of the job's records, spread at random, without those that make no example."""
    indices = _indices(job)
    chosen = np.random.default_rng(0).choice(indices, min(size, len(indices)), replace=False)
    return [
        record
        for index in sorted(chosen.tolist())
        if isinstance(record := job.dataset[index], Example)
    ]


def _measure_records(job: Job) -> Records:
    num_records = min(NUM_MEASURED_RECORDS, len(_indices(job)))
    started_s = time.perf_counter()
    examples = _sample(job, num_records)
    if not examples:
        raise nothing_to_train(job)
    seconds = time.perf_counter() - started_s
    return Records(
        tokens=sum(example.num_tokens for example in examples) / num_records,
        stored_tokens=sum(int(np.flatnonzero(example.loss_mask_S)[-1]) + 1 for example in examples)
        / num_records,
        loss_tokens=sum(example.num_loss_tokens for example in examples) / num_records,
        seconds=seconds / num_records,
    )


def _probe(run: Run, job: Job, teacher: Teacher) -> Probe:
    lines, cache = lines_of(job.config.output_path), job.config.cache
    examples = _sample(job, NUM_PROBES)
    teacher.rows(examples[:NUM_WARM_UPS])
    started_s = time.perf_counter()
    started = teacher.start(examples)
    rows = teacher.finish(started)
    seconds = time.perf_counter() - started_s
    targets = [row.loss_rows() for row in rows]
    return Probe(
        records=len(examples),
        seconds=seconds,
        file_bytes=sum(len(lines.write(encode(row, cache.codec, cache.positions))) for row in rows),
        tokens=sum(example.num_tokens for example in examples),
        computed_tokens=started.computed_tokens,
        loss_tokens=sum(example.num_loss_tokens for example in examples),
        kept_tokens=sum(int((part.topk_token_ids_PK >= 0).sum()) for part in targets),
        kept_mass=sum(float((1 - part.tail_mass_PT[:, 0]).sum()) for part in targets),
    )


def _estimates(
    run: Run, job: Job, probe: Probe, records: Records, start_up_s: float
) -> list[tuple[str, str]]:
    num_records, data_size = len(_indices(job)), run.groups.data_size
    tokens, loss_tokens = records.tokens * num_records, records.loss_tokens * num_records
    stored_tokens = records.stored_tokens * num_records
    # The probe's records may be longer or shorter than the dataset's: bytes follow loss tokens, time follows tokens.
    file_bytes = (
        probe.file_bytes / max(1, probe.loss_tokens) * loss_tokens + BYTES_PER_LINE * num_records
    )
    compute_s = probe.seconds / max(1, probe.tokens) * tokens / data_size
    seconds = (
        start_up_s + records.seconds * num_records / torch.distributed.get_world_size() + compute_s
    )
    largest_chunk = max(map(len, job.chunks)) / num_records * file_bytes
    segment_bytes = min(job.config.cache.segment_examples, num_records) / num_records * file_bytes
    host_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + segment_bytes
    folder, num_shards = CacheLayout(job.config.output_path).folder, job.config.part_number()[1]
    return [
        *([("split", job.split)] if job.split else []),
        *(
            [("shards", f"{num_shards}; what follows is for all of them together")]
            if num_shards > 1
            else []
        ),
        ("records", f"{num_records:,} in {len(job.chunks)} chunks"),
        ("tokens", f"{stored_tokens:,.0f} ({loss_tokens:,.0f} in the loss)"),
        ("padding", f"{1 - probe.tokens / max(1, probe.computed_tokens):.1%}"),
        (
            f"mass of the kept ids (at most {job.config.top_k})",
            f"{probe.kept_mass / max(1, probe.loss_tokens):.4f}",
        ),
        ("bytes per token", f"{file_bytes / max(1.0, stored_tokens):,.1f}"),
        (
            "disk",
            f"{size_text(file_bytes)}, and {size_text(largest_chunk)} more while a chunk is put together, in {folder}",
        ),
        (
            "time",
            f"{timedelta(seconds=round(seconds))} on {data_size} data-parallel ranks ({seconds:,.0f} s)",
        ),
        ("tokens per second", f"{tokens / max(1e-9, compute_s):,.0f}"),
        ("memory of a rank", size_text(host_bytes) + _device_memory(run)),
        ("probed", f"{probe.records:,} records in {probe.seconds:.1f} s"),
    ]


def _device_memory(run: Run) -> str:
    if run.groups.device.type != "cuda":
        return ""
    return f", {size_text(torch.cuda.max_memory_allocated())} on its GPU"
