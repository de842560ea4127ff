"""`logit_cache inspect`: describe a cache."""

from __future__ import annotations

import argparse
import os
from typing import Any

from nemo_kd.cli.options import path
from nemo_kd.config import ConfigError
from nemo_kd.terminal import print_text

SUMMARY = (
    "describe a cache: counts, how much of the teacher it keeps, how certain the teacher is, "
    "examples as text or as a page"
)


def add_inspect(subcommands: Any) -> None:
    """Add the subcommand. Heavy imports wait until it runs."""
    inspect = subcommands.add_parser("inspect", help=SUMMARY, description=SUMMARY)
    option = inspect.add_argument
    option(
        "path",
        type=path,
        help="file or CHUNK_ID template of a cache; append [a:b] to select examples",
    )
    option(
        "--tokenizer",
        type=path,
        metavar="MODEL",
        help="folder of the teacher's model or tokenizer; without it, ids are shown",
    )
    option(
        "--example",
        type=int,
        default=0,
        metavar="N",
        help="position of the example to show, from 0",
    )
    option(
        "--sample",
        type=int,
        default=1000,
        metavar="N",
        help="examples to measure (default 1000)",
    )
    option(
        "--html",
        type=path,
        metavar="FILE",
        help="write a page: tokens coloured by the teacher's entropy, with its alternatives",
    )
    option(
        "--num-examples",
        type=int,
        default=20,
        metavar="N",
        help="examples on the page (default 20)",
    )
    inspect.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    _check(arguments)
    from nemo_kd.cache.layout import CacheError
    from nemo_kd.cache.reader import CacheReader
    from nemo_kd.data.text import TokenText, example_lines
    from nemo_kd.data.tokenizer import load_tokenizer_of
    from nemo_kd.files import write_atomically
    from nemo_kd.tools.inspect_cache import (
        build_page,
        check_tokenizer,
        describe_cache,
        format_report,
        measure,
        spread,
    )

    reader = CacheReader(arguments.path, partial=True)
    tokenizer = None
    if arguments.tokenizer:
        tokenizer = load_tokenizer_of(arguments.tokenizer)
        check_tokenizer(reader, tokenizer, arguments.tokenizer)
    number = arguments.example
    if not 0 <= number < len(reader):
        raise CacheError(
            f"--example: {number} lies outside the {len(reader)} examples of {arguments.path}"
        )
    text = TokenText(tokenizer)
    report = describe_cache(reader, measure(reader, arguments.sample))
    row = reader[number]
    headline = (
        f"example {number} of {len(reader):,} (record {row.example.index}): "
        f"{row.example.num_tokens:,} positions, {row.example.num_loss_tokens:,} in the loss"
    )
    print_text(
        "\n".join([format_report(report), "", headline, *example_lines(row, text)])
    )
    if arguments.html:
        others = spread(len(reader), arguments.num_examples)
        positions = [number, *(one for one in others if one != number)]
        positions = positions[: arguments.num_examples]
        rows = ((position, reader[position]) for position in positions)
        content = build_page(arguments.path, report, rows, text)
        target = os.path.abspath(arguments.html)
        write_atomically(target, content.encode(errors="backslashreplace"))
        print_text(f"\nwritten: {arguments.html}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    for name in ("sample", "num_examples"):
        value = getattr(arguments, name)
        if value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: {value} must be at least 1")
    if arguments.html:
        folder = os.path.dirname(os.path.abspath(arguments.html))
        if os.path.isdir(arguments.html) or not os.path.isdir(folder):
            raise ConfigError(
                f"--html: {arguments.html} must be a file in a folder that exists"
            )
