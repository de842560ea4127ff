"""Which examples form which batch, as a pure function of seed, epoch and layout."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

FILLER = -1
"""A position that stands for no example: it fills up the last batch so that every rank takes part."""


def epoch_order(num_samples: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """Positions 0 to num_samples - 1 (int64) in the order of an epoch, the same on every rank and machine."""
    if not shuffle:
        return np.arange(num_samples, dtype=np.int64)
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_samples)


class TrainingBatches:
    """Every global batch of a run, this data-parallel rank's contiguous part of each, from `consumed_samples` on.

    An epoch is `steps_per_epoch` whole global batches; the rest of its order sits that epoch out. Setting
    `consumed_samples` continues a run where it stopped, on any number of ranks.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        steps_per_epoch: int,
        max_steps: int,
        seed: int,
        shuffle: bool,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> None:
        assert steps_per_epoch * global_batch_size <= num_samples
        self.num_samples, self.global_batch_size = num_samples, global_batch_size
        self.steps_per_epoch, self.max_steps = steps_per_epoch, max_steps
        self.seed, self.shuffle = seed, shuffle
        self.rank, self.per_rank = data_parallel_rank, global_batch_size // data_parallel_size
        self.consumed_samples = 0

    def __len__(self) -> int:
        return self.max_steps

    def __iter__(self) -> Iterator[list[int]]:
        ordered_epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.consumed_samples // self.global_batch_size, self.max_steps):
            epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
            if epoch != ordered_epoch:
                ordered_epoch, order = epoch, epoch_order(self.num_samples, self.seed, epoch, self.shuffle)
            start = step_of_epoch * self.global_batch_size + self.rank * self.per_rank
            yield order[start : start + self.per_rank].tolist()


class EvaluationBatches:
    """Every example once, in order, this rank's part of each global batch; the last one is filled up with `FILLER`."""

    def __init__(
        self, num_samples: int, global_batch_size: int, data_parallel_rank: int, data_parallel_size: int
    ) -> None:
        self.num_samples, self.global_batch_size = num_samples, global_batch_size
        self.rank, self.size = data_parallel_rank, data_parallel_size

    def __len__(self) -> int:
        return -(-self.num_samples // self.global_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, self.num_samples, self.global_batch_size):
            positions = list(range(start, min(start + self.global_batch_size, self.num_samples)))
            per_rank = -(-len(positions) // self.size)
            mine = positions[self.rank * per_rank : (self.rank + 1) * per_rank]
            yield mine + [FILLER] * (per_rank - len(mine))
