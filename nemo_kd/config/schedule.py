"""Numbers of a configuration that change with the training step."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

EXAMPLE = "cosine from 1.0 to 0.1 over steps 0 to 1000"
_TEXT = re.compile(
    r"(linear|cosine) from (\S+) to (\S+) over steps (\d+) to (\d+)", re.ASCII
)


@dataclass(frozen=True)
class Schedule:
    """A number that moves from `start` at `first_step` to `end` at `last_step`.

    Steps count from 0: a value at step s is that of the training step after s completed ones.
    """

    start: float
    end: float
    first_step: int = 0
    last_step: int = 0
    shape: str = "linear"

    @classmethod
    def of(cls, value: float | str) -> Schedule:
        """Read a number, or a text as `EXAMPLE`.

        Raises:
            ValueError: it is neither.
        """
        match = _TEXT.fullmatch(str(value).strip())
        try:
            if match is None:
                return cls(float(value), float(value))
            shape, start, end, first, last = match.groups()
            schedule = cls(float(start), float(end), int(first), int(last), shape)
        except ValueError as error:
            raise ValueError(
                f"{value!r} is neither a number nor a schedule: linear or cosine, for example "
                f"'{EXAMPLE}'"
            ) from error
        if schedule.last_step <= schedule.first_step:
            raise ValueError(
                f"{value!r} ends at step {last}, but starts at step {first}; give a later end"
            )
        return schedule

    @property
    def is_constant(self) -> bool:
        return self.start == self.end

    @property
    def ends(self) -> tuple[float, float]:
        """Return (start, end); all values lie between them."""
        return self.start, self.end

    def at(self, step: float) -> float:
        """Return the value at a step; `math.inf` gives the end."""
        if step >= self.last_step:
            return self.end
        num_steps = self.last_step - self.first_step
        progress = max(0.0, (step - self.first_step) / num_steps)
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.end - self.start) * progress
