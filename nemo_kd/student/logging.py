"""What stage 2 tells while it runs: lines on the terminal, and the same figures for every logger."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from nemo_kd.run.metrics import Counters, MetricsFile, Progress, ProgressLine

log = logging.getLogger(__name__)


def source_names(paths: Sequence[str]) -> list[str]:
    """A short name of each path, for metrics: the file's, and its number where several have the same."""
    stems = [
        re.sub(r"[_-]?CHUNK_ID", "", Path(path.partition("[")[0]).name.partition(".")[0]) or "data"
        for path in paths
    ]
    return [
        stem if stems.count(stem) == 1 else f"{stem}_{number}" for number, stem in enumerate(stems)
    ]


class JsonlLogger(Logger):
    """Appends every logged set of metrics to one file, a JSON object a line with `step` and `time` (unix seconds).

    A resumed run appends too; where it repeats steps, the later line counts.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._file: MetricsFile | None = None

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing: the configuration is in the other loggers."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self._file is None:
            self._file = MetricsFile(self.path)
        self._file.show({"step": step, **metrics})  # type: ignore[dict-item]

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class RunLog(pl.Callback):
    """Shows the run's progress on stderr, and gives `step_metrics` and `evaluation_metrics` of the module to the loggers.

    Lightning's own way to the loggers repeats the last value of a metric that a step does not have.

    Args:
        every_n_steps: steps between those whose metrics are logged.
        interval_s: seconds between two lines.

    Attributes:
        latest: metrics of the last step and of the last evaluation of each split, by name.
        best: (step, value) of the lowest `validation/loss` of this process.
        seconds: from the start to the end of the training.
    """

    def __init__(self, max_steps: int, every_n_steps: int, interval_s: float) -> None:
        self.max_steps = max_steps
        self.every_n_steps = every_n_steps
        self.interval_s = interval_s
        self.latest: dict[str, float] = {}
        self.best: tuple[int, float] | None = None
        self.line: ProgressLine | None = None
        self.progress: Progress | None = None
        self.seconds = 0.0
        self._started_s = time.monotonic()
        self._evaluation_started_s = self._next_line_s = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started_s = time.monotonic()
        if trainer.is_global_zero:
            self.line = ProgressLine("training", self.max_steps, "steps")
            start = Counters(steps=trainer.global_step)
            peak_flops = pl_module.meter.peak_flops
            self.progress = Progress(
                self.max_steps,
                self.interval_s,
                [self.line],
                peak_flops=peak_flops,
                unit="steps",
                start=start,
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        metrics, step = pl_module.step_metrics, trainer.global_step
        self.latest |= metrics
        if step % self.every_n_steps == 0:
            _give(trainer, metrics, step)
        if self.progress is not None:
            self.progress.latest = metrics
            self.progress.add(steps=1, **pl_module.meter.counted)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
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
            testing = trainer.state.fn == "test"
            (num_batches,) = trainer.num_test_batches if testing else trainer.num_val_batches
            self._note(
                f"{_stage(trainer)} after step {trainer.global_step:,}: batch {batch_idx + 1} of {num_batches}"
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics, step = pl_module.evaluation_metrics, trainer.global_step
        self.latest |= metrics
        _give(trainer, metrics, step)
        loss = metrics.get("val_loss")
        if loss is not None and (self.best is None or loss < self.best[1]):
            self.best = step, loss
        seconds = time.monotonic() - self._evaluation_started_s
        self._note(
            f"{_stage(trainer)} after step {step:,}: {listed(metrics, _stage(trainer))}, {seconds:.1f} s"
        )

    on_test_start, on_test_batch_end, on_test_end = (
        on_validation_start,
        on_validation_batch_end,
        on_validation_end,
    )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = time.monotonic() - self._started_s
        if self.progress is not None:
            self.progress.close()
        self.line = self.progress = None

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if self.line is not None:
            self.line.close()
        self.line = self.progress = None

    def _note(self, text: str) -> None:
        if self.line is not None:
            self.line.note(text)
        else:  # after the training; ranks other than the first say nothing of the kind
            log.info(text)


def _stage(trainer: pl.Trainer) -> str:
    return "test" if trainer.state.fn == "test" else "validation"


def listed(metrics: dict[str, float], section: str) -> str:
    """Return the metrics of a section as `loss 1.2345, sft_loss ...`, without those of single sources."""
    own = {
        name.removeprefix(f"{section}/"): value
        for name, value in metrics.items()
        if name.startswith(f"{section}/")
    }
    shown = (
        f"{name} {value:.4f}"
        for name, value in own.items()
        if "/" not in name and name != "skipped_steps"
    )
    return ", ".join(shown) or "no token counts in the loss"


def _give(trainer: pl.Trainer, metrics: dict[str, float], step: int) -> None:
    """Hands metrics to all loggers; only rank 0's do something.

    Raises:
        OSError: names the file or folder that cannot be written.
    """
    for logger in trainer.loggers:
        with named_os_errors(getattr(logger, "path", None) or logger.save_dir):
            logger.log_metrics(metrics, step)
            logger.save()


@contextlib.contextmanager
def named_os_errors(path: object) -> Iterator[None]:
    """Raise errors of the operating system with `path` where they name none, as those of writing to an open file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


@contextlib.contextmanager
def quiet_tensorboard_thread() -> Iterator[None]:
    """Keep the traceback of TensorBoard's writing thread off the terminal; its error is raised where metrics are logged."""
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
