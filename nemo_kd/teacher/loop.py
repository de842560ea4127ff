"""Stage 1: runs a teacher over datasets and caches its top-k logits.

The loop is `_work`: each replica of the teacher claims segments, runs of consecutive records, and computes them in
batches of its own, while processes beside it tokenize what comes next and encode what came before. What is computed
together depends on the records alone, not on the ranks; and every row carries the index of its example from the file to
the cache.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import Store
from torch.utils.data import DataLoader, Dataset

from nemo_kd.batch import Example
from nemo_kd.cache.layout import CacheError, CacheLayout
from nemo_kd.cache.publisher import SegmentPublisher
from nemo_kd.cache.writer import CacheWriter, Segment
from nemo_kd.config import UserInputError
from nemo_kd.config.teacher import ComputeTopkLogitsConfig
from nemo_kd.data.dataset import Skipped, TokenizedDataset
from nemo_kd.run.collective import raise_together, shared_store
from nemo_kd.run.interruption import Interruption, Requeue, follow_the_main_process
from nemo_kd.run.watchdog import Watchdog
from nemo_kd.teacher.estimate import plan_cache
from nemo_kd.teacher.job import Job, Run, check_records, open_run
from nemo_kd.teacher.model import Pass, Teacher, TeacherError
from nemo_kd.teacher.progress import TeacherProgress, metrics_file
from nemo_kd.teacher.segment_queue import WorkList, wait_until
from nemo_kd.teacher.summary import Work, check_end, kept_mass_advice, next_commands, summary_lines
from nemo_kd.terminal import print_table, print_text

log = logging.getLogger(__name__)

SILENT_S = 8.0
USER_ERROR = 2

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
        timeout_s = 60 * config.trainer.distributed_timeout_minutes
        watchdog = stack.enter_context(Watchdog(timeout_s, torch.distributed.get_rank()))
        stack.enter_context(watchdog.explain_collective_errors())
        teacher = None
        if any(output.missing for output in outputs):
            with watchdog.pause("loading the teacher"):
                teacher = run.load_teacher(watchdog.step)
        for output, num_tokens in zip(outputs, totals, strict=True):
            started_s = time.monotonic()
            if teacher is not None and output.missing:
                with _one_rank_tells(output.store):
                    _work(run, output, teacher, num_tokens, interruption, watchdog)
            work = Work(num_tokens, time.monotonic() - started_s, output.num_complete)
            _finish(output, work, watchdog)
        if all(output.writer is not None and not output.writer.missing for output in outputs):
            print_text("\n".join(next_commands(run.jobs)))
        torch.distributed.barrier()  # the store may end with the process of rank 0


def _open_output(job: Job, stack: contextlib.ExitStack) -> Output:
    """Takes the cache's lock on rank 0 and tells all ranks what is missing.

    Raises:
        CacheError: on every rank, what rank 0 found against writing.
    """
    writer, missing, problem = None, list[Segment](), ""
    store = shared_store("compute_topk_logits")
    if torch.distributed.get_rank() == 0:
        try:
            metrics_file(job).close()  # whether it can be written shows now
            writer = CacheWriter(
                CacheLayout(job.config.output_path),
                job.manifest,
                job.chunks,
                job.config.part_number(),
            )
            stack.callback(writer.close)
            missing = writer.missing_segments()
        except UserInputError as error:
            problem = str(error)
        store.set("opened", "1")
    # All segments that are there are read: longer than a collective waits.
    wait_until(store, "opened", lambda: None)
    found: list[Any] = [missing, problem]
    torch.distributed.broadcast_object_list(found, src=0)
    missing, problem = found
    if problem:
        raise CacheError(problem)
    num_complete = len(job.chunks) - len(writer.missing) if writer is not None else 0
    return Output(job, missing, store, writer, num_complete)


def _work(
    run: Run,
    output: Output,
    teacher: Teacher,
    total_tokens: int,
    interruption: Interruption,
    watchdog: Watchdog,
) -> None:
    """Computes this replica's share of the missing segments.

    Raises:
        Requeue: on every rank, when all that was begun is published and something is left.
    """
    job, layout = output.job, CacheLayout(output.job.config.output_path)
    interruption.share(output.store, torch.distributed.get_rank())
    work = WorkList(output.store, output.missing, run.groups, lambda: interruption.reason)
    before: tuple[Segment, Records, Pass] | None = None
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(TeacherProgress(run, job, output.store, total_tokens))
        publisher = None
        if run.groups.is_writer:
            publisher = stack.enter_context(
                SegmentPublisher(layout, job.manifest, computed_with(job.config))
            )
        assembler = stack.enter_context(_Assembler(output.writer))
        for segment, records in progress.waiting_for(_read_ahead(job, work)):
            if not work.goes_on():
                break
            started = teacher.start([record for record in records if isinstance(record, Example)])
            # On a GPU the results of one segment come to the host while the next one is computed.
            if before is not None:
                _publish(teacher, before, publisher, progress)
                assembler.look(up_to=before[0][0])
            before = None if segment is None else (segment, records, started)
        if before is not None:
            _publish(teacher, before, publisher, progress)
        if publisher is not None:
            publisher.close()
            progress.published(publisher)
        progress.report()
        num_ranks = torch.distributed.get_world_size()
        reason = work.wait_for_all(num_ranks, lambda: watchdog.step("waiting for other ranks"))
        with watchdog.pause("putting chunks together"):
            assembler.finish()
    if reason is not None:
        raise Requeue(reason)


@contextlib.contextmanager
def _one_rank_tells(store: Store) -> Iterator[None]:
    """Let the first rank that fails on a file tell why; ranks that fail after it, mostly alike, end without a word."""
    try:
        yield
    except TeacherError:
        raise
    except (UserInputError, OSError):
        if store.add("failed", 1) > 1:
            time.sleep(SILENT_S)  # until the launcher ends this rank, after the one that tells
            sys.exit(USER_ERROR)
        raise


def _read_ahead(job: Job, work: WorkList) -> Iterable[tuple[Segment | None, Records]]:
    """The claimed segments with their records, tokenized by processes beside this one."""
    num_workers = job.config.data.num_workers
    return DataLoader(
        _Segments(job.dataset),
        batch_size=None,
        sampler=work.claims(),
        num_workers=num_workers,
        prefetch_factor=1 if num_workers else None,
        multiprocessing_context="fork"
        if num_workers
        else None,  # a spawned one imports everything anew
        collate_fn=_unchanged,
        worker_init_fn=follow_the_main_process,
    )


def _publish(
    teacher: Teacher,
    computed: tuple[Segment, Records, Pass],
    publisher: SegmentPublisher | None,
    progress: TeacherProgress,
) -> None:
    """Hands a segment's rows over to the process that encodes and writes them."""
    segment, records, started = computed
    rows = teacher.finish(started)
    if publisher is None:
        return
    remaining = iter(rows)
    rows_and_reasons = [
        record.reason if isinstance(record, Skipped) else next(remaining) for record in records
    ]
    publisher.publish(segment, rows_and_reasons, max_tokens_per_batch=started.max_tokens)
    progress.computed(started)
    progress.published(publisher)


def computed_with(config: ComputeTopkLogitsConfig) -> dict[str, Any]:
    """What rounding depends on besides the weights; the manifest records it."""
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


def _finish(output: Output, work: Work, watchdog: Watchdog) -> None:
    """Put the last chunks together, check what is on disk, and print the summary; every rank calls it.

    Raises:
        CacheError, DataError: on every rank, what rank 0 found wrong.
    """
    problem: UserInputError | None = None
    if output.writer is not None:
        try:
            with watchdog.pause("putting chunks together"):
                if work.num_tokens:
                    output.job.dataset.records.check_unchanged(read_all=True)
                output.writer.assemble_complete()
                waiting_for = check_end(output.job, output.writer)
            _print_summary(output.job, output.writer, work, waiting_for)
        except UserInputError as error:
            problem = error
        output.store.set("complete", "1")
    wait_until(
        output.store, "complete", lambda: watchdog.step("waiting for chunks to be put together")
    )
    raise_together(problem)


def _print_summary(job: Job, writer: CacheWriter, work: Work, waiting_for: str) -> None:
    print_table(summary_lines(job, writer.manifest, work))
    advice = kept_mass_advice(writer.manifest, job.config.cache)
    if advice:
        log.warning("warning: %s%s", f"{job.split}: " if job.split else "", advice)
    if waiting_for:
        log.warning("warning: this cache is not complete: %s", waiting_for)


class _Segments(Dataset[tuple[Segment | None, list[Example | Skipped]]]):
    """The records of a segment, for processes that read ahead; None is the segment of a lane that has no more."""

    def __init__(self, dataset: TokenizedDataset) -> None:
        self.dataset = dataset

    def __getitem__(
        self, segment: Segment | None
    ) -> tuple[Segment | None, list[Example | Skipped]]:
        if segment is None:
            return None, []
        records = [self.dataset[index] for index in segment[1]]
        self.dataset.records.check_unchanged()  # after they were read: no segment holds what a change has left
        return segment, records


class _Assembler:
    """Puts chunks together in a thread of the process that holds the cache's lock, while the teacher goes on."""

    def __init__(self, writer: CacheWriter | None) -> None:
        self._writer, self._threads, self._running = (
            writer,
            ThreadPoolExecutor(max_workers=1),
            Future[None](),
        )
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
        """Waits for what is going on.

        Raises:
            CacheError: as `look`.
        """
        self._running.result()

    def __enter__(self) -> _Assembler:
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown()


def _unchanged(item: Any) -> Any:
    return item
