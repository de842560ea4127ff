"""Groups of examples that are computed together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

MAX_PADDING = 0.05


def form_batches(
    lengths: Sequence[int],
    max_examples: int | None,
    max_tokens: int | None,
    packed: bool,
    multiple_of: int = 1,
) -> list[list[int]]:
    """Group the positions in `lengths` into batches, each position once, long examples first.

    A batch holds at most `max_examples` examples and `max_tokens` tokens, padding included; a
    longer example is alone. Packed examples lie end to end; first-fit decreasing (Johnson 1974)
    fills the batches. Padded examples are joined with neighbours in length. With `max_tokens`, less
    than `MAX_PADDING` of a padded batch is padding. The result depends on the lengths alone.
    """
    by_length = sorted(
        range(len(lengths)), key=lambda position: (-lengths[position], position)
    )
    batches: list[list[int]] = []
    sums: list[int] = []  # of every batch's lengths
    for position in by_length:
        for number in range(len(batches)) if packed else range(len(batches))[-1:]:
            batch = batches[number]
            tokens = sums[number] + lengths[position]
            longest = lengths[batch[0]]
            size = len(batch) + 1
            room = tokens if packed else size * -(-longest // multiple_of) * multiple_of
            is_dense = packed or tokens > (1 - MAX_PADDING) * size * longest
            fits = max_tokens is None or (room <= max_tokens and is_dense)
            if fits and (max_examples is None or len(batch) < max_examples):
                batch.append(position)
                sums[number] = tokens
                break
        else:
            batches.append([position])
            sums.append(lengths[position])
    return batches


@dataclass(frozen=True)
class MicroBatching:
    """Cut of a global batch into micro-batches, and this data-parallel rank's share of them.

    Every rank gets the same number, some of them empty: ranks run each step of the pipeline
    together.

    Attributes:
        micro_batch_size: examples of each micro-batch, where `max_tokens` is None.
        max_tokens: most tokens of a micro-batch, padding included; a longer example is alone.
        packed, multiple_of: as `form_batches`.
    """

    data_rank: int
    data_size: int
    micro_batch_size: int
    max_tokens: int | None = None
    packed: bool = False
    multiple_of: int = 1

    def share(
        self, positions: Sequence[int], num_tokens: Callable[[int], int]
    ) -> list[list[int]]:
        """Return this rank's micro-batches of the global batch; all ranks pass equal arguments.

        Args:
            num_tokens: of the example at a position; not called without `max_tokens`.
        """
        if self.max_tokens is None:
            per_rank = -(-len(positions) // self.data_size)
            mine = positions[self.data_rank * per_rank : (self.data_rank + 1) * per_rank]
            starts = range(0, per_rank, self.micro_batch_size)
            return [list(mine[start : start + self.micro_batch_size]) for start in starts]
        lengths = [num_tokens(position) for position in positions]
        batches = form_batches(
            lengths, None, self.max_tokens, self.packed, self.multiple_of
        )
        batches = _whole_rounds(batches, lengths, self.data_size)
        # Ranks get neighbours in size, because the first to finish waits for the others.
        return [
            [positions[place] for place in batch]
            for batch in batches[self.data_rank :: self.data_size]
        ]


def _whole_rounds(
    batches: list[list[int]], lengths: Sequence[int], num_ranks: int
) -> list[list[int]]:
    """Halve the largest batches, or add empty ones, up to a multiple of `num_ranks`."""

    def tokens(batch: list[int]) -> int:
        return sum(lengths[place] for place in batch)

    batches = list(batches)
    while len(batches) % num_ranks:
        largest = max(
            (batch for batch in batches if len(batch) > 1), key=tokens, default=None
        )
        if largest is None:
            batches.append([])
        else:
            batches.remove(largest)
            batches += [largest[::2], largest[1::2]]
    return sorted(batches, key=tokens, reverse=True)
