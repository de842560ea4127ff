"""From a Hydra config to a typed one, with errors that name the key."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import textwrap
import typing
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


class UserInputError(ValueError):
    """Something the user gave cannot work; the message says what, where and what to do."""


class ConfigError(UserInputError):
    """A key of the configuration is unknown, missing or has a value that cannot work."""


def typed(cls: type[T], cfg: DictConfig) -> T:
    """The dataclass `cls` filled from `cfg`.

    Raises:
        ConfigError: a key is unknown, mandatory and missing, or of the wrong type; or a check of `cls` failed.
            The message names the full key, the value found and what to do.
    """
    unknown = sorted(set(_leaf_keys(cfg)) - {key for key in _leaf_keys(cfg) if _known(cls, key.split("."))})
    if unknown:
        known = [field.key for field in describe(cls)]
        lines = [f"  {key}{_suggestion(key, known)}" for key in unknown]
        raise ConfigError("unknown configuration keys:\n" + "\n".join(lines) + "\n--help lists the known ones.")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(cls), cfg)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(
                f"mandatory keys have no value: {', '.join(missing)}. Give {missing[0]}=... on the command line."
            )
        return typing.cast(T, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise ConfigError(f"{key}: {str(error.args[0]).splitlines()[0]}") from error


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
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    return f" (did you mean {close[0]}?)" if close else ""
