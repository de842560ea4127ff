"""From a Hydra config to a typed one, with errors that name the key."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import re
import textwrap
import typing
from typing import Any, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)

from nemo_kd.config.errors import ConfigError
from nemo_kd.config.foreign_keys import find_key

T = TypeVar("T")

PATH = {"nemo_kd": "path"}
"""Metadata of a field that holds a path, or paths in a list or mapping: a leading ~ means the home folder."""


def typed(cls: type[T], cfg: DictConfig) -> T:
    """The dataclass `cls` filled from `cfg`.

    Raises:
        ConfigError: a key is unknown, mandatory and missing, or of the wrong type; or a check of `cls` failed.
            The message names the full key, the value found and what to do.
    """
    unknown = sorted(
        set(_leaf_keys(cfg)) - {key for key in _leaf_keys(cfg) if _known(cls, key.split("."))}
    )
    if unknown:
        known = [field.key for field in describe(cls)]
        names = [f"{key}{_suggestion(key, known)}" for key in unknown]
        raise ConfigError(
            f"unknown configuration keys: {', '.join(names)}; --help lists the known ones"
        )
    _check_sections(cls, cfg, [field.key for field in describe(cls)])
    try:
        merged = OmegaConf.merge(OmegaConf.structured(cls), cfg)
        _expand_paths(cls, typing.cast(DictConfig, merged))
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(
                f"mandatory keys have no value: {', '.join(missing)}. Give {missing[0]}=... on the command line."
            )
        return typing.cast(T, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise config_error(error) from error


def _check_sections(cls: type, cfg: DictConfig, keys_of_all: list[str], prefix: str = "") -> None:
    """Refuse a value where keys belong: OmegaConf's own error does not name the place."""
    for name, hint in typing.get_type_hints(cls).items():
        node = cfg._get_node(name, validate_access=False)
        if (
            not dataclasses.is_dataclass(hint)
            or node is None
            or OmegaConf.is_interpolation(cfg, name)
        ):
            continue
        if isinstance(node, DictConfig) and not node._is_none():
            _check_sections(typing.cast(type, hint), node, keys_of_all, f"{prefix}{name}.")
            continue
        keys = [field.key for field in describe(typing.cast(type, hint), f"{prefix}{name}.")]
        value = (
            node._value()
            if not isinstance(node, DictConfig | ListConfig)
            else OmegaConf.to_container(node)
        )
        meant, how = find_key(f"{prefix}{name}", keys_of_all)
        step = (
            f"did you mean {meant}?{f' {how}' if how else ''}"
            if meant
            else f"its keys are {', '.join(keys[:3])} ..."
        )
        raise ConfigError(f"{prefix}{name}: {value} is no mapping of keys; {step}")


def config_error(error: OmegaConfBaseException) -> ConfigError:
    """Return OmegaConf's error as one line that names the key."""
    key = getattr(error, "full_key", None) or "?"
    said = str(error.args[0] if error.args else error).splitlines()[0]
    if isinstance(error, InterpolationKeyError):
        name = re.search(r"'([^']*)'", said)
        variable = name[1] if name else "NAME"
        return ConfigError(
            f"{key}: ${{{variable}}} stands for a key of that name, and there is none; an environment variable is "
            f"${{oc.env:{variable}}}"
        )
    if isinstance(error, InterpolationResolutionError):
        said = said.rpartition("resolving interpolation: ")[2].strip("\"'")
        return ConfigError(f"{key}: the value's ${{...}} cannot be resolved: {said}")
    return ConfigError(f"{key}: {said}{shape_hint(key)}")


def shape_hint(key: str) -> str:
    """Return an example of a structured value, for those that were given something plain."""
    if key == "model.data.data_prefix":
        return "; give each split's paths: model.data.data_prefix='{train: [FILE], validation: [FILE]}'"
    return ""


def key_type(cls: type, key: str) -> tuple[Any, bool]:
    """Return (type, holds paths) of a full key below the dataclass `cls`; (None, False) for one that it does not have.

    Keys inside a mapping have the mapping's value type.
    """
    name, _, rest = key.partition(".")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if name not in fields:
        return None, False
    hint = typing.get_type_hints(cls)[name]
    is_path = fields[name].metadata.get("nemo_kd") == "path"
    if not rest:
        return hint, is_path
    inner = [each for each in (typing.get_args(hint) or (hint,)) if dataclasses.is_dataclass(each)]
    if inner:
        return key_type(typing.cast(type, inner[0]), rest)
    return (Any, is_path) if hint is Any or typing.get_origin(hint) is dict else (None, False)


def _expand_paths(cls: type, cfg: DictConfig) -> None:
    """Replace a leading ~ in every path below the dataclass `cls`, wherever the value came from."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        node = cfg._get_node(field.name)
        if isinstance(node, DictConfig) and dataclasses.is_dataclass(hints[field.name]):
            _expand_paths(typing.cast(type, hints[field.name]), node)
        elif field.metadata.get("nemo_kd") == "path":
            _expand_node(cfg, field.name)


def _expand_node(parent: DictConfig | ListConfig, key: Any) -> None:
    node: Any = parent._get_node(key)
    value = node._value() if node is not None else None
    if isinstance(node, DictConfig | ListConfig) and isinstance(value, dict | list):
        for inner in list(node.keys()) if isinstance(node, DictConfig) else range(len(node)):
            _expand_node(node, inner)
    elif isinstance(value, str) and value.startswith("~"):
        path = os.path.expanduser(value)
        if path.startswith("~"):
            name = value.partition("/")[0]
            raise ConfigError(
                f"{node._get_full_key(None)}: {value}: there is no user for {name}; a folder of that name is ./{name}"
            )
        parent[key] = path


@dataclasses.dataclass(frozen=True)
class KeyDoc:
    """One key of a configuration as `--help` prints it."""

    key: str
    type: str
    default: str
    doc: str


def describe(cls: type, prefix: str = "") -> list[KeyDoc]:
    """Every key below the dataclass `cls`, with the docstring that follows its field in the source."""
    docs, hints, result = _field_docs(cls), typing.get_type_hints(cls), []
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
        name = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        result.append(KeyDoc(prefix + field.name, name, default, docs.get(field.name, "")))
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


def _leaf_keys(cfg: Any, prefix: str = "") -> list[str]:
    if not isinstance(cfg, DictConfig) or cfg._is_none() or cfg._is_missing():
        return [prefix[:-1]] if prefix else []
    keys: list[str] = []
    for key in cfg:
        node = cfg._get_node(key)
        keys += (
            _leaf_keys(node, f"{prefix}{key!s}.")
            if isinstance(node, DictConfig) and len(node)
            else [f"{prefix}{key!s}"]
        )
    return keys


def _known(cls: type, parts: list[str]) -> bool:
    hints = typing.get_type_hints(cls)
    if parts[0] not in hints:
        return False
    if len(parts) == 1:
        return True
    alternatives = typing.get_args(hints[parts[0]]) or (hints[parts[0]],)
    if hints[parts[0]] is Any or typing.get_origin(hints[parts[0]]) is dict:
        return True
    return any(
        _known(inner, parts[1:])
        if isinstance(inner, type) and dataclasses.is_dataclass(inner)
        else inner is Any or typing.get_origin(inner) is dict
        for inner in alternatives
    )


def _suggestion(key: str, known: list[str]) -> str:
    meant, how = find_key(key, known)
    return f" (did you mean {meant}?{f' {how}' if how else ''})" if meant else ""
