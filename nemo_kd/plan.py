"""What stage 1 is going to cost, from a short probe: `logit_cache plan`."""

from __future__ import annotations

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
from nemo_kd.teacher import Job, Teacher, open_job

NUM_PROBES, NUM_WARM_UPS = 24, 2
NUM_MEASURED_RECORDS = 2000


@dataclass(frozen=True)
class Probe:
    """Sums over the probed micro-batches.

    Attributes:
        seconds: of one rank, from records to encoded lines.
        file_bytes: of the lines; loss_tokens: in them.
    """

    records: int
    seconds: float
    file_bytes: int
    tokens: int
    loss_tokens: int
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
    """Runs the teacher on some micro-batches spread over the dataset and prints what the whole of it takes.

    Raises:
        ConfigError, DataError: something the user gave cannot work.
    """
    with open_job(config) as job:
        indices = range(job.chunks[0][0], job.chunks[-1][-1] + 1)
        started_s = time.perf_counter()
        records = _measure_records(job, indices)
        measured_s = time.perf_counter() - started_s
        teacher = job.load_teacher()
        start_up_s = time.time() - _started_at() - measured_s
        batches = _micro_batches(job, indices)
        starts = np.random.default_rng(0).choice(len(batches), min(NUM_PROBES, len(batches)), replace=False)
        probed = [batches[start] for start in sorted(starts.tolist())]
        for batch in probed[:NUM_WARM_UPS]:
            _probe(job, teacher, [batch])
        probe = _probe(job, teacher, probed)
        if torch.distributed.get_rank() == 0:
            _print(job, indices, probe, records, start_up_s)


def _started_at() -> float:
    """When the command was started: this process, or the one that launched the ranks."""
    process = psutil.Process()
    launcher = process.parent() if "TORCHELASTIC_RUN_ID" in os.environ else None
    return min(process.create_time(), launcher.create_time() if launcher is not None else float("inf"))


def _measure_records(job: Job, indices: range) -> Records:
    sample = np.random.default_rng(0).choice(indices, min(NUM_MEASURED_RECORDS, len(indices)), replace=False)
    started_s = time.perf_counter()
    records = [job.dataset[int(index)] for index in sample]
    seconds = time.perf_counter() - started_s
    examples = [record for record in records if isinstance(record, Example)]
    return Records(
        tokens=sum(example.num_tokens for example in examples) / len(records),
        stored_tokens=sum(int(np.flatnonzero(example.loss_mask_S)[-1]) + 1 for example in examples) / len(records),
        loss_tokens=sum(example.num_loss_tokens for example in examples) / len(records),
        seconds=seconds / len(records),
    )


def _micro_batches(job: Job, indices: range) -> list[range]:
    size = job.config.model.micro_batch_size
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _probe(job: Job, teacher: Teacher, batches: list[range]) -> Probe:
    lines, cache = lines_of(job.config.output_path), job.config.cache
    file_bytes = tokens = loss_tokens = 0
    kept_mass, started_s = 0.0, time.perf_counter()
    for batch in batches:
        records = [job.dataset[index] for index in batch]
        for row in teacher.rows([record for record in records if isinstance(record, Example)]):
            file_bytes += len(lines.write(encode(row, cache.codec, cache.positions)))
            in_loss = row.example.loss_mask_S > 0
            tokens, loss_tokens = tokens + row.example.num_tokens, loss_tokens + int(in_loss.sum())
            kept_mass += float((1 - row.teacher.tail_mass_TS[0, in_loss]).sum())
    seconds = time.perf_counter() - started_s
    return Probe(sum(map(len, batches)), seconds, file_bytes, tokens, loss_tokens, kept_mass)


def _print(job: Job, indices: range, probe: Probe, records: Records, start_up_s: float) -> None:
    num_records, data_size = len(indices), job.groups.data_size
    tokens, loss_tokens = records.tokens * num_records, records.loss_tokens * num_records
    stored_tokens = records.stored_tokens * num_records
    # The probe's records may be longer or shorter than the dataset's: bytes follow loss tokens, time follows tokens.
    file_bytes = probe.file_bytes / max(1, probe.loss_tokens) * loss_tokens + BYTES_PER_LINE * num_records
    compute_s = probe.seconds / max(1, probe.tokens) * tokens / data_size
    seconds = start_up_s + records.seconds * num_records / torch.distributed.get_world_size() + compute_s
    largest_chunk = max(map(len, job.chunks)) / num_records * file_bytes
    segment_bytes = min(job.config.cache.segment_examples, num_records) / num_records * file_bytes
    host_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + segment_bytes
    folder = CacheLayout(job.config.output_path).folder
    lines = [
        ("records", f"{num_records:,} in {len(job.chunks)} chunks"),
        ("tokens", f"{stored_tokens:,.0f} ({loss_tokens:,.0f} in the loss)"),
        ("teacher mass kept", f"{probe.kept_mass / max(1, probe.loss_tokens):.4f}"),
        ("bytes per token", f"{file_bytes / max(1.0, stored_tokens):,.1f}"),
        ("disk", f"{_size(file_bytes)}, and {_size(largest_chunk)} more while a chunk is put together, in {folder}"),
        ("time", f"{timedelta(seconds=round(seconds))} on {data_size} data-parallel ranks ({seconds:,.0f} s)"),
        ("tokens per second", f"{tokens / max(1e-9, compute_s):,.0f}"),
        ("memory of a rank", _size(host_bytes) + _device_memory(job)),
        ("probed", f"{probe.records:,} records in {probe.seconds:.1f} s"),
    ]
    width = max(len(name) for name, _ in lines)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in lines), flush=True)


def _device_memory(job: Job) -> str:
    if job.groups.device.type != "cuda":
        return ""
    return f", {_size(torch.cuda.max_memory_allocated())} on its GPU"


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            return f"{num_bytes:,.0f} {unit}" if unit == "bytes" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError
