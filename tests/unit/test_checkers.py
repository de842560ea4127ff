"""Checkers of answers: what counts as correct, and that hostile responses cost bounded time."""

from __future__ import annotations

import resource

import math_verify
import pytest

from nemo_kd.answers import limited_process
from nemo_kd.answers.checkers import checker_of, ground_truth, judge_of
from nemo_kd.answers.outcomes import Outcome
from nemo_kd.config import ConfigError, DataError
from nemo_kd.config.answers import AnswerConfig

CORRECT = Outcome.CORRECT
WRONG = Outcome.WRONG
NO_ANSWER = Outcome.NO_ANSWER


@pytest.fixture(scope="module")
def judge():
    return judge_of(AnswerConfig())


MATH = [
    # GSM8K
    ("12 * 6 = 72\n#### 72", "48 / 2 = <<48/2=24>>24\n#### 72", CORRECT),
    ("#### 1,234", "... #### 1,234", CORRECT),
    ("#### 1234", "... #### 1,234", CORRECT),
    ("The total is 1,234.", "#### 1234", CORRECT),
    ("#### 72\n\nQuestion: 2 + 2?\n4", "72", CORRECT),
    ("#### 7\nNo, that is wrong.\n#### 9", "9", CORRECT),
    ("####\n9\n", "9", CORRECT),
    ("#### $18", "18", CORRECT),
    ("#### \\$18", "18", CORRECT),
    ("#### 18 dollars", "18", CORRECT),
    ("#### 18", "18 dollars", CORRECT),
    ("#### -$18", "-18", CORRECT),
    ("#### -$18", "18", WRONG),
    ("#### +18", "18", CORRECT),
    ("#### \N{MINUS SIGN}18", "-18", CORRECT),
    ("#### **18**", "18", CORRECT),
    ("#### 18.", "18", CORRECT),
    ("#### 3", "-3", WRONG),
    ("#### 18.001", "18", WRONG),
    # a heading of Markdown
    ("#### Final answer\nIt is $42$.", "42", CORRECT),
    ("#### Step 2: add\nso we get \\boxed{42}", "42", CORRECT),
    # numbers and fractions
    ("so it is 0.5", "1/2", CORRECT),
    ("so it is 1/2", "\\frac{1}{2}", CORRECT),
    ("#### 2 1/2", "2.5", CORRECT),
    ("#### 2 1/2", "1", WRONG),
    ("0.333333", "1/3", CORRECT),
    ("0.33", "1/3", WRONG),
    ("#### 1e-3", "0.001", CORRECT),
    ("#### 1", "1e-3", WRONG),
    ("1000", "1e3", CORRECT),
    ("50%", "0.5", CORRECT),
    ("18.00", "18", CORRECT),
    ("007", "7", CORRECT),
    # LaTeX
    ("Thus \\boxed{\\frac{3}{4}}.", "0.75", CORRECT),
    ("Thus $\\boxed{\\dfrac{3}{4}}$", "\\frac34", CORRECT),
    ("\\[ x = \\boxed{\\sqrt{8}} \\]", "2\\sqrt{2}", CORRECT),
    ("#### \\sqrt{8}", "2\\sqrt{2}", CORRECT),
    ("$(x+1)^2$", "x^2 + 2x + 1", CORRECT),
    ("#### 2x + 1", "1 + 2x", CORRECT),
    ("#### 2", "2x + 1", WRONG),
    ("#### (2, 1)", "(1, 2)", WRONG),
    ("#### 1, 2", "2, 1", CORRECT),
    ("$x = 5$", "5", CORRECT),
    ("\\boxed{3} or \\boxed{4}", "4", WRONG),
    # neither
    ("I do not know.", "5", NO_ANSWER),
    ("", "5", NO_ANSWER),
    ("####", "5", NO_ANSWER),
    # words
    ("#### Monday", "Monday", CORRECT),
    ("It is \\boxed{Monday}.", "Monday", CORRECT),
    ("It is \\boxed{\\text{Sunday}}.", "Monday", WRONG),
    ("\\boxed{B}", "B", CORRECT),
    ("\\boxed{A}", "B", WRONG),
    ("5", "Monday", WRONG),
]


@pytest.mark.parametrize(("response", "answer", "outcome"), MATH)
def test_math(judge, response, answer, outcome):
    assert judge(response, answer) is outcome


@pytest.mark.parametrize(
    "response",
    [
        "The answer is 72.",
        "First 3, then 72",
        "We get $\\frac{144}{2}$",
        "Final answer is 72. I hope it is correct.",
        "Answer: 71",
        "72 and then 5",
        "\\boxed{72}",
        "$70 + 2$",
    ],
)
def test_prose_is_read_as_math_verify_reads_it(judge, response):
    expected = math_verify.verify(math_verify.parse("72"), math_verify.parse(response))
    assert (judge(response, "72") is CORRECT) == expected


@pytest.mark.parametrize(
    "response",
    [
        "$9^{9^{9^{9}}}$",
        "$" + "(" * 5000 + "$",
        "\\boxed{" * 5000,
        "1" * 100_000,
        "answer " * 20_000,
        "\ud800 \x00 \\frac{\\frac{",
    ],
)
def test_hostile_responses_are_not_correct_and_end_nothing(judge, response):
    assert judge(response, "5") in (WRONG, NO_ANSWER, Outcome.UNDECIDED)
    assert judge("#### 5", "5") is CORRECT


def test_the_answer_of_a_long_response_is_found(judge):
    assert judge("Let us see. " * 10_000 + "The answer is 5.", "5") is CORRECT


def test_a_hostile_answer_ends_nothing(judge):
    assert judge("#### 5", "$9^{9^{9^{9}}}$") is Outcome.UNDECIDED


def test_a_checker_that_cannot_start_is_an_error():
    process = limited_process.LimitedProcess("nemo_kd.answers.missing")
    with pytest.raises(RuntimeError, match=r"nemo_kd\.answers\.missing ended with"):
        process.ask("5", "5")


def test_modules_in_the_working_folder_are_not_executed(tmp_path, monkeypatch):
    for name in ("json", "math_verify", "resource"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    assert judge_of(AnswerConfig())("1/2", "0.5") is CORRECT


def test_a_lower_limit_of_memory_stays(monkeypatch):
    """As under `ulimit -v`."""
    start = limited_process.subprocess.Popen
    limit = 3_000_000 << 10

    def start_limited(*args, **options):
        child = start(*args, **options)
        resource.prlimit(child.pid, resource.RLIMIT_AS, (limit, limit))
        return child

    monkeypatch.setattr(limited_process.subprocess, "Popen", start_limited)
    assert judge_of(AnswerConfig())("1/2", "0.5") is CORRECT


@pytest.mark.parametrize(
    ("response", "answer", "outcome"),
    [
        ("New  York\n", "New York", CORRECT),
        ("new york", "New York", WRONG),
        ("It is New York", "New York", WRONG),
        (" \n", "New York", NO_ANSWER),
    ],
)
def test_exact(response, answer, outcome):
    assert judge_of(AnswerConfig(checker="exact"))(response, answer) is outcome


def test_regex_compares_its_last_match():
    judge = judge_of(AnswerConfig(checker="regex", pattern=r"answer is ([\w ]+)"))
    assert (
        judge("The answer is A. No, the answer is  New  York.", "New York") is CORRECT
    )
    assert judge("The answer is B. No, the answer is A.", "B") is WRONG
    assert judge("It is A", "A") is NO_ANSWER
    assert judge("The answer is 5", "so 2 + 3 = 5\n#### 5") is CORRECT


def test_a_regex_that_backtracks_without_end_is_stopped():
    judge = judge_of(AnswerConfig(checker="regex", pattern=r"^((?:a+)+)b"))
    assert judge("a" * 5000, "a") is Outcome.UNDECIDED
    assert judge("aab", "aa") is CORRECT


def test_custom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_checker.py").write_text(
        "def ends_with(response, answer):\n    return response.endswith(answer)\n"
        "def partly(response, answer):\n    return len(response) / len(answer)\n"
        "def percent(response, answer):\n    return 50\n"
        "def fails(response, answer):\n    return int(response)\n"
        "def one(response):\n    return True\n"
    )

    def custom(name):
        path = f"my_checker.{name}"
        return checker_of(AnswerConfig(checker="custom", custom_checker=path))

    assert custom("ends_with")("it is 5", "5") == (1, CORRECT)
    assert custom("ends_with")("it is 5.", "5") == (0, WRONG)
    assert custom("partly")("12", "1234") == (0.5, WRONG)
    judge = judge_of(
        AnswerConfig(checker="custom", custom_checker="my_checker.partly")
    )
    assert (judge("12", "1234"), judge("4321", "1234")) == (WRONG, CORRECT)
    with pytest.raises(ConfigError, match="percent returned 50; it must return True"):
        custom("percent")("it is 5", "5")
    with pytest.raises(ConfigError, match=r"fails raised ValueError: .* response 'x'"):
        custom("fails")("x", "5")
    with pytest.raises(
        ConfigError, match=r"custom_checker: my_checker\.one cannot be"
    ):
        custom("one")
    with pytest.raises(
        ConfigError, match=r"custom_checker: my_checker\.two cannot be"
    ):
        custom("two")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checker": "maths"}, "checker: 'maths' is not one of math, exact, regex"),
        ({"checker": "regex"}, "pattern: missing; checker=regex needs it"),
        ({"pattern": "(.)"}, "pattern: '(.)' has no effect with checker=math, only"),
        ({"checker": "custom"}, "custom_checker: missing; checker=custom needs it"),
        ({"checker": "regex", "pattern": "("}, "'(' is not a regular expression"),
        ({"checker": "regex", "pattern": "(.)(.)"}, "has 2 groups; it needs one"),
        ({"checker": "regex", "pattern": "."}, "has 0 groups; it needs one"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ConfigError) as error:
        AnswerConfig(**settings)
    assert message in str(error.value)


def test_ground_truth():
    record = {"a": " 5 ", "b": 5, "c": 0.5, "d": None, "e": " ", "f": ["5"], "g": True}
    found = [ground_truth(record, field) for field in "abcdex"]
    assert found == ["5", "5", "0.5", None, None, None]
    for field in "fg":
        with pytest.raises(DataError, match=f"`{field}` must be a text or a number"):
            ground_truth(record, field)
