"""Command lines with options: argparse, with the error lines of the other commands."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, NoReturn

from nemo_kd import __version__
from nemo_kd.run.endings import USER_ERROR
from nemo_kd.terminal import print_error


class OptionParser(argparse.ArgumentParser):
    """A parser whose errors are one `error:` line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_argument("--version", action="version", version=f"nemo_kd {__version__}")

    def error(self, message: str) -> NoReturn:
        print_error(f"{message}; {self.prog} --help explains")
        sys.exit(USER_ERROR)


def path(text: str) -> str:
    """Return a path with a leading ~ as the home folder, which shells leave in --option=~/file."""
    return os.path.expanduser(text)
