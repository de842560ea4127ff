"""Weights and a temperature that change with the step."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from nemo_kd.cache.reader import CacheReader
from nemo_kd.cli.compose import read_argument
from nemo_kd.config import ConfigError
from nemo_kd.config.loss import LossConfig
from nemo_kd.config.schedule import Schedule
from nemo_kd.config.student import TrainStudentConfig
from nemo_kd.config.typed import typed
from nemo_kd.data.batches import collate
from nemo_kd.ops.distillation import distillation_loss
from nemo_kd.student.loss import StudentLoss
from nemo_kd.student.module import StudentModule
from nemo_kd.student.steps import check_loss_schedules
from tests.tiny_cache import write

KEY = "model.knowledge_distillation.kd_loss_weight"


def test_values_equal_the_schedules_of_torch():
    """torch's schedulers multiply a rate by a factor of the step; they know no first step."""
    weight = torch.nn.Parameter(torch.zeros(()))
    for text, scheduler in (
        (
            "linear from 2.0 to 0.5 over steps 0 to 8",
            lambda sgd: torch.optim.lr_scheduler.LinearLR(sgd, 1.0, 0.25, 8),
        ),
        (
            "cosine from 2.0 to 0.5 over steps 0 to 8",
            lambda sgd: torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 8, 0.5),
        ),
    ):
        sgd = torch.optim.SGD([weight], lr=2.0)
        theirs = scheduler(sgd)
        schedule = Schedule.of(text)
        later = Schedule.of(text.replace("0 to 8", "100 to 108"))
        for step in range(9):
            assert schedule.at(step) == pytest.approx(theirs.get_last_lr()[0])
            assert later.at(100 + step) == schedule.at(step)
            sgd.step()
            theirs.step()
        assert [later.at(step) for step in (0, 99, 100)] == [2.0] * 3
        assert [later.at(step) for step in (108, 109, math.inf)] == [0.5] * 3


@pytest.mark.parametrize("value", [0.7, 1, "0.7", 1e-30])
def test_a_number_is_the_same_at_every_step(value):
    schedule = Schedule.of(value)
    assert schedule.is_constant
    assert {schedule.at(step) for step in (0, 1, 10**9, math.inf)} == {float(value)}


def test_a_schedule_is_read_from_the_command_line_and_from_yaml():
    text = "cosine from 1.0 to 0.1 over steps 0 to 1000"
    name, value = read_argument(
        f"{KEY}={text}", "train_gpt_knowledge_distillation", TrainStudentConfig
    )
    assert (name, value) == (KEY, text)
    for given, expected in ((text, text), (1, 1.0), (0.5, 0.5)):
        config = typed(LossConfig, OmegaConf.create({"kd_loss_weight": given}))
        assert config.kd_loss_weight == expected
        assert type(config.kd_loss_weight) is type(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kd_loss_weight": "cosine from 1 to 0"},
            "kd_loss_weight: 'cosine from 1 to 0' is neither a number nor a schedule: linear or "
            "cosine, for example 'cosine from 1.0 to 0.1 over steps 0 to 1000'",
        ),
        (
            {"kd_loss_weight": "linear from a to 0 over steps 0 to 9"},
            "kd_loss_weight: 'linear from a to 0 over steps 0 to 9' is neither a number nor",
        ),
        (
            {"kd_loss_weight": "linear from 1 to 0 over steps 9 to 9"},
            "ends at step 9, but starts at step 9; give a later end",
        ),
        (
            {"kd_loss_weight": "linear from 1 to -1 over steps 0 to 9"},
            "kd_loss_weight: linear from 1 to -1 over steps 0 to 9 must be at least 0",
        ),
        (
            {"sft_loss_weight": "linear from nan to 1 over steps 0 to 9"},
            "sft_loss_weight: linear from nan to 1 over steps 0 to 9 must be at least 0",
        ),
        (
            {
                "support": "renormalize",
                "temperature": "linear from 2 to 0 over steps 0 to 9",
            },
            "temperature: linear from 2 to 0 over steps 0 to 9 must be above 0",
        ),
        (
            {"kd_loss_weight": "linear from 1 to 0 over steps 0 to 9"},
            "are both 0 at the end; nothing would be trained",
        ),
        (
            {
                "kd_loss_weight": "linear from 0 to 1 over steps 5 to 9",
                "sft_loss_weight": "linear from 1 to 0 over steps 2 to 4",
            },
            "are both 0 at step 5; nothing would be trained",
        ),
        (
            {"temperature": "linear from 2 to 1 over steps 0 to 9"},
            "passes temperatures at which a cache does not hold the teacher's tail mass, which "
            "support=tail needs; use support=renormalize",
        ),
        (
            {
                "support": "label",
                "temperature": "linear from 2 to 1 over steps 0 to 9",
            },
            "which support=label needs",
        ),
        (
            {
                "support": "sampled",
                "temperature": "linear from 2 to 1 over steps 0 to 9",
            },
            "support=sampled needs temperature and scales",
        ),
        (
            {"kd_loss": "k3", "temperature": "linear from 1 to 2 over steps 0 to 9"},
            "kd_loss=k3 with support=tail needs temperature and scales",
        ),
        (
            {"label_smoothing": 0.1, "sft_loss_weight": "0"},
            "label_smoothing: 0.1 belongs to the cross-entropy",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ConfigError) as error:
        LossConfig(**settings)
    assert message in str(error.value)


def test_the_range_decides_what_a_run_needs():
    """A weight of 0 at some steps leaves the term, its checks and its metrics in place."""
    config = LossConfig(
        kd_loss_weight="linear from 1 to 0 over steps 0 to 4",
        sft_loss_weight="linear from 0 to 1 over steps 0 to 4",
        label_smoothing=0.1,
    )
    assert config.trains_on_teacher
    assert config.trains_on_labels
    for step in (0, 2, 4, math.inf):
        now = config.at(step)
        assert now.divergence == config.divergence is not None
        assert now.kd_weight + now.sft_weight == 1
        assert now.scheduled == {
            "kd_loss_weight": now.kd_weight,
            "sft_loss_weight": now.sft_weight,
        }
    loss = StudentLoss(config)
    assert "kd_loss" in loss.reported
    assert loss.now == config.at(math.inf)  # a validation before any step
    loss.set_step(1)
    assert (loss.now.kd_weight, loss.now.sft_weight) == (0.75, 0.25)


def test_a_temperature_schedule_scales_the_logits_and_its_square():
    config = LossConfig(
        support="renormalize",
        temperature="linear from 4 to 2 over steps 0 to 2",
        multiply_by_squared_temperature=True,
    )
    loss = StudentLoss(config)
    for step, temperature in ((0, 4.0), (1, 3.0), (2, 2.0)):
        loss.set_step(step)
        constant = LossConfig(
            support="renormalize",
            temperature=temperature,
            multiply_by_squared_temperature=True,
        )
        assert loss.losses == StudentLoss(constant).losses
        assert loss.now.scheduled == {"temperature": temperature}
    assert StudentLoss(constant).now.scheduled == {}


def test_renormalize_is_warned_about_where_the_cross_entropy_ends(caplog):
    StudentLoss(
        LossConfig(
            support="renormalize",
            sft_loss_weight="linear from 1 to 0 over steps 0 to 9",
        )
    )
    assert "nothing limits the student's probability" in caplog.text


def test_the_loss_of_other_trainers_takes_the_step(tmp_path):
    reader = CacheReader(str(write(tmp_path)))
    batch = collate([reader[0], reader[3]], 0)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(
        *batch.tokens_BS.shape, 50, generator=generator, dtype=torch.float64
    )
    config = LossConfig(
        kd_loss_weight="linear from 1 to 0 over steps 0 to 4",
        sft_loss_weight="cosine from 0 to 1 over steps 0 to 4",
    )
    for step in (0, 1, 4, math.inf):
        now = config.at(step)
        constant = LossConfig(
            kd_loss_weight=now.kd_weight, sft_loss_weight=now.sft_weight
        )
        assert torch.equal(
            distillation_loss(logits, batch, config, step=step),
            distillation_loss(logits, batch, constant),
        )
    assert torch.equal(
        distillation_loss(logits, batch, config),
        distillation_loss(logits, batch, config, step=math.inf),
    )


def test_a_run_that_is_shorter_than_a_schedule(caplog):
    """Validation measures the loss at the end of the training, which is told."""
    config = LossConfig(
        kd_loss_weight="linear from 1 to 0 over steps 0 to 1000", sft_loss_weight=1
    )
    check_loss_schedules(config, 1000)
    assert not caplog.text
    check_loss_schedules(config, 500)
    (message,) = caplog.messages
    assert "kd_loss_weight: the schedule ends at step 1000" in message
    assert "but the run after 500, with 0.5 instead of 0;" in message

    student = SimpleNamespace(
        loss=StudentLoss(config),
        plan=SimpleNamespace(max_steps=500),
        groups=SimpleNamespace(device=torch.device("cpu")),
    )
    StudentModule.on_validation_epoch_start(student)
    assert student.loss.now.kd_weight == 0.5
