"""Stage 1: run a teacher over datasets and cache its top-k logits.

`_compute` is the loop. Each replica of the teacher claims segments, which are runs of consecutive
records, and computes them in batches; processes beside it tokenize the next records and encode the
previous ones. Records alone decide what is computed together, never the number of ranks, and every
row carries the index of its record from the file to the cache.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from nemo_kd.batch import Example
from nemo_kd.cache.layout import CacheLayout
from nemo_kd.cache.publisher import SegmentPublisher
from nemo_kd.cache.segment import Segment
from nemo_kd.cache.writer import CacheWriter
from nemo_kd.config.errors import UserInputError
from nemo_kd.config.teacher import ComputeTopkLogitsConfig
from nemo_kd.data.dataset import TokenizedDataset
from nemo_kd.mcore.groups import ProcessGroups
from nemo_kd.run.collective import POLL_S, on_rank_zero, shared_store
from nemo_kd.run.interruption import Interruption, Requeue, follow_the_main_process
from nemo_kd.run.resolved_config import resolved_config, save_config
from nemo_kd.run.watchdog import Watchdog
from nemo_kd.teacher.estimate import estimate_cost
from nemo_kd.teacher.job import Job, Run, check_records, open_run
from nemo_kd.teacher.model import Pass, Teacher, TeacherError
from nemo_kd.teacher.progress import (
    CacheReport,
    TeacherProgress,
    config_path,
    metrics_file,
    next_commands,
    report_cache,
)
from nemo_kd.terminal import print_text

log = logging.getLogger(__name__)

SILENT_S = 8.0
USER_ERROR = 2

Records = list[Example | str]


@dataclass(frozen=True)
class Output:
    """One cache that is being written.

    Attributes:
        missing: segments that this part still has to compute.
        num_complete: chunks that were complete before this run.
        store: keys of this cache and this run of the command.
        writer: on rank 0 of every part.
    """

    job: Job
    missing: list[Segment]
    num_complete: int
    store: dist.Store
    writer: CacheWriter | None


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
            Interruption(config.exp_manager.max_time_per_run)
        )
        outputs = [_open_output(job, stack) for job in run.jobs]
        totals = [check_records(output.job, output.missing) for output in outputs]
        timeout_s = 60 * config.trainer.distributed_timeout_minutes
        watchdog = stack.enter_context(Watchdog(timeout_s, dist.get_rank()))
        stack.enter_context(watchdog.explain_collective_errors())
        teacher = None
        if any(output.missing for output in outputs):
            with watchdog.pause("loading the teacher"):
                teacher = run.load_teacher(watchdog.step)
        reports = []
        for output, num_tokens in zip(outputs, totals, strict=True):
            started_s = time.monotonic()
            if teacher is not None and output.missing:
                with _first_error_only(output.store):
                    _compute(run, output, teacher, num_tokens, interruption, watchdog)
            seconds = time.monotonic() - started_s
            reports.append(_finish(output, num_tokens, seconds, watchdog))
        if dist.get_rank() == 0 and all(report.is_complete for report in reports):
            print_text("\n".join(next_commands(reports)))
        dist.barrier()  # the store may end with the process of rank 0
    return reports


def _open_output(job: Job, stack: contextlib.ExitStack) -> Output:
    """Lock the cache on rank 0, and find its missing segments for all ranks.

    Raises:
        CacheError: on every rank; the cache cannot be written.
    """
    writers: list[CacheWriter] = []

    def open_writer() -> tuple[list[Segment], int]:
        metrics_file(job).close()  # fails here if it cannot be written
        layout = CacheLayout(job.config.output_path)
        writer = CacheWriter(layout, job.manifest, job.chunks, job.config.part_number())
        writers.append(writer)
        stack.callback(writer.close)
        save_config(config_path(job), resolved_config(job.config))
        missing = writer.missing_segments()
        return missing, len(job.chunks) - len(writer.missing)

    # Reading the published segments may take longer than a collective waits.
    missing, num_complete = on_rank_zero(open_writer, meanwhile=lambda: None)
    store = shared_store("compute_topk_logits")
    return Output(job, missing, num_complete, store, writers[0] if writers else None)


def _compute(
    run: Run,
    output: Output,
    teacher: Teacher,
    total_tokens: int,
    interruption: Interruption,
    watchdog: Watchdog,
) -> None:
    """Compute this replica's share of the missing segments.

    Raises:
        Requeue: on every rank, once all started segments are published and some are left.
    """
    job = output.job
    interruption.share(output.store, dist.get_rank())
    queue = SegmentQueue(
        output.store, output.missing, run.groups, lambda: interruption.reason
    )
    previous: tuple[Segment, Records, Pass] | None = None
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(
            TeacherProgress(run, job, output.store, total_tokens)
        )
        publisher = None
        if run.groups.is_writer:
            layout = CacheLayout(job.config.output_path)
            publisher = stack.enter_context(
                SegmentPublisher(layout, job.manifest, _computed_with(job.config))
            )
        assembler = stack.enter_context(_Assembler(output.writer))
        for segment, records in progress.waiting_for(_read_ahead(job, queue)):
            if not queue.should_continue():
                break
            started = teacher.start(
                [record for record in records if isinstance(record, Example)]
            )
            # A GPU copies one segment's results to the host while it computes the next.
            if previous is not None:
                _publish(teacher, previous, publisher, progress)
                assembler.start(up_to=previous[0][0])
            previous = None if segment is None else (segment, records, started)
        if previous is not None:
            _publish(teacher, previous, publisher, progress)
        if publisher is not None:
            publisher.close()
            progress.published(publisher)
        progress.report()
        reason = queue.wait_for_all(lambda: watchdog.step("waiting for other ranks"))
        with watchdog.pause("assembling chunks"):
            assembler.wait()
    if reason is not None:
        raise Requeue(reason)


def _publish(
    teacher: Teacher,
    computed: tuple[Segment, Records, Pass],
    publisher: SegmentPublisher | None,
    progress: TeacherProgress,
) -> None:
    """Pass a segment's rows to the process that encodes and writes them."""
    segment, records, started = computed
    rows = iter(teacher.finish(started))
    if publisher is None:
        return
    rows_and_reasons = [
        record if isinstance(record, str) else next(rows) for record in records
    ]
    publisher.publish(segment, rows_and_reasons, max_tokens_per_batch=started.max_tokens)
    progress.computed(started)
    progress.published(publisher)


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


def _finish(
    output: Output, num_tokens: int, seconds: float, watchdog: Watchdog
) -> CacheReport:
    """Assemble the last chunks, check what is on disk and report it; every rank calls this.

    Raises:
        CacheError, DataError: on every rank, what rank 0 found wrong.
    """

    def finish() -> CacheReport:
        job = output.job
        writer = output.writer
        assert writer is not None
        with watchdog.pause("assembling chunks"):
            if num_tokens:
                job.dataset.records.check_unchanged()
            writer.assemble_complete()
        return report_cache(job, writer, output.num_complete, num_tokens, seconds)

    return on_rank_zero(
        finish, lambda: watchdog.step("waiting for rank 0 to assemble chunks")
    )


@contextlib.contextmanager
def _first_error_only(store: dist.Store) -> Iterator[None]:
    """Let the first rank that fails on a file report it; others mostly fail for the same reason."""
    try:
        yield
    except TeacherError:
        raise
    except (UserInputError, OSError):
        if store.add("failed", 1) > 1:
            time.sleep(SILENT_S)  # until the launcher ends this rank
            sys.exit(USER_ERROR)
        raise


class SegmentQueue:
    """Segments to compute, claimed one at a time by replicas through a shared counter.

    A slow replica claims fewer segments and delays nobody. Ranks that must step together (one
    replica, or several under expert parallelism) follow their first rank, which claims one segment
    per lane. Uses the store only, no collectives.

    Args:
        store: keys of this queue.
        stop_reason: called on every rank before each segment, so that each can share its own
            reason; the first rank's answer decides. None continues.
    """

    def __init__(
        self,
        store: dist.Store,
        segments: Sequence[Segment],
        groups: ProcessGroups,
        stop_reason: Callable[[], str | None],
    ) -> None:
        self._store = store
        self._segments = segments
        self._groups = groups
        self._stop_reason = stop_reason
        self._leader_rank = dist.get_process_group_ranks(groups.lockstep)[0]
        self._is_leader = self._leader_rank == dist.get_rank()
        self._num_steps = 0

    def claims(self) -> Iterator[Segment | None]:
        """Yield this lane's segments; None where only other lanes got one. May run ahead."""
        turn = 0
        lanes = self._groups.lockstep_lanes
        while True:
            key = f"claim/{self._leader_rank}/{turn}"
            if self._is_leader:
                self._store.set(key, str(self._store.add("next", lanes) - lanes))
            first = int(self._store.get(key))
            if first >= len(self._segments):
                return
            mine = first + self._groups.lane
            yield self._segments[mine] if mine < len(self._segments) else None
            turn += 1

    def should_continue(self) -> bool:
        """Return True if the next claimed segment should be computed.

        All ranks that step together get the same answer.
        """
        key = f"go/{self._leader_rank}/{self._num_steps}"
        self._num_steps += 1
        reason = self._stop_reason()
        if self._is_leader:
            if reason is not None:
                self._store.set("stopped", reason)
            self._store.set(key, "stop" if reason is not None else "go")
        return self._store.get(key) == b"go"

    def wait_for_all(self, meanwhile: Callable[[], None]) -> str | None:
        """Wait until all ranks are done; return the reason if one of them stopped early.

        The launcher ends the ranks left by one that dies; the watchdog ends one that hangs.
        """
        self._store.add("finished", 1)
        while self._store.add("finished", 0) < dist.get_world_size():
            meanwhile()
            time.sleep(POLL_S)
        return (
            self._store.get("stopped").decode()
            if self._store.check(["stopped"])
            else None
        )


def _read_ahead(
    job: Job, queue: SegmentQueue
) -> Iterable[tuple[Segment | None, Records]]:
    """Return the claimed segments with their records, tokenized by processes beside this one."""
    num_workers = job.config.data.num_workers
    return DataLoader(
        _Segments(job.dataset),
        batch_size=None,
        sampler=queue.claims(),
        num_workers=num_workers,
        prefetch_factor=1 if num_workers else None,
        # A spawned process would import everything again.
        multiprocessing_context="fork" if num_workers else None,
        collate_fn=lambda item: item,
        worker_init_fn=follow_the_main_process,
    )


class _Segments(Dataset[tuple[Segment | None, Records]]):
    """Records by segment; a lane without a segment gets None and no records."""

    def __init__(self, dataset: TokenizedDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, segment: Segment | None) -> tuple[Segment | None, Records]:
        if segment is None:
            return None, []
        records = [self.dataset[index] for index in segment[1]]
        # After reading, so that no segment holds records of a file that changed.
        self.dataset.records.check_unchanged()
        return segment, records


class _Assembler:
    """Assembles chunks in a thread of the process that holds the cache's lock."""

    def __init__(self, writer: CacheWriter | None) -> None:
        self._writer = writer
        self._threads = ThreadPoolExecutor(max_workers=1)
        self._running: Future[None] | None = None

    def start(self, up_to: int) -> None:
        """Assemble the complete chunks up to this one, unless the thread is still at work.

        Raises:
            CacheError: from the previous time.
        """
        if self._writer is None or (
            self._running is not None and not self._running.done()
        ):
            return
        self.wait()
        self._running = self._threads.submit(self._writer.assemble_complete, up_to)

    def wait(self) -> None:
        """Wait for the thread.

        Raises:
            CacheError: a chunk cannot be assembled.
        """
        if self._running is not None:
            self._running.result()

    def __enter__(self) -> _Assembler:
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown()
