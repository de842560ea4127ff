"""Console command that draws what training runs measured."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from nemo_kd.cli.options import OptionParser
from nemo_kd.config import ConfigError
from nemo_kd.files import print_text
from nemo_kd.run.endings import errors_end_the_process

SUMMARY = "Draws the metrics of training runs side by side, as PNG pictures."


def main() -> None:
    arguments = parser().parse_args()
    with errors_end_the_process():
        if importlib.util.find_spec("matplotlib") is None:
            raise ConfigError(
                "plot_runs: needs matplotlib, which is not installed: pip install 'nemo-kd[plots]'"
            )
        try:
            re.compile(arguments.metrics or "")
        except re.error as error:
            raise ConfigError(
                f"--metrics: {arguments.metrics!r} is not a regular expression: {error}"
            ) from error
        from nemo_kd.tools.run_curves import plot_runs

        for path in plot_runs(
            [run.expanduser() for run in arguments.runs],
            arguments.output_dir.expanduser(),
            arguments.metrics,
        ):
            print_text(str(path))


def parser() -> OptionParser:
    result = OptionParser(prog="plot_runs", description=SUMMARY)
    result.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run's log folder, or its metrics.jsonl",
    )
    result.add_argument(
        "--output-dir",
        type=Path,
        default=Path("curves"),
        help="for the pictures (default: curves)",
    )
    result.add_argument(
        "--metrics",
        metavar="REGEX",
        help="only metrics whose name contains it, for example 'kl|loss'",
    )
    return result


if __name__ == "__main__":
    main()
