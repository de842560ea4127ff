"""Whether the rows of a cache are a teacher's, judged beside that teacher against itself.

Shape legend: E examples, P compared positions of one of them, T temperatures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nemo_kd.batch import TeacherRows
from nemo_kd.tools.faithfulness import (
    LEAST_LABEL_NATS,
    Rounding,
    Said,
    Scale,
    divergence,
    fit_scale,
    rounding_divergence,
    rounding_of_labels,
    said_about,
)

FACTOR = 4.0
"""A divergence may be this many times the control's worst, that of twice the error of a logit."""
FACTOR_OF_EXPERTS = 10.0
"""Where rounding changes an expert's choice it changes few positions by much, and the control may show none of them."""
ROUNDING_FACTOR = 2.0
"""Of what the codec rounds: |a + b|^2 <= 2 |a|^2 + 2 |b|^2."""
UNIT_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8}
STORED_KL = 1e-7
"""Of float32 fields close to a certain teacher."""
STORED_LABEL_NATS = 2e-3
FLOOR_POSITION = 20.0
"""Times the floor at a single position."""
FLOOR_SCALE, SCALE_ERRORS = 0.005, 6.0
"""A temperature this close to 1 is none, nor is one within so many standard errors."""
FEWEST_FOR_SCALE = 50
"""Positions; from fewer the standard error is no good."""
PROBED_POSITIONS = 16
CLEARLY_CLOSER = 0.1
"""What explains a difference leaves less than this part of it at most positions."""


@dataclass(frozen=True)
class Compared:
    """One sampled example: what the cache says, and the teacher twice, with other examples and alone.

    Attributes:
        index: of the example; where: file:line of its row.
    """

    index: int
    where: str
    cached: TeacherRows[np.ndarray]
    teacher: TeacherRows[np.ndarray]
    alone: TeacherRows[np.ndarray]

    def said(self, temperature: float) -> tuple[Said, Said, Said]:
        """What cache, teacher and the teacher alone say of the ids that the cache keeps."""
        ids_PK = self.cached.topk_token_ids_PK.astype(np.int64)
        cached, teacher, alone = (
            said_about(ids_PK, t, temperature) for t in (self.cached, self.teacher, self.alone)
        )
        return cached, teacher, alone


@dataclass(frozen=True)
class Statistic:
    """One number of every example, of the cache and of the control, and the most that is allowed."""

    name: str
    cached_E: np.ndarray
    control_E: np.ndarray
    allowed_E: np.ndarray

    @property
    def worst(self) -> int:
        """The example that comes closest to what is allowed, or exceeds it most."""
        return int((self.cached_E / self.allowed_E).argmax())

    @property
    def wrong_E(self) -> np.ndarray:
        return ~(self.cached_E <= self.allowed_E)


@dataclass(frozen=True)
class Verdict:
    """What came out of a comparison.

    Attributes:
        temperature, control_temperature: that fit best, over the examples that nothing else is wrong with, or over all.
        wrong: number of an example -> what its difference looks like.
    """

    statistics: list[Statistic]
    temperature: float
    control_temperature: float
    temperature_is_off: bool
    wrong: dict[int, str]


def judge(
    examples: Sequence[Compared], rounding: Rounding, dtype: str, factor: float = FACTOR
) -> Verdict:
    """Compares every example; of each statistic the worst example counts, not the mean.

    Args:
        dtype: the coarser one of those that the cache and the teacher here were computed in.
        factor: FACTOR or FACTOR_OF_EXPERTS.
    """
    temperatures = [
        t
        for t in examples[0].cached.temperatures
        if all(t in e.cached.temperatures for e in examples)
    ]
    statistics: list[Statistic] = []
    for temperature in temperatures:
        statistics += _divergences(examples, rounding, floor_kl(dtype), temperature, factor)
    if all(example.cached.label_logprobs_P is not None for example in examples):
        statistics.append(
            _labels(examples, rounding, STORED_LABEL_NATS + 12 * UNIT_ROUNDOFF[dtype], factor)
        )
    wrong_E = np.logical_or.reduce([statistic.wrong_E for statistic in statistics])
    wrong = {
        number: _explain(number, examples, statistics, rounding)
        for number in np.flatnonzero(wrong_E).tolist()
    }
    right = [example for example, is_wrong in zip(examples, wrong_E, strict=True) if not is_wrong]
    scale, control = _pooled([_scales(example, rounding) for example in right or examples])
    allowed = max(FLOOR_SCALE, SCALE_ERRORS * scale.standard_error) + factor * abs(
        control.scale - 1
    )
    return Verdict(
        statistics,
        _temperature(scale),
        _temperature(control),
        bool(right) and len(scale.squares_P) >= FEWEST_FOR_SCALE and abs(scale.scale - 1) > allowed,
        wrong,
    )


def floor_kl(dtype: str) -> float:
    """Return what is allowed in any case, since a sample of few positions may be lucky: logits off by three roundings."""
    return STORED_KL + (3 * UNIT_ROUNDOFF[dtype]) ** 2 / 2


def _divergences(
    examples: Sequence[Compared],
    rounding: Rounding,
    floor: float,
    temperature: float,
    factor: float,
) -> list[Statistic]:
    """Of every example mean, median and worst position of KL(cache || teacher)."""
    cached, control, rounded = [], [], []
    for example in examples:
        by_cache, by_teacher, by_alone = example.said(temperature)
        cached.append(divergence(by_cache, by_teacher))
        control.append(divergence(by_alone, by_teacher))
        at_one = by_cache if temperature == 1 else example.said(1.0)[0]
        rounded.append(rounding_divergence(rounding, at_one, by_cache, temperature))
    name = "KL" if temperature == 1 else f"KL at T = {temperature:g}"
    mean_E = np.array([kl_P.mean() for kl_P in control])
    mean = Statistic(
        f"{name}, mean of an example",
        np.array([kl_P.mean() for kl_P in cached]),
        mean_E,
        factor * mean_E.max()
        + ROUNDING_FACTOR * np.array([kl_P.mean() for kl_P in rounded])
        + floor,
    )
    typical_E = np.array([np.median(kl_P) for kl_P in control])
    # Where an expert's choice is close, rounding changes it, and with it a position or two: of them the mean may be large.
    typical = Statistic(
        f"{name}, median of an example",
        np.array([np.median(kl_P) for kl_P in cached]),
        typical_E,
        factor * typical_E.max()
        + ROUNDING_FACTOR * np.array([np.median(kl_P) for kl_P in rounded])
        + floor,
    )
    most = factor * max(kl_P.max() for kl_P in control) + FLOOR_POSITION * floor
    allowed = [ROUNDING_FACTOR * kl_P + most for kl_P in rounded]
    places = [
        int((kl_P / allowed_P).argmax()) for kl_P, allowed_P in zip(cached, allowed, strict=True)
    ]
    worst = Statistic(
        f"{name}, worst position",
        np.array([kl_P[place] for kl_P, place in zip(cached, places, strict=True)]),
        np.array([kl_P.max() for kl_P in control]),
        np.array([allowed_P[place] for allowed_P, place in zip(allowed, places, strict=True)]),
    )
    return [mean, typical, worst]


def _labels(
    examples: Sequence[Compared], rounding: Rounding, floor: float, factor: float
) -> Statistic:
    cached, control, allowed = [], [], []
    for example in examples:
        labels_P, by_teacher_P, by_alone_P = (
            np.maximum(np.asarray(said.label_logprobs_P, dtype=np.float64), LEAST_LABEL_NATS)
            for said in (example.cached, example.teacher, example.alone)
        )
        cached.append(np.abs(labels_P - by_teacher_P).mean())
        control.append(np.abs(by_alone_P - by_teacher_P).mean())
        allowed.append(rounding_of_labels(rounding, labels_P).mean())
    most = factor**0.5 * max(control) + floor
    return Statistic(
        "log-probability of labels, mean",
        np.array(cached),
        np.array(control),
        np.array(allowed) + most,
    )


def _scales(example: Compared, rounding: Rounding) -> tuple[Scale, Scale]:
    by_cache, by_teacher, by_alone = example.said(1.0)
    return fit_scale(by_cache, by_teacher, rounding), fit_scale(by_alone, by_teacher, rounding)


def _pooled(fits: Sequence[tuple[Scale, Scale]]) -> tuple[Scale, Scale]:
    cached, control = (
        Scale(*map(np.concatenate, zip(*same, strict=True))) for same in zip(*fits, strict=True)
    )
    return cached, control


def _temperature(fit: Scale) -> float:
    return 1 / fit.scale if fit.scale > 0 else float("inf")


def _explain(
    number: int, examples: Sequence[Compared], statistics: Sequence[Statistic], rounding: Rounding
) -> str:
    """What the difference of an example looks like."""
    example = examples[number]
    by_cache, by_teacher, _ = example.said(1.0)
    kl_P = divergence(by_cache, by_teacher)
    typical = float(np.median(kl_P))
    if not any(statistic.wrong_E[number] for statistic in statistics[:3]):
        return f"only in: {', '.join(s.name for s in statistics if s.wrong_E[number])}"
    if typical < CLEARLY_CLOSER * kl_P.mean():
        place = int(kl_P.argmax())
        return f"at few positions, most at position {example.cached.positions_P[place]} ({kl_P[place]:.2g} nats)"
    for shift in (1, -1, 2, -2):
        if _shifted(example, shift) < CLEARLY_CLOSER * typical:
            return f"shifted: what stands at a position is what the teacher says {abs(shift)} {'behind' if shift > 0 else 'before'} it"
    for other in examples:
        if (
            other is not example
            and _matches(example.cached, other.teacher, 0) < CLEARLY_CLOSER * typical
        ):
            return f"permuted: it is what the teacher says of example {other.index} ({other.where})"
    fit = fit_scale(by_cache, by_teacher, rounding)
    unscaled = float(np.median(fit.differences_P))
    rounded = float(np.median(rounding_divergence(rounding, by_cache, by_cache)))
    explained = min(unscaled / 2, CLEARLY_CLOSER * unscaled + rounded)
    if abs(fit.scale - 1) > FLOOR_SCALE and float(np.median(fit.residuals_P)) < explained:
        return f"another temperature: it is what the teacher says at temperature {_temperature(fit):.2f}"
    if unscaled < CLEARLY_CLOSER * typical:
        return "the kept tokens agree among themselves, their log-sum-exp or the probability of the rest does not"
    return "like nothing the teacher says of the sample: another teacher, other tokens, or the row of an example not sampled"


def _shifted(example: Compared, shift: int) -> float:
    return _matches(example.cached, example.teacher, shift)


def _matches(
    cached: TeacherRows[np.ndarray], teacher: TeacherRows[np.ndarray], shift: int
) -> float:
    """The median divergence of some positions, one stored position paired with the one `shift` further on."""
    first = max(0, -shift)
    length = min(
        len(cached) - first,
        len(teacher) - shift - first,
        PROBED_POSITIONS,
    )
    if length < 1:
        return float("inf")
    places = np.arange(first, first + length)
    mine, theirs = cached.at(places), teacher.at(places + shift)
    ids_PK = mine.topk_token_ids_PK.astype(np.int64)
    return float(np.median(divergence(said_about(ids_PK, mine), said_about(ids_PK, theirs))))
