"""Results of a comparison of a response with the right answer, and GSM8K's mark of an answer."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Outcome(str, Enum):
    """Result of a comparison."""

    CORRECT = "correct"
    WRONG = "wrong answer"
    NO_ANSWER = "no answer found in the response"
    NO_TRUTH = "no usable right answer in the record"
    UNDECIDED = "comparison exceeded its limits"


class Verdict(NamedTuple):
    """What a checker says of a response.

    Attributes:
        reward: 1 for a correct response, less for another one.
    """

    reward: float
    outcome: Outcome


def final_line(text: str) -> str | None:
    """Return the line behind the last "####"; None if there is no such mark."""
    _, mark, rest = text.rpartition("####")
    return rest.strip().partition("\n")[0].strip() if mark else None
