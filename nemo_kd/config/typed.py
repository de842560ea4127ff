"""Conversion of a Hydra configuration to a typed one, with errors that name the key."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import re
import textwrap
import types
import typing
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)

from nemo_kd.config.errors import ConfigError
from nemo_kd.config.fields import rule_of
from nemo_kd.config.foreign_keys import find_key

T = TypeVar("T")

SPLITS_KEY = "model.data.data_prefix"
SPLITS_HINT = (
    f"; give each split's paths: {SPLITS_KEY}.train=FILE {SPLITS_KEY}.validation=FILE"
)


def typed(cls: type[T], cfg: DictConfig) -> T:
    """Return the dataclass `cls` filled from `cfg`.

    Raises:
        ConfigError: a key is unknown, mandatory and missing, or of the wrong type; or a check of
            `cls` failed.
            The message names the full key, the value found and what to do.
    """
    known = [each.key for each in describe(cls)]
    given = typing.cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=False))
    unknown = [key for key in sorted(_leaf_keys(given)) if key_type(cls, key)[0] is None]
    if unknown:
        names = ", ".join(f"{key}{_suggestion(key, known)}" for key in unknown)
        raise ConfigError(
            f"unknown configuration keys: {names}; --help lists the known ones"
        )
    _check_sections(cls, given, known)
    try:
        merged = typing.cast(DictConfig, OmegaConf.merge(OmegaConf.structured(cls), cfg))
        _expand_paths(cls, merged)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(
                f"mandatory keys have no value: {', '.join(missing)}. "
                f"Give {missing[0]}=... on the command line."
            )
        config = typing.cast(T, OmegaConf.to_object(merged))
        vars(config)["environment"] = _from_environment(cfg)
        return config
    except OmegaConfBaseException as error:
        raise config_error(error) from error


def _from_environment(cfg: DictConfig) -> dict[str, Any]:
    """Return the keys whose values contain those of environment variables, as they were given."""
    given: dict[str, Any] = OmegaConf.to_container(cfg, resolve=False)  # type: ignore[assignment]
    texts = {key: _at(given, key) for key in _leaf_keys(given)}
    referring = {key: text for key, text in texts.items() if "${" in str(text)}
    direct = [key for key, text in referring.items() if "${oc.env:" in str(text)]
    values = [str(OmegaConf.select(cfg, key)) for key in direct]
    return {
        key: text
        for key, text in referring.items()
        if key in direct
        or any(value in str(OmegaConf.select(cfg, key)) for value in values)
    }


def _at(values: Any, key: str) -> Any:
    for name in key.split("."):
        values = values[name]
    return values


def _check_sections(
    cls: type, given: dict[str, Any], known: list[str], prefix: str = ""
) -> None:
    """Refuse a value in place of a section: OmegaConf's own error does not name the key."""
    for name, hint in typing.get_type_hints(cls).items():
        value = given.get(name)
        is_interpolation = isinstance(value, str) and "${" in value
        if name not in given or not dataclasses.is_dataclass(hint) or is_interpolation:
            continue
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            _check_sections(typing.cast(type, hint), value, known, f"{key}.")
            continue
        keys = [each for each in known if each.startswith(f"{key}.")]
        step = _suggestion(key, known)[2:-1] or f"its keys are {', '.join(keys[:3])} ..."
        raise ConfigError(f"{key}: {value} is not a mapping of keys; {step}")


def _suggestion(key: str, known: list[str]) -> str:
    meant, how = find_key(key, known)
    return f" (did you mean {meant}?{f' {how}' if how else ''})" if meant else ""


def config_error(error: OmegaConfBaseException) -> ConfigError:
    """Return OmegaConf's error as one line that names the key."""
    key = getattr(error, "full_key", None) or "?"
    text = str(error.args[0] if error.args else error).splitlines()[0]
    if isinstance(error, InterpolationKeyError):
        name = re.search(r"'([^']*)'", text)
        variable = name[1] if name else "NAME"
        return ConfigError(
            f"{key}: ${{{variable}}} stands for a key of that name, and there is none; "
            f"an environment variable is ${{oc.env:{variable}}}"
        )
    if isinstance(error, InterpolationResolutionError):
        text = text.rpartition("resolving interpolation: ")[2].strip("\"'")
        return ConfigError(f"{key}: the value's ${{...}} cannot be resolved: {text}")
    return ConfigError(f"{key}: {text}{SPLITS_HINT if key == SPLITS_KEY else ''}")


def alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the types that a type hint allows besides None."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    kinds = typing.get_args(hint) if union else (hint,)
    return tuple(kind for kind in kinds if kind is not type(None))


def key_type(cls: type, key: str) -> tuple[Any, bool]:
    """Return (type, holds paths) of a full key below the dataclass `cls`, (None, False) if unknown.

    Keys inside a mapping have the type Any.
    """
    name, _, rest = key.partition(".")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if name not in fields:
        return None, False
    hint = typing.get_type_hints(cls)[name]
    is_path = rule_of(fields[name]).is_path
    if not rest:
        return hint, is_path
    for kind in alternatives(hint):
        if dataclasses.is_dataclass(kind):
            return key_type(typing.cast(type, kind), rest)
        if kind is Any or typing.get_origin(kind) is dict:
            return Any, is_path
    return None, False


def _expand_paths(cls: type, cfg: DictConfig, prefix: str = "") -> None:
    """Replace a leading ~ in every path below the dataclass `cls`."""
    hints = typing.get_type_hints(cls)
    values = typing.cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=False))
    for field in dataclasses.fields(cls):
        value = values[field.name]
        key = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]) and isinstance(value, dict):
            _expand_paths(
                typing.cast(type, hints[field.name]), cfg[field.name], f"{key}."
            )
        elif rule_of(field).is_path and _expanded(value, key) != value:
            cfg[field.name] = _expanded(value, key)


def _expanded(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {name: _expanded(inner, f"{key}.{name}") for name, inner in value.items()}
    if isinstance(value, list):
        return [
            _expanded(inner, f"{key}[{number}]") for number, inner in enumerate(value)
        ]
    if not isinstance(value, str) or not value.startswith("~"):
        return value
    path = os.path.expanduser(value)
    if path.startswith("~"):
        name = value.partition("/")[0]
        raise ConfigError(
            f"{key}: {value}: there is no user for {name}; a folder of that name is ./{name}"
        )
    return path


@dataclasses.dataclass(frozen=True)
class KeyDoc:
    """One key of a configuration as `--help` prints it."""

    key: str
    type: str
    default: str
    doc: str
    need: str = ""
    """Bounds of the value in words."""


def describe(cls: type, prefix: str = "") -> list[KeyDoc]:
    """Return every key below the dataclass `cls`, with the docstring that follows its field."""
    docs = _field_docs(cls)
    hints = typing.get_type_hints(cls)
    result = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            result += describe(typing.cast(type, hint), f"{prefix}{field.name}.")
            continue
        default = "mandatory"
        if field.default_factory is not dataclasses.MISSING:
            default = repr(field.default_factory())
        elif field.default not in (dataclasses.MISSING, "???"):
            default = repr(field.default)
        name = (
            hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        )
        doc = docs.get(field.name, "")
        result.append(
            KeyDoc(prefix + field.name, name, default, doc, rule_of(field).need)
        )
    return result


def _field_docs(cls: type) -> dict[str, str]:
    docs: dict[str, str] = {}
    for owner in reversed(cls.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, body.body[1:], strict=False):
            name = statement.target if isinstance(statement, ast.AnnAssign) else None
            text = following.value if isinstance(following, ast.Expr) else None
            if isinstance(name, ast.Name) and isinstance(text, ast.Constant):
                docs[name.id] = " ".join(str(text.value).split())
    return docs


def _leaf_keys(given: dict[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, value in given.items():
        is_section = isinstance(value, dict) and value
        keys += (
            _leaf_keys(value, f"{prefix}{name}.") if is_section else [f"{prefix}{name}"]
        )
    return keys
