"""The learning-rate schedule against NeMo's own CosineAnnealing."""

from __future__ import annotations

import pytest
import torch
from nemo.core.optim.lr_scheduler import CosineAnnealing

from nemo_kd.config.student import SchedConfig
from nemo_kd.mcore.optimizer import learning_rate_factor


@pytest.mark.parametrize(
    ("warmup", "constant", "max_steps", "min_lr"),
    [(0, 0, 20, 0.0), (5, 0, 30, 1e-4), (3, 7, 40, 9e-5), (10, 0, 10, 0.0)],
)
def test_cosine_annealing_is_nemos(warmup, constant, max_steps, min_lr):
    lr = 1e-3
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    reference = CosineAnnealing(
        optimizer, max_steps=max_steps, warmup_steps=warmup, constant_steps=constant, min_lr=min_lr
    )
    sched = SchedConfig(warmup_steps=warmup, constant_steps=constant, min_lr=min_lr)
    for step in range(max_steps):
        ours = lr * learning_rate_factor(step, sched, lr, max_steps)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6, abs=1e-12), step
        optimizer.step()
        reference.step()


def test_warmup_ratio_and_constant():
    sched = SchedConfig(name="constant", warmup_ratio=0.1)
    factors = [learning_rate_factor(step, sched, 1.0, 100) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[10:] == [1.0] * 90
