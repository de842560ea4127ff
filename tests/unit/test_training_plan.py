"""How long a run is, and when it validates and saves."""

from __future__ import annotations

import pytest

from nemo_kd.config import ConfigError
from nemo_kd.config.student import LoopConfig
from nemo_kd.student.steps import TrainingPlan, plan_training


@pytest.mark.parametrize(
    ("loop", "plan"),
    [
        ({"val_check_interval": 10}, TrainingPlan(10, 10, 10, 10)),
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


@pytest.mark.parametrize("key", ["val_check_interval", "save_interval"])
def test_an_interval_has_a_step(key):
    with pytest.raises(ConfigError, match=f"{key}: 0 must be above 0"):
        LoopConfig(**{key: 0})
