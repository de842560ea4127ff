"""Word problems with reasoning and answers that can be checked.

    python examples/reasoning_dataset.py --output-dir data

writes train.jsonl, validation.jsonl and test.jsonl. A record has OpenAI `messages`, a question and its solution that
ends with a line `#### N`, and the right number as `answer`. A share of the training solutions is wrong: a slip in a
calculation, a wrong operation, or no end; their `answer` is still right, so that `filter_sft_data` finds them.
The same seed gives the same files. No calculation (operations and numbers) of one split occurs in another.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

COUNTS = {"train": 4000, "validation": 400, "test": 400}
SHARES = {"validation": 0.1, "test": 0.1}
"""Of all calculations; the others belong to train."""
LARGEST = 30
"""No number in a solution exceeds it."""
SYMBOLS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}

PEOPLE = {
    "Anna": "she",
    "Ben": "he",
    "Carla": "she",
    "David": "he",
    "Elif": "she",
    "Farid": "he",
    "Grace": "she",
    "Hugo": "he",
    "Ines": "she",
    "Jonas": "he",
    "Keiko": "she",
    "Liam": "he",
}
THINGS = (
    "apples",
    "books",
    "cards",
    "coins",
    "marbles",
    "pencils",
    "shells",
    "stamps",
    "stickers",
    "toy cars",
)
PLACES = ("the market", "the station", "the museum", "the school", "the bridge")


@dataclass(frozen=True)
class Theme:
    """Sentences of a story; {b} is the number of a step.

    Attributes:
        starts: sentences by the operation that yields the first result; "" only gives {a}.
        steps: sentences by operation.
    """

    starts: dict[str, tuple[str, ...]]
    steps: dict[str, tuple[str, ...]]
    questions: tuple[str, ...]


THEMES = (
    Theme(
        starts={
            "": (
                "{name} has {a} {things}.",
                "There are {a} {things} in {name}'s bag.",
                "{name} collects {things} and starts with {a}.",
            ),
            "*": (
                "{name} buys {a} boxes with {b} {things} in each box.",
                "{name} puts {things} into {a} rows of {b}.",
            ),
        },
        steps={
            "+": (
                "Then {they} gets {b} more from {friend}.",
                "{friend} gives {name} another {b}.",
                "Later {they} finds {b} more at {place}.",
            ),
            "-": (
                "Then {they} gives {b} to {friend}.",
                "{name} loses {b} of them on the way to {place}.",
                "{friend} borrows {b} and does not bring them back.",
            ),
            "*": (
                "A month later {they} has {b} times as many.",
                "With some luck the number becomes {b} times as large.",
            ),
        },
        questions=(
            "How many {things} does {name} have now?",
            "How many {things} are there at the end?",
        ),
    ),
    Theme(
        starts={
            "": (
                "A bus leaves {place} with {a} passengers.",
                "{name} drives a bus. At first {a} people sit in it.",
            ),
        },
        steps={
            "+": (
                "At the next stop {b} people get on.",
                "At {place} {b} more passengers come in.",
            ),
            "-": (
                "At the next stop {b} people get off.",
                "Near {place} {b} of the passengers leave.",
            ),
        },
        questions=(
            "How many people are on the bus now?",
            "How many passengers remain on the bus?",
        ),
    ),
    Theme(
        starts={
            "": (
                "{name} has saved {a} dollars.",
                "In {name}'s purse are {a} dollars.",
            ),
            "*": (
                "{name} works for {a} hours and earns {b} dollars per hour.",
                "For {a} weeks {name} puts aside {b} dollars a week.",
            ),
        },
        steps={
            "+": (
                "{friend} pays back {b} dollars to {name}.",
                "For help in the garden {they} gets {b} dollars.",
            ),
            "-": (
                "A ticket to {place} costs {name} {b} dollars.",
                "Then {they} spends {b} dollars on {things}.",
            ),
        },
        questions=(
            "How many dollars does {name} have left?",
            "How much money, in dollars, does {name} have now?",
        ),
    ),
    Theme(
        starts={"": ("In a game {name} scores {a} points in the first round.",)},
        steps={
            "+": (
                "The next round brings {b} points.",
                "{name} beats {friend} and gets {b} points for it.",
            ),
            "-": (
                "A mistake costs {b} points.",
                "Then {friend} takes {b} points away from {name}.",
            ),
            "*": ("A bonus card multiplies the points by {b}.",),
        },
        questions=(
            "What is {name}'s score?",
            "How many points does {name} have in the end?",
        ),
    ),
)


@dataclass(frozen=True)
class Step:
    """One calculation of a solution; `result` is wrong in a wrong one."""

    left: int
    symbol: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left} {self.symbol} {self.right} = {self.result}"


@dataclass(frozen=True)
class Problem:
    question: str
    steps: tuple[Step, ...]

    @property
    def answer(self) -> int:
        return self.steps[-1].result

    @property
    def calculation(self) -> str:
        return ", ".join(map(str, self.steps))


def draw_problem(draw: random.Random) -> Problem:
    """Draw a story of one to three steps."""
    theme = draw.choice(THEMES)
    symbol = draw.choice(list(theme.starts))
    name, friend = draw.sample(list(PEOPLE), 2)
    words = {
        "name": name,
        "friend": friend,
        "they": PEOPLE[name],
        "things": draw.choice(THINGS),
    }
    start_place, *places = draw.sample(PLACES, 4)
    steps: list[Step] = []
    value = draw.randint(3, 12)
    if symbol == "*":
        first = Step(draw.randint(2, 5), "*", draw.randint(2, 6), 0)
        steps.append(replace(first, result=first.left * first.right))
        value = steps[0].result
        start = draw.choice(theme.starts["*"])
        sentences = [start.format(a=first.left, b=first.right, **words)]
    else:
        start = draw.choice(theme.starts[""])
        sentences = [start.format(a=value, place=start_place, **words)]
    for place in places[: draw.randint(1, 3) - len(steps)]:
        step = draw_step(draw, value, list(theme.steps))
        value = step.result
        steps.append(step)
        sentence = draw.choice(theme.steps[step.symbol])
        sentence = sentence.format(b=step.right, place=place, **words)
        sentences.append(sentence[0].upper() + sentence[1:])
    sentences.append(draw.choice(theme.questions).format(**words))
    return Problem(" ".join(sentences), tuple(steps))


def draw_step(draw: random.Random, value: int, symbols: list[str]) -> Step:
    """Draw a step whose result lies between 1 and LARGEST."""
    while True:
        symbol = draw.choice(symbols)
        right = draw.randint(2, 3 if symbol == "*" else 12)
        result = SYMBOLS[symbol](value, right)
        if 1 <= result <= LARGEST:
            return Step(value, symbol, right, result)


def solution(problem: Problem) -> str:
    lines = [f"{step}." for step in problem.steps]
    return "\n".join([*lines, f"#### {problem.answer}"])


def wrong_solution(draw: random.Random, problem: Problem) -> str:
    """Return a solution with a slip, with a wrong operation, or without its last step."""
    kind = draw.choice(["slip", "slip", "operation", "operation", "unfinished"])
    if kind == "unfinished":
        lines = [f"{step}." for step in problem.steps[:-1]]
        return "\n".join([*lines, "The rest is hard to tell."])
    place = draw.randrange(len(problem.steps))
    step = problem.steps[place]
    if kind == "slip":
        result = step.result + draw.choice([-2, -1, 1, 2])
        changed = replace(step, result=result)
    else:
        symbol = "-" if step.symbol == "+" else "+"
        result = SYMBOLS[symbol](step.left, step.right)
        changed = replace(step, symbol=symbol, result=result)
    steps = [*problem.steps[:place], changed]
    for later in problem.steps[place + 1 :]:
        left = steps[-1].result
        result = SYMBOLS[later.symbol](left, later.right)
        steps.append(replace(later, left=left, result=result))
    if steps[-1].result == problem.answer:  # 2 * 2 = 2 + 2
        return wrong_solution(draw, problem)
    return solution(replace(problem, steps=tuple(steps)))


def split_of(problem: Problem) -> str:
    """Return the split of a calculation, drawn by its hash."""
    digest = hashlib.sha256(problem.calculation.encode()).hexdigest()
    position = int(digest[:8], 16) / 16**8
    for split, share in SHARES.items():
        position -= share
        if position < 0:
            return split
    return "train"


def records(
    counts: dict[str, int], wrong_share: float, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Draw the records of every split; no question occurs twice."""
    draw = random.Random(seed)
    drawn: dict[str, list[dict[str, Any]]] = {split: [] for split in counts}
    seen: set[str] = set()
    while any(len(drawn[split]) < count for split, count in counts.items()):
        problem = draw_problem(draw)
        split = split_of(problem)
        if len(drawn.get(split, ())) == counts.get(split, 0):
            continue
        if problem.question in seen:
            continue
        seen.add(problem.question)
        is_wrong = split == "train" and draw.random() < wrong_share
        text = wrong_solution(draw, problem) if is_wrong else solution(problem)
        messages = [
            {"role": "user", "content": problem.question},
            {"role": "assistant", "content": text},
        ]
        drawn[split].append({"messages": messages, "answer": str(problem.answer)})
    return drawn


def write_dataset(
    folder: Path,
    counts: dict[str, int] = COUNTS,
    wrong_share: float = 0.3,
    seed: int = 1234,
) -> dict[str, int]:
    """Write a file for each split, whole or not at all; return their numbers of records."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = records(counts, wrong_share, seed)
    for split, chosen in drawn.items():
        lines = [json.dumps(record) + "\n" for record in chosen]
        temporary = folder / f".{split}.jsonl.tmp"
        temporary.write_text("".join(lines), encoding="utf-8")
        os.replace(temporary, folder / f"{split}.jsonl")
    return {split: len(chosen) for split, chosen in drawn.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument(
        "--wrong-share",
        type=float,
        default=0.3,
        help="of the training solutions (default 0.3)",
    )
    for split, count in COUNTS.items():
        parser.add_argument(
            f"--{split}", type=int, default=count, help=f"records (default {count})"
        )
    arguments = parser.parse_args()
    counts = {split: getattr(arguments, split) for split in COUNTS}
    written = write_dataset(
        arguments.output_dir, counts, arguments.wrong_share, arguments.seed
    )
    for split, count in written.items():
        print(f"{split}: {count} records")
