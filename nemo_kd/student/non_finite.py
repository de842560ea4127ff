"""What happens to a step whose loss or gradient is not a finite number."""

from __future__ import annotations

import logging

from nemo_kd.config import UserInputError
from nemo_kd.student.lifetime import StopsAllRanks

log = logging.getLogger(__name__)

MOST_IN_A_ROW = 10
"""Skipped steps after which a run stops that skips them: it is no single example then."""

KEY = "trainer.knowledge_distillation.non_finite"
MOST_NAMED = 20


class NonFiniteError(StopsAllRanks, UserInputError):
    """A step cannot be taken, and the configuration says to stop then."""


class NonFiniteSteps:
    """Counts the steps that changed nothing, alike on all ranks.

    Attributes:
        skipped: of the whole run, resumed parts included.
    """

    def __init__(self, mode: str) -> None:
        self.mode, self.skipped, self.in_a_row = mode, 0, 0

    def taken(self) -> None:
        """A step changed the weights."""
        self.in_a_row = 0

    def left_out(self, step: int, culprits: list[int], examples: list[int]) -> None:
        """A step changed nothing.

        Args:
            culprits: the examples whose loss is not finite; empty where it is the gradient alone.
            examples: those of the whole step.

        Raises:
            NonFiniteError: the run has to stop.
        """
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        found = (
            f"the loss of {_named(culprits)}" if culprits else f"the gradient of {_named(examples)}"
        )
        message = f"step {step}: {found} is not finite; no weight was changed"
        if self.mode == "stop":
            raise NonFiniteError(
                f"{message}. Look at these examples and what the cache says of them (`logit_cache inspect`); try a lower "
                f"model.optim.lr or trainer.precision=32, or go on without such steps: {KEY}=skip"
            )
        if self.in_a_row >= MOST_IN_A_ROW:
            raise NonFiniteError(
                f"{message}. It is the {self.in_a_row}th such step in a row, so the weights themselves are probably the "
                "cause: go on from an earlier checkpoint with a lower model.optim.lr or trainer.precision=32"
            )
        log.warning("%s, the step is skipped (%d so far)", message, self.skipped)

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


def _named(indices: list[int]) -> str:
    listed = ", ".join(map(str, indices[:MOST_NAMED]))
    more = len(indices) - MOST_NAMED
    return f"example{'' if len(indices) == 1 else 's'} {listed}{f' and {more} more' if more > 0 else ''}"
