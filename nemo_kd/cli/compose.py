"""Compose one configuration from a YAML file, the command's or the user's own, and overrides."""

from __future__ import annotations

import os
from pathlib import Path

import hydra
import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from nemo_kd.cli.aligner_keys import without
from nemo_kd.cli.arguments import CommandLine
from nemo_kd.config import ConfigError
from nemo_kd.config.typed import config_error

MAX_YAML_BYTES = 1_000_000
MAX_YAML_NODES = 100_000
MAX_YAML_DEPTH = 50
"""Bounds of a YAML file; aliases count as what they stand for."""


def conf_dir() -> Path:
    """Return the folder of the commands' YAML files: installed with the package, or beside it in a
    checkout."""
    package = Path(__file__).resolve().parent.parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def config_folder(line: CommandLine) -> Path:
    """Return the folder of the YAML file: --config-path, from the current folder, or the commands'
    own.

    Raises:
        ConfigError: there is no such folder.
    """
    given = line.settings.get("--config-path")
    if given is None:
        return conf_dir()
    folder = Path(given).expanduser()
    if folder.is_file():
        raise ConfigError(
            f"--config-path: {given} is a file; give its folder and its name: --config-path "
            f"{folder.parent} --config-name {folder.name}"
        )
    if not folder.is_dir():
        raise ConfigError(f"--config-path: there is no folder {given}")
    return folder.absolute()


def compose(line: CommandLine, name: str) -> DictConfig:
    """Return the configuration of a command line; `name` is that of the YAML file where the line
    gives none.

    Raises:
        ConfigError: names the argument, or the file and its line.
    """
    folder = config_folder(line)
    name = line.settings.get("--config-name", name)
    if name.endswith(".yml"):
        raise ConfigError(
            f"--config-name: {name}: only files ending in .yaml are read; rename it to "
            f"{name[:-4]}.yaml"
        )
    file_name = name if name.endswith(".yaml") else f"{name}.yaml"
    searched = line.settings.get("--config-dir")
    if searched and not (folder / file_name).is_file():
        other = Path(searched).expanduser().absolute()
        if (other / file_name).is_file():
            folder, searched = other, str(folder)
    path = folder / file_name
    if not path.is_file():
        there = ", ".join(sorted(found.stem for found in folder.glob("*.yaml"))) or "none"
        here = Path(path.name).is_file() and "--config-path" not in line.settings
        raise ConfigError(
            f"--config-name: there is no {path.name} in {folder}; there are: {there}"
            + (
                f". For the file in the current folder: --config-path . --config-name {name}"
                if here
                else ""
            )
        )
    check_yaml(path)
    overrides = line.overrides
    if searched:
        overrides = [*overrides, f"hydra.searchpath=[file://{os.path.abspath(searched)}]"]
    try:
        with hydra.initialize_config_dir(str(folder), version_base="1.3"):
            return without(hydra.compose(name, overrides), line.replaced)
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_problem(path, error)) from error
    except OmegaConfBaseException as error:
        raise config_error(error) from error
    except HydraException as error:
        raise ConfigError(" ".join(str(error).split())) from error


def check_yaml(path: Path) -> None:
    """Refuse a YAML file that cannot be read, or only at a cost out of proportion to its size.

    Raises:
        ConfigError: names the file and the line.
    """
    if path.stat().st_size > MAX_YAML_BYTES:
        raise ConfigError(
            f"{path}: {path.stat().st_size:,} bytes are too many for a configuration (at most "
            f"{MAX_YAML_BYTES:,})"
        )
    text = path.read_bytes()
    try:
        _count_nodes(path, text)
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_problem(path, error)) from error


def _count_nodes(path: Path, text: bytes) -> None:
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []  # (anchor, nodes counted before it)
    total = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        line = event.start_mark.line + 1
        if not open_nodes and isinstance(
            event, yaml.ScalarEvent | yaml.SequenceStartEvent
        ):
            raise ConfigError(
                f"{path}:{line}: a configuration is a mapping of keys, KEY: VALUE"
            )
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ConfigError(
                    f"{path}:{line}: *{event.anchor} stands for something that is not complete or "
                    "not there"
                )
            total += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, total))
            total += 1
            if len(open_nodes) > MAX_YAML_DEPTH:
                raise ConfigError(
                    f"{path}:{line}: nested more than {MAX_YAML_DEPTH} deep"
                )
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = total - before
        if total > MAX_YAML_NODES:
            raise ConfigError(
                f"{path}:{line}: more than {MAX_YAML_NODES:,} values, with aliases "
                f"(*{getattr(event, 'anchor', '')}) counted as what they stand for"
            )


def _yaml_problem(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    said = (
        getattr(error, "problem", None)
        or getattr(error, "reason", None)
        or str(error).splitlines()[0]
    )
    if mark is None:
        return f"{path}: is not YAML: {said}"
    name = mark.name if Path(str(mark.name)).is_file() else path
    return f"{name}:{mark.line + 1}: {said}"
