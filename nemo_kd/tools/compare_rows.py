"""Compare cached rows with a teacher's, beside the teacher against itself.

A row is wrong if it differs from the teacher by much more than a control run of the teacher does,
and by more than its encoding explains.

Shape legend: E examples, P compared positions of one, K ids that the cache keeps, k the teacher's.
Everything is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nemo_kd.batch import TeacherRows
from nemo_kd.cache.entropy_coding import level_nats
from nemo_kd.cache.packed_codec import COARSE_STEPS_PER_NAT, FINE_STEPS_PER_NAT
from nemo_kd.config.cache import MAX_VOCAB_SIZE

Targets = TeacherRows[np.ndarray]
ErrorBound = Callable[[np.ndarray, np.ndarray], list[np.ndarray]]
"""`packed_codec.error_bound`, or the sum of several codecs' bounds."""

FACTOR = 4.0
"""Allowed multiple of the control's worst divergence: that of twice the error of a logit."""
FACTOR_OF_EXPERTS = 10.0
"""The same for a mixture of experts, where rounding may change an expert's choice."""
ROUNDING_FACTOR = 2.0
"""Allowed multiple of the encoding's divergence: |a + b|^2 <= 2 |a|^2 + 2 |b|^2."""
POSITION_FACTOR = 20.0
"""Allowed multiple of the floor at a single position."""
UNIT_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8}
STORED_KL = 1e-7
"""KL of float32 fields close to a certain teacher."""
STORED_LABEL_NATS = 2e-3
SMALLEST_TAIL = 1e-9
"""Smaller tails count as this large: float32 fields hold none close to a certain teacher."""
SMALLEST_LABEL = -float(level_nats(FINE_STEPS_PER_NAT, COARSE_STEPS_PER_NAT)[-1])
"""Smaller label log-probabilities count as this: the packed codec's last level."""
SCALE_FLOOR = 0.005
"""Temperatures this close to 1 count as 1."""
SCALE_ERRORS = 6.0
"""Temperatures within this many standard errors of 1 count as 1."""
FEWEST_FOR_SCALE = 50
"""Fewest positions from which a standard error is usable."""
LEAST_CORRELATION = 0.9
"""Squared correlation with the teacher from which a temperature explains a difference."""
PROBED_POSITIONS = 16
CLEARLY_CLOSER = 0.1
"""A cause explains a difference if at most this share of it remains."""


class Distribution(NamedTuple):
    """Log-probabilities of given ids, and the probability of all other ids together.

    Attributes:
        logprobs_PK: -inf where there is no id.
        known_PK: it is stored; otherwise it is the largest one that the stored ones allow.
    """

    logprobs_PK: np.ndarray
    known_PK: np.ndarray
    tail_P: np.ndarray

    @classmethod
    def of(
        cls, teacher: Targets, ids_PK: np.ndarray, temperature: float = 1.0
    ) -> Distribution:
        """Read the distribution over `ids_PK` (-1: no id) at one of the teacher's temperatures."""
        number = teacher.temperatures.index(temperature)
        logits_Pk = teacher.topk_logits_PK.astype(np.float64) / temperature
        tail_P = _clip(teacher.tail_mass_PT[:, number].astype(np.float64))
        total_P = teacher.log_sum_exp_logits_P.astype(np.float64)
        if number:
            total_P = np.log(np.exp(logits_Pk).sum(axis=1)) - np.log1p(-tail_P)
        kept_Pk = logits_Pk - total_P[:, None]
        rows_P = MAX_VOCAB_SIZE * np.arange(len(ids_PK))[:, None]
        keys_N = (teacher.topk_token_ids_PK + rows_P).ravel()
        wanted_PK = ids_PK + rows_P
        order_N = keys_N.argsort()
        place_PK = np.searchsorted(keys_N, wanted_PK, sorter=order_N).clip(
            max=len(keys_N) - 1
        )
        place_PK = order_N[place_PK]
        known_PK = (keys_N[place_PK] == wanted_PK) & (ids_PK >= 0)
        logprobs_PK = np.where(known_PK, kept_Pk.ravel()[place_PK], -np.inf)
        others_P = np.exp(kept_Pk).sum(axis=1) - np.exp(logprobs_PK).sum(axis=1)
        missing_PK = (ids_PK >= 0) & ~known_PK
        num_missing_P = missing_PK.sum(axis=1)
        smallest_P = np.where(np.isfinite(kept_Pk), kept_Pk, np.inf).min(axis=1)
        most_P = np.minimum(smallest_P, np.log(tail_P / np.maximum(num_missing_P, 1)))
        logprobs_PK = np.where(missing_PK, most_P[:, None], logprobs_PK)
        return cls(
            logprobs_PK,
            known_PK,
            _clip(tail_P - num_missing_P * np.exp(most_P) + others_P),
        )


def divergence(p: Distribution, q: Distribution) -> np.ndarray:
    """Return KL(p || q) [P] in nats as the sum of p ln(p / q) - p + q.

    Every term is at least 0, even where rounded probabilities do not sum to 1.
    """
    p_PN = np.column_stack([p.logprobs_PK, np.log(p.tail_P)])
    q_PN = np.column_stack([q.logprobs_PK, np.log(q.tail_P)])
    used_PN = np.isfinite(p_PN)
    distance_PN = np.subtract(p_PN, q_PN, where=used_PN, out=np.zeros(used_PN.shape))
    return (np.exp(p_PN) * (distance_PN + np.expm1(-distance_PN))).sum(axis=1)


def encoding_divergence(
    bound: ErrorBound, at_one: Distribution, found: Distribution, temperature: float = 1.0
) -> np.ndarray:
    """Return the most that the encoding adds to `divergence` [P], to second order in the head.

    Args:
        at_one: the cache's distribution at temperature 1, at which log-probabilities are stored.
        found: the same at `temperature`.
    """
    errors_PK, _, _ = bound(at_one.logprobs_PK, at_one.tail_P)
    _, _, tail_errors_P = bound(at_one.logprobs_PK, found.tail_P)
    head_P = (np.exp(found.logprobs_PK) * (errors_PK / temperature) ** 2).sum(axis=1) / 2
    t_P = found.tail_P
    tails = []
    for sign in (-1, 1):
        other_P = _clip(t_P + sign * tail_errors_P)
        tails.append(
            t_P * np.log(t_P / other_P)
            + (1 - t_P) * (np.log1p(-t_P) - np.log1p(-other_P))
        )
    return head_P + np.maximum(*tails)


class TemperatureFit(NamedTuple):
    """Scale 1 / T that turns log-probabilities of one distribution into those of another.

    Attributes:
        is_proportional: the scale explains the difference.
    """

    scale: float
    standard_error: float
    is_proportional: bool

    @classmethod
    def of(cls, pairs: Iterable[tuple[Distribution, Distribution]]) -> TemperatureFit:
        """Fit p = scale * q + constant at every position, weighted by q's probabilities."""
        moments = [np.zeros((3, 0))]
        for p, q in pairs:
            weights_PK = np.where(
                q.known_PK & np.isfinite(p.logprobs_PK), np.exp(q.logprobs_PK), 0
            )
            # The packed codec may move the likeliest token up by a level.
            weights_PK[:, :-1][:, :1] = 0
            weights_PK /= np.maximum(weights_PK.sum(axis=1, keepdims=True), SMALLEST_TAIL)
            values = np.where(weights_PK > 0, [q.logprobs_PK, p.logprobs_PK], 0)
            x_PK, y_PK = values - (weights_PK * values).sum(axis=2, keepdims=True)
            products = np.stack([x_PK * x_PK, x_PK * y_PK, y_PK * y_PK])
            moments.append((weights_PK * products).sum(axis=2))
        moments_3P = np.concatenate(moments, axis=1)
        xx, xy, yy = np.maximum(moments_3P.sum(axis=1), SMALLEST_TAIL)
        scale = float(xy / xx)
        errors_P = moments_3P[1] - scale * moments_3P[0]
        standard_error = float(np.sqrt((errors_P**2).sum()) / xx)
        return cls(scale, standard_error, bool(xy**2 > LEAST_CORRELATION * xx * yy))


@dataclass(frozen=True)
class Comparison:
    """One sampled example: as cached, as scored in batches, and as scored by the control.

    Attributes:
        where: file:line of its row.
    """

    index: int
    where: str
    cached: Targets
    scored: Targets
    control: Targets

    def at(self, temperature: float = 1.0) -> list[Distribution]:
        """Return the distributions of cache, teacher and control over the cache's ids."""
        ids_PK = self.cached.topk_token_ids_PK.astype(np.int64)
        found = (self.cached, self.scored, self.control)
        return [Distribution.of(teacher, ids_PK, temperature) for teacher in found]


@dataclass(frozen=True)
class Statistic:
    """One number per example: of the cache, of the control, and the largest allowed."""

    name: str
    cached_E: np.ndarray
    control_E: np.ndarray
    allowed_E: np.ndarray

    @property
    def worst(self) -> int:
        """Number of the example that comes closest to what is allowed, or exceeds it most."""
        return int((self.cached_E / self.allowed_E).argmax())

    @property
    def is_wrong_E(self) -> np.ndarray:
        return ~(self.cached_E <= self.allowed_E)


def compare_rows(
    examples: Sequence[Comparison], bound: ErrorBound, dtype: str, factor: float
) -> list[Statistic]:
    """Return the statistics of all examples: KL at every temperature, and label log-probabilities.

    Args:
        dtype: the coarser one of the dtypes of cache and teacher.
        factor: FACTOR or FACTOR_OF_EXPERTS.
    """
    statistics = []
    shared = set.intersection(*(set(example.cached.temperatures) for example in examples))
    for temperature in sorted(shared, key=examples[0].cached.temperatures.index):
        cached = []
        control = []
        rounding = []
        for example in examples:
            p, q, r = example.at(temperature)
            cached.append(divergence(p, q))
            control.append(divergence(r, q))
            encoded = encoding_divergence(bound, example.at()[0], p, temperature)
            rounding.append(ROUNDING_FACTOR * encoded)
        name = "KL" if temperature == 1 else f"KL at T = {temperature:g}"
        floor = floor_kl(dtype)
        # One expert's changed choice changes a position or two by much: the median ignores them.
        for kind, reduce, allowed in (
            ("mean of an example", np.mean, floor),
            ("median of an example", np.median, floor),
            ("worst position", np.max, POSITION_FACTOR * floor),
        ):
            cached_E, control_E, rounding_E = (
                np.array([reduce(kl_P) for kl_P in kls])
                for kls in (cached, control, rounding)
            )
            allowed_E = factor * control_E.max() + rounding_E + allowed
            statistics.append(
                Statistic(f"{name}, {kind}", cached_E, control_E, allowed_E)
            )
    if all(example.cached.label_logprobs_P is not None for example in examples):
        statistics.append(_compare_labels(examples, bound, dtype, factor**0.5))
    return statistics


def _compare_labels(
    examples: Sequence[Comparison], bound: ErrorBound, dtype: str, factor: float
) -> Statistic:
    errors = []
    for example in examples:
        labels_3P = np.stack(
            [
                np.asarray(found.label_logprobs_P, dtype=np.float64)
                for found in (example.cached, example.scored, example.control)
            ]
        )
        p_P, q_P, r_P = np.maximum(labels_3P, SMALLEST_LABEL)
        encoding_P1, shift_P, _ = bound(
            p_P[:, None], _clip(example.cached.tail_mass_PT[:, 0])
        )
        parts = (np.abs(p_P - q_P), np.abs(r_P - q_P), encoding_P1[:, 0] + shift_P)
        errors.append([part.mean() for part in parts])
    cached_E, control_E, encoding_E = np.array(errors).T
    floor = STORED_LABEL_NATS + 12 * UNIT_ROUNDOFF[dtype]
    allowed_E = factor * control_E.max() + encoding_E + floor
    return Statistic("log-probability of labels, mean", cached_E, control_E, allowed_E)


def floor_kl(dtype: str) -> float:
    """Return the divergence that is always allowed: that of logits off by three roundings.

    The control of a few positions may happen to be smaller.
    """
    return STORED_KL + (3 * UNIT_ROUNDOFF[dtype]) ** 2 / 2


def find_wrong(
    examples: Sequence[Comparison], statistics: Sequence[Statistic]
) -> dict[int, list[str]]:
    """Return the numbers of wrong examples, each with the likely cause of its difference."""
    is_wrong_E = np.logical_or.reduce([statistic.is_wrong_E for statistic in statistics])
    numbers = np.flatnonzero(is_wrong_E).tolist()
    return {number: [_likely_cause(number, examples, statistics)] for number in numbers}


def format_statistics(
    statistics: Sequence[Statistic], examples: Sequence[Comparison]
) -> list[str]:
    """Return the lines of a table of the statistics."""
    lines = [
        f"{'':36}  {'cache against teacher':^30}  {'teacher against itself':^22}",
        f"{'':36}  {'mean':>8} {'worst':>8} {'allowed':>8}  {'mean':>10} {'worst':>10}  "
        "worst example",
    ]
    for statistic in statistics:
        worst = statistic.worst
        lines.append(
            f"{statistic.name:<36}  {statistic.cached_E.mean():8.1e} "
            f"{statistic.cached_E[worst]:8.1e} {statistic.allowed_E[worst]:8.1e}  "
            f"{statistic.control_E.mean():10.1e} {statistic.control_E.max():10.1e}  "
            f"{examples[worst].index}"
        )
    return lines


def fit_temperatures(
    examples: Sequence[Comparison], factor: float
) -> tuple[TemperatureFit, TemperatureFit, bool]:
    """Return the fits of cache and control, and True if the cache fits another T than 1."""
    found = [example.at() for example in examples]
    fit = TemperatureFit.of((cached, scored) for cached, scored, _ in found)
    control_fit = TemperatureFit.of((control, scored) for _, scored, control in found)
    allowed = max(SCALE_FLOOR, SCALE_ERRORS * fit.standard_error)
    allowed += factor * abs(control_fit.scale - 1)
    num_positions = sum(len(example.cached) for example in examples)
    is_off = num_positions >= FEWEST_FOR_SCALE and abs(fit.scale - 1) > allowed
    return fit, control_fit, is_off


def _likely_cause(
    number: int, examples: Sequence[Comparison], statistics: Sequence[Statistic]
) -> str:
    """Name a likely cause of an example's difference."""
    example = examples[number]
    p, q, _ = example.at()
    kl_P = divergence(p, q)
    typical = float(np.median(kl_P))
    if not any(statistic.is_wrong_E[number] for statistic in statistics[:3]):
        return f"only in: {', '.join(s.name for s in statistics if s.is_wrong_E[number])}"
    if typical < CLEARLY_CLOSER * kl_P.mean():
        place = int(kl_P.argmax())
        position = example.cached.positions_P[place]
        return f"at few positions, most at position {position} ({kl_P[place]:.2g} nats)"
    for shift in (1, -1, 2, -2):
        if _matches(example.cached, example.scored, shift) < CLEARLY_CLOSER * typical:
            return (
                f"shifted: each position holds the teacher's answer {shift:+d} further on"
            )
    for other in examples:
        is_other = other is not example
        if is_other and _matches(example.cached, other.scored) < CLEARLY_CLOSER * typical:
            return f"permuted: it is the teacher's answer for example {other.index} ({other.where})"
    fit = TemperatureFit.of([(p, q)])
    if fit.is_proportional and abs(fit.scale - 1) > SCALE_FLOOR:
        return f"another temperature: it is the teacher's answer at temperature {1 / fit.scale:.2f}"
    return "unlike all of the sample: another teacher, other tokens, or a row not sampled"


def _matches(cached: Targets, scored: Targets, shift: int = 0) -> float:
    """Return the median divergence of some positions from those `shift` further on."""
    first = max(0, -shift)
    num_scored = len(scored) - shift
    last = min(len(cached), num_scored, first + PROBED_POSITIONS)
    if last <= first:
        return np.inf
    places = np.arange(first, last)
    mine = cached.at(places)
    theirs = scored.at(places + shift)
    ids_PK = mine.topk_token_ids_PK.astype(np.int64)
    kl_P = divergence(Distribution.of(mine, ids_PK), Distribution.of(theirs, ids_PK))
    return float(np.median(kl_P))


def _clip(tail_P: np.ndarray) -> np.ndarray:
    return np.clip(tail_P, SMALLEST_TAIL, 1 - SMALLEST_TAIL)
