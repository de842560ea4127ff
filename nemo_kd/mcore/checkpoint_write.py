"""Write distributed checkpoints: every rank its files, at once or while training continues."""

from __future__ import annotations

import gc
import io
import multiprocessing
import zlib
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
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from nemo_kd.mcore.optimizer import sharding_metadata
from nemo_kd.run.collective import on_every_rank, on_rank_zero, raise_together
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


def gather_to_first(value: Any) -> list[Any]:
    """Return the values of all ranks on rank 0, an empty list on the others."""
    is_first = torch.distributed.get_rank() == 0
    values: list[Any] = [None] * torch.distributed.get_world_size() if is_first else []
    torch.distributed.gather_object(value, values or None)
    return values


class CheckpointWrite(TorchDistSaveShardedStrategy):
    """A distributed checkpoint in progress into a new folder; every rank creates one.

    In the background, the constructor returns after the snapshot. It copies a GPU's tensors to host
    memory; a forked process keeps those of the CPU. That process writes this rank's files, and
    ends with this one. The copies are pinned memory, which a fork shares, so they are kept here
    until it is done. Otherwise `finish` writes the files, in this process.

    It is the strategy that Megatron asks to write. Megatron's own would start a manager process in
    every rank, which costs seconds and memory and outlives a killed rank.

    Raises:
        OSError: on every rank, the folder cannot be made or the plain values cannot be written.
    """

    def __init__(
        self, state: dict[str, Any], folder: Path, in_background: bool = True
    ) -> None:
        super().__init__("torch_dist", 1)
        self.folder = folder
        self.in_background = in_background
        self.finalize_fns: list[Any] = []  # Megatron appends what completes the folder
        self._has_begun = False
        self._planner = _Planner()
        # No copies ahead: torch would open a CUDA stream for them, which a forked process must not.
        self._writer = _Writer(folder, per_thread_copy_ahead=0)
        on_rank_zero(lambda: folder.mkdir(parents=True))
        try:
            dist_checkpointing.save(
                state,
                str(folder),
                sharded_strategy=self,
                content_metadata=sharding_metadata(),
                async_sharded_save=True,
            )
        except OSError as error:
            if not self._has_begun:
                raise_together(error)  # the others wait in `async_save`
            raise

    def async_save(self, sharded_state_dict: Any, *_: Any) -> Any:
        # Megatron 0.19 keeps plain values among the sharded ones, but reads this file, too, which
        # earlier versions write and need.
        is_first = torch.distributed.get_rank() == 0
        if is_first and "common_state" in sharded_state_dict:
            file = io.BytesIO()
            torch.save(sharded_state_dict.pop("common_state").data, file)
            (self.folder / "common.pt").write_bytes(file.getbuffer())
        self._has_begun = True
        raise_together(None)  # unless rank 0 could not write the plain values
        parts: dict[str, list[Any]] = {}
        for part in nested_values(sharded_state_dict):
            if is_main_replica(part.replica_id):
                key = part.unique_key if isinstance(part, ShardedObject) else part.key
                parts.setdefault(key, []).append(part)
        self._planner.set_up_planner(
            mcore_to_pyt_state_dict(parts), self._writer.storage_meta(), is_first
        )
        self._writer.set_up_storage_writer(is_first)
        local = self._writer.prepare_local_plan(self._planner.create_local_plan())
        plans = gather_to_first(local)
        if is_first:
            plans, self._metadata = self._planner.create_global_plan(plans)
            plans = self._writer.prepare_global_plan(plans)
        received: list[Any] = [None]
        torch.distributed.scatter_object_list(received, plans)
        self._plan = self._planner.finish_plan(received[0])
        if self.in_background:
            self._planner.take_snapshot(self._plan)
            context = multiprocessing.get_context("fork")
            self._results, sender = context.Pipe(duplex=False)
            self._process = context.Process(
                target=self._write_and_send, args=(sender,)
            )
            self._process.start()
            sender.close()
        return self

    def is_running(self) -> bool:
        """Return True while this rank's files are being written; no communication."""
        return self.in_background and not self._results.poll()

    def finish(self) -> dict[str, FileSum]:
        """Wait for the writers of all ranks and complete the folder; every rank takes part.

        Returns:
            On rank 0 the writers' files; `.metadata`, `metadata.json` and others lie beside them.

        Raises:
            OSError: on every rank, a file could not be written.
        """
        outcomes = gather_to_first(on_every_rank(self._outcome))
        results = [written for written, _ in outcomes]
        on_rank_zero(lambda: self._writer.finish(self._metadata, results))
        for complete in self.finalize_fns:
            complete()
        return {name: found for _, sums in outcomes for name, found in sums.items()}

    def _write(self) -> list[WriteResult]:
        """Write this rank's files."""
        if not self._plan.items:
            return []
        try:
            return self._writer.write_data(self._plan, self._planner).value()
        except RuntimeError as error:  # torch.save's, where its file cannot be written
            cause = error.__context__
            raise (
                cause if isinstance(cause, OSError) else OSError(str(error))
            ) from error

    def _write_and_send(self, sender: Connection) -> None:
        """Write in the forked process, which must not touch the GPU, not even to free memory."""
        gc.disable()
        end_with_parent()
        torch.set_num_threads(
            1
        )  # a fork has none of torch's threads: it would wait for them
        try:
            results = self._write()
            names = {result.storage_data.relative_path for result in results}
            sums = {name: file_sum(self.folder / name) for name in sorted(names)}
            sender.send((results, sums))
        except OSError as error:
            sender.send(error)

    def _outcome(self) -> tuple[list[WriteResult], dict[str, FileSum]]:
        """Return what was written; wait for the forked process, or write now."""
        if not self.in_background:
            return self._write(), {}
        try:
            outcome = self._results.recv()
        except EOFError:
            outcome = ChildProcessError("the process that writes it was ended")
        self._process.join()
        self._planner.snapshot.clear()
        if isinstance(outcome, OSError):
            raise outcome
        return outcome


class _Planner(MCoreSavePlanner):
    """Planner that returns the snapshot of this rank's values, once taken."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, dedup_replicated_tensors=False)
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
