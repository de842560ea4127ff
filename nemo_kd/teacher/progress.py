"""How far stage 1 is: what the replicas count, and where rank 0's shows it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch.distributed import Store

from nemo_kd.cache.layout import CacheLayout
from nemo_kd.cache.publisher import SegmentPublisher
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
            sinks = [
                ProgressLine(f"teacher, {job.split}" if job.split else "teacher", total_tokens)
            ]
            sinks.append(metrics_file(job))
            if settings.create_wandb_logger:
                sinks.append(WandbSink({"name": run.config.name, **settings.wandb_logger_kwargs}))
        self._num_published, self._waited_s = 0, 0.0
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

    def computed(self, started: Pass) -> None:
        """Counts a pass whose rows are there."""
        tokens = sum(example.num_tokens for example in started.examples)
        self._progress.add(
            examples=len(started.examples),
            tokens=tokens,
            loss_tokens=sum(example.num_loss_tokens for example in started.examples),
            padding_tokens=started.computed_tokens - tokens,
            flops=sum(
                self._flops.example(one.num_tokens, one.num_loss_tokens) for one in started.examples
            ),
        )

    def published(self, publisher: SegmentPublisher) -> None:
        """Counts what has reached the disk since the last call, and the time that the publisher let the teacher wait."""
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
        """Tells the first replica how far this one is."""
        if self._counts:
            self._progress.report()

    def __enter__(self) -> TeacherProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._counts:
            self._progress.close()
        elif self._counts:  # a last report might fail too, and hide why
            for sink in self._progress.sinks:
                sink.close()


def metrics_file(job: Job) -> MetricsFile:
    """`train_CHUNK_ID.jsonl` -> `train_metrics.log`, for a shard `train_metrics_1_of_4.log`. No glob of chunks matches it.

    Raises:
        CacheError: it cannot be written.
    """
    layout, (shard, num_shards) = CacheLayout(job.config.output_path), job.config.part_number()
    folder = Path(job.config.exp_manager.explicit_log_dir or layout.folder)
    part = f"_{shard}_of_{num_shards}" if num_shards > 1 else ""
    path = folder / layout.manifest_name.replace("manifest.json", f"metrics{part}.log")
    with explained(path):
        return MetricsFile(path)
