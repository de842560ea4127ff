"""Speed of training steps, and their wait for data."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from nemo_kd.batch import Batch
from nemo_kd.flops import ForwardFlops, peak_flops
from nemo_kd.run.metrics import Counters

GIB = 2**30
TRAINING_FLOPS = 3
"""Multiple of the forward pass: backward doubles it. Recomputation does not count."""


class WatchedLoader:
    """A data loader that measures how long the training waits for it, and can be closed.

    Attributes:
        waited_s: seconds spent in `next` since the loader was made.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader
        self.waited_s = 0.0
        self._batches: Any = None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        self._batches = iter(self.loader)
        while True:
            started_s = time.perf_counter()
            try:
                batch = next(self._batches)
            except StopIteration:
                return
            finally:
                self.waited_s += time.perf_counter() - started_s
            yield batch

    def close(self) -> None:
        """End the processes that read ahead; they ignore signals, so Python would wait forever."""
        if self.loader.num_workers and self._batches is not None:
            self._batches._shutdown_workers()  # noqa: SLF001 - torch offers no public way


class StepCounts(NamedTuple):
    """Counts of a step, which are summed over the replicas."""

    tokens: float
    positions: float
    flops: float
    wait_s: float
    replicas: float


class StepMeter:
    """Measures one training step at a time; validation and checkpoints in between do not count.

    Args:
        all_train: all weights are trained; with frozen ones MFU is not measured.

    Attributes:
        counted: of the last step, by the names of Counters; a replica waited `data_wait_s` on
            average.
        totals: the same of all steps since this object was made.
    """

    def __init__(
        self,
        flops: ForwardFlops,
        device: torch.device,
        context_size: int,
        precision: str,
        all_train: bool,
    ) -> None:
        self.flops = flops
        self.device = device
        self.context_size = context_size
        on_gpu = device.type == "cuda"
        peak = (
            peak_flops(torch.cuda.get_device_name(device), precision)
            if on_gpu and all_train
            else None
        )
        self.peak_flops = None if peak is None else peak * dist.get_world_size()
        self.counted: dict[str, float] = {}
        self.totals = Counters()
        self._started_s = self._wait_s = self._waited_before_s = 0.0

    def start(self, waited_s: float) -> None:
        """Begin a step; `waited_s` is the wait for all data until now."""
        self._started_s = time.perf_counter()
        self._wait_s = waited_s - self._waited_before_s
        self._waited_before_s = waited_s

    def counts(self, batches: Sequence[Batch]) -> torch.Tensor:
        """Return this rank's `StepCounts`, to be summed over the replicas before `metrics`."""
        lengths = [length for batch in batches for length in batch.lengths_B.tolist()]
        positions = self.context_size * sum(batch.tokens_BS.numel() for batch in batches)
        flops = sum(self.flops.example(length, 0) for length in lengths)
        counts = StepCounts(sum(lengths), positions, flops, self._wait_s, replicas=1)
        return torch.tensor(counts, dtype=torch.float64)

    def metrics(
        self, counts: Iterable[float], num_loss_tokens: float
    ) -> dict[str, float]:
        """Return metrics of the step that ends now from summed `counts`; memory is this rank's."""
        tokens, positions, flops, wait_s, replicas = StepCounts(*counts)
        step_time_s = time.perf_counter() - self._started_s
        wait_s /= replicas
        seconds = step_time_s + wait_s
        metrics = {
            "perf/step_time_s": step_time_s,
            "perf/tokens_per_s": tokens / seconds,
            "perf/loss_tokens_per_s": num_loss_tokens / seconds,
            "perf/data_wait_percent": 100 * wait_s / seconds,
            "perf/padding_percent": 100 * (1 - tokens / positions),
            "perf/peak_memory_gib": self._peak_bytes() / GIB,
        }
        total_flops = TRAINING_FLOPS * (
            flops + num_loss_tokens * self.flops.per_loss_token
        )
        if self.peak_flops is not None:
            metrics["perf/mfu_percent"] = 100 * total_flops / seconds / self.peak_flops
        self.counted = {
            "tokens": tokens,
            "padding_tokens": positions - tokens,
            "loss_tokens": num_loss_tokens,
            "flops": total_flops,
            "data_wait_s": wait_s,
        }
        self.totals += Counters(steps=1, **self.counted)
        return metrics

    def _peak_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
