"""How long a run is, when it validates and saves, and what it warns about before the first step."""

from __future__ import annotations

import logging

import pytest

from nemo_kd.config import ConfigError
from nemo_kd.config.student import LoopConfig
from nemo_kd.student.schedule import TrainingPlan, plan_training


@pytest.mark.parametrize(
    ("loop", "plan"),
    [
        ({}, TrainingPlan(10, 10, 100, 100)),
        ({"max_epochs": 3, "val_check_interval": 0.5}, TrainingPlan(10, 30, 5, 5)),
        (
            {"max_epochs": 3, "val_check_interval": 5, "save_interval": 2},
            TrainingPlan(10, 30, 5, 2),
        ),
        ({"val_check_interval": 4, "save_interval": 0.3}, TrainingPlan(10, 10, 4, 3)),
        (
            {"max_epochs": 2, "limit_train_batches": 7, "val_check_interval": 1.0},
            TrainingPlan(7, 14, 7, 7),
        ),
    ],
)
def test_steps(loop, plan):
    assert plan_training(LoopConfig(**loop), 84, 8) == plan


@pytest.mark.parametrize(
    ("loop", "warnings"),
    [
        ({"val_check_interval": 5}, []),
        ({"val_check_interval": 5, "save_interval": 10}, []),
        (
            {"val_check_interval": 50, "save_interval": 5},
            [
                "val_check_interval: 50, but the run has 10 steps: it validates once, after the last"
            ],
        ),
        (
            {"val_check_interval": 5, "save_interval": 11},
            [
                "save_interval: 11, but the run has 10 steps: a run that is killed starts over"
            ],
        ),
        (
            {"val_check_interval": 5, "limit_val_batches": 0},
            ["limit_val_batches: 0, so nothing is validated"],
        ),
        (
            {"val_check_interval": 5, "max_steps": 11},
            ["max_steps: 11, but the run has 10 steps: max_epochs gives no more"],
        ),
        (
            {"val_check_interval": 5, "log_every_n_steps": 20},
            ["log_every_n_steps: 20, but the run has 10 steps: none"],
        ),
    ],
)
def test_settings_that_hardly_do_what_was_meant(caplog, monkeypatch, loop, warnings):
    monkeypatch.setattr(logging.getLogger("nemo_kd"), "propagate", True)
    with caplog.at_level(logging.WARNING, "nemo_kd"):
        plan_training(LoopConfig(**loop), 84, 8)
    assert len(caplog.messages) == len(warnings)
    for message, warning in zip(caplog.messages, warnings, strict=True):
        assert message.startswith(f"trainer.knowledge_distillation.{warning}")


@pytest.mark.parametrize("key", ["val_check_interval", "save_interval"])
def test_an_interval_has_a_step(key):
    with pytest.raises(
        ConfigError,
        match=r"val_check_interval: .* and save_interval: .* must give at least 1 step",
    ):
        plan_training(LoopConfig(**{key: 0}), 84, 8)
