"""Choose the examples of each batch, as a pure function of seed, epoch and layout."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

CHUNKS = "chunks"


def pass_order(
    chunk_sizes: Sequence[int], entropy: Sequence[int], shuffle: bool | str
) -> np.ndarray:
    """Return every position once (int64), in an order that only the arguments determine.

    Args:
        chunk_sizes: rows of each chunk; a chunk's positions follow those of the chunk before it.
        entropy: non-negative numbers that choose the order.
        shuffle: True shuffles all rows, `CHUNKS` the chunks and the rows inside each, False none.
    """
    num_rows = sum(chunk_sizes)
    if shuffle is False:
        return np.arange(num_rows, dtype=np.int64)
    random = np.random.Generator(np.random.PCG64(list(entropy)))
    if shuffle is True:
        return random.permutation(num_rows)
    starts = np.cumsum([0, *chunk_sizes])
    return np.concatenate(
        [
            starts[chunk] + random.permutation(chunk_sizes[chunk])
            for chunk in random.permutation(len(chunk_sizes))
        ]
    )


def shares(weights: Sequence[float], num_samples: int) -> list[int]:
    """Divide `num_samples` in proportion to the weights, by largest remainder (ties: the first)."""
    total = math.fsum(weights)
    exact = [weight / total * num_samples for weight in weights]
    result = [math.floor(share) for share in exact]
    by_remainder = sorted(
        range(len(weights)), key=lambda number: result[number] - exact[number]
    )
    for number in by_remainder[: num_samples - sum(result)]:
        result[number] += 1
    return result


@dataclass(frozen=True)
class SampleOrder:
    """Positions that each epoch draws from one or several consecutive sources.

    Without weights an epoch is a pass over the rows of all sources. With weights each source
    gives its share of every epoch and continues where the previous epoch stopped, pass after
    pass over its own rows, so that each row is drawn equally often.

    Attributes:
        source_chunks: rows of every chunk, one list a source.
        weights: one a source, or None.
        shuffle: as in `pass_order`; with weights, False interleaves sources evenly.
    """

    source_chunks: Sequence[Sequence[int]]
    weights: Sequence[float] | None
    seed: int
    shuffle: bool | str

    def epoch(self, epoch: int, num_samples: int) -> np.ndarray:
        """Return the positions (int64) of an epoch; every epoch must draw as many samples."""
        if self.weights is None:
            chunk_sizes = [size for sizes in self.source_chunks for size in sizes]
            return pass_order(chunk_sizes, (self.seed, epoch), self.shuffle)[
                :num_samples
            ]
        counts = shares(self.weights, num_samples)
        if self.shuffle is False:
            places = np.concatenate(
                [(np.arange(count) + 0.5) / count for count in counts if count]
            )
            sources = np.repeat(np.arange(len(counts)), counts)[
                np.argsort(places, kind="stable")
            ]
        else:
            random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            sources = random.permutation(np.repeat(np.arange(len(counts)), counts))
        order = np.empty(num_samples, dtype=np.int64)
        first = 0
        for number, (sizes, count) in enumerate(
            zip(self.source_chunks, counts, strict=True)
        ):
            order[sources == number] = first + self._drawn(
                number, epoch * count, count
            )
            first += sum(sizes)
        return order

    def _drawn(self, number: int, start: int, count: int) -> np.ndarray:
        """Return positions inside a source, from its `start`-th sample on over all epochs."""
        if not count:
            return np.empty(0, dtype=np.int64)
        chunk_sizes = self.source_chunks[number]
        num_rows = sum(chunk_sizes)
        passes = range(start // num_rows, (start + count - 1) // num_rows + 1)
        # numpy treats [seed, epoch] and [seed, epoch, 0] alike, so sources count from 1.
        drawn = [
            pass_order(
                chunk_sizes, (self.seed, number_of_pass, number + 1), self.shuffle
            )
            for number_of_pass in passes
        ]
        return np.concatenate(drawn)[start % num_rows :][:count]


@dataclass
class TrainingBatches:
    """Every global batch of a run from `consumed_samples` on, the same on every rank.

    An epoch is `steps_per_epoch` whole global batches; without weights it drops the rest of its
    order. Setting `consumed_samples` continues a run where it stopped, on any number of ranks.
    """

    order: SampleOrder
    global_batch_size: int
    steps_per_epoch: int
    max_steps: int
    consumed_samples: int = 0

    def __len__(self) -> int:
        return self.max_steps

    def __iter__(self) -> Iterator[list[int]]:
        ordered_epoch = -1
        order = np.empty(0, dtype=np.int64)
        for step in range(
            self.consumed_samples // self.global_batch_size, self.max_steps
        ):
            epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
            if epoch != ordered_epoch:
                ordered_epoch = epoch
                order = self.order.epoch(
                    epoch, self.steps_per_epoch * self.global_batch_size
                )
            start = step_of_epoch * self.global_batch_size
            yield order[start : start + self.global_batch_size].tolist()
