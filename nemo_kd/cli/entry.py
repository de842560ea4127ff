"""Entry points of the console commands; they name a missing package with its remedy."""

from __future__ import annotations

import importlib
import sys
from functools import partial

from nemo_kd.files import print_error


def _start(command: str) -> None:
    try:
        importlib.import_module(f"nemo_kd.cli.{command}").main()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "nemo_kd"):
            raise
        print_error(
            f"{command} needs the package {package}, which is not installed; install all that the "
            "commands need: pip install . in the folder of nemo_kd"
        )
        sys.exit(2)


compute_topk_logits = partial(_start, "compute_topk_logits")
train_gpt_knowledge_distillation = partial(_start, "train_gpt_knowledge_distillation")
convert_checkpoint = partial(_start, "convert_checkpoint")
evaluate_gpt = partial(_start, "evaluate_gpt")
logit_cache = partial(_start, "logit_cache")
filter_sft_data = partial(_start, "filter_sft_data")
plot_runs = partial(_start, "plot_runs")
preprocess_openassistant = partial(_start, "preprocess_openassistant")
