"""Console command that draws what training runs measured."""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from pathlib import Path

from nemo_kd.cli.run import USER_ERROR
from nemo_kd.config import ConfigError, UserInputError
from nemo_kd.terminal import print_error, print_text

SUMMARY = "Draws the metrics of training runs side by side, as PNG pictures."


def main() -> None:
    arguments = parser().parse_args()
    try:
        if importlib.util.find_spec("matplotlib") is None:
            raise ConfigError("plot_runs: needs matplotlib; pip install matplotlib")
        try:
            re.compile(arguments.metrics or "")
        except re.error as error:
            raise ConfigError(f"--metrics: {arguments.metrics!r} is no regular expression: {error}") from error
        from nemo_kd.evaluation.run_curves import plot_runs

        for path in plot_runs(arguments.runs, arguments.output_dir, arguments.metrics):
            print_text(str(path))
    except UserInputError as error:
        print_error(error)
        sys.exit(USER_ERROR)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="plot_runs", description=SUMMARY)
    result.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's log folder, or its metrics.jsonl")
    result.add_argument("--output-dir", type=Path, default=Path("curves"), help="for the pictures (default: curves)")
    result.add_argument("--metrics", metavar="REGEX", help="only metrics whose name contains it, for example 'kl|loss'")
    return result


if __name__ == "__main__":
    main()
