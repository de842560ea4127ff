"""Divergences between rows against dense float64 distributions, and the most that rounding adds to them."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest

from nemo_kd.batch import CachedExample, Example, TeacherRows
from nemo_kd.cache import json_codec
from nemo_kd.cache.packed_codec import error_bound, pack, unpack
from nemo_kd.tools.compare_rows import (
    Distribution,
    TemperatureFit,
    divergence,
    encoding_divergence,
)
from nemo_kd.tools.rescore import with_targets_only

TEMPERATURES = (1.0, 2.0, 0.5)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def top_k(logits: np.ndarray, k: int, labels: np.ndarray | None = None) -> TeacherRows:
    """What float32 keeps of dense logits."""
    ids = np.argsort(-logits, axis=1)[:, :k]
    kept = np.take_along_axis(logits, ids, 1)
    tails = [
        1 - np.exp(np.take_along_axis(log_softmax(logits / t), ids, 1)).sum(axis=1)
        for t in TEMPERATURES
    ]
    logprobs = log_softmax(logits)
    return TeacherRows(
        np.arange(len(ids)),
        (kept - kept[:, :1]).astype(np.float32),
        ids.astype(np.int32),
        (-np.take_along_axis(logprobs, ids[:, :1], 1)[:, 0]).astype(np.float32),
        np.array(tails, dtype=np.float32).T,
        TEMPERATURES,
        None
        if labels is None
        else np.take_along_axis(logprobs, labels[:, None], 1)[:, 0].astype(np.float32),
    )


def dense_kl(
    p_logits: np.ndarray, q_logits: np.ndarray, ids: np.ndarray, temperature: float
) -> np.ndarray:
    """KL over the ids and everything else, from whole distributions."""
    p, q = (np.exp(log_softmax(logits / temperature)) for logits in (p_logits, q_logits))
    p_ids, q_ids = np.take_along_axis(p, ids, 1), np.take_along_axis(q, ids, 1)
    p_tail, q_tail = 1 - p_ids.sum(axis=1), 1 - q_ids.sum(axis=1)
    return (p_ids * np.log(p_ids / q_ids)).sum(axis=1) + p_tail * np.log(p_tail / q_tail)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_divergence_is_that_of_the_dense_distributions(temperature):
    random = np.random.default_rng(0)
    p_logits = random.normal(size=(40, 60)) * 2
    q_logits = p_logits + random.normal(size=(40, 60)) * 0.3
    cached, teacher = top_k(p_logits, 12), top_k(q_logits, 60)
    ids = cached.topk_token_ids_PK.astype(np.int64)
    found = divergence(
        Distribution.of(cached, ids, temperature),
        Distribution.of(teacher, ids, temperature),
    )
    np.testing.assert_allclose(
        found, dense_kl(p_logits, q_logits, ids, temperature), rtol=1e-3, atol=1e-6
    )


def test_ids_that_the_teacher_does_not_keep_count_as_its_least_likely_ones():
    random = np.random.default_rng(1)
    p_logits, q_logits = random.normal(size=(2, 30, 60)) * 2
    cached, teacher = top_k(p_logits, 12), top_k(q_logits, 14)
    ids = cached.topk_token_ids_PK.astype(np.int64)
    found = Distribution.of(teacher, ids)
    exact = np.take_along_axis(log_softmax(q_logits), ids, 1)
    assert (~found.known_PK).any()
    np.testing.assert_allclose(
        found.logprobs_PK[found.known_PK], exact[found.known_PK], atol=1e-5
    )
    smallest = np.take_along_axis(
        log_softmax(q_logits), teacher.topk_token_ids_PK[:, -1:].astype(int), 1
    )
    assert (found.logprobs_PK <= np.where(found.known_PK, np.inf, smallest + 1e-5)).all()
    np.testing.assert_allclose(
        np.exp(found.logprobs_PK).sum(axis=1) + found.tail_P, 1, atol=1e-5
    )


@pytest.mark.parametrize("spread", [0.5, 2.0, 5.0, 12.0])
def test_the_packed_codec_stays_below_its_bound(spread):
    random = np.random.default_rng(2)
    logits = random.normal(size=(400, 300)) * spread
    labels = random.integers(300, size=400)
    exact = top_k(logits, 40, labels)
    example = Example(0, labels, labels, np.ones(400, dtype=np.float32))
    cached = unpack(pack(CachedExample(example, exact)), example)
    ids = cached.topk_token_ids_PK.astype(np.int64)
    at_one = Distribution.of(cached, ids)
    for temperature in TEMPERATURES:
        found = Distribution.of(cached, ids, temperature)
        kl = divergence(found, Distribution.of(exact, ids, temperature))
        bound = encoding_divergence(error_bound, at_one, found, temperature)
        assert (kl <= 1.2 * bound).all()
    assert kl.max() > 0


def test_bfloat16_fields_stay_below_their_bound():
    import torch

    def rounded(values: np.ndarray) -> np.ndarray:
        return torch.from_numpy(values).bfloat16().float().numpy()

    logits = np.random.default_rng(3).normal(size=(400, 300)) * 4
    exact = top_k(logits, 25)
    z, lse = rounded(exact.topk_logits_PK), rounded(exact.log_sum_exp_logits_P)
    mass = np.exp(z.astype(np.float64) - lse[:, None]).sum(axis=1)
    cached = TeacherRows(
        exact.positions_P,
        z,
        exact.topk_token_ids_PK,
        lse,
        np.clip(1 - mass, 0, 1)[:, None].astype(np.float32),
    )
    ids = cached.topk_token_ids_PK.astype(np.int64)
    found = Distribution.of(cached, ids)
    kl = divergence(found, Distribution.of(exact, ids))
    bound = functools.partial(json_codec.error_bound, bfloat16=True)
    assert (kl <= 2 * encoding_divergence(bound, found, found)).all()


@pytest.mark.parametrize("temperature", [0.8, 1.0, 1.02, 3.0])
def test_the_scale_that_fits_is_the_inverse_temperature(temperature):
    logits = np.random.default_rng(4).normal(size=(200, 60)) * 3
    cached, teacher = top_k(logits / temperature, 20), top_k(logits, 30)
    ids = cached.topk_token_ids_PK.astype(np.int64)
    fit = TemperatureFit.of(
        [(Distribution.of(cached, ids), Distribution.of(teacher, ids))]
    )
    assert 1 / fit.scale == pytest.approx(temperature, rel=1e-5)
    assert fit.is_proportional
    assert fit.standard_error < 1e-5


def test_positions_that_the_json_codec_fills_are_not_known():
    teacher = top_k(np.random.default_rng(5).normal(size=(4, 30)), 5)
    logits, ids = teacher.topk_logits_PK.copy(), teacher.topk_token_ids_PK.copy()
    logits[0], ids[0] = 0, np.arange(5)
    logits[1], ids[1] = -np.inf, -1
    row = CachedExample(
        Example(0, np.arange(4), np.arange(4), np.array([0, 0, 0, 1], dtype=np.float32)),
        replace(teacher, topk_logits_PK=logits, topk_token_ids_PK=ids),
    )
    assert with_targets_only(row).teacher.positions_P.tolist() == [2, 3]
