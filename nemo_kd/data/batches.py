"""Which examples are computed together."""

from __future__ import annotations

from collections.abc import Sequence

MAX_PADDING = 0.05


def form_batches(
    lengths: Sequence[int], max_examples: int | None, max_tokens: int | None, packed: bool, multiple_of: int = 1
) -> list[list[int]]:
    """Positions in `lengths` grouped into batches, every one once, long examples first.

    A batch holds at most `max_examples` examples and `max_tokens` tokens, padding included; an example longer than that
    is alone. Packed examples lie end to end, so a batch is filled with whatever fits (first-fit decreasing, Johnson
    1974); padded ones take the room of the longest each, so neighbours in length go together, and under a budget of
    tokens only such as leave less than `MAX_PADDING` of it empty. The result depends on the lengths alone.
    """
    by_length = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    batches: list[list[int]] = []
    sums: list[int] = []  # of every batch's lengths
    for position in by_length:
        for number in range(len(batches)) if packed else range(len(batches))[-1:]:
            batch, tokens = batches[number], sums[number] + lengths[position]
            longest, size = lengths[batch[0]], len(batch) + 1
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
