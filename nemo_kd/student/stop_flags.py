"""What all ranks have to know at the same step, in the all-reduce that every step has anyway."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Agreement:
    """Sums over all ranks; beside them goes whether any rank wants to stop, or still writes a checkpoint.

    Attributes:
        wants_to_stop, is_writing: what this rank has to say, asked at every sum.
        stop, writing: whether any rank said so at the last sum; the same on all ranks.
    """

    def __init__(self) -> None:
        self.wants_to_stop: Callable[[], bool] = _no
        self.is_writing: Callable[[], bool] = _no
        self.stop = self.writing = False

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The values of all ranks added up; every rank takes part, and waits for its GPU."""
        wishes = values.new_tensor([float(self.wants_to_stop()), float(self.is_writing())])
        total = torch.cat([values.flatten(), wishes])
        torch.distributed.all_reduce(total)
        self.stop, self.writing = (wish > 0 for wish in total[-2:].tolist())
        return total[:-2].view_as(values)


def _no() -> bool:
    return False
