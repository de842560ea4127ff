"""Steps of a run: how many, their learning rate and speed, those that are not finite, and an early
end."""

from __future__ import annotations

import logging
import math
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nemo_kd.batch import Batch
from nemo_kd.config import ConfigError, UserInputError
from nemo_kd.config.exp_manager import PARAMS
from nemo_kd.config.loss import KEY, LossConfig
from nemo_kd.config.optim import OptimConfig
from nemo_kd.config.shared import GPTArchitecture
from nemo_kd.config.student import LOOP, LoopConfig, TrainStudentConfig
from nemo_kd.mcore.architecture import ForwardFlops, peak_flops
from nemo_kd.mcore.groups import ProcessGroups
from nemo_kd.run.interruption import Requeue

log = logging.getLogger(__name__)

GIB = 2**30
TRAINING_FLOPS = 3
"""Multiple of the forward pass: backward doubles it. Recomputation does not count."""
MAX_SKIPPED_IN_A_ROW = 10
"""Stop after this many skipped steps in a row."""
MAX_EXAMPLES_SHOWN = 20


@dataclass(frozen=True)
class TrainingPlan:
    """Length and intervals of a run in optimizer steps; a step consumes one global batch."""

    steps_per_epoch: int
    max_steps: int
    val_check_interval: int
    save_interval: int


def plan_training(
    loop: LoopConfig, num_samples: int, global_batch_size: int
) -> TrainingPlan:
    """Resolve fractions and -1 against the size of the training data.

    Raises:
        ConfigError: the data is smaller than a global batch, or an interval has no step.
    """
    whole_batches = num_samples // global_batch_size
    if not whole_batches:
        raise ConfigError(
            f"model.global_batch_size: {global_batch_size} exceeds the {num_samples} training "
            "examples; use a smaller one"
        )
    limit = _steps(loop.limit_train_batches, whole_batches)
    steps_per_epoch = min(limit, whole_batches)
    max_steps = loop.max_epochs * steps_per_epoch
    if loop.max_steps >= 0:
        max_steps = min(max_steps, loop.max_steps) if max_steps > 0 else loop.max_steps
    if max_steps < 1:
        raise ConfigError(
            f"{LOOP}.max_steps: {loop.max_steps} with max_epochs {loop.max_epochs} leaves nothing "
            "to train"
        )
    val_check_interval = _steps(loop.val_check_interval, steps_per_epoch)
    save_interval = val_check_interval
    if loop.save_interval is not None:
        save_interval = _steps(loop.save_interval, steps_per_epoch)
    return TrainingPlan(steps_per_epoch, max_steps, val_check_interval, save_interval)


def _steps(value: int | float, steps_per_epoch: int) -> int:
    """Return a number of steps, which may be given as a fraction of an epoch."""
    if isinstance(value, int) or value > 1:
        return int(value)
    return max(1, int(value * steps_per_epoch))


def learning_rate(step: int, optim: OptimConfig, max_steps: int) -> float:
    """Return the learning rate of a step (from 0).

    As in NeMo, the warmup starts at 0 if there are constant steps, else at lr / (warmup + 1).
    Unlike NeMo's, the inverse square root does not fall below min_lr.
    """
    sched = optim.sched
    warmup, decay, constant = sched.phases(max_steps)
    if warmup and step <= warmup:
        return optim.lr * (step / warmup if constant else (step + 1) / (warmup + 1))
    if sched.shape == "constant" or optim.lr == 0:
        return optim.lr
    min_factor = sched.min_lr / optim.lr
    if sched.shape == "inverse_square_root":
        return optim.lr * max(min_factor, math.sqrt((warmup + 1) / (step + 1)))
    progress = min(1.0, (step - warmup) / decay) if decay else 1.0
    left = (
        1.0 - progress
        if sched.shape == "linear"
        else 0.5 * (1.0 + math.cos(math.pi * progress))
    )
    return optim.lr * (min_factor + (1.0 - min_factor) * left)


def check_schedule(optim: OptimConfig, max_steps: int) -> None:
    """Warn if the run is too short for its constant steps or its warmup."""
    warmup, _, constant = optim.sched.phases(max_steps)
    wanted = optim.sched.asked_steps("constant", max_steps)
    if constant < wanted or warmup >= max_steps:
        log.warning(
            "warning: model.optim.sched: the %d steps of the run are too few for %d steps of warmup "
            "and %d at min_lr; lower warmup_steps or constant_steps",
            max_steps,
            warmup,
            wanted,
        )


def check_loss_schedules(loss: LossConfig, max_steps: int) -> None:
    """Warn if the run is too short for a schedule of the loss."""
    for name, schedule in loss.schedules.items():
        value = schedule.at(max_steps)
        if value != schedule.end:
            log.warning(
                "warning: %s.%s: the schedule ends at step %d, but the run after %d, with %g instead "
                "of %g; validation takes %g, too; give an earlier end, or train longer",
                KEY,
                name,
                schedule.last_step,
                max_steps,
                value,
                schedule.end,
                value,
            )


def check_intervals(config: TrainStudentConfig, plan: TrainingPlan) -> None:
    """
    Raises:
        ConfigError: a metric of responses is not measured where checkpoints or early stopping need
            it.
    """
    interval = config.eval.interval
    manager = config.exp_manager
    if not interval:
        return
    meet = math.lcm(interval, plan.save_interval)
    if (
        manager.checkpoint_callback_params.ranks_by_answers
        and plan.save_interval < plan.max_steps < meet
    ):
        raise ConfigError(
            f"{PARAMS}.monitor: {manager.checkpoint_callback_params.monitor} is measured every "
            f"{interval} steps (eval.interval) and checkpoints are written every "
            f"{plan.save_interval}, which meet first at step {meet} of {plan.max_steps}; set "
            f"{LOOP}.save_interval to a multiple of eval.interval"
        )
    watched = manager.early_stopping_callback_params.monitor
    if (
        manager.create_early_stopping_callback
        and watched.startswith("eval/")
        and plan.val_check_interval % interval
    ):
        raise ConfigError(
            f"exp_manager.early_stopping_callback_params.monitor: {watched} is measured every "
            f"{interval} steps (eval.interval), but validations look at it every "
            f"{plan.val_check_interval}; set {LOOP}.val_check_interval to a multiple of eval.interval"
        )


class Stopped(Requeue):
    """The run stops early with a whole checkpoint; the same command continues."""


class Ended(SystemExit):
    """The run stops early, and the same command would start over."""


class NonFiniteError(UserInputError):
    """The loss or gradient of a step is not finite, and the run stops because of it."""


STOPS_ALL_RANKS = (Stopped, Ended, NonFiniteError)
"""Raised by every rank at the same place, so that they can still communicate."""


@dataclass
class NonFiniteSteps:
    """Counts skipped steps, whose loss or gradient is not finite; the same on all ranks.

    Attributes:
        mode: stop or skip.
        skipped: of the whole run, its resumed parts included.
        in_a_row: since the last step that changed the weights.
    """

    mode: str
    skipped: int = 0
    in_a_row: int = 0

    def left_out(self, step: int, parts: Sequence[tuple[bool, list[int]]]) -> None:
        """Record a step that changed nothing.

        Args:
            parts: of each micro-batch, True if its loss is finite, and its examples.

        Raises:
            NonFiniteError: the run has to stop.
        """
        self.skipped += 1
        self.in_a_row += 1
        culprits = [examples for is_finite, examples in parts if not is_finite]
        value = "loss" if culprits else "gradient"
        examples = set[int]().union(*(culprits or [examples for _, examples in parts]))
        found = sorted(examples - {-1})  # -1 stands for no example
        shown = ", ".join(map(str, found[:MAX_EXAMPLES_SHOWN]))
        message = f"step {step}: the {value} of examples {shown} is not finite; no weight was changed"
        if self.mode == "stop" or self.in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"{message} ({self.in_a_row} in a row). Look at these examples and at their cached "
                "targets (`logit_cache inspect`); try a lower model.optim.lr or "
                "trainer.precision=32, after many in a row from an earlier checkpoint; "
                "trainer.knowledge_distillation.non_finite=skip skips up to "
                f"{MAX_SKIPPED_IN_A_ROW} in a row"
            )
        log.warning("%s, the step is skipped (%d so far)", message, self.skipped)


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
        self.flops = ForwardFlops(architecture)
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
            "perf/peak_memory_gib": self.peak_bytes() / GIB,
        }
        if self.peak_flops is not None:
            metrics["perf/mfu_percent"] = 100 * total_flops / seconds / self.peak_flops
        return metrics

    def peak_bytes(self) -> int:
        """Return the most memory that this rank had: on its GPU, or else of its process."""
        if self.groups.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.groups.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
