"""Speed of training steps, steps that are not finite, and the ends of a run before its last step."""

from __future__ import annotations

import logging
import resource
import signal
import time
from collections.abc import Sequence
from typing import NoReturn

import torch

from nemo_kd.batch import Batch
from nemo_kd.config import UserInputError
from nemo_kd.config.model import GPTArchitecture
from nemo_kd.flops import forward_flops, peak_flops
from nemo_kd.mcore.groups import ProcessGroups
from nemo_kd.run.interruption import Requeue

log = logging.getLogger(__name__)

GIB = 2**30
TRAINING_FLOPS = 3
"""Multiple of the forward pass: backward doubles it. Recomputation does not count."""
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


def stop(reason: str, resumes: bool) -> NoReturn:
    """
    Raises:
        Stopped, Ended: on every rank; `resumes` if the same command continues the run.
    """
    if resumes:
        raise Stopped(reason)
    log.warning(
        "%s; with exp_manager.resume_if_exists=true the same command resumes its checkpoint",
        reason,
    )
    raise Ended(128 + signal.SIGTERM)


class NonFiniteSteps:
    """Counts skipped steps, whose loss or gradient is not finite; the same on all ranks.

    Attributes:
        skipped: of the whole run, its resumed parts included.
        in_a_row: since the last step that changed the weights.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.skipped = 0
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
        value = "loss" if culprits else "gradient"
        shown = ", ".join(map(str, (culprits or examples)[:MAX_EXAMPLES_SHOWN]))
        message = f"step {step}: the {value} of examples {shown} is not finite; no weight was changed"
        if self.mode == "stop":
            raise NonFiniteError(
                f"{message}. Look at these examples and at their cached targets (`logit_cache "
                "inspect`); try a lower model.optim.lr or trainer.precision=32, or skip such "
                "steps: trainer.knowledge_distillation.non_finite=skip"
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


class StepMeter:
    """Measures one training step at a time; validation and checkpoints in between do not count.

    Args:
        all_train: all weights are trained; with frozen ones MFU is not measured.

    Attributes:
        counted: of the last step, by the names of Counts; a replica waited `data_wait_s` on
            average.
    """

    def __init__(
        self,
        architecture: GPTArchitecture,
        groups: ProcessGroups,
        precision: str,
        all_train: bool,
    ) -> None:
        self.flops = forward_flops(architecture)
        self.groups = groups
        peak = peak_flops(groups.device, precision)
        self.peak_flops = peak if all_train else None
        self.counted: dict[str, float] = {}
        self._waiting_since_s = self._started_s = 0.0

    def wait(self) -> None:
        """Begin to wait for the data of the next step."""
        self._waiting_since_s = time.perf_counter()

    def start(self) -> None:
        """Begin a step, whose data is there."""
        self._started_s = time.perf_counter()

    def counts(self, batches: Sequence[Batch]) -> torch.Tensor:
        """Return tokens, positions, FLOPs and wait, to be summed over all ranks before `metrics`."""
        lengths = [length for batch in batches for length in batch.lengths_B.tolist()]
        positions = sum(batch.tokens_BS.numel() for batch in batches)
        counts = torch.tensor(
            [
                sum(lengths),
                self.groups.context_size * positions,
                sum(self.flops.example(length, 0) for length in lengths),
                self._started_s - self._waiting_since_s,
            ],
            dtype=torch.float64,
            device=self.groups.device,
        )
        # One rank counts for the whole replica.
        return counts if self.groups.is_writer else torch.zeros_like(counts)

    def metrics(
        self, counts: Sequence[float], num_loss_tokens: float
    ) -> dict[str, float]:
        """Return metrics of the step that ends now from summed `counts`; memory is this rank's."""
        tokens, positions, flops, wait_s = counts
        step_time_s = time.perf_counter() - self._started_s
        wait_s /= self.groups.data_size
        seconds = step_time_s + wait_s
        total_flops = TRAINING_FLOPS * (
            flops + num_loss_tokens * self.flops.per_loss_token
        )
        self.counted = {
            "tokens": tokens,
            "padding_tokens": positions - tokens,
            "loss_tokens": num_loss_tokens,
            "flops": total_flops,
            "data_wait_s": wait_s,
        }
        metrics = {
            "perf/step_time_s": step_time_s,
            "perf/tokens_per_s": tokens / seconds,
            "perf/loss_tokens_per_s": num_loss_tokens / seconds,
            "perf/data_wait_percent": 100 * wait_s / seconds,
            "perf/padding_percent": 100 * (1 - tokens / positions),
            "perf/peak_memory_gib": self._peak_bytes() / GIB,
        }
        if self.peak_flops is not None:
            metrics["perf/mfu_percent"] = 100 * total_flops / seconds / self.peak_flops
        return metrics

    def _peak_bytes(self) -> int:
        if self.groups.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.groups.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
