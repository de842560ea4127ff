"""Progress of stage 2: lines on the terminal, metrics for every logger, Weights & Biases."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from nemo_kd.config import ConfigError
from nemo_kd.run.collective import on_rank_zero
from nemo_kd.run.metrics import (
    Counters,
    MetricsFile,
    Progress,
    ProgressLine,
    explained_wandb_errors,
)

log = logging.getLogger(__name__)

WANDB_AXES = {
    "train": "train_step",
    "perf": "train_step",
    "validation": "eval_step",
    "test": "eval_step",
}
"""Sections of metrics and the completed steps that their charts run along."""


class RunLog(pl.Callback):
    """Shows progress on stderr and passes the module's metrics to `metrics.jsonl` and all loggers.

    Lightning's own path to the loggers repeats the last value of a metric that a step lacks. A
    resumed run appends to `metrics.jsonl`; where it repeats steps, the later line counts.

    Args:
        every_n_steps: steps between those whose metrics are logged.
        interval_s: seconds between two lines.

    Attributes:
        log_dir: folder of the run; set before training starts.
        latest: metrics of the last step and of the last evaluation of each split, by name.
        seconds: duration of the training.
    """

    log_dir: Path

    def __init__(self, max_steps: int, every_n_steps: int, interval_s: float) -> None:
        self.max_steps = max_steps
        self.every_n_steps = every_n_steps
        self.interval_s = interval_s
        self.latest: dict[str, float] = {}
        self.seconds = 0.0
        self._line: ProgressLine | None = None
        self._progress: Progress | None = None
        self._file: MetricsFile | None = None
        self._started_s = 0.0
        self._evaluation_started_s = 0.0
        self._next_line_s = 0.0

    @property
    def metrics_path(self) -> Path:
        return self.log_dir / "metrics" / "metrics.jsonl"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started_s = time.monotonic()
        if trainer.is_global_zero:
            self._line = ProgressLine("training", self.max_steps, "steps")
            self._progress = Progress(
                self.max_steps,
                self.interval_s,
                [self._line],
                peak_flops=pl_module.meter.peak_flops,
                unit="steps",
                start=Counters(steps=trainer.global_step),
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        metrics = pl_module.step_metrics
        self.latest |= metrics
        if trainer.global_step % self.every_n_steps == 0:
            self._log(trainer, metrics)
        if self._progress is not None:
            self._progress.latest = metrics
            self._progress.add(steps=1, **pl_module.meter.counted)

    def on_validation_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> None:
        self._evaluation_started_s = time.monotonic()
        self._next_line_s = self._evaluation_started_s + self.interval_s

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        *args: Any,
    ) -> None:
        if time.monotonic() >= self._next_line_s:
            self._next_line_s = time.monotonic() + self.interval_s
            split = _split(trainer)
            counts = (
                trainer.num_test_batches if split == "test" else trainer.num_val_batches
            )
            self._print(trainer, f"batch {batch_idx + 1} of {counts[0]}")

    def on_validation_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> None:
        metrics = pl_module.evaluation_metrics
        self.latest |= metrics
        self._log(trainer, metrics)
        seconds = time.monotonic() - self._evaluation_started_s
        self._print(
            trainer, f"{format_metrics(metrics, _split(trainer))}, {seconds:.1f} s"
        )

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end
    on_test_end = on_validation_end

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = time.monotonic() - self._started_s
        if self._progress is not None:
            self._progress.close()
        self._line = None
        self._progress = None

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if self._line is not None:
            self._line.close()

    def teardown(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _print(self, trainer: pl.Trainer, text: str) -> None:
        text = f"{_split(trainer)} after step {trainer.global_step:,}: {text}"
        if self._line is not None:
            self._line.note(text)
        else:  # the test, after the training; or a rank other than 0, which logs errors only
            log.info(text)

    def _log(self, trainer: pl.Trainer, metrics: dict[str, float]) -> None:
        """
        Raises:
            OSError: names the file or folder that cannot be written.
        """
        step = trainer.global_step
        if trainer.is_global_zero:
            with named_os_errors(self.metrics_path):
                self._file = self._file or MetricsFile(self.metrics_path)
                self._file.show({"step": step, **metrics})
        for logger in trainer.loggers:
            with named_os_errors(logger.save_dir):
                logger.log_metrics(metrics, step)
                logger.save()


def _split(trainer: pl.Trainer) -> str:
    return "test" if trainer.state.fn == "test" else "validation"


def format_metrics(metrics: dict[str, float], section: str) -> str:
    """Return the metrics of a section as `loss 1.2345, sft_loss ...`, without single sources."""
    parts = {name: name.removeprefix(f"{section}/") for name in metrics}
    shown = [
        f"{part} {metrics[name]:.4f}"
        for name, part in parts.items()
        if part != name and "/" not in part and part != "skipped_steps"
    ]
    return ", ".join(shown) or "no token counts in the loss"


@contextlib.contextmanager
def named_os_errors(path: object) -> Iterator[None]:
    """Add `path` to an OSError without a file name, for example from a write to an open file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


@contextlib.contextmanager
def quiet_tensorboard_thread() -> Iterator[None]:
    """Hide the traceback of TensorBoard's writer thread; its error is raised on logging."""
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        in_writer = type(arguments.thread).__name__ == "_AsyncWriterThread"
        if not (in_writer and isinstance(arguments.exc_value, OSError)):
            before(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


class RunWandbLogger(WandbLogger):
    """Lightning's logger; warns once and stops logging if wandb fails during the run."""

    current: ClassVar[RunWandbLogger | None] = None
    """Logger whose run this process has started and not finished."""

    is_lost = False

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        if self._wandb_init.get("anonymous", "") is None:
            del self._wandb_init[
                "anonymous"
            ]  # wandb warns about the argument, whatever its value

    def start(self) -> None:
        """Start a run; one that the caller has started is reused."""
        import wandb

        finish_wandb(
            exit_code=1
        )  # of a call of train_student that failed in this process
        if wandb.run is None:
            RunWandbLogger.current = self
        for section, axis in WANDB_AXES.items():
            self.experiment.define_metric(f"{section}/*", step_metric=axis)

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        if not self.is_lost:
            with self.errors_as_warning():
                super().log_hyperparams(params)

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if not self.is_lost:
            with self.errors_as_warning():
                super().log_metrics(metrics, step)

    @contextlib.contextmanager
    def errors_as_warning(self) -> Iterator[None]:
        import wandb

        try:
            yield
        except (wandb.Error, OSError, RuntimeError) as error:
            self.is_lost = True
            log.warning(
                "exp_manager.create_wandb_logger: Weights & Biases failed (%s: %s); the run "
                "continues without it, and metrics/metrics.jsonl holds all metrics",
                type(error).__name__,
                error,
            )


def finish_wandb(exit_code: int = 0) -> None:
    """Finish the run that this process has started in Weights & Biases, if any."""
    logger = RunWandbLogger.current
    RunWandbLogger.current = None
    if logger is not None:
        with logger.errors_as_warning():
            logger.experiment.finish(exit_code=exit_code)


def start_wandb(settings: dict[str, Any], log_dir: Path) -> list[RunWandbLogger]:
    """Return the logger if `exp_manager` requests it; rank 0 starts the run, every rank calls this.

    Raises:
        ConfigError, OSError: on every rank, if it cannot start or its folder cannot be written.
    """
    if not settings["create_wandb_logger"]:
        return []
    loggers: list[RunWandbLogger] = []
    arguments = {"save_dir": str(log_dir), **(settings["wandb_logger_kwargs"] or {})}
    on_rank_zero(lambda: loggers.append(_start_wandb(arguments)))
    return loggers


def _start_wandb(arguments: dict[str, Any]) -> RunWandbLogger:
    with explained_wandb_errors():
        os.makedirs(arguments["save_dir"] or ".", exist_ok=True)
        try:
            logger = RunWandbLogger(**arguments)
        except ModuleNotFoundError as error:  # Lightning needs a newer version
            raise ConfigError(f"exp_manager.create_wandb_logger: {error}") from error
        logger.start()
        return logger
