"""Reasons to end a run before its last step, on which all ranks agree."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch

from nemo_kd.config import UserInputError
from nemo_kd.run.collective import shared_store
from nemo_kd.run.interruption import Interruption, Requeue
from nemo_kd.run.watchdog import Watchdog

log = logging.getLogger(__name__)

NON_FINITE_KEY = "trainer.knowledge_distillation.non_finite"
MAX_SKIPPED_IN_A_ROW = 10
"""Stop after this many skipped steps in a row."""
MAX_EXAMPLES_SHOWN = 20


class StopsAllRanks(Exception):
    """Raised by every rank at the same place, so that they can still communicate."""


class Stopped(StopsAllRanks, Requeue):
    """The run stops early with a whole checkpoint; the same command continues."""


class Ended(StopsAllRanks, SystemExit):
    """The run stops early, and the same command would start over."""


class NonFiniteError(StopsAllRanks, UserInputError):
    """The loss or gradient of a step is not finite, and the run stops because of it."""


class StopFlags:
    """Flags of all ranks that travel in the all-reduce of every step.

    Attributes:
        wants_to_stop, is_writing: this rank's flags; called at every sum.
        stop, writing: True if any rank had the flag set at the last sum; the same on all ranks.
    """

    def __init__(self) -> None:
        self.wants_to_stop: Callable[[], bool] = lambda: False
        self.is_writing: Callable[[], bool] = lambda: False
        self.stop = False
        self.writing = False

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of `values` over all ranks; every rank calls it and waits for its GPU."""
        flags = values.new_tensor([float(self.wants_to_stop()), float(self.is_writing())])
        total = torch.cat([values.flatten(), flags])
        torch.distributed.all_reduce(total)
        self.stop, self.writing = (flag > 0 for flag in total[-2:].tolist())
        return total[:-2].view_as(values)


class Lifetime:
    """Signals, `max_time_per_run` and hangs of one run.

    Attributes:
        interruption: None if the run writes no checkpoints; signals end it as they end any process.
        reason: why all ranks stop now; None to continue.
    """

    def __init__(
        self, interruption: Interruption | None, watchdog: Watchdog, resumes: bool
    ) -> None:
        self.interruption = interruption
        self.watchdog = watchdog
        self.resumes = resumes
        self.reason: str | None = None
        self._loading = contextlib.ExitStack()
        self._loading.enter_context(watchdog.pause("loading"))

    @classmethod
    @contextlib.contextmanager
    def begin(cls, settings: dict[str, Any], timeout_s: float) -> Iterator[Lifetime]:
        """Watch signals, time and hangs until the block ends; every rank calls it.

        Args:
            settings: of `exp_manager`.
        """
        rank = torch.distributed.get_rank()
        with Watchdog(timeout_s, rank) as watchdog, watchdog.explain_collective_errors():
            if not settings["create_checkpoint_callback"]:
                yield cls(None, watchdog, resumes=True)
                return
            with Interruption(settings["max_time_per_run"]) as interruption:
                interruption.share(shared_store("train_student"), rank)
                yield cls(interruption, watchdog, settings["resume_if_exists"])

    def wants_to_stop(self) -> bool:
        return self.interruption is not None and self.interruption.reason is not None

    def end_loading(self) -> None:
        """Start to expect progress, and take signals back from Lightning's handlers."""
        self._loading.close()
        if self.interruption is not None:
            self.interruption.take_signals()

    def read(self, flags: StopFlags) -> None:
        """Set `reason` if any rank asked to stop."""
        if flags.stop and self.interruption is not None:
            self.reason = self.interruption.agreed_reason()

    def raise_if_stopped(self) -> None:
        """
        Raises:
            Stopped, Ended: on every rank, if there is a reason to stop.
        """
        if self.reason is None:
            return
        if self.resumes:
            raise Stopped(self.reason)
        log.warning(
            "%s; with exp_manager.resume_if_exists=true the same command resumes its checkpoint",
            self.reason,
        )
        raise Ended(128 + signal.SIGTERM)


class NonFiniteSteps:
    """Counts skipped steps, whose loss or gradient is not finite; the same on all ranks.

    Attributes:
        skipped: of the whole run, its resumed parts included.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.skipped = 0
        self.in_a_row = 0

    def taken(self) -> None:
        """Record a step that changed the weights."""
        self.in_a_row = 0

    def left_out(self, step: int, culprits: list[int], examples: list[int]) -> None:
        """Record a step that changed nothing.

        Args:
            culprits: examples whose loss is not finite; empty if only the gradient is not.
            examples: all examples of the step.

        Raises:
            NonFiniteError: the run has to stop.
        """
        self.skipped += 1
        self.in_a_row += 1
        found = (
            f"the loss of {_list(culprits)}"
            if culprits
            else f"the gradient of {_list(examples)}"
        )
        message = f"step {step}: {found} is not finite; no weight was changed"
        if self.mode == "stop":
            raise NonFiniteError(
                f"{message}. Look at these examples and at their cached targets (`logit_cache "
                "inspect`); try a lower model.optim.lr or trainer.precision=32, or skip such "
                f"steps: {NON_FINITE_KEY}=skip"
            )
        if self.in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"{message}. It is the {self.in_a_row}th such step in a row, so the weights are "
                "probably the cause: resume from an earlier checkpoint with a lower "
                "model.optim.lr or trainer.precision=32"
            )
        log.warning("%s, the step is skipped (%d so far)", message, self.skipped)

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped = state["skipped"]
        self.in_a_row = state["in_a_row"]


def _list(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:MAX_EXAMPLES_SHOWN]))
    more = len(indices) - MAX_EXAMPLES_SHOWN
    suffix = f" and {more} more" if more > 0 else ""
    return f"example{'' if len(indices) == 1 else 's'} {shown}{suffix}"
