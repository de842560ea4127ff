"""How long a run is, and when it validates and saves."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_kd.config import ConfigError
from nemo_kd.config.student import LoopConfig
from nemo_kd.student.steps import TrainingPlan, check_intervals, plan_training
from tests.tiny_data import student_config


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


EVAL = {
    "eval__data": "q.jsonl",
    "eval__answer_field": "answer",
    "exp_manager__checkpoint_callback_params__monitor": "eval/accuracy",
}
STOPPING = {
    "exp_manager__create_early_stopping_callback": True,
    "exp_manager__early_stopping_callback_params__monitor": "eval/accuracy",
    "exp_manager__checkpoint_callback_params__monitor": "val_loss",
}


@pytest.mark.parametrize(
    ("interval", "plan", "overrides", "message"),
    [
        (5, TrainingPlan(30, 30, 4, 3), {}, ""),  # they meet at step 15
        (5, TrainingPlan(30, 30, 4, 30), {}, ""),  # the only checkpoint is the last
        (50, TrainingPlan(30, 30, 4, 60), {}, ""),
        (
            7,
            TrainingPlan(30, 30, 4, 5),
            {},
            r"params.monitor: eval/accuracy is measured every 7 steps \(eval.interval\) and checkpoints "
            "are written every 5, which meet first at step 35 of 30; set trainer.*save_interval to a",
        ),
        (4, TrainingPlan(30, 30, 4, 5), STOPPING, ""),
        (
            8,
            TrainingPlan(30, 30, 4, 5),
            STOPPING,
            "early_stopping_callback_params.monitor: .* validations look at it every 4; set",
        ),
    ],
)
def test_answers_are_measured_where_they_decide(interval, plan, overrides, message):
    overrides = {"eval__interval": interval, **EVAL, **overrides}
    config = student_config(*[Path("p")] * 4, **overrides)
    if not message:
        check_intervals(config, plan)
        return
    with pytest.raises(ConfigError, match=message):
        check_intervals(config, plan)
