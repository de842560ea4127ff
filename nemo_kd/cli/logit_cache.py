"""Console command for caches that are there, or about to be written."""

from __future__ import annotations

import argparse
import sys

from nemo_kd.cli.plan_cache import COMMAND as PLAN
from nemo_kd.cli.run import USER_ERROR, run
from nemo_kd.config import UserInputError


def main() -> None:
    if sys.argv[1:2] == ["plan"]:  # takes the keys of stage 1, not options
        del sys.argv[1]
        run(PLAN)
        return
    arguments = parser().parse_args()
    try:
        sys.exit(arguments.run(arguments))
    except UserInputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)


def parser() -> argparse.ArgumentParser:
    """The command line; every subcommand sets `run`, which returns the exit status."""
    result = argparse.ArgumentParser(prog="logit_cache", description="Works on caches of teacher logits.")
    subcommands = result.add_subparsers(required=True, metavar="SUBCOMMAND")
    subcommands.add_parser("plan", help=PLAN.summary)
    return result


if __name__ == "__main__":
    main()
