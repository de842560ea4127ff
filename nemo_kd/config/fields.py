"""Fields of configuration dataclasses: bounds, choices and paths stand beside the default."""

from __future__ import annotations

import dataclasses
import math
import operator
import os
from collections.abc import Iterable
from dataclasses import MISSING, field
from typing import Any, ClassVar

from nemo_kd.config import ConfigError
from nemo_kd.config.schedule import Schedule

COMPARISONS = {
    "at_least": operator.ge,
    "above": operator.gt,
    "at_most": operator.le,
    "below": operator.lt,
}


def bounded(default: Any = MISSING, **bounds: float) -> Any:
    """Return a field whose value, or each of them, must lie within bounds named as in
    `COMPARISONS`."""
    return _field(default, bounds=bounds)


def count(default: Any = MISSING) -> Any:
    """Return a field whose value is at least 1."""
    return bounded(default, at_least=1)


def positive(default: Any = MISSING) -> Any:
    """Return a field whose value, or each of them, is above 0 and finite."""
    return bounded(default, above=0, below=math.inf)


def scheduled(default: Any, **bounds: float) -> Any:
    """Return a field that holds a number or the text of a `Schedule`, with bounds for all values."""
    return _field(default, bounds=bounds, is_scheduled=True)


def choice(default: Any, options: Iterable[Any]) -> Any:
    """Return a field whose value is one of `options`; on and off also accept true and false."""
    return _field(default, options=tuple(options))


def path(default: Any = "???") -> Any:
    """Return a field that holds a path, or paths in a list or mapping."""
    return _field(default, is_path=True)


def is_path(a_field: dataclasses.Field[Any]) -> bool:
    return "is_path" in a_field.metadata


def need(a_field: dataclasses.Field[Any]) -> str:
    """Return the bounds of a field in words, empty if there are none."""
    bounds = a_field.metadata.get("bounds", {})
    words = (f"{name.replace('_', ' ')} {bound}" for name, bound in bounds.items())
    return " and ".join(words).replace("below inf", "finite")


def _field(default: Any, **metadata: Any) -> Any:
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Section:
    """Base of configuration dataclasses: checks the rules of the fields."""

    KEY: ClassVar[str] = ""
    """Full key of the section in a command's configuration."""
    environment: ClassVar[dict[str, Any]] = {}
    """In a whole configuration: key -> text with `${oc.env:NAME}` that gave the value."""

    def __init_subclass__(cls, key: str | None = None) -> None:
        cls.KEY = cls.KEY if key is None else key

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, each.name)
            if value is None:
                continue
            if is_path(each) and isinstance(value, str):
                value = os.path.expanduser(value)
            if "is_scheduled" in each.metadata and type(value) is int:
                value = float(value)
            options = each.metadata.get("options", ())
            if "on" in options:
                value = {"true": "on", "false": "off"}.get(str(value).lower(), value)
            setattr(self, each.name, value)
            bounds = each.metadata.get("bounds", {})
            items = value if isinstance(value, list) else [value]
            if "is_scheduled" in each.metadata:
                items = list(self.schedule(each.name).ends)
            for item in items:
                if options and item not in options:
                    raise self.error(
                        each.name,
                        f"{item!r} is not one of {', '.join(map(str, options))}",
                    )
                # NaN is outside of all bounds.
                if not all(COMPARISONS[name](item, bounds[name]) for name in bounds):
                    raise self.error(each.name, f"{value} must be {need(each)}")

    def schedule(self, name: str) -> Schedule:
        """Return the values that a key has during the training.

        Raises:
            ConfigError: it is neither a number nor a schedule.
        """
        try:
            return Schedule.of(getattr(self, name))
        except ValueError as error:
            raise self.error(name, str(error)) from error

    def error(self, name: str, problem: str) -> ConfigError:
        """Return the error of one of the section's keys."""
        return ConfigError(f"{self.KEY}.{name}: {problem}".lstrip("."))
