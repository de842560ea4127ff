"""Stage 1: runs a teacher over datasets and caches its top-k logits.

The loop is `_work`: each replica of the teacher claims segments, runs of consecutive records, and computes them in
batches of its own, while processes beside it tokenize what comes next and encode what came before. What is computed
together depends on the records alone, not on the ranks; and every row carries the index of its example from the file to
the cache.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store
from torch.utils.data import DataLoader, Dataset

from nemo_kd.batch import Example
from nemo_kd.cache.layout import CacheError, CacheLayout
from nemo_kd.cache.publisher import SegmentPublisher
from nemo_kd.cache.writer import CacheWriter, Segment
from nemo_kd.config.teacher import ComputeTopkLogitsConfig
from nemo_kd.data.dataset import Skipped, TokenizedDataset
from nemo_kd.interruption import Interruption, Requeue, ignore_signals
from nemo_kd.teacher.job import Job, Run, check_records, open_run
from nemo_kd.teacher.model import Pass, Teacher
from nemo_kd.teacher.plan import plan_cache, print_table
from nemo_kd.teacher.progress import TeacherProgress
from nemo_kd.teacher.work_list import WorkList
from nemo_kd.watchdog import Watchdog

log = logging.getLogger(__name__)

Records = list[Example | Skipped]


@dataclass(frozen=True)
class Output:
    """One cache that is being written.

    Attributes:
        missing: this shard's segments that are not there yet.
        store: keys that belong to this cache and this run of the command.
        writer: on rank 0 of every shard.
    """

    job: Job
    missing: list[Segment]
    store: Store
    writer: CacheWriter | None
    num_complete: int


def compute_topk_logits(config: ComputeTopkLogitsConfig) -> None:
    """Runs stage 1: writes every chunk of the asked range that is not complete yet.

    Raises:
        ConfigError, DataError, CacheError: something the user gave cannot work; before the teacher is loaded.
        Requeue: it was told to stop, or its time is over; the same call continues.
    """
    if config.dry_run:
        plan_cache(config)
        return
    with open_run(config) as run, contextlib.ExitStack() as stack:
        interruption = stack.enter_context(Interruption(config.exp_manager.max_time_per_run))
        outputs = [_open_output(job, stack) for job in run.jobs]
        totals = [check_records(output.job, output.missing) for output in outputs]
        watchdog = stack.enter_context(Watchdog(60 * config.trainer.distributed_timeout_minutes))
        teacher = run.load_teacher(watchdog.step) if any(output.missing for output in outputs) else None
        for output, total in zip(outputs, totals, strict=True):
            if teacher is not None and output.missing:
                _work(run, output, teacher, total, interruption, watchdog)
            if output.writer is not None:
                _report(output)


def _open_output(job: Job, stack: contextlib.ExitStack) -> Output:
    """Takes the cache's lock on rank 0 and tells all ranks what is missing.

    Raises:
        CacheError: on every rank, what rank 0 found against writing.
    """
    writer, missing, problem, number = None, list[Segment](), "", 0
    store = _get_default_store()
    if torch.distributed.get_rank() == 0:
        number = store.add("compute_topk_logits", 1)
        try:
            writer = CacheWriter(
                CacheLayout(job.config.output_path), job.manifest, job.chunks, job.config.shard_number()
            )
            stack.callback(writer.close)
            missing = writer.missing_segments()
        except CacheError as error:
            problem = str(error)
    box: list[Any] = [missing, problem, number]
    torch.distributed.broadcast_object_list(box, src=0)
    missing, problem, number = box
    if problem:
        raise CacheError(problem)
    num_complete = len(job.chunks) - len(writer.missing) if writer is not None else 0
    return Output(job, missing, PrefixStore(f"compute_topk_logits/{number}", store), writer, num_complete)


def _work(
    run: Run, output: Output, teacher: Teacher, total: Totals, interruption: Interruption, watchdog: Watchdog
) -> None:
    """Computes missing segments, this replica's share of them, until none is left.

    Raises:
        Requeue: on every rank, when everything claimed is published and some is not claimed yet.
    """
    groups, config = run.groups, output.job.config
    interruption.share(output.store, torch.distributed.get_rank())
    work = WorkList(output.store, output.missing, groups, lambda: interruption.reason is not None)
    loader = DataLoader(
        _Segments(output.job.dataset),
        batch_size=None,
        sampler=work.claims(),
        num_workers=config.data.num_workers,
        prefetch_factor=1 if config.data.num_workers else None,
        collate_fn=_unchanged,
        worker_init_fn=ignore_signals,
    )
    with contextlib.ExitStack() as stack:
        publisher = None
        if groups.is_writer:
            publisher = stack.enter_context(SegmentPublisher(CacheLayout(config.output_path), output.job.manifest))
        progress = stack.enter_context(TeacherProgress(run, output, total))
        assembler = stack.enter_context(_Assembler(output.writer))
        before: tuple[Segment, Records, Pass] | None = None
        for segment, records in progress.waiting_for(loader):
            if not work.goes_on():
                break
            started = teacher.start([record for record in records if isinstance(record, Example)])
            # On a GPU the results of one segment come to the host while the next one is computed.
            if before is not None:
                _publish(teacher, before, publisher, progress)
                assembler.look(up_to=before[0][0])
            before = (segment, records, started) if segment is not None else None
        if before is not None:
            _publish(teacher, before, publisher, progress)
        if publisher is not None:
            publisher.close()
        stopped = work.wait_for_all(torch.distributed.get_world_size(), watchdog.step)
    if stopped:
        raise Requeue(interruption.reason)


class _Segments(Dataset[tuple[Segment | None, list[Example | Skipped]]]):
    """The records of a segment, for processes that read ahead; None is the segment of a lane that has no more."""

    def __init__(self, dataset: TokenizedDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, segment: Segment | None) -> tuple[Segment | None, list[Example | Skipped]]:
        return segment, [] if segment is None else [self.dataset[index] for index in segment[1]]


class _Assembler:
    """Puts chunks together in a thread of the process that holds the cache's lock, while the teacher goes on."""

    def __init__(self, writer: CacheWriter | None) -> None:
        self._writer, self._threads, self._running = writer, ThreadPoolExecutor(max_workers=1), Future[None]()
        self._running.set_result(None)

    def look(self, up_to: int) -> None:
        """Starts to assemble what is complete among the chunks up to this one, unless that is going on.

        Raises:
            CacheError: what went wrong the last time.
        """
        if self._writer is not None and self._running.done():
            self._running.result()
            self._running = self._threads.submit(self._writer.assemble_complete, up_to)

    def finish(self) -> None:
        """Waits, then assembles all that is complete."""
        self._running.result()
        self._threads.shutdown()
        if self._writer is not None:
            self._writer.assemble_complete()
