"""How far what a cache says of an example lies from what a teacher says, and how much of that rounding explains.

Shape legend: P compared positions of an example, K ids, k the ids that somebody keeps, T temperatures. Everything here is
float64.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from nemo_kd.batch import CachedExample, TeacherRows

SMALLEST_TAIL = 1e-9
"""Tails below count as this large: float32 holds no better ones close to a certain teacher."""
FINE_STEPS_PER_NAT, LARGEST_STEP, TAIL_STEP, TAIL_STEP_FROM_NATS = 64, 1 / 8, 1 / 2, 10.0
SEARCH_CELL = 1 / 1024
CLIPPED_TAIL_KL = 1e-5
"""What a tail outside the packed codec's range, 8e-7 to 1 - 7e-6, adds at most."""
LEAST_LABEL_NATS = -58.0
"""The packed codec holds no smaller log-probability."""
BFLOAT16 = 2.0**-8


class Rounding(NamedTuple):
    """What happened to the numbers of a cache: the packed codec's levels, another program's bfloat16, or both."""

    packed: bool
    bfloat16: bool


class Said(NamedTuple):
    """What somebody says of given ids at one temperature.

    Attributes:
        logprobs_PK: -inf where there is no id.
        known_PK: whether it is said so; else the id is not kept, and the number the largest that fits what is said.
        tail_P: probability of all other ids.
    """

    logprobs_PK: np.ndarray
    known_PK: np.ndarray
    tail_P: np.ndarray


def targets_of(row: CachedExample) -> TeacherRows[np.ndarray]:
    """The row's targets without the filler that the json codec writes at positions without one."""
    teacher = row.teacher
    ids_PK = teacher.topk_token_ids_PK
    filler_P = (ids_PK == np.arange(ids_PK.shape[1])).all(axis=1)
    filler_P &= (teacher.topk_logits_PK == 0).all(axis=1)
    filler_P &= row.example.loss_mask_S[teacher.positions_P] == 0
    return teacher.at((ids_PK[:, 0] >= 0) & ~filler_P)


def said_about(
    ids_PK: np.ndarray, teacher: TeacherRows[np.ndarray], temperature: float = 1.0
) -> Said:
    """What `teacher` says of the ids (-1 stands for none) at one of its temperatures."""
    number = teacher.temperatures.index(temperature)
    ids_Pk, logits_Pk = (
        teacher.topk_token_ids_PK.astype(np.int64),
        teacher.topk_logits_PK.astype(np.float64),
    )
    tail_P = np.clip(
        teacher.tail_mass_PT[:, number].astype(np.float64), SMALLEST_TAIL, 1 - SMALLEST_TAIL
    )
    total_P = teacher.log_sum_exp_logits_P.astype(np.float64)
    if number:  # the likeliest logit is 0
        total_P = np.log(np.exp(logits_Pk / temperature).sum(axis=1)) - np.log1p(-tail_P)
    kept_Pk, wanted_PK = ids_Pk >= 0, ids_PK >= 0
    row_N, logprobs_N = (
        np.nonzero(kept_Pk)[0],
        (logits_Pk / temperature - total_P[:, None])[kept_Pk],
    )
    width = max(int(ids_Pk.max()), int(ids_PK.max())) + 1
    keys_N, wanted_M = (
        row_N * width + ids_Pk[kept_Pk],
        (np.nonzero(wanted_PK)[0] * width + ids_PK[wanted_PK]),
    )
    order_N = keys_N.argsort()
    found_M = order_N[np.searchsorted(keys_N, wanted_M, sorter=order_N).clip(max=len(keys_N) - 1)]
    hit_M = keys_N[found_M] == wanted_M
    others_N = np.ones(len(keys_N), dtype=bool)
    others_N[found_M[hit_M]] = False
    known_PK = np.zeros(ids_PK.shape, dtype=bool)
    known_PK[wanted_PK] = hit_M
    logprobs_PK = np.full(ids_PK.shape, -np.inf)
    logprobs_PK[known_PK] = logprobs_N[found_M[hit_M]]
    missing_PK = wanted_PK & ~known_PK
    num_missing_P = missing_PK.sum(axis=1)
    smallest_P = np.full(len(ids_Pk), np.inf)
    np.minimum.at(smallest_P, row_N, logprobs_N)
    most_P = np.minimum(smallest_P, np.log(tail_P / np.maximum(num_missing_P, 1)))
    logprobs_PK = np.where(missing_PK, most_P[:, None], logprobs_PK)
    tail_P = tail_P - num_missing_P * np.exp(most_P)
    tail_P += np.bincount(row_N, weights=np.exp(logprobs_N) * others_N, minlength=len(tail_P))
    return Said(logprobs_PK, known_PK, np.clip(tail_P, SMALLEST_TAIL, 1 - SMALLEST_TAIL))


def divergence(p: Said, q: Said) -> np.ndarray:
    """KL(p || q) [P] in nats over ids and tail, as the sum of p ln(p / q) - p + q: no part is negative, even where rounded
    probabilities do not sum to 1."""
    used_PK = np.isfinite(p.logprobs_PK)
    distance_PK = np.subtract(
        p.logprobs_PK, q.logprobs_PK, where=used_PK, out=np.zeros(used_PK.shape)
    )
    tail_distance_P = np.log(p.tail_P / q.tail_P)
    ids_P = (np.exp(p.logprobs_PK) * (distance_PK + np.expm1(-distance_PK))).sum(axis=1)
    return ids_P + p.tail_P * (tail_distance_P + np.expm1(-tail_distance_P))


def levels_step(nats: np.ndarray) -> np.ndarray:
    """The packed codec's largest step between levels at a log-probability of -nats (docs/cache_format.md, section 4)."""
    fine = np.minimum(np.exp(np.minimum(nats, 10) / 2) / FINE_STEPS_PER_NAT, LARGEST_STEP)
    return np.where(nats > TAIL_STEP_FROM_NATS, TAIL_STEP, fine)


def rounding_divergence(
    rounding: Rounding, at_one: Said, said: Said, temperature: float = 1.0
) -> np.ndarray:
    """The most that rounding adds to `divergence` [P], to second order.

    Args:
        at_one: what the cache says at temperature 1, at which log-probabilities are stored; said: at `temperature`.
    """
    used_PK = np.isfinite(at_one.logprobs_PK)
    nats_PK, p_PK = np.where(used_PK, -at_one.logprobs_PK, 0), np.exp(said.logprobs_PK)
    errors_PK, tail_kl_P = np.zeros(used_PK.shape), np.zeros(len(used_PK))
    if rounding.packed:
        steps_PK = levels_step(nats_PK)
        errors_PK += steps_PK / 2 + SEARCH_CELL
        errors_PK[:, 0] += steps_PK[:, 0]
        odds_P = np.log(said.tail_P / (1 - said.tail_P))
        # A reader finds odds within a step of 3 on either side of it.
        errors_P = np.where(np.abs(odds_P) < 2.9, 1 / 32, 1 / 16)
        tail_kl_P += said.tail_P * (1 - said.tail_P) * errors_P**2 / 2 + CLIPPED_TAIL_KL
    if rounding.bfloat16:  # logit and log-sum-exp, which together are the nats
        errors_PK += BFLOAT16 * nats_PK
        errors_P = (p_PK * errors_PK).sum(axis=1) + SMALLEST_TAIL
        tail_kl_P += errors_P**2 / np.maximum(said.tail_P, errors_P)
    return (p_PK * (errors_PK / temperature) ** 2).sum(axis=1) / 2 + tail_kl_P


def rounding_of_labels(rounding: Rounding, labels: np.ndarray) -> np.ndarray:
    """The most that rounding moves label log-probabilities."""
    errors = BFLOAT16 * np.abs(labels) if rounding.bfloat16 else np.zeros(labels.shape)
    return errors + rounding.packed * (1.5 * levels_step(-labels) + SEARCH_CELL + 1 / 8)


class Scale(NamedTuple):
    """A fit of log-probabilities p = scale * q + constant at every position, by the ids' probabilities.

    Attributes:
        products_P, squares_P: whose sums' ratio is the scale.
        residuals_P, differences_P: half the variance of p - scale * q and of p - q: KL over the kept ids, to second order.
    """

    products_P: np.ndarray
    squares_P: np.ndarray
    residuals_P: np.ndarray
    differences_P: np.ndarray

    @property
    def scale(self) -> float:
        """1 / T where p is q at temperature T."""
        return float(self.products_P.sum() / max(self.squares_P.sum(), SMALLEST_TAIL))

    @property
    def standard_error(self) -> float:
        """Of `scale`, from how the positions scatter."""
        off_P = self.products_P - self.scale * self.squares_P
        return float(np.sqrt((off_P**2).sum()) / max(self.squares_P.sum(), SMALLEST_TAIL))


def fit_scale(p: Said, q: Said, rounding: Rounding) -> Scale:
    """The scale that turns q into p, over the ids whose probability q knows."""
    used_PK = q.known_PK & np.isfinite(p.logprobs_PK)
    weights_PK = np.where(used_PK, np.exp(q.logprobs_PK), 0)
    if rounding.packed and weights_PK.shape[1] > 1:
        # The likeliest token is put one level higher where it shares its level, which is no rounding to the nearest.
        first_P, second_P = p.logprobs_PK[:, 0], p.logprobs_PK[:, 1]
        weights_PK[first_P - second_P < 2.5 * levels_step(-first_P), 0] = 0
    weights_PK /= np.maximum(weights_PK.sum(axis=1, keepdims=True), SMALLEST_TAIL)
    x_PK, y_PK = (np.where(used_PK, said.logprobs_PK, 0) for said in (q, p))
    x_PK = x_PK - (weights_PK * x_PK).sum(axis=1, keepdims=True)
    y_PK = y_PK - (weights_PK * y_PK).sum(axis=1, keepdims=True)
    products_P, squares_P = (
        (weights_PK * x_PK * y_PK).sum(axis=1),
        (weights_PK * x_PK**2).sum(axis=1),
    )
    scale = products_P.sum() / max(squares_P.sum(), SMALLEST_TAIL)
    residuals_P, differences_P = (
        (weights_PK * (y_PK - s * x_PK) ** 2).sum(axis=1) / 2 for s in (scale, 1.0)
    )
    return Scale(products_P, squares_P, residuals_P, differences_P)
