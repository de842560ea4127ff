"""Stage 1: run a teacher over datasets and cache its top-k logits.

`_compute` is the loop. Each replica of the teacher claims segments, which are runs of consecutive
records, and computes them in batches; processes beside it tokenize the next records and encode the
previous ones. Records alone decide what is computed together, never the number of ranks, and every
row carries the index of its record from the file to the cache.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from nemo_kd.batch import Example
from nemo_kd.cache.layout import CacheLayout
from nemo_kd.cache.segment import Segment, SegmentPublisher
from nemo_kd.cache.writer import CacheWriter
from nemo_kd.config.teacher import ComputeTopkLogitsConfig
from nemo_kd.mcore.groups import ProcessGroups
from nemo_kd.run.collective import POLL_S, on_rank_zero, shared_store
from nemo_kd.run.interruption import (
    Interruption,
    Requeue,
    Watchdog,
    follow_the_main_process,
)
from nemo_kd.run.metrics import Progress, resolved_config, save_config
from nemo_kd.teacher.job import Job, Run, check_records, open_run
from nemo_kd.teacher.model import Pass, Teacher
from nemo_kd.teacher.reports import (
    CacheReport,
    estimate_cost,
    open_progress,
    path_beside,
    print_next_commands,
    report_cache,
)

Records = list[Example | str]


def compute_topk_logits(config: ComputeTopkLogitsConfig) -> list[CacheReport]:
    """Run stage 1: write every chunk of the requested range that is not complete yet.

    Returns:
        One report per dataset, on every rank; none for `dry_run`.

    Raises:
        ConfigError, DataError, CacheError: something the user gave cannot work; raised before the
            teacher is loaded.
        Requeue: a signal or the time limit stopped the run; the same call continues it.
    """
    if config.dry_run:
        estimate_cost(config)
        return []
    with open_run(config) as run, contextlib.ExitStack() as stack:
        interruption = stack.enter_context(
            Interruption(config.exp_manager.max_time_per_run, dist.get_rank())
        )
        for job in run.jobs:
            job.missing = on_rank_zero(partial(_open_cache, job, stack))
        for job in run.jobs:
            check_records(job)
        timeout_s = 60 * config.trainer.distributed_timeout_minutes
        watchdog = stack.enter_context(Watchdog(timeout_s, dist.get_rank()))
        teacher = None
        if any(job.missing for job in run.jobs):
            with watchdog.pause("loading the teacher"):
                teacher = Teacher(run, watchdog.step)
        reports = []
        for job in run.jobs:
            started_s = time.monotonic()
            if teacher is not None and job.missing:
                _compute(run, job, teacher, interruption, watchdog)
            seconds = time.monotonic() - started_s
            with watchdog.pause("assembling chunks"):
                reports.append(on_rank_zero(partial(report_cache, job, seconds)))
        if dist.get_rank() == 0 and all(report.is_complete for report in reports):
            print_next_commands(reports)
        dist.barrier()  # the store may end with the process of rank 0
    return reports


def _open_cache(job: Job, stack: contextlib.ExitStack) -> list[Segment]:
    """Lock the cache, and return its missing segments; rank 0 calls it.

    Raises:
        CacheError: the cache cannot be written.
    """
    layout = CacheLayout(job.config.output_path)
    job.writer = CacheWriter(
        layout, job.manifest, job.chunks, job.config.part_number()
    )
    stack.callback(job.writer.close)
    save_config(path_beside(job, "config.yaml"), resolved_config(job.config))
    return job.writer.missing_segments()


def _compute(
    run: Run,
    job: Job,
    teacher: Teacher,
    interruption: Interruption,
    watchdog: Watchdog,
) -> None:
    """Compute this replica's share of the missing segments.

    Raises:
        Requeue: on every rank, once all started segments are published and some are left.
    """
    store = shared_store("compute_topk_logits")
    queue = SegmentQueue(store, job.missing, run.groups, interruption)
    previous: tuple[Segment, Records, Pass] | None = None
    with contextlib.ExitStack() as stack:
        progress = open_progress(run, job, store)
        stack.callback(progress.close)
        publisher = None
        if run.groups.is_writer:
            layout = CacheLayout(job.config.output_path)
            publisher = stack.enter_context(
                SegmentPublisher(layout, job.manifest, _computed_with(job.config))
            )
        waiting_since_s = time.perf_counter()
        for segment, records in _read_ahead(job, queue):
            progress.add(data_wait_s=time.perf_counter() - waiting_since_s)
            if not queue.should_continue():
                break
            started = teacher.start(
                [record for record in records if isinstance(record, Example)]
            )
            # A GPU copies one segment's results to the host while it computes the next.
            if previous is not None:
                _publish(teacher, previous, publisher, progress)
                chunk = previous[0][0]
                if (
                    job.writer is not None
                    and segment is not None
                    and segment[0] > chunk
                ):
                    with watchdog.pause("assembling chunks"):
                        job.writer.assemble_complete()
            previous = None if segment is None else (segment, records, started)
            waiting_since_s = time.perf_counter()
        if previous is not None:
            _publish(teacher, previous, publisher, progress)
        if publisher is not None:
            publisher.close()
            _count_published(publisher, progress)
        progress.report()
        reason = queue.wait_for_all(watchdog)
        progress.finish()
    if reason is not None:
        raise Requeue(reason)


def _publish(
    teacher: Teacher,
    computed: tuple[Segment, Records, Pass],
    publisher: SegmentPublisher | None,
    progress: Progress,
) -> None:
    """Pass a segment's rows to the process that encodes and writes them."""
    segment, records, started = computed
    rows = iter(teacher.finish(started))
    if publisher is None:
        return
    rows_and_reasons = [
        record if isinstance(record, str) else next(rows) for record in records
    ]
    publisher.publish(
        segment, rows_and_reasons, max_tokens_per_batch=teacher.max_tokens
    )
    progress.add(**teacher.counts(started))
    _count_published(publisher, progress)


def _count_published(publisher: SegmentPublisher, progress: Progress) -> None:
    """Count what reached the disk since the last call, and how long the publisher blocked."""
    for summary in publisher.done:
        progress.add(
            cached_tokens=summary.tokens,
            cached_loss_tokens=summary.target_tokens,
            kept_mass_sum=summary.kept_mass_sum,
            bytes=summary.bytes,
        )
    publisher.done.clear()
    progress.add(data_wait_s=publisher.waited_s)
    publisher.waited_s = 0.0


def _computed_with(config: ComputeTopkLogitsConfig) -> dict[str, Any]:
    """Return what rounding depends on besides the weights; the manifest records it."""
    model = config.model
    return {
        "max_tokens_per_batch": config.max_tokens_per_batch,
        "micro_batch_size": model.micro_batch_size,
        "packing": config.data.packing,
        "tensor_model_parallel_size": model.tensor_model_parallel_size,
        "pipeline_model_parallel_size": model.pipeline_model_parallel_size,
        "context_parallel_size": model.context_parallel_size,
        "precision": config.trainer.precision,
        "torch": torch.__version__,
    }


@dataclass
class SegmentQueue:
    """Segments to compute, claimed one at a time by replicas through a shared counter.

    A slow replica claims fewer segments and delays nobody. Ranks that must step together (one
    replica, or several under expert parallelism) follow their first rank, which claims one segment
    per lane. Uses the store only, no collectives.

    Args:
        store: keys of this queue.
        interruption: asked on every rank before each segment; the reason of one stops all.
    """

    store: dist.Store
    segments: Sequence[Segment]
    groups: ProcessGroups
    interruption: Interruption

    def __post_init__(self) -> None:
        self._leader_rank = dist.get_process_group_ranks(self.groups.lockstep)[0]
        self._is_leader = self._leader_rank == dist.get_rank()
        self._num_steps = 0

    def claims(self) -> Iterator[Segment | None]:
        """Yield this lane's segments; None where only other lanes got one. May run ahead."""
        lanes = self.groups.lockstep_lanes
        for turn in itertools.count():
            key = f"claim/{self._leader_rank}/{turn}"
            if self._is_leader:
                self.store.set(key, str(self.store.add("next", lanes) - lanes))
            first = int(self.store.get(key))
            if first >= len(self.segments):
                return
            mine = first + self.groups.lane
            yield self.segments[mine] if mine < len(self.segments) else None

    def should_continue(self) -> bool:
        """Return True if the next claimed segment should be computed.

        All ranks that step together get the same answer.
        """
        key = f"go/{self._leader_rank}/{self._num_steps}"
        self._num_steps += 1
        if self.interruption.reason is not None:
            self.store.set("stopped", self.interruption.reason)
        if self._is_leader:
            self.store.set(key, "stop" if self.store.check(["stopped"]) else "go")
        return self.store.get(key) == b"go"

    def wait_for_all(self, watchdog: Watchdog) -> str | None:
        """Wait until all ranks are done; return the reason if one of them stopped early.

        The launcher ends the ranks left by one that dies; the watchdog ends one that hangs.
        """
        self.store.add("finished", 1)
        while self.store.add("finished", 0) < dist.get_world_size():
            watchdog.step("waiting for other ranks")
            time.sleep(POLL_S)
        if self.store.check(["stopped"]):
            return self.store.get("stopped").decode()
        return None


def _read_ahead(
    job: Job, queue: SegmentQueue
) -> Iterable[tuple[Segment | None, Records]]:
    """Return the claimed segments with their records, read by processes beside this one."""
    num_workers = job.config.data.num_workers
    return DataLoader(
        _Segments(job),
        batch_size=None,
        sampler=queue.claims(),
        num_workers=num_workers,
        prefetch_factor=1 if num_workers else None,
        # A spawned process would import everything again.
        multiprocessing_context="fork" if num_workers else None,
        collate_fn=lambda item: item,
        worker_init_fn=follow_the_main_process,
    )


@dataclass
class _Segments(Dataset[tuple[Segment | None, Records]]):
    """Records by segment; a lane without a segment gets None and no records."""

    job: Job

    def __getitem__(self, segment: Segment | None) -> tuple[Segment | None, Records]:
        if segment is None:
            return None, []
        rendered = self.job.rendered
        assert rendered is not None
        records = [rendered[index] for index in segment[1]]
        # After reading, so that no segment holds records of a file that changed.
        self.job.dataset.records.check_unchanged()
        return segment, records
