"""Conversion of a Hydra configuration to a typed one, with errors that name the key."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from nemo_kd.config.errors import ConfigError
from nemo_kd.config.fields import is_path, need
from nemo_kd.config.foreign_keys import suggestion

T = TypeVar("T")

HINTS = {
    "model.data.data_prefix": "; give each split's paths: model.data.data_prefix.train=FILE "
    "model.data.data_prefix.validation=FILE",
}
"""What to do about a key whose value has the wrong type."""


def typed(cls: type[T], cfg: DictConfig) -> T:
    """Return the dataclass `cls` filled from `cfg`.

    Raises:
        ConfigError: a key is unknown, mandatory and missing, or of the wrong type; or a check of
            `cls` failed.
            The message names the full key, the value found and what to do.
    """
    environment = {}
    for key, value in _leaves(OmegaConf.to_container(cfg, resolve=False)):
        hint, _ = key_type(cls, key)
        is_reference = "${" in str(value)
        if hint is None or (dataclasses.is_dataclass(hint) and not is_reference):
            close = suggestion(key, (each.key for each in describe(cls)))
            raise ConfigError(f"{key}: there is no such key{close}; --help lists all")
        is_list = any(typing.get_origin(each) is list for each in alternatives(hint))
        if is_list and not (is_reference or isinstance(value, list | None)):
            raise ConfigError(f"{key}: {value} is not a list; give [{value}]")
        if "${oc.env:" in str(value):
            environment[key] = value
    try:
        merged = typing.cast(DictConfig, OmegaConf.merge(OmegaConf.structured(cls), cfg))
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(
                f"mandatory keys have no value: {', '.join(missing)}. "
                f"Give {missing[0]}=... on the command line."
            )
        config = typing.cast(T, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise config_error(error) from error
    vars(config)["environment"] = environment
    return config


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{prefix}.{name}".lstrip("."))
    else:
        yield prefix, value


def config_error(error: OmegaConfBaseException) -> ConfigError:
    """Return OmegaConf's error as one line that names the key."""
    key = getattr(error, "full_key", None) or "?"
    step = HINTS.get(key, "")
    if isinstance(error, InterpolationKeyError):
        step = "; an environment variable is ${oc.env:NAME}"
    return ConfigError(f"{key}: {str(error).splitlines()[0]}{step}")


def alternatives(hint: Any) -> set[Any]:
    """Return the types that a type hint allows besides None."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return {*(typing.get_args(hint) if is_union else (hint,))} - {types.NoneType}


def key_type(cls: type, key: str) -> tuple[Any, bool]:
    """Return (type, holds paths) of a full key below the dataclass `cls`, (None, False) if unknown.

    Keys inside a mapping have the type Any.
    """
    name, _, rest = key.partition(".")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if name not in fields:
        return None, False
    hint = typing.get_type_hints(cls)[name]
    if not rest:
        return hint, is_path(fields[name])
    for kind in alternatives(hint):
        if dataclasses.is_dataclass(kind):
            return key_type(typing.cast(type, kind), rest)
        if kind is Any or typing.get_origin(kind) is dict:
            return Any, is_path(fields[name])
    return None, False


@dataclasses.dataclass(frozen=True)
class KeyDoc:
    """One key of a configuration as `--help` prints it."""

    key: str
    type: str
    default: Any
    """The value without one given; ??? if it is mandatory."""
    doc: str
    need: str
    """Bounds of the value in words."""


def describe(cls: type, prefix: str = "") -> list[KeyDoc]:
    """Return every key below the dataclass `cls`, with the docstring that follows its field."""
    docs = _field_docs(cls)
    hints = typing.get_type_hints(cls)
    result = []
    for field in dataclasses.fields(cls):
        key = prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            result += describe(hints[field.name], f"{key}.")
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        doc = docs.get(field.name, "")
        result.append(KeyDoc(key, str(field.type), default, doc, need(field)))
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
