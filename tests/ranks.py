"""Gloo ranks for tests: started once per world size, used by every test that needs that many.

A test sends an importable function; each rank runs it inside a live process group and returns a picklable result.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import multiprocessing.connection
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psutil
import torch

CONTEXT = multiprocessing.get_context("forkserver")
"""Forks processes from one that has imported what takes seconds to import."""
CONTEXT.set_forkserver_preload(
    ["tests.forked_runs", "nemo_kd.student.job", "nemo_kd.teacher.job", "transformers"]
)


class Ranks:
    """`world_size` processes joined by gloo through a store that the test process serves."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._pipes: list[multiprocessing.connection.Connection] = []

    def run(
        self, function: Callable[..., Any], *args: Any, timeout_s: float = 180
    ) -> list[Any]:
        """The results of `function(*args)` on every rank, in rank order. A hang or an error fails the test."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        results: list[Any] = []
        for rank, pipe in enumerate(self._pipes):
            # Once a rank has failed the others may wait for it forever: give them little time.
            failed = any(isinstance(result, _Failure) for result in results)
            if not pipe.poll(5 if failed else timeout_s):
                results.append(_Failure(f"rank {rank} gave no result within its time"))
                continue
            try:
                results.append(pipe.recv())
            except EOFError:
                results.append(_Failure(f"rank {rank} died"))
        failures = [
            result.message for result in results if isinstance(result, _Failure)
        ]
        if failures:
            self.stop()
            raise AssertionError("\n\n".join(failures))
        return results

    def stop(self) -> None:
        """Ends the processes; the next `run` starts new ones."""
        for process in self._processes:
            # With what it started: Megatron's checkpoints leave a process beside each rank.
            for one in (
                *psutil.Process(process.pid).children(recursive=True),
                process,
            ):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"
        # Port 0: the system picks a free one. A file store would do, but its `get` polls.
        self._store = torch.distributed.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )
        for rank in range(self.world_size):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(
                target=_serve, args=(rank, self.world_size, self._store.port, theirs)
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


class _Failure:
    def __init__(self, message: str) -> None:
        self.message = message


def _serve(
    rank: int, world_size: int, port: int, pipe: multiprocessing.connection.Connection
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="1",  # nobody asks there: the process group exists already
    )
    torch.set_num_threads(1)
    store = torch.distributed.TCPStore("127.0.0.1", port)
    torch.distributed.init_process_group(
        "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=120),
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            result = function(*args)
        except BaseException:  # noqa: BLE001 (whatever it is, the test has to show it)
            result = _Failure(f"rank {rank}:\n{traceback.format_exc()}")
        pipe.send(result)
        _let_go_of_models()


def _let_go_of_models() -> None:
    """What a test has trained would keep its process groups, each of which wakes a thread a hundred times a second."""
    from megatron.core.distributed import DistributedDataParallel

    from nemo_kd.mcore.optimizer import release

    kept = [one for one in gc.get_objects() if type(one) is DistributedDataParallel]
    if not kept:
        return
    while kept:
        release(kept.pop())
    gc.collect()
