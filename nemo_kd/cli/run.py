"""What the commands share: help, Hydra, the typed configuration, launching, errors."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import shutil
import signal
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from nemo_kd.cli.launch import follow_launcher, global_rank, launch, needs_launch
from nemo_kd.config import ConfigError, UserInputError, describe, typed
from nemo_kd.config.aligner_keys import translate
from nemo_kd.interruption import REQUEUE, SIGNALS, Requeue, hold_back_warning_signal
from nemo_kd.terminal import PrintableFormatter, print_error, print_text
from nemo_kd.watchdog import CollectiveError

HYDRA_SETTINGS = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")
"""Hydra neither makes folders nor logs; a run's files are those that its own keys name."""

USER_ERROR = 2
"""Exit status when the user's input cannot work; any other failure is 1."""


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


@contextlib.contextmanager
def errors_end_the_process() -> Iterator[None]:
    """Errors that a user can do something about end this rank at once, with a message and the status that tells them apart."""
    try:
        yield
    except Requeue as requeue:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        _wait_for_other_ranks()
        if global_rank() == 0:
            print_text(f"{requeue}; the same command continues (exit status {REQUEUE})", sys.stderr)
        _leave(REQUEUE)
    except SystemExit as leaving:
        if leaving.code is None:  # Lightning's SIGTERMException, which would pass for success
            sys.exit(128 + signal.SIGTERM)
        raise
    except KeyboardInterrupt:
        if global_rank() == 0:
            print("interrupted", file=sys.stderr, flush=True)
        _leave(128 + signal.SIGINT)
    except (UserInputError, CollectiveError) as error:
        if "HYDRA_FULL_ERROR" in os.environ:
            raise
        user_error = isinstance(error, UserInputError)
        if user_error and global_rank() != 0:
            # Rank 0 mostly fails alike; then the launcher ends this process before it repeats the message.
            time.sleep(3)
        print_error(error)
        if not user_error:
            time.sleep(1)  # the rank that caused it ends first, and its exit status counts
        _leave(USER_ERROR if user_error else 1)


def _wait_for_other_ranks() -> None:
    """The first rank that leaves makes launchers end the others, and one of those may be cleaning up."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def _leave(status: int) -> None:
    """Not sys.exit: other ranks may be waiting for this one, and an orderly shutdown would wait for them."""
    sys.stdout.flush()
    os._exit(status)


def configure_logging() -> None:
    """Messages of rank 0, errors of the others."""
    level = logging.INFO if global_rank() == 0 else logging.ERROR
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(message)s"))
    logger = logging.getLogger("nemo_kd")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(level)
    warnings.filterwarnings("ignore", module=r"megatron\.")  # what it misses without Apex and Transformer Engine
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # what is logged has been reduced over ranks
    warnings.filterwarnings("ignore", message=".*dataloader is not resumable.*")  # it is: StudentData
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty.")
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
