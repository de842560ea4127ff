"""Console command for caches."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from nemo_kd.cli.compute_topk_logits import PLAN
from nemo_kd.cli.inspect_cache import add_inspect
from nemo_kd.cli.options import OptionParser, path
from nemo_kd.cli.run import run
from nemo_kd.cli.verify_cache import add_verify
from nemo_kd.run.endings import errors_end_the_process
from nemo_kd.terminal import print_text

PATH = "file or CHUNK_ID template of a cache"


def main() -> None:
    if sys.argv[1:2] == ["plan"]:  # accepts the keys of stage 1, not options
        run(PLAN, sys.argv[2:])
        return
    command_line = parser()
    # argparse accepts no positional arguments behind options: KEY=VALUE arrive as unknown.
    arguments, unknown = command_line.parse_known_args()
    if unknown and (
        "settings" not in arguments
        or any(argument.startswith("-") for argument in unknown)
    ):
        command_line.error(f"unrecognized arguments: {' '.join(unknown)}")
    with errors_end_the_process():
        if unknown:
            arguments.settings = unknown
        sys.exit(arguments.run(arguments))


def parser() -> OptionParser:
    """Return the parser; every subcommand sets `run`, which returns the exit status."""
    result = OptionParser(
        prog="logit_cache",
        description="Inspect, check and change caches of teacher logits.",
    )
    subcommands = result.add_subparsers(required=True, metavar="SUBCOMMAND")
    subcommands.add_parser("plan", help=PLAN.summary)
    add_inspect(subcommands)
    add_verify(subcommands, PATH)
    _add_repair(subcommands)
    _add_convert(subcommands)
    _add_merge(subcommands)
    return result


def _add_repair(subcommands: Any) -> None:
    text = (
        "cut torn last lines (keeping what is cut), rebuild missing or stale indexes, remove "
        "leftovers of dead processes"
    )
    repair = subcommands.add_parser("repair", help=text, description=text)
    repair.add_argument("path", type=path, help=PATH)
    repair.add_argument(
        "--dry-run", action="store_true", help="only print what would be done"
    )
    repair.set_defaults(run=_repair)


def _repair(arguments: argparse.Namespace) -> int:
    from nemo_kd.tools.repair import repair

    done = repair(arguments.path, arguments.dry_run)
    print_text("\n".join(done) if done else "nothing to repair")
    return 1 if any(text.startswith("not repaired") for text in done) else 0


def _add_convert(subcommands: Any) -> None:
    text = (
        "write a cache again: in another codec or container (by the target's suffix), with fewer "
        "tokens, or from other programs' files"
    )
    convert = subcommands.add_parser("convert", help=text, description=text)
    option = convert.add_argument
    option(
        "source",
        type=path,
        help=f"{PATH}; NeMo-Aligner's files, or vLLM's with --from vllm",
    )
    option(
        "target",
        type=path,
        help="file or CHUNK_ID template, ending in .jsonl or .jsonl.zst",
    )
    option(
        "--from",
        dest="format",
        choices=["cache", "vllm"],
        default="cache",
        help="format of the source; vllm: prompt_logprobs",
    )
    option("--codec", choices=["packed", "json"], default="packed")
    option(
        "--top-k",
        type=int,
        help="most tokens to keep per position (default: the source's)",
    )
    option(
        "--min-probability",
        type=float,
        default=0.0,
        help="move less likely tokens to the tail (default 0)",
    )
    option(
        "--top-p",
        type=float,
        default=1.0,
        help="keep the likeliest tokens until they hold this probability (default 1)",
    )
    option(
        "--min-k",
        type=int,
        default=1,
        help="least tokens to keep per position (default 1)",
    )
    option(
        "--vocab-size",
        type=int,
        help="the teacher's vocabulary, if the source has no manifest",
    )
    option(
        "--tokenizer",
        type=path,
        metavar="MODEL",
        help="folder of the teacher's model or tokenizer, if the source has no manifest",
    )
    option(
        "--examples-per-chunk", type=int, help="records per chunk (default: the source's)"
    )
    convert.set_defaults(run=_convert)


def _convert(arguments: argparse.Namespace) -> int:
    from nemo_kd.cache.reader import CacheReader
    from nemo_kd.config.cache import CacheConfig
    from nemo_kd.tools.recode import Tokenizer, convert
    from nemo_kd.tools.vllm_files import VllmRows

    cache = CacheConfig(
        codec=arguments.codec,
        min_probability=arguments.min_probability,
        top_p=arguments.top_p,
        min_k=arguments.min_k,
    )
    source_class = VllmRows if arguments.format == "vllm" else CacheReader
    source = source_class(arguments.source)
    tokenizer = None
    if arguments.tokenizer:
        from nemo_kd.data.tokenizer import load_tokenizer_of, tokenizer_fingerprint

        loaded = load_tokenizer_of(arguments.tokenizer)
        tokenizer = Tokenizer(tokenizer_fingerprint(loaded), len(loaded))
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
    chunks = written.chunks.values()
    num_tokens = sum(chunk.tokens for chunk in chunks)
    per_token = sum(chunk.bytes for chunk in chunks) / max(1, num_tokens)
    num_examples = sum(chunk.examples for chunk in chunks)
    print(
        f"{num_examples:,} examples, {num_tokens:,} tokens, {per_token:,.1f} bytes per token"
    )
    return 0


def _add_merge(subcommands: Any) -> None:
    text = "make one cache of several that were written apart, for example from ranges of one dataset"
    merge = subcommands.add_parser("merge", help=text, description=text)
    option = merge.add_argument
    option("sources", type=path, nargs="+", help=PATH)
    option(
        "--output", type=path, required=True, help="CHUNK_ID template of the merged cache"
    )
    option(
        "--allow-gaps",
        action="store_true",
        help="allow missing records between the sources",
    )
    option(
        "--num-workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes (default: all cores)",
    )
    merge.set_defaults(run=_merge)


def _merge(arguments: argparse.Namespace) -> int:
    from nemo_kd.tools.merge import merge

    manifest = merge(
        arguments.sources,
        arguments.output,
        arguments.allow_gaps,
        max(1, arguments.num_workers),
    )
    num_examples = sum(chunk.examples for chunk in manifest.chunks.values())
    print(f"{len(manifest.chunks)} chunks, {num_examples:,} examples")
    return 0


if __name__ == "__main__":
    main()
