"""Divergences between rows against dense float64 distributions, and the most that rounding adds to them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nemo_kd.batch import CachedExample, Example, TeacherRows
from nemo_kd.cache.packed_codec import pack, unpack
from nemo_kd.tools.faithfulness import (
    LEAST_LABEL_NATS,
    Rounding,
    divergence,
    fit_scale,
    rounding_divergence,
    rounding_of_labels,
    said_about,
    targets_of,
)

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
    found = divergence(said_about(ids, cached, temperature), said_about(ids, teacher, temperature))
    np.testing.assert_allclose(
        found, dense_kl(p_logits, q_logits, ids, temperature), rtol=1e-3, atol=1e-6
    )


def test_ids_that_the_teacher_does_not_keep_count_as_its_least_likely_ones():
    random = np.random.default_rng(1)
    p_logits, q_logits = random.normal(size=(2, 30, 60)) * 2
    cached, teacher = top_k(p_logits, 12), top_k(q_logits, 14)
    ids = cached.topk_token_ids_PK.astype(np.int64)
    said = said_about(ids, teacher)
    exact = np.take_along_axis(log_softmax(q_logits), ids, 1)
    assert (~said.known_PK).any()
    np.testing.assert_allclose(said.logprobs_PK[said.known_PK], exact[said.known_PK], atol=1e-5)
    smallest = np.take_along_axis(
        log_softmax(q_logits), teacher.topk_token_ids_PK[:, -1:].astype(int), 1
    )
    assert (said.logprobs_PK <= np.where(said.known_PK, np.inf, smallest + 1e-5)).all()
    np.testing.assert_allclose(np.exp(said.logprobs_PK).sum(axis=1) + said.tail_P, 1, atol=1e-5)


@pytest.mark.parametrize("spread", [0.5, 2.0, 5.0, 12.0])
def test_the_packed_codec_stays_below_its_bound(spread):
    random = np.random.default_rng(2)
    logits = random.normal(size=(400, 300)) * spread
    labels = random.integers(300, size=400)
    exact = top_k(logits, 40, labels)
    example = Example(0, labels, labels, np.ones(400, dtype=np.float32))
    cached = unpack(pack(CachedExample(example, exact)), example)
    ids = cached.topk_token_ids_PK.astype(np.int64)
    rounding = Rounding(packed=True, bfloat16=False)
    at_one = said_about(ids, cached)
    for temperature in TEMPERATURES:
        said = said_about(ids, cached, temperature)
        kl = divergence(said, said_about(ids, exact, temperature))
        bound = rounding_divergence(rounding, at_one, said, temperature)
        assert (kl <= 1.2 * bound).all()
    assert kl.max() > 0
    off = np.abs(cached.label_logprobs_P - np.maximum(exact.label_logprobs_P, LEAST_LABEL_NATS))
    assert (off <= rounding_of_labels(rounding, cached.label_logprobs_P)).all()


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
    said = said_about(ids, cached)
    kl = divergence(said, said_about(ids, exact))
    assert (kl <= 2 * rounding_divergence(Rounding(packed=False, bfloat16=True), said, said)).all()


@pytest.mark.parametrize("temperature", [0.8, 1.0, 1.02, 3.0])
def test_the_scale_that_fits_is_the_inverse_temperature(temperature):
    logits = np.random.default_rng(4).normal(size=(200, 60)) * 3
    cached, teacher = top_k(logits / temperature, 20), top_k(logits, 30)
    ids = cached.topk_token_ids_PK.astype(np.int64)
    fit = fit_scale(
        said_about(ids, cached), said_about(ids, teacher), Rounding(packed=False, bfloat16=False)
    )
    assert 1 / fit.scale == pytest.approx(temperature, rel=1e-5)
    assert np.median(fit.residuals_P) < 1e-10
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
    assert targets_of(row).positions_P.tolist() == [2, 3]
