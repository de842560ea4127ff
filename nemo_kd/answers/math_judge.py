r"""Compare the mathematical answer of a response with the right one, by math-verify.

math-verify finds answers in prose: behind "answer is", in \boxed{}, in LaTeX, or the last number.
A line behind GSM8K's "####", and a right answer, hold nothing but the answer, which may be LaTeX
without dollars.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import math_verify

from nemo_kd.answers.limited_process import serve
from nemo_kd.answers.outcomes import Outcome, final_line

LONGEST = 10_000
"""Characters at the end of a response that are searched for its answer."""
_MARKED = re.compile(r"\$|\\\(|\\\[|\\boxed")
_ALGEBRA = re.compile(
    r"[\\^_{}=<>]|^[(\[]|\d, |\d[xyz]\b|\b\d*[a-zA-Z]\s*[-+*]|[-+*]\s*\d*[a-zA-Z]\b"
)
"""Tells 2x + 1, which is read as LaTeX, from 18 dollars, of which the number counts."""
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?|\.\d+)[eE]([-+]?\d{1,3})(?!\w)")
_MIXED = re.compile(r"(?<![\w.,/])(\d+) (\d+)/(\d+)(?![\w/])")


def judge(response: str, answer: str) -> Outcome:
    response = response[-LONGEST:]
    right = final_line(answer) or answer
    line = final_line(response)
    if response.rfind("\\boxed") > response.rfind("####"):
        line = None
    if right.split() == (line or response).split():
        return Outcome.CORRECT
    truths = _parse_answer(right[-LONGEST:]) or _parse(rf"$\text{{{right}}}$")
    if not truths:
        return Outcome.NO_TRUTH
    # Markdown has headings of four #, too.
    values = (_parse_answer(line) if line else []) or _parse(response)
    if not values:
        return Outcome.NO_ANSWER
    same = math_verify.verify(truths, values, timeout_seconds=None)
    return Outcome.CORRECT if same else Outcome.WRONG


def _parse_answer(text: str) -> list[Any]:
    """Return the value of a text that is nothing but an answer."""
    text = text.replace("\\$", "$").lstrip("+")
    if text.count("$") == 1:  # a currency
        text = text.replace("$", "")
    if _MARKED.search(text) or not _ALGEBRA.search(text):
        return _parse(text)
    return _parse(f"${text}$")


def _parse(text: str) -> list[Any]:
    text = text.replace("\N{MINUS SIGN}", "-")
    text = _SCIENTIFIC.sub(r"\1*10^(\2)", text)
    text = _MIXED.sub(r"(\1+\2/\3)", text)
    values: list[Any] = math_verify.parse(text, parsing_timeout=None)
    return values


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)  # of limits that are off here
    serve(judge)
