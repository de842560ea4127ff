"""Settings for checking answers: of `evaluate_gpt`, of training's evaluation, of `filter_sft_data`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nemo_kd.config.fields import Section, choice

CHECKERS = ("math", "exact", "regex", "custom")
OWN_KEYS = {"pattern": "regex", "custom_checker": "custom"}
"""Keys that only one checker has, which needs them."""


@dataclass
class AnswerConfig(Section):
    """Where the right answer of a record stands, and how a response is compared with it."""

    answer_field: str | None = None
    """Field of a record that holds the right answer, as text or number. GSM8K's solutions work: of
    "... #### 1,234", math and regex take the part behind the last ####."""
    checker: str = choice("math", CHECKERS)
    """math (numbers, fractions and LaTeX by math-verify: behind the last ####, else the response's
    final answer, \\boxed or last number), exact (the whole response; white space counts as one
    space), regex (last match of pattern) or custom (custom_checker)."""
    pattern: str | None = None
    """checker=regex: regular expression with one group; the last match is compared with the answer,
    white space counts as one space. For example "answer is (\\S+)"."""
    custom_checker: str | None = None
    """checker=custom: import path of a function, package.module.function, also of a file in the
    current folder. It takes the texts response and answer and returns True or False."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, owner in OWN_KEYS.items():
            value = getattr(self, name)
            if value is not None and self.checker != owner:
                raise self.error(
                    name,
                    f"{value!r} has no effect with checker={self.checker}, only with {owner}",
                )
            if not value and self.checker == owner:
                raise self.error(name, f"missing; checker={owner} needs it")
        if self.pattern is not None:
            try:
                num_groups = re.compile(self.pattern).groups
            except re.error as error:
                raise self.error(
                    "pattern", f"{self.pattern!r} is not a regular expression: {error}"
                ) from error
            if num_groups != 1:
                raise self.error(
                    "pattern",
                    f"{self.pattern!r} has {num_groups} groups; it needs one, which is the answer; "
                    "write others as (?:...)",
                )
