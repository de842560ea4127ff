"""Console command for caches."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from nemo_kd.cli.compute_topk_logits import PLAN
from nemo_kd.cli.options import OptionParser, count, path
from nemo_kd.cli.run import check_writable, configure_logging, run
from nemo_kd.config import ConfigError
from nemo_kd.files import print_text
from nemo_kd.run.endings import errors_end_the_process
from nemo_kd.run.launch import launch, needs_launch
from nemo_kd.run.ranks import find_ranks

PATH = "file or CHUNK_ID template of a cache"
CORES = os.cpu_count() or 1


def main() -> None:
    if sys.argv[1:2] == ["plan"]:  # accepts the keys of stage 1, not options
        run(PLAN, sys.argv[2:])
        return
    command_line = parser()
    # argparse accepts no positional arguments behind options: KEY=VALUE arrive as unknown.
    arguments, settings = command_line.parse_known_args()
    arguments.settings = settings
    for unknown in settings:
        if arguments.run is not _verify or unknown.startswith("-"):
            command_line.error(f"unrecognized arguments: {unknown}")
    with errors_end_the_process():
        sys.exit(arguments.run(arguments))


def parser() -> OptionParser:
    """Return the parser; every subcommand sets `run`, which returns the exit status."""
    result = OptionParser(
        prog="logit_cache",
        description="Inspect, check and change caches of teacher logits.",
    )
    subcommands = result.add_subparsers(required=True, metavar="SUBCOMMAND")
    subcommands.add_parser("plan", help=PLAN.summary)
    for name, (function, text, options) in SUBCOMMANDS.items():
        subcommand = subcommands.add_parser(name, help=text, description=text)
        subcommand.set_defaults(run=function)
        for option, row in options.items():
            subcommand.add_option(option, *row)
    return result


def _inspect(arguments: argparse.Namespace) -> int:
    from nemo_kd.cache.layout import CacheError
    from nemo_kd.cache.reader import CacheReader
    from nemo_kd.data.tokenizer import TokenText, example_lines, load_tokenizer_of
    from nemo_kd.files import write_atomically
    from nemo_kd.tools.inspect_cache import (
        cache_page,
        check_tokenizer,
        describe_cache,
        format_report,
        measure,
        spread,
    )

    if arguments.html:
        folder = os.path.dirname(arguments.html) or "."
        check_writable("--html", folder)
        os.makedirs(folder, exist_ok=True)
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
        positions = list(dict.fromkeys([number, *others]))[: arguments.num_examples]
        rows = ((position, reader[position]) for position in positions)
        content = cache_page(arguments.path, report, rows, text)
        write_atomically(arguments.html, content.encode(errors="backslashreplace"))
        print_text(f"\nwritten: {arguments.html}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    if arguments.against is not None:
        return _verify_against(arguments)
    if arguments.settings:
        raise ConfigError(
            f"{arguments.settings[0]}: keys of compute_topk_logits are accepted with --against "
            "TEACHER only"
        )
    from nemo_kd.cache.index import ChunkSummary
    from nemo_kd.tools.verify import COUNTS, verify

    reports = verify(arguments.path, arguments.num_workers)
    problems = [problem for report in reports for problem in report.problems]
    for problem in problems:
        print_text(problem)
    total = ChunkSummary.total(report.found for report in reports)
    found = (f"{getattr(total, name):,} {name.replace('_', ' ')}" for name in COUNTS)
    print(f"{len(reports)} chunks, {total.bytes:,} bytes, {', '.join(found)}")
    print(f"{len(problems)} problems" if problems else "no problem found")
    return 1 if problems else 0


def _verify_against(arguments: argparse.Namespace) -> int:
    configure_logging()
    from nemo_kd.tools.rescore import open_sample, rescore, rescoring_config

    sample = open_sample(arguments.path, arguments.num_examples, arguments.seed)
    config = rescoring_config(sample, arguments.against, arguments.settings)
    if needs_launch(config.trainer):
        return launch(config.trainer.num_devices)
    report, is_right = rescore(sample, config, arguments.dataset)
    if find_ranks().rank != 0:  # another status would end rank 0 before it prints
        return 0
    print_text(report)
    return 0 if is_right else 1


def _repair(arguments: argparse.Namespace) -> int:
    from nemo_kd.tools.repair import repair

    done = repair(arguments.path, arguments.dry_run)
    print_text("\n".join(done) if done else "nothing to repair")
    return 1 if any(text.startswith("not repaired") for text in done) else 0


def _convert(arguments: argparse.Namespace) -> int:
    from nemo_kd.cache.index import ChunkSummary
    from nemo_kd.cache.reader import CacheReader
    from nemo_kd.config.data import CacheConfig
    from nemo_kd.data.tokenizer import load_tokenizer_of
    from nemo_kd.tools.recode import convert
    from nemo_kd.tools.vllm_files import VllmRows

    cache = CacheConfig(
        codec=arguments.codec,
        min_probability=arguments.min_probability,
        top_p=arguments.top_p,
        min_k=arguments.min_k,
    )
    is_vllm = getattr(arguments, "from") == "vllm"
    source = (VllmRows if is_vllm else CacheReader)(arguments.source)
    tokenizer = None
    if arguments.tokenizer:
        tokenizer = load_tokenizer_of(arguments.tokenizer)
    elif not source.manifests:
        print(
            "warning: without --tokenizer, training cannot check that the student's is the same",
            file=sys.stderr,
        )
    written = convert(
        source,
        arguments.target,
        cache,
        arguments.top_k,
        arguments.vocab_size,
        arguments.examples_per_chunk,
        tokenizer,
    )
    total = ChunkSummary.total(written.chunks.values())
    per_token = total.bytes / max(1, total.tokens)
    print(
        f"{total.examples:,} examples, {total.tokens:,} tokens, {per_token:,.1f} bytes per token"
    )
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    from nemo_kd.cache.layout import CacheLayout
    from nemo_kd.tools.merge import merge

    check_writable("--output", CacheLayout(arguments.output).folder)
    manifest = merge(
        arguments.sources,
        arguments.output,
        arguments.allow_gaps,
        arguments.num_workers,
    )
    num_examples = sum(chunk.examples for chunk in manifest.chunks.values())
    print(f"{len(manifest.chunks)} chunks, {num_examples:,} examples")
    return 0


SUBCOMMANDS: dict[str, tuple[Any, ...]] = {
    "inspect": (
        _inspect,
        "describe a cache: counts, how much of the teacher it keeps, how certain the teacher is, "
        "examples as text or as a page",
        {
            "path": (path, f"{PATH}; append [a:b] to select examples"),
            "--tokenizer": (
                path,
                "folder of the teacher's model or tokenizer; without it, ids are shown",
            ),
            "--example": (int, "position of the example to show, from 0", 0),
            "--sample": (count, "examples to measure", 1000),
            "--html": (
                path,
                "write a page: tokens coloured by the teacher's entropy, with its alternatives",
            ),
            "--num-examples": (count, "examples on the page", 20),
        },
    ),
    "verify": (
        _verify,
        "read every byte and check checksums, hashes, counts, order and indexes, or with --against "
        "TEACHER [KEY=VALUE ...] the numbers of a sample; exit status 1 if anything is wrong. "
        "KEY=VALUE: trainer.*, model.*, data.max_tokens_per_batch and data.packing of "
        "compute_topk_logits, for example trainer.devices=2 model.tensor_model_parallel_size=2",
        {
            "path": (path, PATH),
            "--num-workers": (count, "processes", CORES),
            "--against": (
                path,
                "score a sample with this teacher twice, the second time as a control",
            ),
            "--num-examples": (count, "rows to sample", 64),
            "--seed": (int, "seed of the sample", 0),
            "--dataset": (
                path,
                "dataset of the cache, to render the sample again (default: its recorded path)",
            ),
        },
    ),
    "repair": (
        _repair,
        "cut torn last lines (keeping what is cut), rebuild missing or stale indexes, remove "
        "leftovers of dead processes",
        {
            "path": (path, PATH),
            "--dry-run": (bool, "only print what would be done"),
        },
    ),
    "convert": (
        _convert,
        "write a cache again: in another codec or container (by the target's suffix), with fewer "
        "tokens, or from other programs' files",
        {
            "source": (
                path,
                f"{PATH}; NeMo-Aligner's files, or vLLM's with --from vllm",
            ),
            "target": (
                path,
                "file or CHUNK_ID template, ending in .jsonl or .jsonl.zst",
            ),
            "--from": (
                ("cache", "vllm"),
                "format of the source; vllm: prompt_logprobs",
                "cache",
            ),
            "--codec": (("packed", "json"), "codec of the target", "packed"),
            "--top-k": (
                count,
                "most tokens to keep per position (default: the source's)",
            ),
            "--min-probability": (float, "move less likely tokens to the tail", 0.0),
            "--top-p": (
                float,
                "keep the likeliest tokens until they hold this probability",
                1.0,
            ),
            "--min-k": (int, "least tokens to keep per position", 1),
            "--vocab-size": (
                int,
                "the teacher's vocabulary, if the source has no manifest",
            ),
            "--tokenizer": (
                path,
                "folder of the teacher's model or tokenizer, if the source has no manifest",
            ),
            "--examples-per-chunk": (
                count,
                "records per chunk (default: the source's)",
            ),
        },
    ),
    "merge": (
        _merge,
        "make one cache of several that were written apart, for example from ranges of one dataset",
        {
            "sources": ([path], PATH),
            "--output": (path, "CHUNK_ID template of the merged cache", ...),
            "--allow-gaps": (bool, "allow missing records between the sources"),
            "--num-workers": (count, "processes", CORES),
        },
    ),
}
"""Function, summary, and the other arguments of `OptionParser.add_option` for each name."""

if __name__ == "__main__":
    main()
