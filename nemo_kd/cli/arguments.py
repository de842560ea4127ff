"""Read the command line of a command with keys: text as typed, and an error for any argument that
is not `key=value`."""

from __future__ import annotations

import os
import re
import shlex
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from nemo_kd.cli.aligner_keys import ALIASES, SEQ_LENGTH, YIELDS, key_of
from nemo_kd.config import ConfigError
from nemo_kd.config.foreign_keys import find_key
from nemo_kd.config.typed import SPLITS_HINT, SPLITS_KEY, alternatives, describe, key_type

VALUE_OPTIONS = {
    "--config-path": "--config-path",
    "-cp": "--config-path",
    "--config-name": "--config-name",
    "-cn": "--config-name",
    "--config-dir": "--config-dir",
    "-cd": "--config-dir",
    "--cfg": "--cfg",
    "-c": "--cfg",
    "--package": "--package",
    "-p": "--package",
}
FLAGS = ("--multirun", "-m", "--resolve", "--hydra-help", "--run", "-r")
"""Hydra's options, with a value and without."""

CHOICES = {
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
"""Values of --cfg and --info."""

COMPOSED = ("--config-path", "--config-name", "--config-dir")
"""Options that give the place of the configuration."""

_KEY = re.compile(
    r"(?P<sign>\+{0,2})(?P<key>[A-Za-z_]\w*(\.\w+)*)=(?P<value>.*)", re.DOTALL | re.ASCII
)
_OTHER_OVERRIDE = re.compile(
    r"~[A-Za-z_]\w*(\.\w+)*(=.*)?|\+{0,2}hydra[\w./@:-]*=.*", re.DOTALL | re.ASCII
)


@dataclass
class CommandLine:
    """Arguments of a command, read.

    Attributes:
        options: Hydra's options in Hydra's form.
        overrides: `key=value` in Hydra's form, in order.
        settings: values of the options in `VALUE_OPTIONS`.
        replaced: other names of the overrides' keys; their values in a YAML file no longer count.
    """

    options: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)

    @property
    def is_for_hydra(self) -> bool:
        """Return True if an option makes Hydra do more than compose one configuration."""
        return any(option.partition("=")[0] not in COMPOSED for option in self.options)

    @property
    def is_sweep(self) -> bool:
        """Return True with --multirun, where a comma separates values."""
        return any(option in ("--multirun", "-m") for option in self.options)


def read_command_line(
    arguments: list[str], config_class: type, command: str
) -> CommandLine:
    """Return the options and overrides in `arguments`.

    Every `key=value` may add a key: our own check names unknown ones. Text is taken as typed,
    whatever characters it holds; numbers, lists and mappings are read by Hydra's grammar.

    Raises:
        ConfigError: an argument is neither an option nor `key=value`, or its value cannot be read.
    """
    line = CommandLine()
    known = [each.key for each in describe(config_class)]
    given: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        name, has_value, value = argument.partition("=")
        if name.startswith("--experimental"):
            raise ConfigError(
                "--experimental-rerun: refused, because Hydra unpickles the file, which can run "
                "any code"
            )
        if name in VALUE_OPTIONS:
            option = VALUE_OPTIONS[name]
            value = value if has_value else next(remaining, "")
            if not value:
                raise ConfigError(f"{option}: needs a value")
            line.options.append(f"{option}={value}")
            line.settings[option] = value
        elif name in ("--info", "-i"):
            line.options.append(f"--info={value or 'all'}")
        elif name in FLAGS:
            line.options.append(argument)
        elif argument == "--dry-run" and "dry_run" in known:
            given.append("dry_run=true")
        elif name in ("--part", "--shard") and "part" in known:
            given.append(f"part={value if has_value else next(remaining, '')}")
        elif argument.startswith("-"):
            raise ConfigError(_answer_to_flag(argument, list(remaining), known))
        elif "=" in argument or argument.startswith("~"):
            given.append(argument)
        else:
            raise ConfigError(
                _answer_to_word(argument, list(remaining), given, config_class)
            )
    _check_options(line)
    given, line.replaced = _without_aliases(given, command)
    line.overrides = [
        _override(argument, config_class, known, line.is_sweep) for argument in given
    ]
    return line


def _without_aliases(given: list[str], command: str) -> tuple[list[str], list[str]]:
    """Return the overrides with keys for their aliases, and all aliases of these keys.

    Raises:
        ConfigError: two names of one key have different values.
    """
    matches = [_KEY.fullmatch(argument) for argument in given]
    keys = [key_of(one["key"], one["value"], command) if one else "" for one in matches]
    names = {
        one["key"]
        for one, key in zip(matches, keys, strict=True)
        if one and key == SEQ_LENGTH
    }
    yielding = YIELDS if len(names) > 1 else ""
    values: dict[str, tuple[str, str]] = {}
    result = []
    for argument, match, key in zip(given, matches, keys, strict=True):
        if match is None:
            result.append(argument)
            continue
        if match["key"] == yielding:
            continue
        name, value = values.setdefault(key, (match["key"], match["value"]))
        if name != match["key"] and value != match["value"]:
            raise ConfigError(
                f"{match['key']}: {match['value']} is another name of {key}, for which "
                f"{name}={value} "
                "is given; give one of them"
            )
        result.append(f"{match['sign']}{key}={match['value']}")
    return result, [alias for alias, key in ALIASES[command].items() if key in values]


def _check_options(line: CommandLine) -> None:
    """Refuse what Hydra ends in a traceback or several lines.

    Raises:
        ConfigError: names the option.
    """
    for option in line.options:
        name, _, value = option.partition("=")
        if value not in CHOICES.get(name, (value,)):
            raise ConfigError(
                f"{name}: {value} is not one of {', '.join(CHOICES[name])}; write "
                f"{name}={CHOICES[name][0]}"
            )
    if "--resolve" in line.options and "--cfg" not in line.settings:
        raise ConfigError("--resolve: goes with --cfg; write --cfg job --resolve")
    if line.is_sweep and "--cfg" in line.settings:
        raise ConfigError(
            "--multirun: does not go with --cfg, which prints one configuration; leave one of them "
            "out"
        )


def _answer_to_flag(argument: str, following: list[str], known: list[str]) -> str:
    name, has_value, value = argument.partition("=")
    if (
        not has_value
        and following
        and not following[0].startswith("--")
        and "=" not in following[0]
    ):
        value = following[0]
    if name in ("--config", "--config-file", "--yaml", "--cfg-file"):
        folder, _, file = (value or "my.yaml").rpartition("/")
        return (
            f"{name}: give the folder and the file of a YAML: --config-path {folder or '.'} "
            f"--config-name {file}"
        )
    key, how = find_key(name, known)
    if not key:
        return (
            f"{name}: is not an option; keys are given as key=value, without dashes. --help lists "
            "them"
        )
    return (
        f"{name}: keys are given as key=value, without dashes: "
        f"{_example(key, value)}{f' ({how})' if how else ''}"
    )


def _answer_to_word(
    argument: str, following: list[str], given: list[str], config_class: type
) -> str:
    docs = describe(config_class)
    known = [each.key for each in docs]
    key, how = (
        ("", "") if os.path.exists(argument) else find_key(argument, known)
    )  # a path stands for a value
    if key and following and "=" not in following[0] and not following[0].startswith("-"):
        return (
            f"{argument} {following[0]}: write {_example(key, following[0])}, with = and without "
            f"blanks{f' ({how})' if how else ''}"
        )
    if argument in known:
        return f"{argument}: has no value; write {_example(argument, 'VALUE')}"
    words = [
        argument,
        *(word for word in following if "=" not in word and not word.startswith("-")),
    ]
    named = {
        each.partition("=")[0].lstrip("+") for each in given + following if "=" in each
    }
    free = [
        each.key for each in docs if each.default == "mandatory" and each.key not in named
    ]
    if free:
        form = " ".join(f"{key}={word}" for key, word in zip(free, words, strict=False))
        return f"{argument}: arguments are given as key=value: {form}"
    return (
        f"{argument}: arguments are given as key=value; --help lists the keys (a value with blanks "
        "needs quotes around key=value)"
    )


def _example(key: str, value: str) -> str:
    value = value or "VALUE"
    if key == SPLITS_KEY:
        key = f"{key}.train"
    if re.search(
        r"[$`\"\\!]", value
    ):  # in double quotes the shell would still replace these
        return shlex.quote(f"{key}={value}")
    return (
        f'"{key}={value}"'
        if re.search(r"[\s#&|;<>()$*?'\[\]{}]", value)
        else f"{key}={value}"
    )


def _override(argument: str, config_class: type, known: list[str], is_sweep: bool) -> str:
    match = _KEY.fullmatch(argument)
    if match is None or match["key"].startswith("hydra."):
        if _OTHER_OVERRIDE.fullmatch(argument) is None:
            name, _, value = argument.partition("=")
            meant, how = find_key(name.strip(), known)
            form = f"key=value{f', here {_example(meant, value)}' if meant else ''}"
            form += f" ({how})" if how else ""
            raise ConfigError(
                f"{name}: is not the name of a key; arguments are given as {form}; --help lists "
                "the keys"
            )
        _parse(argument)
        return argument
    key = match["key"]
    value = match["value"]
    if not is_sweep:
        value = _value(key, value, config_class, known)
    return f"++{key}={value}"


def _value(key: str, value: str, config_class: type, known: list[str]) -> str:
    """Return a value as Hydra's grammar has it."""
    if value.strip().lower() == "null" or value in ("", "???"):
        return value
    hint, is_path = key_type(config_class, key)
    kinds = set(alternatives(hint))
    if (
        len(value) > 1
        and value[0] == value[-1]
        and value[0] in "'\""
        and _is_read(key, value)
    ):
        return value
    if kinds == {str} or (is_path and hint is Any and value[0] not in "[{"):
        return _quoted(value)
    is_mapping = any(typing.get_origin(each) is dict for each in kinds)
    is_list = any(typing.get_origin(each) is list for each in kinds)
    if value[0] in "[{":
        if _is_read(key, value):
            return value
        if is_mapping or is_list or is_path:
            return _with_quotes(key, value)
        return _quoted(value)
    if is_mapping and not value.startswith("${"):
        form = f"; give a mapping: {key}={{NAME: VALUE}}"
        if key == SPLITS_KEY:
            form = SPLITS_HINT.replace("FILE", value, 1)
        raise ConfigError(f"{key}: {value} is not a mapping{form}")
    if is_list and not value.startswith("${"):
        raise ConfigError(f"{key}: {value} is not a list; give {key}=[{value}]")
    return value if _is_read(key, value) else _quoted(value)


def _is_read(key: str, value: str) -> bool:
    """Return True if Hydra's grammar reads the value as one value."""
    try:
        return not _parse(f"{key}={value}").is_sweep_override()
    except ConfigError:
        return False


def _parse(argument: str) -> Any:
    try:
        return OverridesParser.create().parse_override(argument)
    except (HydraException, RecursionError) as error:
        key = argument.partition("=")[0]
        raise ConfigError(
            f"{key}: cannot be read ({str(error).splitlines()[0][:200]})"
        ) from error


def _with_quotes(key: str, value: str) -> str:
    """Return a list or mapping with quotes around the texts that Hydra's grammar does not read
    without."""
    form = "".join(_quoted_texts(value)) if len(value) <= 10_000 else ""
    if form and _is_read(key, form):
        return form
    shown = value if len(value) <= 300 else f"{value[:300]}..."
    example = (
        "{train: ['FILE'], validation: ['FILE']}"
        if value.startswith("{")
        else "['TEXT', 'TEXT']"
    )
    raise ConfigError(
        f"{key}: {shown} cannot be read; brackets must match, texts that hold brackets, commas or "
        "quotes need quotes, and "
        f'the shell wants quotes around it all: "{key}={example}"'
    )


def _quoted_texts(value: str) -> Iterator[str]:
    """Yield the parts of a list or mapping, texts that Hydra's grammar does not read in quotes."""
    for text, sign in re.findall(
        r"('(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|(?:[^,\[\]{}:]|:(?!\s))+)|([,\[\]{}:])",
        value,
    ):
        plain = text.strip()
        if not plain or plain[0] in "'\"" or _is_read("key", plain):
            yield text + sign
        else:
            start = text.index(plain)
            yield text[:start] + _quoted(plain) + text[start + len(plain) :]


def _quoted(value: str) -> str:
    """Return text in single quotes for Hydra's grammar, which takes a backslash before a quote
    only."""
    inner = re.sub(r"(\\*)'", lambda match: match[1] * 2 + r"\'", value)
    inner = re.sub(r"(\\+)$", lambda match: match[1] * 2, inner)
    return f"'{inner}'"
