"""Estimate the cost of stage 1 from a short probe: `logit_cache plan` and `--dry-run`."""

from __future__ import annotations

import logging
import resource
import time
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import psutil
import torch

from nemo_kd.batch import Example
from nemo_kd.cache.index import BYTES_PER_LINE
from nemo_kd.cache.layout import CacheLayout
from nemo_kd.cache.lines import lines_of
from nemo_kd.cache.record import encode
from nemo_kd.config.teacher import ComputeTopkLogitsConfig
from nemo_kd.run.ranks import find_ranks
from nemo_kd.teacher.job import Job, Run, nothing_to_train, open_run
from nemo_kd.teacher.model import Teacher
from nemo_kd.teacher.progress import kept_mass_advice
from nemo_kd.terminal import print_table, size_text

log = logging.getLogger(__name__)

NUM_PROBES = 48
NUM_WARM_UPS = 2
NUM_SAMPLES = 2000


class Probe(NamedTuple):
    """Measurements of the probed examples on a rank that writes, where rows arrive.

    Attributes:
        seconds: of the teacher; encoding runs beside it.
        num_bytes: of the encoded lines.
        computed_tokens: with padding.
        kept_ids, kept_mass: means over loss tokens.
    """

    num_records: int
    seconds: float
    num_bytes: int
    tokens: int
    computed_tokens: int
    loss_tokens: int
    kept_ids: float
    kept_mass: float


def estimate_cost(config: ComputeTopkLogitsConfig) -> None:
    """Run the teacher on a few records of each dataset and print disk, time and memory of all.

    Writes nothing.

    Raises:
        ConfigError, DataError: something the user gave cannot work.
    """
    with open_run(config) as run:
        started_s = time.perf_counter()
        samples = [_sample(job, NUM_SAMPLES) for job in run.jobs]
        sampling_s = time.perf_counter() - started_s
        teacher = run.load_teacher()
        start_up_s = time.time() - _command_start() - sampling_s
        num_sampled = sum(min(NUM_SAMPLES, len(job.indices)) for job in run.jobs)
        for job, sample in zip(run.jobs, samples, strict=True):
            if not sample:
                raise nothing_to_train(job)
            probe = _probe(job, teacher)
            if run.groups.is_writer and run.groups.data_rank == 0:
                _print_costs(
                    run, job, probe, sample, sampling_s / num_sampled, start_up_s
                )


def _command_start() -> float:
    """Return when the command started: this process, or the one that launched the ranks."""
    process = psutil.Process()
    launcher = process.parent() if find_ranks().launcher == "torchrun" else None
    return min(one.create_time() for one in (process, launcher) if one is not None)


def _sample(job: Job, size: int) -> list[Example]:
    """Return the examples among `size` records of the job, drawn at random."""
    size = min(size, len(job.indices))
    chosen = np.random.default_rng(0).choice(job.indices, size, replace=False)
    records = [job.dataset[index] for index in sorted(chosen.tolist())]
    return [record for record in records if isinstance(record, Example)]


def _probe(job: Job, teacher: Teacher) -> Probe:
    """Run the teacher on a few examples, and encode what it computed."""
    cache = job.config.cache
    examples = _sample(job, NUM_PROBES)
    teacher.rows(examples[:NUM_WARM_UPS])
    started_s = time.perf_counter()
    started = teacher.start(examples)
    rows = teacher.finish(started)
    seconds = time.perf_counter() - started_s
    lines = lines_of(job.config.output_path)
    targets = [row.loss_rows() for row in rows]
    loss_tokens = max(1, sum(example.num_loss_tokens for example in examples))
    return Probe(
        len(examples),
        seconds,
        sum(len(lines.write(encode(row, cache.codec, cache.positions))) for row in rows),
        max(1, sum(example.num_tokens for example in examples)),
        max(1, started.computed_tokens),
        loss_tokens,
        sum(int((target.topk_token_ids_PK >= 0).sum()) for target in targets)
        / loss_tokens,
        sum(float((1 - target.tail_mass_PT[:, 0]).sum()) for target in targets)
        / loss_tokens,
    )


def _print_costs(
    run: Run,
    job: Job,
    probe: Probe,
    sample: list[Example],
    seconds_per_record: float,
    start_up_s: float,
) -> None:
    """Print the costs of one dataset.

    Args:
        sample: examples among NUM_SAMPLES records.
        seconds_per_record: of tokenization.
        start_up_s: from the start of the command to the loaded teacher.
    """
    cache = job.config.cache
    # Probed records may be shorter than the others: bytes follow loss tokens, time follows tokens.
    num_records = len(job.indices)
    scale = num_records / min(NUM_SAMPLES, num_records)
    tokens = scale * sum(example.num_tokens for example in sample)
    loss_tokens = scale * sum(example.num_loss_tokens for example in sample)
    # Of an example the cache holds the tokens up to the last one in the loss.
    stored_tokens = scale * sum(
        int(np.flatnonzero(e.loss_mask_S)[-1]) + 1 for e in sample
    )
    file_bytes = (
        probe.num_bytes / probe.loss_tokens * loss_tokens + BYTES_PER_LINE * num_records
    )
    data_size = run.groups.data_size
    compute_s = probe.seconds / probe.tokens * tokens / data_size
    tokenize_s = seconds_per_record * num_records / torch.distributed.get_world_size()
    seconds = start_up_s + tokenize_s + compute_s
    chunk_bytes = max(map(len, job.chunks)) / num_records * file_bytes
    segment_bytes = min(cache.segment_examples, num_records) / num_records * file_bytes
    num_parts = job.config.part_number()[1]
    parts = f"{num_parts}; all values below are for all parts together"
    folder = CacheLayout(job.config.output_path).folder
    disk = f"{size_text(file_bytes)}, and {size_text(chunk_bytes)} more while a chunk is assembled"
    duration = timedelta(seconds=round(seconds))
    table = [
        ("layout", run.describe_ranks()),
        *([("split", job.split)] if job.split else []),
        *([("parts", parts)] if num_parts > 1 else []),
        ("records", f"{num_records:,} in {len(job.chunks)} chunks"),
        ("tokens", f"{stored_tokens:,.0f} ({loss_tokens:,.0f} in the loss)"),
        ("padding", f"{1 - probe.tokens / probe.computed_tokens:.1%}"),
        (f"mass of the kept ids (at most {job.config.top_k})", f"{probe.kept_mass:.4f}"),
        ("bytes per token", f"{file_bytes / max(1.0, stored_tokens):,.1f}"),
        ("disk", f"{disk}, in {folder}"),
        ("time", f"{duration} on {data_size} data-parallel ranks ({seconds:,.0f} s)"),
        ("tokens per second", f"{tokens / max(1e-9, compute_s):,.0f}"),
        ("memory of a rank", _memory(run, segment_bytes)),
        ("probed", f"{probe.num_records:,} records in {probe.seconds:.1f} s"),
    ]
    print_table(table)
    warning = kept_mass_advice(probe.kept_mass, probe.kept_ids, job.config.top_k, cache)
    if warning:
        log.warning("warning: %s", warning)


def _memory(run: Run, segment_bytes: float) -> str:
    host_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + segment_bytes
    text = size_text(host_bytes)
    if run.groups.device.type == "cuda":
        text += f", {size_text(torch.cuda.max_memory_allocated())} on its GPU"
    return text
