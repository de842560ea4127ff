"""Checked responses of a model, their summary, and the file that holds them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
from transformers import PreTrainedTokenizerBase

from nemo_kd.answers.checkers import Checker
from nemo_kd.answers.outcomes import Outcome
from nemo_kd.answers.prompts import Question
from nemo_kd.files import write_atomically

if TYPE_CHECKING:
    from nemo_kd.mcore.generation import Response

log = logging.getLogger(__name__)

UNCHECKED = (Outcome.NO_TRUTH.value, Outcome.UNDECIDED.value)
"""Outcomes that say nothing about the response."""


@dataclass(frozen=True)
class Sample:
    """A response to one question.

    Attributes:
        index: of the record in its dataset.
        prompt, response: text with special tokens; the response without its stop token.
        answer: the right one; None if nothing is checked.
        correct: the checker's reward is 1; None if nothing is checked.
        reward: at most 1; None if nothing is checked.
        outcome: of the comparison, value of an `Outcome`; None if nothing is checked.
        num_tokens: of the response, without its stop token.
        mean_entropy: nats per generated token, the stop token included; None if unknown.
        stopped: the model ended the response; False if it was cut at the limit of tokens.
        reference: text of the dataset's own response.
    """

    index: int
    prompt: str
    response: str
    answer: str | None
    correct: bool | None
    reward: float | None
    outcome: str | None
    num_tokens: int
    mean_entropy: float | None
    stopped: bool
    reference: str = ""


def check_responses(
    questions: Sequence[Question],
    responses: Sequence[Response],
    tokenizer: PreTrainedTokenizerBase,
    checker: Checker | None,
) -> list[Sample]:
    """Return a sample per question; without a checker none is correct or incorrect.

    Warns of responses that cannot be checked.
    """
    samples = []
    for question, response in zip(questions, responses, strict=True):
        text = tokenizer.decode(response.token_ids)
        reward = None
        outcome = None
        if checker is not None and question.answer is not None:
            verdict = checker(text, question.answer)
            reward = verdict.reward
            outcome = verdict.outcome.value
        samples.append(
            Sample(
                index=question.index,
                prompt=tokenizer.decode(question.prompt_ids),
                response=text,
                answer=question.answer,
                correct=None if reward is None else reward == 1,
                reward=reward,
                outcome=outcome,
                num_tokens=len(response.token_ids),
                mean_entropy=_mean(response.entropy_nats),
                stopped=response.stopped,
                reference=question.reference,
            )
        )
    for reason in UNCHECKED:
        found = [sample.index for sample in samples if sample.outcome == reason]
        if found:
            log.warning(
                "warning: %s: responses to the records %s count as not correct",
                reason,
                found,
            )
    return samples


def summarize(samples: Sequence[Sample]) -> dict[str, float | None]:
    """Return means over samples by name; None for a mean over nothing.

    Lengths are in tokens; `stopped` is the share of responses that were not cut.
    """
    rewards = [sample.reward for sample in samples if sample.reward is not None]
    lengths = {
        name: _mean(
            [sample.num_tokens for sample in samples if sample.correct in kinds]
        )
        for name, kinds in (
            ("", (True, False, None)),
            ("_correct", (True,)),
            ("_incorrect", (False,)),
        )
    }
    return {
        "num_examples": len(samples),
        "accuracy": _mean([float(reward == 1) for reward in rewards]),
        "reward": _mean(rewards),
        **{f"mean_response_length{name}": mean for name, mean in lengths.items()},
        "entropy": _entropy(samples),
        "stopped": _mean([float(sample.stopped) for sample in samples]),
    }


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write one JSON object a line; the file appears whole.

    Raises:
        FileError: it cannot be written.
    """
    write_atomically(path, (orjson.dumps(sample) + b"\n" for sample in samples))


def _entropy(samples: Sequence[Sample]) -> float | None:
    """Return the entropy per generated token of all samples; None if one of them has none."""
    total = 0.0
    num_tokens = 0
    for sample in samples:
        if sample.mean_entropy is None:
            return None
        count = sample.num_tokens + sample.stopped
        total += sample.mean_entropy * count
        num_tokens += count
    return total / num_tokens if num_tokens else None


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
