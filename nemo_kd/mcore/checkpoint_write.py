"""Distributed checkpoints that are written while training goes on."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import traceback
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from nemo_kd.mcore.optimizer import sharding_metadata

BLOCK_BYTES = 1 << 24
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class FileSum(NamedTuple):
    """What a file holds, as far as that can be told quickly."""

    num_bytes: int
    crc32: int


def file_sum(path: Path) -> FileSum:
    """Length and checksum; reads the whole file."""
    num_bytes, crc32 = 0, 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            num_bytes, crc32 = num_bytes + len(block), zlib.crc32(block, crc32)
    return FileSum(num_bytes, crc32)


class CheckpointWrite:
    """A distributed checkpoint on its way into an empty folder; every rank makes one.

    The constructor returns as soon as there is a snapshot: tensors of a GPU are copied to host memory, those of the CPU
    belong to a forked process from then on. That process writes this rank's files, and ends with this one. The copies
    are pinned memory, which a fork shares: they are kept here until it is done with them, lest something else gets them.
    """

    def __init__(self, state: dict[str, Any], folder: Path) -> None:
        self.folder = folder
        if torch.distributed.get_rank() == 0:
            folder.mkdir(parents=True)
        torch.distributed.barrier()
        # Megatron would start a manager process for its queue; the writer's results come through a file here.
        self._results: queue.Queue[Any] = queue.Queue()
        filesystem_async._results_queue = self._results
        try:
            self._request = dist_checkpointing.save(
                state, str(folder), content_metadata=sharding_metadata(), async_sharded_save=True
            )
        finally:
            filesystem_async._results_queue = None
        self._outcome = folder / f".outcome_{torch.distributed.get_rank()}"
        self._writer: Any = None
        self._buckets: Any = None
        if self._request.async_fn is not None:
            self._buckets = self._request.preload_fn()
            self._writer = multiprocessing.get_context("fork").Process(
                target=_write_files,
                args=(self._request.async_fn.args[0], self._buckets, self._outcome, os.getpid()),
                name="checkpoint writer",
            )
            self._writer.start()

    def is_running(self) -> bool:
        """Whether this rank's files are still being written; no communication."""
        return self._writer is not None and self._writer.is_alive()

    def finish(self) -> dict[str, FileSum]:
        """Waits for the writers of all ranks and completes the folder; every rank takes part.

        Returns:
            The files that the writers wrote; `common.pt`, `.metadata` and `metadata.json` lie beside them.

        Raises:
            torch.distributed.checkpoint.CheckpointException: on every rank, a file could not be written.
        """
        sums: dict[str, FileSum] = {}
        if self._writer is not None:
            self._writer.join()
            self._buckets = None
            results: Any = RuntimeError(f"the process that writes it ended with the status {self._writer.exitcode}")
            if self._outcome.exists():
                results, sums = pickle.loads(self._outcome.read_bytes())
                self._outcome.unlink()
            self._results.put(results)
        for finalize in self._request.finalize_fns:
            finalize()
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, sums)
        return {name: found for part in gathered for name, found in part.items()}


class _Results(list[Any]):
    """The queues that Megatron's function for one file reports to."""

    def put(self, result: Any) -> None:
        self.append(result)

    def get(self) -> None: ...

    def task_done(self) -> None: ...


def _write_files(transforms: list[Any], buckets: Iterable[Any], outcome: Path, parent: int) -> None:
    """Runs in the forked process: nothing here may touch the GPU, not even to free memory."""
    gc.disable()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed before that
        return
    written: dict[int, Any] = {}
    sums: dict[str, FileSum] = {}
    results: Any = written
    for number, bucket in enumerate(buckets):
        reported = _Results()
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, number, bucket, reported, reported, use_fsync=True
        )
        _, result = reported[0]
        if isinstance(result, Exception):
            results = RuntimeError("".join(traceback.format_exception_only(result)).strip())
            break
        written[number] = result
        sums[Path(bucket[0]).name] = file_sum(Path(bucket[0]))
    temporary = outcome.with_name(f"{outcome.name}.tmp")
    temporary.write_bytes(pickle.dumps((results, sums)))
    temporary.replace(outcome)
