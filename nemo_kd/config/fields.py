"""Fields of configuration dataclasses: bounds, choices and paths stand beside the default."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field
from typing import Any, ClassVar

from nemo_kd.config.errors import ConfigError

RULE = "nemo_kd"
"""Key of the metadata of a field under which its rule lies."""


@dataclass(frozen=True)
class Rule:
    """Condition on a field's value, or on each value of a list. None always passes."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    one_of: tuple[str, ...] = ()
    is_path: bool = False
    """The value is a path, or paths in a list or mapping: a leading ~ means the home folder."""

    @property
    def need(self) -> str:
        """Return the condition in words, empty if there is none."""
        if self.at_least is not None and self.at_most is not None:
            return f"from {self.at_least} to {self.at_most}"
        parts = [
            f"{words} {bound}"
            for words, bound in (
                ("at least", self.at_least),
                ("above", self.above),
                ("at most", self.at_most),
                ("below", self.below),
            )
            if bound not in (None, math.inf)
        ]
        if self.below == math.inf:
            parts.append("finite")
        return " and ".join(parts)

    def accepts(self, value: Any) -> bool:
        """Return True for a number within the bounds; NaN is outside of all."""
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )


def bounded(default: Any = MISSING, **bounds: float) -> Any:
    """Return a field whose value must lie within `at_least`, `above`, `at_most` and `below`."""
    return _field(default, Rule(**bounds))  # type: ignore[arg-type]


def choice(default: Any, options: Iterable[str]) -> Any:
    """Return a field whose value is one of `options`; on and off also accept true and false."""
    return _field(default, Rule(one_of=tuple(options)))


def path(default: Any = "???") -> Any:
    """Return a field that holds a path, or paths in a list or mapping."""
    return _field(default, Rule(is_path=True))


def rule_of(a_field: dataclasses.Field[Any]) -> Rule:
    return a_field.metadata.get(RULE, Rule())


def _field(default: Any, rule: Rule) -> Any:
    if isinstance(default, list | dict):
        return field(
            default_factory=lambda: type(default)(default), metadata={RULE: rule}
        )
    return field(default=default, metadata={RULE: rule})


class Section:
    """Base of configuration dataclasses: checks the rules of the fields."""

    KEY: ClassVar[str] = ""
    """Full key of the section in a command's configuration."""
    environment: ClassVar[dict[str, Any]] = {}
    """In a whole configuration: key -> text with `${oc.env:NAME}` that gave the value."""

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):  # type: ignore[arg-type]
            rule = rule_of(each)
            value = getattr(self, each.name)
            if value is None:
                continue
            if "on" in rule.one_of and str(value).lower() in ("true", "false"):
                value = "on" if str(value).lower() == "true" else "off"
                setattr(self, each.name, value)
            values = value if isinstance(value, list) else [value]
            for item in values if rule.one_of else ():
                if item not in rule.one_of:
                    raise self.error(
                        each.name, f"{item!r} is not one of {', '.join(rule.one_of)}"
                    )
            if rule.need and not all(map(rule.accepts, values)):
                raise self.error(each.name, f"{value} must be {rule.need}")

    def error(self, name: str, problem: str) -> ConfigError:
        """Return the error of one of the section's keys."""
        return ConfigError(f"{self.KEY}{'.' if self.KEY else ''}{name}: {problem}")
