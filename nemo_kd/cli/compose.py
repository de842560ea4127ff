"""Arguments of a command -> its configuration: a YAML file and key=value, merged once."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_kd.cli.aligner_keys import ALIASES, config_of, with_keys
from nemo_kd.cli.options import OptionParser
from nemo_kd.config import ConfigError
from nemo_kd.config.typed import config_error, key_doc, known_keys, suggestion

_ARGUMENT = re.compile(r"\+{0,2}([A-Za-z_]\w*(?:\.\w+)*)=(.*)", re.DOTALL | re.ASCII)


def option_parser() -> OptionParser:
    """Return the parser of Hydra's options; what it does not know are key=value."""
    parser = OptionParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-path", "-cp")
    parser.add_argument("--config-name", "-cn")
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--cfg", "-c", choices=["job"])
    parser.add_argument(
        "--dry-run",
        dest="keys",
        action="append_const",
        const="dry_run=true",
        default=[],
    )
    return parser


def compose(
    options: argparse.Namespace,
    arguments: Iterable[str],
    command: str,
    config_class: type,
) -> tuple[DictConfig, list[str]]:
    """Return the configuration, and a warning for each key that has no effect.

    Raises:
        ConfigError: names the argument, the key, or the file and its line.
    """
    given = dict(
        read_argument(argument, command, config_class)
        for argument in [*options.keys, *arguments]
    )
    file = with_keys(_read_file(options, command), command)
    return config_of({**file, **with_keys(given, command)}, command)


def conf_dir() -> Path:
    """Return the folder of the commands' YAML files: installed with the package, or beside it in a
    checkout."""
    package = Path(__file__).resolve().parent.parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def _read_file(options: argparse.Namespace, command: str) -> Any:
    name = (options.config_name or command).removesuffix(".yaml")
    given = (options.config_path or conf_dir(), options.config_dir)
    folders = [Path(each).expanduser().absolute() for each in given if each]
    found = [folder for folder in folders if (folder / f"{name}.yaml").is_file()]
    if not found:
        near = [
            file for each in folders for file in (each / name).parent.glob("*.yaml")
        ]
        there = ", ".join(
            sorted(str(Path(name).with_name(each.stem)) for each in near)
        )
        raise ConfigError(
            f"--config-name: there is no {name}.yaml in {' or '.join(map(str, folders))}; there "
            f"are: {there or 'none'} (--config-path . reads the current folder)"
        )
    try:
        with hydra.initialize_config_dir(str(found[0]), version_base="1.3"):
            others = [folder for folder in folders if folder != found[0]]
            search = [f"hydra.searchpath=['file://{folder}']" for folder in others]
            return OmegaConf.to_container(hydra.compose(name, search))
    except OmegaConfBaseException as error:
        raise config_error(error) from error
    except (yaml.YAMLError, HydraException, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{found[0]}/{name}.yaml: {text}") from error


def read_argument(argument: str, command: str, config_class: type) -> tuple[str, Any]:
    """Read key=value; text is taken as typed, whatever characters it holds."""
    match = _ARGUMENT.fullmatch(argument)
    if match is None:
        name, _, text = argument.partition("=")
        known = known_keys(config_class)
        close = "" if name in known else suggestion(name, known, text or None)
        raise ConfigError(
            f"{name}: arguments are given as key=value, without dashes and blanks{close}; --help "
            "lists the keys"
        )
    name, text = match.groups()
    doc = key_doc(config_class, ALIASES[command].get(name, name))
    is_list = text.startswith(("[", "{"))
    is_text = doc is not None and (doc.kinds == {str} or (doc.is_path and not is_list))
    if is_text and text not in ("null", "") and text[0] not in "'\"":
        return name, text
    try:
        override = OverridesParser.create().parse_override(f"{name}={text}")
        return name, text if override.is_sweep_override() else override.value()
    except HydraException as error:
        if not is_list:
            return name, text
        try:
            return name, yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(
                f"{name}: {text} cannot be read; brackets must match, and texts that hold "
                "brackets, commas or quotes need quotes"
            ) from error
