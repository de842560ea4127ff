"""Command lines with options: argparse, with the error lines of the other commands."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, NoReturn

from nemo_kd import __version__
from nemo_kd.files import print_error
from nemo_kd.run.endings import USER_ERROR


class OptionParser(argparse.ArgumentParser):
    """A parser whose errors are one `error:` line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_argument(
            "--version", action="version", version=f"nemo_kd {__version__}"
        )

    def add_option(
        self, name: str, kind: Any, meaning: str, default: Any = None
    ) -> None:
        """Add an argument.

        Args:
            kind: function that reads the text; bool for a flag, a tuple of choices, or [function]
                for one or more values.
            default: of an option; ... if it must be given.
        """
        more: dict[str, Any] = {"type": kind, "help": meaning}
        if kind is bool:
            more = {"action": "store_true", "help": meaning}
        elif isinstance(kind, tuple):
            more = {"choices": kind, "help": meaning}
        elif isinstance(kind, list):
            more |= {"type": kind[0], "nargs": "+"}
        elif name.startswith("-"):
            more["metavar"] = "PATH" if kind is path else "N"
        if default is ...:
            more["required"] = True
        elif default is not None:
            more |= {"default": default, "help": f"{meaning} (default {default})"}
        self.add_argument(name, **more)

    def error(self, message: str) -> NoReturn:
        print_error(f"{message}; {self.prog} --help explains")
        sys.exit(USER_ERROR)


def path(text: str) -> str:
    """Return a path with a leading ~ as the home folder, which shells leave in --option=~/file."""
    return os.path.expanduser(text)


def count(text: str) -> int:
    """Return a number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number
