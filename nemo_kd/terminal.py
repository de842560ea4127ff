"""Text from files and from users, made safe for a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TextIO


def printable(text: str, keep: str = "\t\n") -> str:
    """Escape control characters and other invisible ones, for example as `\\x1b`.

    A manifest, a record or a file name may hold escape sequences that move the cursor, rename
    the window or write to the clipboard.

    Args:
        keep: characters to leave unescaped.
    """
    return "".join(
        character
        if character.isprintable() or character in keep
        else repr(character)[1:-1]
        for character in text
    )


def print_text(text: str, stream: TextIO | None = None) -> None:
    """Print text, escaping control characters; ignore a closed pipe."""
    stream = sys.stdout if stream is None else stream
    try:
        print(printable(text), file=stream, flush=True)
    except BrokenPipeError:
        # Python flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_error(error: object) -> None:
    """Print an error as one line on stderr."""
    print_text(f"error: {error}", sys.stderr)


def size_text(num_bytes: float) -> str:
    """Format a number of bytes with a decimal unit."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"


def print_table(lines: Sequence[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    width = max(len(name) for name, _ in lines)
    print_text("\n".join(f"{name:<{width}}  {value}" for name, value in lines))
