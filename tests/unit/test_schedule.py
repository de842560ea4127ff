"""The learning rate at every step against NeMo's own schedulers and written-out tables."""

from __future__ import annotations

import logging

import pytest
import torch
from nemo.core.optim import lr_scheduler as nemo

from nemo_kd.config import ConfigError
from nemo_kd.config.optim import OptimConfig, SchedConfig
from nemo_kd.student.steps import check_schedule, learning_rate

LR = 1e-3


def rates(sched: SchedConfig, max_steps: int, lr: float = LR) -> list[float]:
    optim = OptimConfig(lr=lr, sched=sched)
    return [learning_rate(step, optim, max_steps) for step in range(max_steps)]


@pytest.mark.parametrize(
    ("name", "settings", "max_steps"),
    [
        ("CosineAnnealing", {"warmup_steps": 0, "constant_steps": 0}, 20),
        ("CosineAnnealing", {"warmup_steps": 5, "min_lr": 1e-4}, 30),
        (
            "CosineAnnealing",
            {"warmup_steps": 3, "constant_steps": 7, "min_lr": 9e-5},
            40,
        ),
        (
            "CosineAnnealing",
            {"warmup_ratio": 0.13, "constant_ratio": 0.26, "min_lr": 9e-5},
            50,
        ),
        ("CosineAnnealing", {"warmup_steps": 10}, 10),
        ("CosineAnnealing", {"warmup_steps": 4, "constant_steps": 6}, 10),
        ("WarmupAnnealing", {"warmup_steps": 6, "min_lr": 2e-4}, 30),
        ("WarmupAnnealing", {"warmup_ratio": 0.2}, 30),
        ("WarmupAnnealing", {"warmup_steps": 0}, 12),
        ("InverseSquareRootAnnealing", {"warmup_steps": 5}, 40),
        ("InverseSquareRootAnnealing", {"warmup_steps": 0}, 12),
        ("WarmupPolicy", {"warmup_steps": 5, "min_lr": 1e-4}, 12),
    ],
)
def test_every_step_is_nemos(name, settings, max_steps):
    settings = {"min_lr": 0.0, **settings}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    reference = getattr(nemo, name)(optimizer, max_steps=max_steps, **settings)
    for step, ours in enumerate(rates(SchedConfig(name=name, **settings), max_steps)):
        assert ours == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-6, abs=1e-12
        ), step
        optimizer.step()
        reference.step()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"name": "linear", "warmup_steps": 3, "min_lr": 0.2},
            [0.25, 0.5, 0.75, 1.0, 0.8857, 0.7714, 0.6571, 0.5429, 0.4286, 0.3143],
        ),
        (
            {"name": "linear", "warmup_steps": 2, "constant_steps": 4, "min_lr": 0.2},
            [0.0, 0.5, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2, 0.2],
        ),
        (
            {
                "name": "CosineAnnealing",
                "warmup_ratio": 0.2,
                "constant_ratio": 0.4,
                "min_lr": 0.2,
            },
            [0.0, 0.5, 1.0, 0.8828, 0.6, 0.3172, 0.2, 0.2, 0.2, 0.2],
        ),
        (
            {"name": "inverse_square_root", "warmup_steps": 2, "min_lr": 0.6},
            [0.3333, 0.6667, 1.0, 0.866, 0.7746, 0.7071, 0.6547, 0.6124, 0.6, 0.6],
        ),
        ({"name": "constant", "warmup_ratio": 0.35}, [0.25, 0.5, 0.75] + [1.0] * 7),
        ({"name": "constant", "warmup_steps": 0}, [1.0] * 10),
        ({"name": "constant"}, [step / 11 for step in range(1, 11)]),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_table(settings, expected):
    assert rates(SchedConfig(**settings), 10, lr=1.0) == pytest.approx(
        expected, abs=1e-4
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "cosine"},
            "model.optim.sched.name: 'cosine' is not one of CosineAnnealing, WarmupAnnealing",
        ),
        (
            {"warmup_steps": 3, "warmup_ratio": 0.1},
            "warmup_steps: give it or warmup_ratio, not both",
        ),
        (
            {"constant_steps": 3, "constant_ratio": 0.1},
            "constant_steps: give it or constant_ratio, not both",
        ),
        (
            {"warmup_steps": -1},
            "model.optim.sched.warmup_steps: -1 must be at least 0",
        ),
        (
            {"constant_ratio": 1.5},
            "model.optim.sched.constant_ratio: 1.5 must be at least 0 and at most 1",
        ),
        (
            {"name": "constant", "constant_steps": 5},
            "leave them out with name=constant",
        ),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        SchedConfig(**settings)


def test_constant_steps_without_room_are_left_out_with_a_warning(caplog):
    for sched, max_steps, message in (
        (SchedConfig(warmup_steps=10, constant_steps=1000), 900, "900 steps of the run are too few for 10 steps of warmup and 1000 at min_lr"),
        (SchedConfig(warmup_ratio=0.6, constant_ratio=0.5), 100, "60 steps of warmup and 50 at min_lr"),
    ):  # fmt: skip
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            check_schedule(OptimConfig(sched=sched), max_steps)
        assert message in caplog.text
        assert sched.phases(max_steps) == (
            sched.phases(max_steps)[0],
            max_steps - sched.phases(max_steps)[0],
            0,
        )
        assert rates(sched, max_steps)[max_steps // 2 + 20] > 0.1 * LR


def test_a_long_warmup_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        check_schedule(OptimConfig(lr=1.0, sched=SchedConfig(warmup_steps=10)), 11)
        assert not caplog.text
        check_schedule(OptimConfig(lr=1.0, sched=SchedConfig(warmup_steps=10)), 5)
    assert (
        "5 steps of the run are too few for 10 steps of warmup and 0 at min_lr"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "sgd"},
            "model.optim.name: 'sgd' is not one of distributed_fused_adam, adamw, adam",
        ),
        ({"lr": -1.0}, "model.optim.lr: -1.0 must be at least 0"),
        ({"lr": float("nan")}, "model.optim.lr: nan must be at least 0"),
        ({"weight_decay": -0.1}, "model.optim.weight_decay: -0.1 must be at least 0"),
        ({"eps": 0.0}, "model.optim.eps: 0.0 must be above 0"),
        (
            {"lr": 1e-5, "sched": SchedConfig(min_lr=1e-4)},
            "min_lr: 0.0001 must be at most model.optim.lr",
        ),
    ],
)
def test_impossible_optimizers_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        OptimConfig(**settings)
