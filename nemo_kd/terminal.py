"""Text from files and from users, made safe for a terminal."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO


def printable(text: str, keep: str = "\t\n") -> str:
    """Return `text` with control characters and other invisible ones as visible escapes, `\\x1b` for example.

    A manifest, a record or a file's name may hold escape sequences that move the cursor, rename the window or
    write to the clipboard.

    Args:
        keep: characters that stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in keep else repr(character)[1:-1] for character in text
    )


def print_text(text: str, stream: TextIO | None = None) -> None:
    """Print text in any language to any terminal, by default to stdout, or to a program that stops reading."""
    stream = sys.stdout if stream is None else stream
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(printable(text).encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
    except BrokenPipeError:
        # Python flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_error(error: object) -> None:
    """Print the one line that ends a command."""
    print_text(f"error: {error}", sys.stderr)


class PrintableFormatter(logging.Formatter):
    """Log messages without what a terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
