"""How far stage 1 is: what the replicas count, and where rank 0's shows it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch.distributed import Store

from nemo_kd.batch import CachedExample
from nemo_kd.cache.layout import CacheLayout
from nemo_kd.config.model import GPTArchitecture
from nemo_kd.metrics import (
    ForwardFlops,
    MetricsFile,
    Progress,
    ProgressLine,
    SharedCounters,
    Sink,
    WandbSink,
    peak_flops,
)
from nemo_kd.teacher.job import Job, Run
from nemo_kd.teacher.model import Pass

T = TypeVar("T")


class TeacherProgress:
    """Counts this replica's work on one cache; the first replica's writer shows what all of them did.

    Args:
        store: keys that belong to this cache and this run of the command.
        total_tokens: of what is missing.
    """

    def __init__(self, run: Run, job: Job, store: Store, total_tokens: int) -> None:
        groups, settings = run.groups, run.config.exp_manager
        self._counts = groups.is_writer
        self._flops = forward_flops(run.pretrained.architecture)
        sinks: list[Sink] = []
        if groups.is_writer and groups.data_rank == 0:
            sinks = [ProgressLine(f"teacher, {job.split}" if job.split else "teacher", total_tokens)]
            sinks.append(MetricsFile(metrics_path(job)))
            if settings.create_wandb_logger:
                sinks.append(WandbSink({"name": run.config.name, **settings.wandb_logger_kwargs}))
        shared = SharedCounters(store, groups.data_rank, groups.data_size)
        peak = None
        if groups.device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(), run.config.trainer.precision)
        self._progress = Progress(
            total_tokens,
            settings.log_interval_s,
            sinks,
            shared,
            None if peak is None else peak * torch.distributed.get_world_size(),
        )

    def waiting_for(self, items: Iterable[T]) -> Iterator[T]:
        """The items; the time until each is there counts as waiting for data."""
        iterator, sentinel = iter(items), object()
        while True:
            started_s = time.perf_counter()
            item = next(iterator, sentinel)
            if item is sentinel:
                return
            self.waited(time.perf_counter() - started_s)
            yield item  # type: ignore[misc]

    def waited(self, seconds: float) -> None:
        """Counts time in which the teacher had nothing to do."""
        if self._counts:
            self._progress.add(data_wait_s=seconds)

    def computed(self, started: Pass, rows: Sequence[CachedExample]) -> None:
        """Counts a pass whose rows are there."""
        if not self._counts:
            return
        tokens = sum(example.num_tokens for example in started.examples)
        loss_tokens = sum(example.num_loss_tokens for example in started.examples)
        in_loss = [row.example.loss_mask_S > 0 for row in rows]
        self._progress.add(
            examples=len(started.examples),
            tokens=tokens,
            loss_tokens=loss_tokens,
            padding_tokens=started.computed_tokens - tokens,
            flops=sum(self._flops.example(one.num_tokens, one.num_loss_tokens) for one in started.examples),
        )
