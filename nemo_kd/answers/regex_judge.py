"""Compare the last match of a regular expression with the right answer."""

from __future__ import annotations

import re
import sys
from functools import partial

from nemo_kd.answers.limited_process import serve
from nemo_kd.answers.outcomes import Outcome, final_line


def judge(pattern: str, response: str, answer: str) -> Outcome:
    """Compare the group of the last match, by words; white space counts as one space."""
    found = None
    for match in re.finditer(pattern, response):
        found = match[1]
    if not found:
        return Outcome.NO_ANSWER
    right = final_line(answer) or answer
    return Outcome.CORRECT if found.split() == right.split() else Outcome.WRONG


if __name__ == "__main__":
    serve(partial(judge, sys.argv[1]))
