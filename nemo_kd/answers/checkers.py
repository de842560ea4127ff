"""Compare a response with the right answer of its record.

Responses may be hostile. Every comparison with math, exact or regex ends in bounded time, and none
raises.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from nemo_kd.answers.limited_process import LimitedProcess
from nemo_kd.answers.outcomes import Outcome, Verdict
from nemo_kd.config import DataError
from nemo_kd.config.answers import AnswerConfig
from nemo_kd.config.user_function import import_function

Judge = Callable[[str, str], Outcome]
Checker = Callable[[str, str], Verdict]
"""(response, answer) -> reward and outcome."""


def checker_of(settings: AnswerConfig) -> Checker:
    """Return a function of response and answer that gives the verdict on the response.

    The reward is 1 for a correct response and 0 for another one, or what the custom function returns.

    Raises:
        ConfigError: the custom function cannot be called, or a package is missing.
    """
    if settings.checker == "custom":
        return _custom_checker(settings)
    return partial(_verdict, judge_of(settings))


def judge_of(settings: AnswerConfig) -> Judge:
    """Return a function of response and answer that also tells why a response is not correct.

    One thread of one process may call it.

    Raises:
        ConfigError: as `checker_of`.
    """
    if settings.checker == "custom":
        return partial(_outcome, _custom_checker(settings))
    if settings.checker == "exact":
        return _judge_exactly
    if settings.checker == "math" and importlib.util.find_spec("math_verify") is None:
        raise settings.error(
            "checker",
            "math needs the package math-verify, which is not installed: pip install "
            "'math-verify[antlr4_9_3]'; or use exact or regex",
        )
    module = f"nemo_kd.answers.{settings.checker}_judge"
    options = [] if settings.pattern is None else [settings.pattern]
    return partial(_judge_in_process, LimitedProcess(module, *options))


def ground_truth(record: Mapping[str, Any], field: str) -> str | None:
    """Return the right answer of a record as text; None if the field is missing, null or empty.

    Raises:
        DataError: the field is neither a text nor a number.
    """
    value = record.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(
            f"the field `{field}` must be a text or a number, found {str(value)[:80]!r}"
        )
    return str(value).strip() or None


def _verdict(judge: Judge, response: str, answer: str) -> Verdict:
    outcome = judge(response, answer)
    return Verdict(float(outcome is Outcome.CORRECT), outcome)


def _outcome(checker: Checker, response: str, answer: str) -> Outcome:
    return checker(response, answer).outcome


def _judge_in_process(process: LimitedProcess, response: str, answer: str) -> Outcome:
    reply = process.ask(response, answer)
    return Outcome.UNDECIDED if reply is None else Outcome(reply)


def _judge_exactly(response: str, answer: str) -> Outcome:
    """Compare all words; white space counts as one space, at the ends not at all."""
    if not response.strip():
        return Outcome.NO_ANSWER
    same = response.split() == answer.split()
    return Outcome.CORRECT if same else Outcome.WRONG


def _custom_checker(settings: AnswerConfig) -> Checker:
    path = settings.custom_checker
    assert path is not None  # checked by AnswerConfig
    try:
        function = import_function(path, "response", "answer")
    except ValueError as error:
        raise settings.error(
            "custom_checker",
            f"{path} cannot be called as function(response, answer): {error}",
        ) from error

    def checker(response: str, answer: str) -> Verdict:
        try:
            result = function(response, answer)
            reward = float(result)
        except Exception as error:  # a foreign program can raise anything
            raise settings.error(
                "custom_checker",
                f"{path} raised {type(error).__name__}: {error} for the response "
                f"{response[:80]!r} and the answer {answer[:80]!r}",
            ) from error
        if not -math.inf < reward <= 1:
            raise settings.error(
                "custom_checker",
                f"{path} returned {result!r:.80}; it must return True or 1 for a correct response, "
                "and False or a number below 1 for another one",
            )
        return Verdict(reward, Outcome.CORRECT if reward == 1 else Outcome.WRONG)

    return checker
