"""What the commands share: help, Hydra, the typed configuration, launching, errors."""

from __future__ import annotations

import importlib
import logging
import re
import shutil
import sys
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from nemo_kd.cli.endings import USER_ERROR, errors_end_the_process
from nemo_kd.cli.launch import follow_launcher, global_rank, launch, needs_launch
from nemo_kd.config import ConfigError, UserInputError, describe, typed
from nemo_kd.config.aligner_keys import translate
from nemo_kd.interruption import hold_back_warning_signal
from nemo_kd.terminal import PrintableFormatter, print_error, print_text

HYDRA_SETTINGS = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")
"""Hydra neither makes folders nor logs; a run's files are those that its own keys name."""


IGNORED_WARNINGS: tuple[dict[str, Any], ...] = (
    {"module": r"megatron\."},  # what it misses without Apex and Transformer Engine
    {"message": ".*sync_dist=True.*"},  # what is logged has been reduced over ranks
    {"message": ".*dataloader is not resumable.*"},  # it is: StudentData
    {"message": "Checkpoint directory .* exists and is not empty."},
    {"message": "The `srun` command is available"},  # a hint for programs that do not start their ranks themselves
)
"""Warnings of libraries that a user can do nothing about, as arguments of warnings.filterwarnings."""


@dataclass(frozen=True)
class Command:
    """A console command.

    Attributes:
        name: of the command and of its YAML file in conf/.
        function: "module:function" that takes the typed configuration; imported when all checks have passed.
        example: a command line that works.
        subcommand: word of the command line before the keys.
    """

    name: str
    summary: str
    config_class: type
    function: str
    example: str
    subcommand: str = ""


def run(command: Command) -> None:
    """Reads the command line and runs the command; exits with status 2 where the input cannot work, with REQUEUE where
    the run stopped early and the same command continues it."""
    if any(argument in ("-h", "--help") for argument in sys.argv[1:]):
        print(help_text(command))
        return
    hold_back_warning_signal()
    follow_launcher()
    _register_resolvers()
    try:
        sys.argv[1:] = hydra_arguments(sys.argv[1:])
    except UserInputError as error:
        print_error(error)
        sys.exit(USER_ERROR)
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=command.name)(
        lambda cfg: _run_with_config(command, cfg)
    )()


def hydra_arguments(arguments: list[str]) -> list[str]:
    """The arguments as Hydra takes them: every `key=value` may add a key (our own check names unknown ones), and a
    relative --config-path means the current folder."""
    if any(argument.startswith("--experimental") for argument in arguments):
        raise ConfigError("--experimental-rerun: refused, because Hydra unpickles the file, which can run any code")
    options: list[str] = []
    overrides: list[str] = []
    arguments = _flags_as_keys(arguments)
    for position, argument in enumerate(arguments):
        option = arguments[position - 1] if position and "=" not in arguments[position - 1] else ""
        if option in ("--config-path", "-cp", "--config-dir", "-cd"):
            options.append(_absolute(argument))
        elif argument.startswith(("--config-path=", "--config-dir=")):
            name, _, value = argument.partition("=")
            options.append(f"{name}={_absolute(value)}")
        elif argument.startswith("-") or option in (
            "--config-name",
            "-cn",
            "--cfg",
            "-c",
            "--info",
            "-i",
            "--package",
            "-p",
        ):
            options.append(argument)
        elif re.match(r"[A-Za-z_][\w.]*=", argument) and not argument.startswith("hydra."):
            overrides.append(f"++{argument}")
        else:
            overrides.append(f"+{argument}" if re.match(r"\+[A-Za-z_][\w.]*=", argument) else argument)
    given = {override.partition("=")[0] for override in overrides}
    settings = [setting for setting in HYDRA_SETTINGS if setting.partition("=")[0] not in given]
    return [*options, *settings, *overrides]


def _flags_as_keys(arguments: list[str]) -> list[str]:
    """`--dry-run` and `--shard i/n`, which read better than dry_run=true and shard=i/n."""
    keys: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--dry-run":
            keys.append("dry_run=true")
        elif argument == "--shard":
            keys.append(f"shard={next(remaining, '')}")
        else:
            keys.append(argument.replace("--shard=", "shard=", 1) if argument.startswith("--shard=") else argument)
    return keys


def _absolute(folder: str) -> str:
    return str(Path(folder).absolute()) if Path(folder).is_dir() else folder


def conf_dir() -> Path:
    """The folder of the commands' YAML files: installed with the package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def help_text(command: Command) -> str:
    """What --help prints: purpose, an example, every key with type, default and meaning."""
    width = min(shutil.get_terminal_size().columns, 120)
    title = f"logit_cache {command.subcommand}" if command.subcommand else command.name
    lines = [f"{title}: {command.summary}", "", "Example:", textwrap.indent(command.example, "  "), ""]
    lines += ["Keys, given as key=value:"]
    for key in describe(command.config_class):
        default = "" if key.default == "mandatory" else f", default {key.default}"
        needed = ", mandatory" if key.default == "mandatory" else ""
        lines += [f"  {key.key}  ({key.type}{default}{needed})"]
        lines += textwrap.wrap(key.doc, width, initial_indent="      ", subsequent_indent="      ")
    if any(key.key == "dry_run" for key in describe(command.config_class)):
        lines += ["", "--dry-run is dry_run=true, --shard i/n is shard=i/n."]
    lines += ["", "Hydra's own options work too: --config-path, --config-name, --cfg job, --multirun."]
    return "\n".join(lines)


def _run_with_config(command: Command, cfg: DictConfig) -> None:
    with errors_end_the_process():
        cfg, ignored = translate(cfg, command.name)
        config: Any = typed(command.config_class, cfg)
        trainer = getattr(config, "trainer", None)
        if trainer is not None and needs_launch(trainer):
            sys.exit(launch(trainer.num_devices, command.subcommand))
        configure_logging()
        if ignored and global_rank() == 0:
            print_text("warning: these keys do nothing here:\n  " + "\n  ".join(ignored), sys.stderr)
        module, function = command.function.split(":")
        getattr(importlib.import_module(module), function)(config)


def configure_logging() -> None:
    """Messages of rank 0, errors of the others; before anything heavy is imported, which would warn then."""
    level = logging.INFO if global_rank() == 0 else logging.ERROR
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(message)s"))
    logger = logging.getLogger("nemo_kd")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(level)
    for pattern in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", **pattern)
    for noisy in ("nv_one_logger", "lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def _register_resolvers() -> None:
    """Those that NeMo-Aligner's YAML files use."""
    resolvers: dict[str, Any] = {
        "multiply": lambda x, y: x * y,
        "int_div": lambda x, y: x // y,
        "sum": lambda x, y: x + y,
    }
    for name, function in resolvers.items():
        OmegaConf.register_new_resolver(name, function, replace=True)
