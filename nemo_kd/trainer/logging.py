"""What a run tells while it goes: a progress bar and a file of metrics."""

from __future__ import annotations

import re
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import orjson
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


def source_names(paths: Sequence[str]) -> list[str]:
    """A short name of each path, for metrics: the file's, and its number where several have the same."""
    stems = [
        re.sub(r"[_-]?CHUNK_ID", "", Path(path.partition("[")[0]).name.partition(".")[0]) or "data" for path in paths
    ]
    return [stem if stems.count(stem) == 1 else f"{stem}_{number}" for number, stem in enumerate(stems)]


class JsonlLogger(Logger):
    """Appends every logged set of metrics to one file, a JSON object a line with `step` and `time` (unix seconds).

    A resumed run appends too; where it repeats steps, the later line counts.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the configuration is in the other loggers."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(orjson.dumps({"step": step, "time": time.time(), **metrics}) + b"\n")


class ProgressBar(TQDMProgressBar):
    """Lightning's bar over all steps of the run (ETA, the values logged with `prog_bar`); sparse where nobody watches."""

    def __init__(self, num_steps: int) -> None:
        super().__init__(refresh_rate=1 if sys.stderr.isatty() else max(1, num_steps // 20))

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description("training")

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {name.removeprefix("train/").removeprefix("perf/"): value for name, value in metrics.items()}
