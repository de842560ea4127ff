"""Settings for checking answers: of `evaluate_gpt`, of training's evaluation, of `filter_sft_data`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from nemo_kd.config.fields import Section, bounded, choice, count, path

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
    current folder. It takes the texts response and answer. It returns True or False, or a reward:
    1 for a correct response, less for another one."""

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


ANSWER_METRICS = (
    "eval/accuracy",
    "eval/reward",
    "eval/response_length",
    "eval/response_length_correct",
    "eval/response_length_incorrect",
    "eval/entropy",
    "eval/stopped",
)
"""Metrics of every evaluation of responses."""


@dataclass
class ResponseConfig(AnswerConfig):
    """How responses are generated and checked."""

    max_new_tokens: int = count(256)
    """Most tokens of a response, its stop token included."""
    temperature: float = bounded(0.0, at_least=0, below=math.inf)
    """Divides the logits before sampling; 0 takes the most probable token."""
    top_p: float = bounded(1.0, above=0, at_most=1)
    """Sample among the fewest tokens that together reach this probability."""
    seed: int = bounded(0, at_least=0)
    """Seed of sampling. Each evaluation draws the same random numbers."""
    batch_size: int = count(16)
    """Prompts that a replica answers together."""

    @property
    def sampling(self) -> dict[str, Any]:
        """Return the fields of `Sampling` that the user chooses."""
        names = ("max_new_tokens", "temperature", "top_p", "seed")
        return {name: getattr(self, name) for name in names}


@dataclass
class EvalConfig(ResponseConfig, key="eval"):
    """`eval`: responses of the student to questions, generated and checked during the training."""

    interval: int | None = bounded(None, at_least=0)
    """Optimizer steps between evaluations; one also follows the last step. None or 0: no
    evaluation."""
    data: str | None = path(None)
    """Records with questions, in a format of model.data.dataset. The prompt of a record is all
    before its last trained turn; answer_field holds the ground truth."""
    num_examples: int | None = count(100)
    """Records to answer, the first of the file. None: all."""
    log_generations: int = bounded(5, at_least=0)
    """Responses to show: in generations/ of the run's folder, in TensorBoard and in Weights &
    Biases."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.interval and self.data is None:
            raise self.error(
                "data",
                f"missing; eval.interval={self.interval} needs questions: a file of records "
                "with the right answer in the field eval.answer_field",
            )
        if self.interval and self.answer_field is None:
            raise self.error(
                "answer_field",
                f"missing; name the field of {self.data} that holds the right answer",
            )
        if self.interval is None and self.data is not None:
            raise self.error(
                "interval",
                f"eval.data={self.data} is read every eval.interval steps; give a number, or 0 for "
                "no evaluation",
            )
