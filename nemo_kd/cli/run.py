"""Run a command: help, the typed configuration, its checks, launching, errors."""

from __future__ import annotations

import contextlib
import gc
import logging
import operator
import os
import pkgutil
import shutil
import sys
import tarfile
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemo_kd.cli.aligner_keys import ALIASES
from nemo_kd.cli.compose import compose, option_parser
from nemo_kd.config import ConfigError, DataError
from nemo_kd.config.typed import describe, typed
from nemo_kd.data.records import check_readable
from nemo_kd.files import print_text
from nemo_kd.run.endings import errors_end_the_process
from nemo_kd.run.interruption import hold_back_warning_signal, parse_max_time
from nemo_kd.run.launch import LAUNCHER, follow_launcher, launch, needs_launch
from nemo_kd.run.ranks import find_ranks, join_ranks

log = logging.getLogger(__name__)

IGNORED_WARNINGS = (
    ".*sync_dist=True.*",  # what is logged has been reduced over ranks
    ".*dataloader is not resumable.*",  # it is: StudentData
    "Checkpoint directory .* exists and is not empty.",
    "The `srun` command is available",  # a hint for programs that do not start their ranks
)
"""Warnings of libraries that a user can do nothing about."""

MODEL_FILES = {"config.json", "model_config.yaml", ".metadata"}
"""Each marks a folder of a model, or of a checkpoint, whose error names the next step."""


RESOLVERS = {
    "multiply": operator.mul,
    "int_div": operator.floordiv,
    "sum": operator.add,
}
"""Resolvers that NeMo-Aligner's YAML files use."""

NO_COMPILER = "TORCHDYNAMO_DISABLE"
"""Torch's switch of `torch.compile`; the losses are compiled after the libraries have loaded."""

END_OF_HELP = """
--dry-run is dry_run=true, for commands with this key.

Text is taken as typed; lists are [a, b], mappings {a: 1, b: 2}, with quotes around the whole
argument for the shell.

Hydra's options for files work too: --config-path, --config-name, --config-dir, --cfg job."""


@dataclass(frozen=True)
class Command:
    """A console command.

    Attributes:
        name: of the command and of its YAML file in conf/.
        check: refuses what cannot work, before torch is imported and ranks are started.
        function: "module:function" that takes the typed configuration; imported when all checks
            have passed.
        example: a command line that works.
    """

    name: str
    summary: str
    config_class: type
    check: Callable[[Any], None]
    function: str
    example: str


def run(command: Command, arguments: list[str] | None = None) -> None:
    """Run the command with these arguments; None: those of this process.

    Exits with status 2 where the input cannot work, with REQUEUE where the run stopped early and
    the same command continues it.
    """
    if {"-h", "--help"} & {*sys.argv}:
        print_text(help_text(command))
        return
    hold_back_warning_signal()
    follow_launcher()
    for name, function in RESOLVERS.items():
        OmegaConf.register_new_resolver(name, function, replace=True)
    options, keys = option_parser().parse_known_args(arguments)
    with errors_end_the_process():
        cfg, ignored = compose(options, keys, command.name, command.config_class)
        if options.cfg:
            print_text(OmegaConf.to_yaml(cfg))
            return
        config: Any = typed(command.config_class, cfg)
        trainer: Any = getattr(config, "trainer", None)
        launching = trainer is not None and needs_launch(trainer)
        if LAUNCHER not in os.environ:  # the launcher has checked already
            command.check(config)
        if launching:
            sys.exit(launch(trainer.num_devices))
        configure_logging()
        ranks = find_ranks()
        log.info("loading libraries; ranks: %d", ranks.size)
        if ignored and ranks.rank == 0:
            text = "\n  ".join(["warning: these keys do nothing here:", *ignored])
            print_text(text, sys.stderr)
        with _no_collections():
            if trainer is not None:
                # Before Megatron and Lightning load, so that wrong devices are reported at once.
                join_ranks(trainer)
            with _no_compiler_without_gpu():
                function = pkgutil.resolve_name(command.function)
        function(config)


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Load libraries without garbage collection, which takes a fifth of their time and finds hardly
    anything; later collections skip what was loaded."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def _no_compiler_without_gpu() -> Iterator[None]:
    """Leave Megatron's small functions as they are where there is no GPU to fuse them for: a mere
    `@torch.compile` loads Inductor, in half a second."""
    import torch

    before = os.environ.get(NO_COMPILER)
    if before is None and not torch.cuda.is_available():
        os.environ[NO_COMPILER] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(NO_COMPILER, None)


def help_text(command: Command) -> str:
    """Return the text of --help: purpose, example, every key with type, default and meaning."""
    lines = [f"{command.name}: {command.summary}", "", "Example:"]
    lines += [textwrap.indent(command.example, "  "), "", "Keys, given as key=value:"]
    width = min(shutil.get_terminal_size().columns, 120) - 6
    for key in describe(command.config_class):
        default = "mandatory" if key.default == "???" else f"default {key.default!r}"
        facts = ", ".join(filter(None, [key.type, default, key.need]))
        lines += [
            f"  {key.key}  ({facts})",
            textwrap.indent(textwrap.fill(key.doc, width), " " * 6),
        ]
    lines += ["", "Other names of keys:"]
    lines += [f"  {name}: {key}" for name, key in ALIASES[command.name].items()]
    return "\n".join([*lines, END_OF_HELP])


def configure_logging() -> None:
    """Show messages of rank 0 and errors of the others; call it before heavy imports: they warn."""
    level = logging.INFO if find_ranks().rank == 0 else logging.ERROR
    logger = logging.getLogger("nemo_kd")
    logger.handlers = [logging.StreamHandler()]
    logger.propagate = False
    logger.setLevel(level)
    silence_libraries()


def silence_libraries() -> None:
    """Drop messages of libraries that a user can do nothing about."""
    warnings.filterwarnings("ignore", "|".join(IGNORED_WARNINGS))
    # Megatron misses Apex and Transformer Engine.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    for noisy in (
        "nv_one_logger",
        "lightning.pytorch.utilities.rank_zero",
        "lightning.fabric.utilities.seed",
        # Of Megatron 0.19: GPTModel's end (CONTRIBUTING.md); what 0.16 has under other names.
        "megatron.core.models.gpt.gpt_model",
        "megatron.core.distributed.distributed_data_parallel",
        "megatron.core.dist_checkpointing.strategies.common",
    ):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def check_stage(config: Any) -> int:
    """Refuse what cannot work in either stage; return the number of replicas of the model."""
    if config.exp_manager.max_time_per_run is not None:
        parse_max_time(config.exp_manager.max_time_per_run)
    path = config.pretrained_checkpoint.restore_from_path
    check_model("pretrained_checkpoint.restore_from_path", path)
    return config.model.data_parallel_size(
        config.trainer.num_nodes * config.trainer.num_devices
    )


def check_model(key: str, path: str) -> None:
    """Refuse a model that is not there."""
    if not os.access(path, os.R_OK):
        raise ConfigError(
            f"{key}: {path} does not exist or may not be read; give a Hugging Face folder or a "
            ".nemo archive"
        )
    if os.path.isdir(path):
        is_model = bool(MODEL_FILES & {*os.listdir(path)})
    else:
        is_model = tarfile.is_tarfile(path)
    if not is_model:
        raise ConfigError(
            f"{key}: {path} is neither a Hugging Face folder (config.json) nor a .nemo archive or "
            "its content (model_config.yaml)"
        )


def check_records(key: str, file_path: str | Sequence[str]) -> None:
    """Refuse a dataset that cannot be opened."""
    try:
        check_readable(file_path)
    except DataError as error:
        raise ConfigError(f"{key}: {error}") from error


def check_writable(key: str, folder: str | Path | None) -> None:
    """Refuse a folder that does not exist and cannot be made, or cannot be written; None is the
    current one."""
    existing = Path(folder or ".").absolute()
    # Path.exists fails where os.path.exists returns False: in a folder that may not be searched.
    while not os.path.exists(existing):
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{key}: {folder or existing} cannot be written: {existing} is no folder in which you "
            "may write; give another one"
        )
