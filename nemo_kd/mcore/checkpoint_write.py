"""Write distributed checkpoints: every rank its files, at once or while training continues."""

from __future__ import annotations

import gc
import multiprocessing
import os
import zlib
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from nemo_kd.mcore.optimizer import sharding_metadata
from nemo_kd.run.collective import on_rank_zero, raise_together
from nemo_kd.run.interruption import end_with_parent

BLOCK_BYTES = 1 << 24


class FileSum(NamedTuple):
    """Length and checksum of a file."""

    num_bytes: int
    crc32: int


def file_sum(path: Path) -> FileSum:
    """Return length and checksum of a file; reads all of it."""
    num_bytes = 0
    crc32 = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            num_bytes += len(block)
            crc32 = zlib.crc32(block, crc32)
    return FileSum(num_bytes, crc32)


def save_sharded(state: dict[str, Any], folder: Path) -> None:
    """Write sharded tensors and plain values into the new folder `folder`; every rank calls it.

    Raises:
        OSError: on every rank, a file could not be written.
    """
    CheckpointWrite(state, folder, in_background=False).finish()


class CheckpointWrite:
    """A distributed checkpoint in progress into a new folder; every rank creates one.

    In the background, the constructor returns after the snapshot. It copies a GPU's tensors to host
    memory; a forked process keeps those of the CPU. That process writes this rank's files, and
    ends with this one. The copies are pinned memory, which a fork shares, so they are kept here
    until it is done. Otherwise `finish` writes the files, in this process.

    Raises:
        OSError: on every rank, the folder cannot be made or the plain values cannot be written.
    """

    def __init__(
        self, state: dict[str, Any], folder: Path, in_background: bool = True
    ) -> None:
        self.folder = folder
        on_rank_zero(lambda: folder.mkdir(parents=True))
        self._strategy = _Strategy(in_background)
        try:
            self._request = dist_checkpointing.save(
                state,
                str(folder),
                sharded_strategy=self._strategy,
                content_metadata=sharding_metadata(),
                async_sharded_save=True,
            )
        except OSError as error:
            if self._strategy.has_begun:  # all ranks have the error already
                raise
            raise_together(_naming(error, folder))  # the others wait in `async_save`

    def is_running(self) -> bool:
        """Return True while this rank's files are being written; no communication."""
        return self._strategy.is_running()

    def finish(self) -> dict[str, FileSum]:
        """Wait for the writers of all ranks and complete the folder; every rank takes part.

        Returns:
            The writers' files; `.metadata`, `metadata.json` and others lie beside them.

        Raises:
            OSError: on every rank, a file could not be written; names the file.
        """
        write, *complete = self._request.finalize_fns
        sums: dict[str, FileSum] = write()
        problem: OSError | None = None
        try:
            for function in complete:
                function()
        except OSError as error:  # on rank 0, while the others wait at a barrier
            problem = _naming(error, self.folder)
            torch.distributed.barrier()
        raise_together(problem)
        return sums


class _Request:
    """A started save; Megatron appends a function to the list that completes the folder."""

    def __init__(self, finish: Callable[[], Any]) -> None:
        self.finalize_fns = [finish]


class _Strategy(TorchDistSaveShardedStrategy):
    """Writes through torch's public planner and writer instead of Megatron's processes and queues.

    Megatron would start a manager process in every rank. It costs seconds and memory and outlives a
    killed rank.

    Attributes:
        has_begun: all ranks have reached this strategy.
    """

    def __init__(self, in_background: bool) -> None:
        super().__init__("torch_dist", 1)
        self.in_background = in_background
        self.has_begun = False
        self._planner = _Planner(flatten_state_dict=False, dedup_replicated_tensors=False)
        self._process: Any = None
        self._results: Connection | None = None

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Path, *_: Any) -> Any:
        self.has_begun = True
        raise_together(None)  # unless rank 0 could not write the plain values
        folder = Path(checkpoint_dir)
        is_first = torch.distributed.get_rank() == 0
        # No copies ahead: torch would open a CUDA stream for them, which a forked process must not.
        writer = _Writer(folder, thread_count=1, sync_files=True, per_thread_copy_ahead=0)
        self._planner.set_up_planner(
            _by_key(sharded_state_dict), writer.storage_meta(), is_first
        )
        writer.set_up_storage_writer(is_first)
        plan, metadata = _global_plan(self._planner, writer)
        if self.in_background:
            self._planner.take_snapshot(plan)
            self._start(writer, plan)

        def finish() -> dict[str, FileSum]:
            if self.in_background:
                outcome = self._outcome()
            else:
                outcome = _write(writer, plan, self._planner, folder, with_sums=False)
            return _complete(outcome, writer, metadata, folder)

        return _Request(finish)

    def is_running(self) -> bool:
        if self._results is None or not self._process.is_alive():
            return False
        return not self._results.poll()

    def _start(self, writer: _Writer, plan: SavePlan) -> None:
        context = multiprocessing.get_context("fork")
        self._results, sender = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_write_and_send,
            args=(sender, writer, plan, self._planner, Path(writer.path), os.getpid()),
            name="checkpoint writer",
        )
        self._process.start()
        sender.close()

    def _outcome(self) -> _Outcome:
        assert self._results is not None
        try:
            outcome: _Outcome = self._results.recv()
        except EOFError:
            outcome = _Outcome([], {}, None)
        self._process.join()
        self._results.close()
        self._planner.snapshot.clear()
        status = self._process.exitcode
        if status:
            error = ChildProcessError(
                f"the process that writes it ended with the status {status}"
            )
            return _Outcome([], {}, error)
        return outcome


class _Planner(MCoreSavePlanner):
    """Planner that returns the snapshot of this rank's values, once taken."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.snapshot: dict[MetadataIndex, Any] = {}

    def take_snapshot(self, plan: SavePlan) -> None:
        """Copy a GPU's values into pinned host memory; a fork keeps the CPU's."""
        for item in plan.items:
            value = super().resolve_data(item)
            if isinstance(value, torch.Tensor) and value.device.type != "cpu":
                copy = torch.empty_like(value, device="cpu", pin_memory=True)
                value = copy.copy_(value.detach(), non_blocking=True)
            self.snapshot[item.index] = value
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.index in self.snapshot:
            return self.snapshot[write_item.index]
        return super().resolve_data(write_item)


class _Writer(FileSystemWriter):
    """torch's writer, without the path of this machine in `.metadata`."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


class _Outcome(NamedTuple):
    """Result of writing one rank's files."""

    results: list[WriteResult]
    sums: dict[str, FileSum]
    error: OSError | None


def _by_key(state: Any) -> dict[str, Any]:
    """Return the parts that this rank writes, grouped by tensor, as torch's planner takes them."""
    parts: dict[str, list[Any]] = {}
    for part in nested_values(state):
        if is_main_replica(part.replica_id):
            key = part.unique_key if isinstance(part, ShardedObject) else part.key
            parts.setdefault(key, []).append(part)
    return mcore_to_pyt_state_dict(parts)


def _global_plan(planner: _Planner, writer: _Writer) -> tuple[SavePlan, Metadata | None]:
    """Return this rank's part of the plan and, on rank 0, the metadata of all ranks."""
    size = torch.distributed.get_world_size()
    is_first = torch.distributed.get_rank() == 0
    local = writer.prepare_local_plan(planner.create_local_plan())
    plans: list[Any] | None = [None] * size if is_first else None
    torch.distributed.gather_object(local, plans)
    metadata = None
    if plans is not None:
        plans, metadata = planner.create_global_plan(plans)
        plans = writer.prepare_global_plan(plans)
    received: list[Any] = [None]
    torch.distributed.scatter_object_list(received, plans)
    return planner.finish_plan(received[0]), metadata


def _write(
    writer: _Writer, plan: SavePlan, planner: _Planner, folder: Path, with_sums: bool
) -> _Outcome:
    """Write this rank's files."""
    if not plan.items:
        return _Outcome([], {}, None)
    try:
        results = writer.write_data(plan, planner).value()
        names = sorted({result.storage_data.relative_path for result in results})
        sums = {name: file_sum(folder / name) for name in names} if with_sums else {}
        return _Outcome(results, sums, None)
    except OSError as error:
        return _Outcome([], {}, _naming(error, folder))
    except RuntimeError as error:  # torch.save's, where its file cannot be written
        cause = error.__context__
        if isinstance(cause, OSError):
            return _Outcome([], {}, _naming(cause, folder))
        return _Outcome(
            [], {}, OSError(f"{folder}: {str(error).strip().splitlines()[0]}")
        )


def _write_and_send(
    sender: Connection,
    writer: _Writer,
    plan: SavePlan,
    planner: _Planner,
    folder: Path,
    parent: int,
) -> None:
    """Write in the forked process, which must not touch the GPU, not even to free memory."""
    gc.disable()
    end_with_parent(parent)
    sender.send(_write(writer, plan, planner, folder, with_sums=True))


def _complete(
    outcome: _Outcome, writer: _Writer, metadata: Metadata | None, folder: Path
) -> dict[str, FileSum]:
    """Gather the results; rank 0 writes `.metadata`. Return the checksums of all files."""
    raise_together(outcome.error)
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    is_first = torch.distributed.get_rank() == 0
    torch.distributed.gather_object(outcome.results, parts if is_first else None)

    def write_metadata() -> None:
        assert metadata is not None
        try:
            writer.finish(metadata, parts)
        except OSError as error:
            raise _naming(error, folder) from error

    on_rank_zero(write_metadata)
    sums: list[Any] = [None] * len(parts)
    torch.distributed.all_gather_object(sums, outcome.sums)
    return {name: found for part in sums for name, found in part.items()}


def _naming(error: OSError, folder: Path) -> OSError:
    """Return the error with a file name, which the system omits for open files."""
    if error.errno is None or error.filename is not None:
        return error
    return OSError(error.errno, error.strerror, str(folder))
