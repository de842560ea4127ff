"""Run a command: help, Hydra, the typed configuration, launching, errors."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import sys
import textwrap
import warnings
from dataclasses import dataclass
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_kd import __version__
from nemo_kd.cli.aligner_keys import ALIASES, translate
from nemo_kd.cli.arguments import CommandLine, read_command_line
from nemo_kd.cli.before_start import check_before_start
from nemo_kd.cli.compose import compose, conf_dir, config_folder
from nemo_kd.config.typed import config_error, describe, typed
from nemo_kd.run.endings import errors_end_the_process
from nemo_kd.run.interruption import hold_back_warning_signal
from nemo_kd.run.launch import LAUNCHER, follow_launcher, launch, needs_launch
from nemo_kd.run.ranks import find_ranks
from nemo_kd.terminal import PrintableFormatter, print_text

HYDRA_SETTINGS = (
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)
"""Hydra neither makes folders nor logs; a run's files are those that its own keys name."""


IGNORED_WARNINGS: tuple[dict[str, Any], ...] = (
    {"module": r"megatron\."},  # what it misses without Apex and Transformer Engine
    {"message": ".*sync_dist=True.*"},  # what is logged has been reduced over ranks
    {"message": ".*dataloader is not resumable.*"},  # it is: StudentData
    {"message": "Checkpoint directory .* exists and is not empty."},
    {
        "message": "The `srun` command is available"
    },  # a hint for programs that do not start their ranks themselves
)
"""Warnings of libraries that a user can do nothing about, as arguments of
warnings.filterwarnings."""


@dataclass(frozen=True)
class Command:
    """A console command.

    Attributes:
        name: of the command and of its YAML file in conf/.
        function: "module:function" that takes the typed configuration; imported when all checks
            have passed.
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
    """Read the command line and run the command.

    Exits with status 2 where the input cannot work, with REQUEUE where the run stopped early and
    the same command continues it.
    """
    arguments = sys.argv[1:]
    if any(argument in ("-h", "--help") for argument in arguments):
        print_text(help_text(command))
        return
    if "--version" in arguments:
        print_text(f"nemo_kd {__version__}")
        return
    hold_back_warning_signal()
    follow_launcher()
    _register_resolvers()
    with errors_end_the_process(at_once=False):
        line = read_command_line(arguments, command.config_class, command.name)
        cfg = None if line.is_sweep else compose(line, command.name)
    if cfg is not None and not line.is_for_hydra:
        _run_with_config(command, cfg)
        return
    sys.argv[1:] = [*_absolute(line), *HYDRA_SETTINGS, *line.overrides]
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=command.name)(
        lambda cfg: _run_with_config(command, cfg)
    )()


def _absolute(line: CommandLine) -> list[str]:
    """Return the options for Hydra, to which a relative folder is relative to a Python file."""
    options = [
        option for option in line.options if not option.startswith("--config-path=")
    ]
    return (
        [*options, f"--config-path={config_folder(line)}"]
        if "--config-path" in line.settings
        else options
    )


def help_text(command: Command) -> str:
    """Return the text of --help: purpose, example, every key with type, default and meaning."""
    width = min(shutil.get_terminal_size().columns, 120)
    title = f"logit_cache {command.subcommand}" if command.subcommand else command.name
    lines = [
        f"{title}: {command.summary}",
        "",
        "Example:",
        textwrap.indent(command.example, "  "),
        "",
    ]
    lines += ["Keys, given as key=value:"]
    for key in describe(command.config_class):
        default = "mandatory" if key.default == "mandatory" else f"default {key.default}"
        need = f", {key.need}" if key.need else ""
        lines += [f"  {key.key}  ({key.type}, {default}{need})"]
        lines += textwrap.wrap(
            key.doc, width, initial_indent="      ", subsequent_indent="      "
        )
    lines += ["", "Other names of keys:"]
    lines += [f"  {name}: {key}" for name, key in ALIASES[command.name].items()]
    if any(key.key == "dry_run" for key in describe(command.config_class)):
        lines += ["", "--dry-run is dry_run=true, --part i/n is part=i/n."]
    lines += [
        "",
        "Text is taken as typed; lists are [a, b], mappings {a: 1, b: 2}, with quotes around the "
        "whole argument for the shell.",
        "",
        "Hydra's own options work too: --config-path, --config-name, --cfg job, --multirun.",
    ]
    return "\n".join(lines)


def _run_with_config(command: Command, cfg: DictConfig) -> None:
    with errors_end_the_process():
        try:
            cfg, ignored = translate(cfg, command.name, command.config_class)
        except OmegaConfBaseException as error:
            raise config_error(error) from error
        config: Any = typed(command.config_class, cfg)
        trainer: Any = getattr(config, "trainer", None)
        launching = trainer is not None and needs_launch(trainer)
        if LAUNCHER not in os.environ:  # the launcher has checked already
            check_before_start(config)
        if launching:
            sys.exit(launch(trainer.num_devices, command.subcommand))
        configure_logging()
        if ignored and find_ranks().rank == 0:
            print_text(
                "warning: these keys do nothing here:\n  " + "\n  ".join(ignored),
                sys.stderr,
            )
        module, function = command.function.split(":")
        getattr(importlib.import_module(module), function)(config)


def configure_logging() -> None:
    """Show messages of rank 0 and errors of the others; call it before heavy imports: they warn."""
    level = logging.INFO if find_ranks().rank == 0 else logging.ERROR
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(message)s"))
    logger = logging.getLogger("nemo_kd")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(level)
    for pattern in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", **pattern)
    for noisy in (
        "nv_one_logger",
        "lightning.pytorch.utilities.rank_zero",
        "lightning.fabric.utilities.seed",
    ):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def _register_resolvers() -> None:
    """Register the resolvers that NeMo-Aligner's YAML files use."""
    resolvers: dict[str, Any] = {
        "multiply": lambda x, y: x * y,
        "int_div": lambda x, y: x // y,
        "sum": lambda x, y: x + y,
    }
    for name, function in resolvers.items():
        OmegaConf.register_new_resolver(name, function, replace=True)
