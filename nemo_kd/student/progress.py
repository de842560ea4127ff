"""Progress of stage 2: lines on the terminal, metrics for every logger, Weights & Biases."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from nemo_kd.run.collective import on_rank_zero, rank
from nemo_kd.run.metrics import MetricsFile, Progress, open_wandb

log = logging.getLogger(__name__)

WANDB_AXES = {
    "*": "step",
    "train/*": "train_step",
    "perf/*": "train_step",
    "validation/*": "eval_step",
    "test/*": "eval_step",
}
"""Metrics and the completed steps that their charts run along."""


@dataclass
class RunLog:
    """Shows progress on stderr and passes the metrics to `metrics.jsonl` and all loggers.

    Lightning's own path to the loggers repeats the last value of a metric that a step lacks. A
    resumed run appends to `metrics.jsonl`; where it repeats steps, the later line counts.

    Attributes:
        interval_s: seconds between two lines.
        trainer: has the loggers, and logs every `log_every_n_steps`.
        sinks: files and services that take the metrics, on rank 0.
        latest: metrics of the last step and of the last evaluation of each split, by name.
        progress: its counters since the start of the run; on rank 0, from the first step on.
        seconds: duration of the training.
    """

    log_dir: Path
    max_steps: int
    interval_s: float
    trainer: pl.Trainer
    sinks: list[Any] = field(default_factory=list)
    latest: dict[str, float] = field(default_factory=dict)
    progress: Progress | None = None
    seconds: float = 0.0
    _started_s: float = 0.0

    def __post_init__(self) -> None:
        self.metrics_path = self.log_dir / "metrics" / "metrics.jsonl"
        if rank() == 0:
            self.sinks.append(MetricsFile(self.metrics_path))

    def start(self, step: int, peak_flops: float | None) -> None:
        """Begin the training after `step`."""
        self._started_s = time.monotonic()
        if rank() == 0:
            self.progress = Progress(
                "training",
                self.max_steps,
                self.interval_s,
                peak_flops=peak_flops,
                unit="steps",
                start={"steps": step},
            )

    def step(
        self, step: int, metrics: dict[str, float], counted: dict[str, float]
    ) -> None:
        """Log a training step; `counted` are names of Counts."""
        self.latest |= metrics
        if step % self.trainer.log_every_n_steps == 0:
            self._log(step, metrics)
        if self.progress is not None:
            self.progress.latest = metrics
            self.progress.add(steps=1, **counted)

    def evaluation(
        self, split: str, step: int, metrics: dict[str, float], seconds: float
    ) -> None:
        """Log a validation or test."""
        self.latest |= metrics
        self._log(step, metrics)
        text = f"{split} after step {step:,}: {format_metrics(metrics, split)}, {seconds:.1f} s"
        if self.progress is not None:
            self.progress.note(text)

    def end(self) -> None:
        """End the training, also after an error."""
        self.seconds = time.monotonic() - self._started_s
        if self.progress is not None:
            self.progress.finish()
            self.progress.close()

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        for sink in self.sinks:
            sink.log({"step": step, **metrics})
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step)
            logger.save()


def format_metrics(metrics: dict[str, float], section: str) -> str:
    """Return the metrics of a section as `loss 1.2345, sft_loss ...`, without single sources."""
    shown = []
    for name, value in metrics.items():
        found, _, part = name.partition("/")
        if found == section and "/" not in part and part != "skipped_steps":
            shown.append(f"{part} {value:.4f}")
    return ", ".join(shown) or "no token counts in the loss"


class WandbRun:
    """A run in Weights & Biases; a failure after the start is one warning."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.run = open_wandb(settings)
        self.is_lost = False
        for metrics, axis in WANDB_AXES.items():
            self.run.define_metric(metrics, step_metric=axis)

    def log(self, metrics: dict[str, float]) -> None:
        self._attempt(self.run.log, metrics)

    def finish(self, error: object, *_: object) -> None:
        self._attempt(self.run.finish, int(error is not None))

    def _attempt(self, function: Callable[[Any], object], argument: Any) -> None:
        import wandb

        try:
            if not self.is_lost:
                function(argument)
        except (wandb.Error, OSError, RuntimeError) as error:
            self.is_lost = True
            log.warning(
                "exp_manager.create_wandb_logger: Weights & Biases failed (%s: %s); the run "
                "continues without it, and metrics/metrics.jsonl holds all metrics",
                type(error).__name__,
                error,
            )


def start_wandb(
    run_log: RunLog,
    arguments: dict[str, Any],
    config: dict[str, Any],
    stack: contextlib.ExitStack,
) -> None:
    """Start a run on rank 0 that ends with `stack`; every rank calls this.

    Args:
        arguments: of wandb.init; save_dir and offline as in NeMo also work.

    Raises:
        ConfigError: on every rank, if it cannot start.
    """
    settings = {"dir": str(run_log.log_dir), "config": config, **arguments}
    if "save_dir" in settings:
        settings["dir"] = settings.pop("save_dir")
    if settings.pop("offline", False):
        settings["mode"] = "offline"

    def start() -> None:
        run = WandbRun(settings)
        stack.push(run.finish)
        run_log.sinks.append(run)

    on_rank_zero(start)
