"""Steps of stage 2 that cannot be taken, and checkpoints that cannot be written."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from nemo_kd.config import ConfigError, UserInputError
from nemo_kd.mcore.checkpoint_write import CheckpointWrite
from nemo_kd.student.checkpoint_folder import Contents, checkpoints
from nemo_kd.student.job import train_student
from nemo_kd.student.module import StudentModule
from nemo_kd.student.steps import MAX_SKIPPED_IN_A_ROW, NonFiniteError, NonFiniteSteps
from tests.forked_runs import metrics, training_rows
from tests.tiny_data import student_config, write_chat_dataset
from tests.tiny_models import save_hf_model

SETTINGS = {
    "trainer__devices": 2,
    "model__data__data_impl": "dataset",
    "model__data__shuffle": False,  # example 5 has no answer: step 2 has 9 to 16, its second rank 13 to 16
    "model__knowledge_distillation__kd_loss_weight": 0.0,
    "model__knowledge_distillation__sft_loss_weight": 1.0,
    "trainer__knowledge_distillation__val_check_interval": 4,
    "exp_manager__create_tensorboard_logger": False,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    student = save_hf_model("llama2", folder / "student", 300, num_hidden_layers=1)
    train = write_chat_dataset(folder / "train.jsonl", 41, 5)
    return student, train, write_chat_dataset(folder / "validation.jsonl", 9, 60)


class Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def run(
    arguments, overrides, token_losses=None
) -> tuple[str, list[str], list[bool], list[float]]:
    """(error, messages, whether each step changed weights or optimizer, learning rates of the steps)."""
    said, changed, rates = Said(), [], []
    logger = logging.getLogger("nemo_kd")
    originals = StudentModule.token_losses, StudentModule.training_step

    def state(module: StudentModule) -> list[torch.Tensor]:
        inner = module.optimizers().optimizer.megatron
        optimizers = [
            part.optimizer for part in getattr(inner, "chained_optimizers", [inner])
        ]
        moments = [
            one
            for part in optimizers
            for states in part.state.values()
            for one in states.values()
        ]
        return [one.detach().clone() for one in (*module.gpt.parameters(), *moments)]

    def training_step(self, batch, batch_idx):
        before = state(self)
        rates.append(self.optimizers().param_groups[0]["lr"])
        originals[1](self, batch, batch_idx)
        changed.append(not all(map(torch.equal, before, state(self))))

    if token_losses is not None:
        StudentModule.token_losses = lambda self, hidden, batch: token_losses(
            originals[0], self, hidden, batch
        )
    StudentModule.training_step = training_step
    logger.addHandler(said)
    logger.setLevel(logging.INFO)
    try:
        train_student(student_config(*arguments, **overrides))
    except (UserInputError, OSError) as error:
        return f"{type(error).__name__}: {error}", said.messages, changed, rates
    finally:
        logger.removeHandler(said)
        StudentModule.token_losses, StudentModule.training_step = originals
    return "", said.messages, changed, rates


def infinite_loss(original, module, hidden_SBH, batch):
    return original(
        module, hidden_SBH * (torch.inf if 13 in batch.indices_B else 1), batch
    )


def infinite_gradient(original, module, hidden_SBH, batch):
    if 13 in batch.indices_B and hidden_SBH.requires_grad:
        hidden_SBH.register_hook(lambda gradient: gradient * torch.inf)
    return original(module, hidden_SBH, batch)


@pytest.mark.parametrize(
    ("token_losses", "optimizer", "found"),
    [
        (
            infinite_loss,
            "distributed_fused_adam",
            "step 2: the loss of examples 13, 14 is not finite",
        ),
        (
            infinite_gradient,
            "adam",
            "step 2: the gradient of examples 9, 10, 11, 12, 13, 14, 15, 16 is not finite",
        ),
    ],
)
def test_a_step_that_is_not_finite(
    ranks, world, tmp_path, token_losses, optimizer, found
):
    """On one of two ranks; neither of them changes anything."""
    overrides = {
        **SETTINGS,
        "model__optim__name": optimizer,
        "model__optim__sched__warmup_steps": 3,
    }
    skip = {**overrides, "trainer__knowledge_distillation__non_finite": "skip"}
    for error, messages, changed, rates in ranks(2).run(
        run, (*world, tmp_path / "skip"), skip, token_losses
    ):
        assert error == ""
        assert changed == [True, False, True, True, True]
        assert (
            rates[2] > rates[1]
        )  # the schedule goes on, so that it ends where the run does
        assert [message for message in messages if "not finite" in message] == [
            f"{found}; no weight was changed, the step is skipped (1 so far)"
        ]
    rows = training_rows(tmp_path / "skip")
    assert [rows[step]["train/skipped_steps"] for step in rows] == [0, 1, 1, 1, 1]
    assert [rows[step]["consumed_samples"] for step in rows] == [8, 16, 24, 32, 40]
    assert rows[5]["train/loss"] < rows[1]["train/loss"]

    for error, _, changed, _ in ranks(2).run(
        run, (*world, tmp_path / "stop"), overrides, token_losses
    ):
        assert error.startswith(
            f"NonFiniteError: {found}; no weight was changed (1 in a row). Look at these"
        )
        assert "trainer.knowledge_distillation.non_finite=skip" in error
        assert changed == [True]


def test_the_count_of_skipped_steps_is_resumed_and_another_order_refused(
    ranks, world, tmp_path
):
    overrides = {**SETTINGS, "trainer__knowledge_distillation__non_finite": "skip"}
    first = {**overrides, "trainer__knowledge_distillation__max_steps": 4}
    ranks(2).run(run, (*world, tmp_path / "run"), first, infinite_loss)
    assert (
        ranks(2).run(run, (*world, tmp_path / "run"), overrides, infinite_loss)[0][0]
        == ""
    )
    assert training_rows(tmp_path / "run")[5]["train/skipped_steps"] == 1
    for key, before, now in (
        ("model.seed", 1234, 5),
        ("model.global_batch_size", 8, 4),
    ):
        changed = {**overrides, key.replace(".", "__"): now}
        error = ranks(2).run(run, (*world, tmp_path / "run"), changed)[1][0]
        assert "belongs to another experiment:\n" in error
        assert f"\n  {key}: {before} in the checkpoint, {now} now\n" in error


def test_too_many_in_a_row():
    steps = NonFiniteSteps("skip")
    for step in range(1, MAX_SKIPPED_IN_A_ROW):
        steps.left_out(step, [(False, [3])])
    steps.in_a_row = 0
    for step in range(1, MAX_SKIPPED_IN_A_ROW):
        steps.left_out(step, [(False, [3])])
    assert steps.skipped == 2 * MAX_SKIPPED_IN_A_ROW - 2
    with pytest.raises(NonFiniteError, match=rf"\({MAX_SKIPPED_IN_A_ROW} in a row\)"):
        steps.left_out(99, [(True, list(range(50)))])


def test_what_to_do_then_is_one_of_two():
    with pytest.raises(
        ConfigError,
        match=r"trainer.knowledge_distillation.non_finite: 'ignore' is not one of stop",
    ):
        student_config(
            *map(Path, "mtvl"), trainer__knowledge_distillation__non_finite="ignore"
        )


def run_with_full_disk(*arguments) -> str:
    """From step 4 on, rank 1 cannot write."""
    original = CheckpointWrite._write

    def write(self):
        if "step=4-" in self.folder.name and torch.distributed.get_rank() == 1:
            self._writer.path = Path("/proc/no")
        return original(self)

    CheckpointWrite._write = write
    try:
        return run(*arguments)[0]
    finally:
        CheckpointWrite._write = original


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_leaves_the_one_before(
    ranks, world, tmp_path
):
    overrides = {**SETTINGS, "trainer__knowledge_distillation__save_interval": 2}
    arguments = (*world, tmp_path / "run")
    errors = ranks(2).run(run_with_full_disk, arguments, overrides)
    assert all(
        "cannot be written (No such file or directory)" in each for each in errors
    )
    assert [
        Contents.read(path).step
        for path in checkpoints(tmp_path / "run" / "checkpoints")
    ] == [2]
    assert ranks(2).run(run, arguments, overrides)[0][0] == ""
    steps = [row["step"] for row in metrics(tmp_path / "run") if "train/loss" in row]
    assert steps[:4] == [1, 2, 3, 4]
    assert steps[-3:] == [3, 4, 5]
