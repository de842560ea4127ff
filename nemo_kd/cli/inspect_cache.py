"""`logit_cache inspect`: the command line."""

from __future__ import annotations

import argparse
import os
from typing import Any

from nemo_kd.cli.options import path
from nemo_kd.config import ConfigError
from nemo_kd.terminal import print_text

SUMMARY = "tells what a cache holds: counts, how much of the teacher is kept, how certain it is, examples as text or a page"


def add_inspect(subcommands: Any) -> None:
    """Adds the subcommand; nothing heavy is imported before it runs."""
    inspect = subcommands.add_parser("inspect", help=SUMMARY, description=SUMMARY)
    inspect.add_argument(
        "path",
        type=path,
        help="file or CHUNK_ID template of a cache; [a:b] behind it selects examples",
    )
    inspect.add_argument(
        "--tokenizer",
        type=path,
        metavar="MODEL",
        help="the teacher's model or tokenizer folder; without it ids are shown",
    )
    inspect.add_argument(
        "--example",
        type=int,
        default=0,
        metavar="N",
        help="position of the example to show (default 0)",
    )
    inspect.add_argument(
        "--sample",
        type=int,
        default=1000,
        metavar="N",
        help="examples measured for the statistics (default 1000)",
    )
    inspect.add_argument(
        "--html",
        type=path,
        metavar="FILE",
        help="writes a page: tokens coloured by the teacher's entropy, with its alternatives",
    )
    inspect.add_argument(
        "--num-examples",
        type=int,
        default=20,
        metavar="N",
        help="examples on the page (default 20)",
    )
    inspect.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    from nemo_kd.cache.layout import CacheError
    from nemo_kd.cache.reader import CacheReader
    from nemo_kd.data.token_text import TokenText, tokenizer_of
    from nemo_kd.files import write_atomically
    from nemo_kd.tools.cache_statistics import measure
    from nemo_kd.tools.inspect_cache import as_text, check_tokenizer, example_as_text, report_of
    from nemo_kd.tools.inspect_page import chosen, page

    _check(arguments)
    reader, tokenizer = CacheReader(arguments.path, partial=True), None
    if arguments.tokenizer:
        tokenizer = tokenizer_of(arguments.tokenizer)
        check_tokenizer(reader, tokenizer, arguments.tokenizer)
    if not 0 <= arguments.example < len(reader):
        raise CacheError(
            f"--example: {arguments.example} lies outside the {len(reader)} examples of {arguments.path}"
        )
    text = TokenText(tokenizer)
    report = report_of(reader, measure(reader, arguments.sample))
    found = as_text(
        report, example_as_text(reader[arguments.example], arguments.example, len(reader), text)
    )
    if arguments.html:
        positions = chosen(len(reader), arguments.example, arguments.num_examples)
        rows = ((position, reader[position]) for position in positions)
        content = page(arguments.path, report, rows, text).encode(errors="backslashreplace")
        write_atomically(os.path.abspath(arguments.html), content)
        found += f"\n\nwritten: {arguments.html}"
    print_text(found)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    for name in ("sample", "num_examples"):
        if getattr(arguments, name) < 1:
            raise ConfigError(
                f"--{name.replace('_', '-')}: {getattr(arguments, name)} must be at least 1"
            )
    if arguments.html:
        folder = os.path.dirname(os.path.abspath(arguments.html))
        if os.path.isdir(arguments.html) or not os.path.isdir(folder):
            raise ConfigError(f"--html: {arguments.html} must be a file in a folder that exists")
