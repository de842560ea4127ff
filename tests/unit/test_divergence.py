"""Divergences between rows against dense float64 distributions, and the most that rounding adds to them."""

from __future__ import annotations

import numpy as np
import pytest

from nemo_kd.batch import CachedExample, Example, TeacherRows
from nemo_kd.cache.packed_codec import pack, unpack
from nemo_kd.tools.rescore import divergence, log_probs

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
    p, q = (
        np.exp(log_softmax(logits / temperature)) for logits in (p_logits, q_logits)
    )
    p_ids, q_ids = np.take_along_axis(p, ids, 1), np.take_along_axis(q, ids, 1)
    p_tail, q_tail = 1 - p_ids.sum(axis=1), 1 - q_ids.sum(axis=1)
    return (p_ids * np.log(p_ids / q_ids)).sum(axis=1) + p_tail * np.log(
        p_tail / q_tail
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_divergence_is_that_of_the_dense_distributions(temperature):
    random = np.random.default_rng(0)
    p_logits = random.normal(size=(40, 60)) * 2
    q_logits = p_logits + random.normal(size=(40, 60)) * 0.3
    cached, teacher = top_k(p_logits, 12), top_k(q_logits, 60)
    ids = cached.topk_token_ids_PK.astype(np.int64)
    found = divergence(cached, teacher, temperature)
    np.testing.assert_allclose(
        found, dense_kl(p_logits, q_logits, ids, temperature), rtol=1e-3, atol=1e-6
    )


def test_ids_that_the_teacher_does_not_keep_count_as_its_least_likely_ones():
    random = np.random.default_rng(1)
    p_logits, q_logits = random.normal(size=(2, 30, 60)) * 2
    cached, teacher = top_k(p_logits, 12), top_k(q_logits, 14)
    ids = cached.topk_token_ids_PK.astype(np.int64)
    found = log_probs(teacher, ids, 1.0)
    exact = np.take_along_axis(log_softmax(q_logits), ids, 1)
    is_kept = (ids[:, :, None] == teacher.topk_token_ids_PK[:, None]).any(axis=2)
    assert not is_kept.all()
    np.testing.assert_allclose(found[:, :-1][is_kept], exact[is_kept], atol=1e-5)
    smallest = np.take_along_axis(
        log_softmax(q_logits), teacher.topk_token_ids_PK[:, -1:].astype(int), 1
    )
    assert (found[:, :-1] <= np.where(is_kept, np.inf, smallest + 1e-5)).all()
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("spread", [0.5, 2.0, 5.0, 12.0])
def test_the_packed_codec_adds_little_at_every_temperature(spread):
    random = np.random.default_rng(2)
    logits = random.normal(size=(400, 300)) * spread
    labels = random.integers(300, size=400)
    exact = top_k(logits, 40, labels)
    example = Example(0, labels, labels, np.ones(400, dtype=np.float32))
    cached = unpack(pack(CachedExample(example, exact)), example)
    for temperature in TEMPERATURES:
        kl = divergence(cached, exact, temperature)
        assert 0 < kl.mean() < 1e-3
        assert kl.max() < 1e-2
