"""Progress of stage 2: lines on the terminal, metrics for every logger, Weights & Biases."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from nemo_kd.run.collective import on_rank_zero, rank
from nemo_kd.run.metrics import MetricsFile, Progress, open_wandb

log = logging.getLogger(__name__)

WANDB_AXES = {
    "*": "trainer/global_step",
    "train/*": "train_step",
    "perf/*": "train_step",
    "validation/*": "eval_step",
    "test/*": "eval_step",
}
"""Metrics and the completed steps that their charts run along."""

LIGHTNING_NAMES = {"save_dir": "dir", "version": "id"}
"""Arguments of Lightning's logger and what wandb.init calls them."""


class RunLog:
    """Shows progress on stderr and passes the metrics to `metrics.jsonl` and all loggers.

    Lightning's own path to the loggers repeats the last value of a metric that a step lacks. A
    resumed run appends to `metrics.jsonl`; where it repeats steps, the later line counts.

    Args:
        interval_s: seconds between two lines.
        trainer: has the loggers, and logs every `log_every_n_steps`.

    Attributes:
        sinks: places that show the metrics, on rank 0.
        latest: metrics of the last step and of the last evaluation of each split, by name.
        progress: its counters since the start of the run; on rank 0, from the first step on.
    """

    def __init__(
        self, log_dir: Path, max_steps: int, interval_s: float, trainer: pl.Trainer
    ) -> None:
        self.log_dir = log_dir
        self.metrics_path = log_dir / "metrics" / "metrics.jsonl"
        self.max_steps = max_steps
        self.interval_s = interval_s
        self.trainer = trainer
        self.sinks: list[Any] = []
        if rank() == 0:
            self.sinks.append(MetricsFile(self.metrics_path))
        self.latest: dict[str, float] = {}
        self.progress: Progress | None = None
        self.seconds = 0.0
        self._started_s = 0.0

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
        if self.progress is not None and not self.seconds:
            self.progress.note(text)
        else:  # the test, after the training; or a rank other than 0, which logs errors only
            log.info(text)

    def end(self) -> None:
        """End the training."""
        self.seconds = time.monotonic() - self._started_s
        if self.progress is not None:
            self.progress.finish()
            self.progress.close()

    def close(self) -> None:
        if self.progress is not None:
            self.progress.close()
        for sink in self.sinks:
            sink.finish()

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        for sink in self.sinks:
            sink.log({"step": step, **metrics})
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step)
            logger.save()


def format_metrics(metrics: dict[str, float], section: str) -> str:
    """Return the metrics of a section as `loss 1.2345, sft_loss ...`, without single sources."""
    parts = {name: name.removeprefix(f"{section}/") for name in metrics}
    shown = [
        f"{part} {metrics[name]:.4f}"
        for name, part in parts.items()
        if part != name and "/" not in part and part != "skipped_steps"
    ]
    return ", ".join(shown) or "no token counts in the loss"


class StudentWandb:
    """A run in Weights & Biases, finished at the end of `with`; a later failure is one warning."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.is_callers = getattr(sys.modules.get("wandb"), "run", None) is not None
        self.is_lost = False
        self.run = open_wandb(settings)
        for metrics, axis in WANDB_AXES.items():
            self.run.define_metric(metrics, step_metric=axis)

    def __enter__(self) -> StudentWandb:
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        if not self.is_callers:
            with self._errors_as_warning():
                self.run.finish(exit_code=int(error_type is not None))

    def log(self, metrics: dict[str, float]) -> None:
        if not self.is_lost:
            with self._errors_as_warning():
                self.run.log({**metrics, "trainer/global_step": metrics["step"]})

    def finish(self) -> None:
        """Do nothing: `__exit__` finishes the run."""

    @contextlib.contextmanager
    def _errors_as_warning(self) -> Iterator[None]:
        import wandb

        try:
            yield
        except (wandb.Error, OSError, RuntimeError) as error:
            if not self.is_lost:
                log.warning(
                    "exp_manager.create_wandb_logger: Weights & Biases failed (%s: %s); the run "
                    "continues without it, and metrics/metrics.jsonl holds all metrics",
                    type(error).__name__,
                    error,
                )
            self.is_lost = True


def start_wandb(
    run_log: RunLog,
    arguments: dict[str, Any] | None,
    config: dict[str, Any],
    stack: contextlib.ExitStack,
) -> None:
    """Start a run on rank 0 for the rest of `stack`; every rank calls this.

    Args:
        arguments: of wandb.init, or of Lightning's WandbLogger as in NeMo.

    Raises:
        ConfigError, OSError: on every rank, if it cannot start or its folder cannot be written.
    """
    settings: dict[str, Any] = {
        "dir": str(run_log.log_dir),
        "resume": "allow",
        "config": config,
    }
    for name, value in (arguments or {}).items():
        settings[LIGHTNING_NAMES.get(name, name)] = value
    if settings.pop("offline", False):
        settings["mode"] = "offline"

    def start() -> None:
        os.makedirs(settings["dir"], exist_ok=True)
        run_log.sinks.append(stack.enter_context(StudentWandb(settings)))

    on_rank_zero(start)
