"""Weights & Biases as a logger of stage 2: it starts before the student is loaded, and its loss is not the run's."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from nemo_kd.config import ConfigError
from nemo_kd.run.collective import on_rank_zero
from nemo_kd.run.metrics import explained_wandb_errors

log = logging.getLogger(__name__)

AXES = {"train": "train_step", "perf": "train_step", "validation": "eval_step", "test": "eval_step"}
"""Sections of metrics and the completed steps that their charts run along."""


class RunWandbLogger(WandbLogger):
    """Lightning's logger, which warns once and stops logging where wandb fails during the run."""

    is_lost = False

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        if self._wandb_init.get("anonymous", "") is None:
            del self._wandb_init["anonymous"]  # wandb warns about the argument, whatever its value

    def start(self) -> None:
        """Start the run of Weights & Biases."""
        for section, axis in AXES.items():
            self.experiment.define_metric(f"{section}/*", step_metric=axis)

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if self.is_lost:
            return
        import wandb

        try:
            super().log_metrics(metrics, step)
        except (wandb.Error, OSError, RuntimeError) as error:
            self.is_lost = True
            log.warning(
                "exp_manager.create_wandb_logger: Weights & Biases failed (%s: %s); the run goes on without it, and "
                "metrics/metrics.jsonl holds all its metrics",
                type(error).__name__,
                error,
            )


def start_wandb(settings: dict[str, Any], log_dir: Path) -> list[RunWandbLogger]:
    """Return the logger if `exp_manager` asks for it; rank 0 starts the run of Weights & Biases, every rank takes part.

    Raises:
        ConfigError, OSError: on every rank, it cannot be started, or its folder cannot be written.
    """
    if not settings["create_wandb_logger"]:
        return []
    loggers: list[RunWandbLogger] = []
    arguments = {"save_dir": str(log_dir), **(settings["wandb_logger_kwargs"] or {})}
    on_rank_zero(lambda: loggers.append(_started(arguments)))
    return loggers


def _started(arguments: dict[str, Any]) -> RunWandbLogger:
    with explained_wandb_errors():
        os.makedirs(arguments["save_dir"] or ".", exist_ok=True)
        try:
            logger = RunWandbLogger(**arguments)
        except ModuleNotFoundError as error:  # Lightning asks for a newer version than there is
            raise ConfigError(f"exp_manager.create_wandb_logger: {error}") from error
        logger.start()
        return logger
