"""The configuration that a run used: every key, defaults included, secrets left out."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from pathlib import Path
from typing import Any

import yaml

from nemo_kd import __version__
from nemo_kd.config.fields import is_path
from nemo_kd.files import explained, write_atomically

SECRET_NAME = re.compile(
    r"(?i)(api|access|private|secret|auth)[_-]?key|^key$|token$|secret|passw|credential|^auth"
)
"""Names inside free mappings, and of environment variables, whose values are never written."""

SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[\w-]{16,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*)"
    r"|^[0-9a-f]{40}$|^local-[0-9a-f]{40}$|://[^/\s:@]+:[^/\s@]+@"
)
"""Tokens of well-known services, keys of Weights & Biases, and addresses with a password."""


def resolved_config(config: Any, *, paths: bool = True) -> dict[str, Any]:
    """Return the keys of a typed configuration, nested and as plain values; paths only on request.

    Values that came from environment variables are `${oc.env:NAME}`, as they were given. Keys whose
    name or value looks like a secret are left out.
    """
    values = _plain(config, paths)
    for key, text in config.environment.items():
        *sections, name = key.split(".")
        parent = values
        for section in sections:
            parent = parent.get(section, {})
        if paths or name in parent:
            parent[name] = _plain(text)
    return values


def save_config(path: Path, values: dict[str, Any]) -> None:
    """Write the configuration of a run; one with other values that is there keeps a numbered name.

    Raises:
        FileError: it cannot be written.
    """
    content = (
        f"# Configuration of this run with all defaults, by nemo_kd {__version__}; secrets are "
        f"left out.\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}"
    ).encode()
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.read_bytes() != content:
            names = (
                path.with_stem(f"{path.stem}-{number}")
                for number in itertools.count(1)
            )
            path.rename(next(name for name in names if not name.exists()))
    write_atomically(path, content)


def _plain(value: Any, paths: bool = True) -> Any:
    if dataclasses.is_dataclass(value):
        value = {
            each.name: getattr(value, each.name)
            for each in dataclasses.fields(value)
            if paths or not is_path(each)
        }
    if isinstance(value, dict):
        return {
            str(name): _plain(each, paths)
            for name, each in value.items()
            if not SECRET_NAME.search(str(name)) and not _is_secret(each)
        }
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value if not _is_secret(each)]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _is_secret(value: Any) -> bool:
    secrets = [text for name, text in os.environ.items() if SECRET_NAME.search(name)]
    return isinstance(value, str) and (
        bool(SECRET_VALUE.search(value))
        or any(len(secret) >= 8 and secret in value for secret in secrets)
    )
