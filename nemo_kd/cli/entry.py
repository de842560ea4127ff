"""Entry points of the console commands; they name a missing package with its remedy."""

from __future__ import annotations

import importlib
import sys

from nemo_kd.terminal import print_error


def compute_topk_logits() -> None:
    """Start stage 1."""
    _start("compute_topk_logits")


def train_gpt_knowledge_distillation() -> None:
    """Start stage 2."""
    _start("train_gpt_knowledge_distillation")


def convert_checkpoint() -> None:
    """Start the conversion of a model."""
    _start("convert_checkpoint")


def logit_cache() -> None:
    """Start a tool for caches."""
    _start("logit_cache")


def plot_runs() -> None:
    """Start the plot of runs side by side."""
    _start("plot_runs")


def _start(command: str) -> None:
    try:
        importlib.import_module(f"nemo_kd.cli.{command}").main()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "nemo_kd"):
            raise
        print_error(
            f"{command} needs the package {package}, which is not installed; install all that the "
            "commands need: pip install nemo-kd"
        )
        sys.exit(2)
