"""`logit_cache verify`: check a cache's bytes, or its numbers against the teacher."""

from __future__ import annotations

import argparse
import os
from typing import Any

from nemo_kd.cli.options import path
from nemo_kd.cli.run import configure_logging
from nemo_kd.config import ConfigError
from nemo_kd.run.endings import errors_end_the_process
from nemo_kd.run.launch import launch, needs_launch
from nemo_kd.run.ranks import find_ranks
from nemo_kd.terminal import print_text


def add_verify(subcommands: Any, path_help: str) -> None:
    """Add the subcommand; arguments that its parser does not know become `settings`."""
    text = (
        "read every byte and check checksums, hashes, counts, order and indexes, or with --against "
        "the numbers of a sample; exit status 1 if anything is wrong"
    )
    verify = subcommands.add_parser(
        "verify",
        help=text,
        description=text,
        usage="logit_cache verify PATH [--num-workers N]\n"
        "       logit_cache verify PATH --against TEACHER [--num-examples N] [--seed N] "
        "[--dataset FILE] [KEY=VALUE ...]",
        epilog="KEY=VALUE: trainer.*, model.*, data.max_tokens_per_batch and data.packing of "
        "compute_topk_logits, for example trainer.devices=2 model.tensor_model_parallel_size=2.",
    )
    verify.add_argument("path", type=path, help=path_help)
    verify.add_argument(
        "--num-workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes (default: all cores)",
    )
    verify.add_argument(
        "--against",
        type=path,
        metavar="TEACHER",
        help="score a sample with this teacher twice, the second time as a control",
    )
    verify.add_argument(
        "--num-examples", type=int, default=64, help="rows to sample (default 64)"
    )
    verify.add_argument(
        "--seed", type=int, default=0, help="seed of the sample (default 0)"
    )
    verify.add_argument(
        "--dataset",
        type=path,
        metavar="FILE",
        help="dataset of the cache, to render the sample again (default: its recorded path)",
    )
    verify.set_defaults(run=_verify, settings=[])


def _verify(arguments: argparse.Namespace) -> int:
    if arguments.against is not None:
        return _verify_against(arguments)
    if arguments.settings:
        raise ConfigError(
            f"{arguments.settings[0]}: keys of compute_topk_logits are accepted with --against "
            "TEACHER only"
        )
    return _verify_bytes(arguments)


def _verify_bytes(arguments: argparse.Namespace) -> int:
    from nemo_kd.tools.verify import verify

    reports = verify(arguments.path, max(1, arguments.num_workers))
    problems = [problem for report in reports for problem in report.problems]
    for problem in problems:
        print_text(problem)
    counts = {
        name: sum(report.counts[name] for report in reports) for name in reports[0].counts
    }
    found = ", ".join(
        f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items()
    )
    num_chunks = sum(report.chunk >= 0 for report in reports)
    print(
        f"{num_chunks} chunks, {sum(report.bytes for report in reports):,} bytes, {found}"
    )
    print(f"{len(problems)} problems" if problems else "no problem found")
    return 1 if problems else 0


def _verify_against(arguments: argparse.Namespace) -> int:
    with errors_end_the_process():
        check_verify(arguments)
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


def check_verify(arguments: argparse.Namespace) -> None:
    """Refuse paths that cannot work before the seconds in which torch loads.

    Raises:
        ConfigError: names the option.
    """
    if not os.path.exists(arguments.against):
        raise ConfigError(
            f"--against: {arguments.against} does not exist; give the teacher, a Hugging Face "
            "folder or a .nemo archive"
        )
    if arguments.dataset is not None and not os.path.isfile(arguments.dataset):
        raise ConfigError(
            f"--dataset: there is no file {arguments.dataset}; give the JSONL file that the cache "
            "was made from"
        )
