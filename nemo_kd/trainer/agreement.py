"""What all ranks have to know at the same step, in the all-reduce that every step has anyway."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nemo_kd.mcore.groups import ProcessGroups


class Agreement:
    """Sums over all ranks; beside them goes whether any rank wants to stop, or still writes a checkpoint.

    Attributes:
        wants_to_stop, is_writing: what this rank has to say, asked at every sum.
        stop, writing: whether any rank said so at the last sum; the same on all ranks.
    """

    def __init__(self, groups: ProcessGroups) -> None:
        # Tensor-parallel ranks all have the same sums, and those of a pipeline only the last stage.
        self._counts = groups.tensor_rank == 0 and groups.is_last_stage
        self.wants_to_stop: Callable[[], bool] = _no
        self.is_writing: Callable[[], bool] = _no
        self.stop = self.writing = False

    def sum(self, sums: torch.Tensor) -> torch.Tensor:
        """Each rank's sums added up, one of every place in a replica that has sums of its own; waits for the GPU."""
        wishes = sums.new_tensor([float(self.wants_to_stop()), float(self.is_writing())])
        total = torch.cat([sums if self._counts else torch.zeros_like(sums), wishes])
        torch.distributed.all_reduce(total)
        self.stop, self.writing = (wish > 0 for wish in total[-2:].tolist())
        return total[:-2]


def _no() -> bool:
    return False
