"""Stage 2 under what happens to a job: killed, told to stop, out of time, hanging; it always ends as if nothing had."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from nemo_kd.config.exp_manager import ExpManagerConfig
from nemo_kd.mcore import checkpoint_write
from nemo_kd.run.interruption import REQUEUE
from nemo_kd.student.checkpoint_folder import (
    CheckpointError,
    Contents,
    check_whole,
    checkpoints,
    choose_checkpoint,
)
from nemo_kd.student.module import StudentModule
from tests.forked_runs import StudentRun, metrics, training_rows, validation_rows
from tests.tiny_data import write_chat_dataset
from tests.tiny_models import save_hf_model

HERE = __name__
STEPS = 12
SETTINGS = {
    "model__data__data_impl": "dataset",
    "model__knowledge_distillation__kd_loss_weight": 0.0,
    "model__knowledge_distillation__sft_loss_weight": 1.0,
    "trainer__knowledge_distillation__max_epochs": 3,  # 39 examples, so four batches of 8 an epoch
    "trainer__knowledge_distillation__val_check_interval": 5,
    "trainer__knowledge_distillation__save_interval": 2,
    "exp_manager__create_tensorboard_logger": False,
    "exp_manager__checkpoint_callback_params__save_top_k": 2,
}


def with_dropout() -> None:
    """The loss depends on the state of the random generator."""
    original = StudentModule.token_losses

    def token_losses(self, hidden_SBH, batch):
        return original(
            self,
            torch.nn.functional.dropout(hidden_SBH, 0.1, self.gpt.training),
            batch,
        )

    StudentModule.token_losses = token_losses


def with_slow_steps() -> None:
    with_dropout()
    original = StudentModule.training_step

    def training_step(self, batch, batch_idx):
        time.sleep(0.05)
        original(self, batch, batch_idx)

    StudentModule.training_step = training_step


def with_slow_writers() -> None:
    with_slow_steps()
    original = checkpoint_write.file_sum

    def file_sum(path):
        time.sleep(0.3)
        return original(path)

    checkpoint_write.file_sum = file_sum


def with_slow_validation() -> None:
    with_dropout()
    original = StudentModule.validation_step

    def validation_step(self, batch, batch_idx):
        (Path(self.config.exp_manager.explicit_log_dir) / "validating").touch()
        time.sleep(1)
        original(self, batch, batch_idx)

    StudentModule.validation_step = validation_step


def with_slow_archive() -> None:
    original = StudentModule.save_to

    def save_to(self, save_path):
        (Path(self.config.exp_manager.explicit_log_dir) / "writing").touch()
        time.sleep(5)
        original(self, save_path)

    StudentModule.save_to = save_to


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    student = save_hf_model("llama2", folder / "student", 300, num_hidden_layers=1)
    train = write_chat_dataset(folder / "train.jsonl", 40)
    return student, train, write_chat_dataset(folder / "validation.jsonl", 19, 60)


def start(
    world, log_dir: Path, change: str, world_size: int = 2, **overrides
) -> StudentRun:
    return StudentRun(
        log_dir, world_size, f"{HERE}:{change}", *world, **{**SETTINGS, **overrides}
    )


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory) -> Path:
    log_dir = tmp_path_factory.mktemp("straight") / "run"
    run = start(world, log_dir, "with_dropout")
    assert run.end() == [0, 0], run.said()
    (log_dir / "messages").write_text(run.said())
    return log_dir


def last(log_dir: Path) -> Path:
    (folder,) = (log_dir / "checkpoints").glob("*-last")
    return folder


def check_equal(log_dir: Path, straight: Path, same_names: bool = True) -> None:
    """Every loss of every step, and all weights, optimizer and random states at the end, to the last bit."""
    assert training_rows(log_dir) == training_rows(straight)
    assert validation_rows(log_dir) == validation_rows(straight)
    contents = [Contents.read(last(folder)) for folder in (log_dir, straight)]
    assert contents[0].step == STEPS
    tensors = [
        {name: sums for name, sums in one.files.items() if name.endswith("distcp")}
        for one in contents
    ]
    assert len(tensors[0]) >= 2
    assert tensors[0] == tensors[1]
    names = [
        sorted(path.name for path in checkpoints(folder / "checkpoints"))
        for folder in (log_dir, straight)
    ]
    assert names[0] == names[1] or not same_names
    assert (
        log_dir / "checkpoints" / "megatron_gpt_knowledge_distillation.nemo"
    ).exists()
    assert not list((log_dir / "checkpoints").glob(".*"))


def test_what_a_run_leaves(straight):
    assert list(training_rows(straight)) == list(range(1, STEPS + 1))
    assert list(validation_rows(straight)) == [5, 10, STEPS]
    by_step = {}
    for folder in checkpoints(straight / "checkpoints"):
        assert check_whole(folder)
        by_step.setdefault(Contents.read(folder).step, []).append(folder.name)
    # Of 10 and 12, which follow a validation, the ranked ones; the one before the last is unranked or the twin of one.
    assert set(by_step) == {10, 12}
    common = torch.load(last(straight) / "common.pt", weights_only=True)
    plain = {"loops", "callbacks", "lr_schedulers", "schedule", "ranks", "StudentData"}
    plain |= {
        "non_finite",
        "adapters",
        "hyper_parameters",
        "hparams_name",
        "global_step",
    }
    plain |= {"epoch", "pytorch-lightning_version"}
    assert common.keys() - {"content_metadata", "optimizer_states"} == plain
    summary = dict(
        re.findall(
            r"^(\w+(?: \w+)?)  +(.*)$",
            (straight / "messages").read_text(),
            re.MULTILINE,
        )
    )
    rows, validated = training_rows(straight), validation_rows(straight)
    assert summary["trained"] == "12 of 12 steps"
    assert summary["last train"].startswith(
        f"loss {rows[STEPS]['train/loss']:.4f}, sft_loss "
    )
    assert summary["last validation"].startswith(
        f"loss {validated[STEPS]['val_loss']:.4f}"
    )
    step = min(validated, key=lambda step: validated[step]["val_loss"])
    assert (
        f"val_loss={validated[step]['val_loss']:.4f}-step={step}-"
        in summary["best val_loss"]
    )
    archive = straight / "checkpoints" / "megatron_gpt_knowledge_distillation.nemo"
    assert summary["weights"] == str(archive)
    assert summary["metrics"] == str(straight / "metrics" / "metrics.jsonl")
    assert (
        f"next             convert_checkpoint input_path={archive}"
        in (straight / "messages").read_text()
    )
    assert [name.endswith("-last") for name in by_step[12]].count(True) == 1
    assert any(name.endswith("-previous") for name in by_step[10])
    assert all(
        "val_loss=0.0000" not in name for names in by_step.values() for name in names
    )


def test_killed_at_any_step_it_ends_as_a_straight_run(world, straight, tmp_path):
    """At a step in the first epoch, while a checkpoint is written, and at a step after that."""
    log_dir, numbers = tmp_path / "run", random.Random(torch.seed())
    folder, first, second = (
        log_dir / "checkpoints",
        numbers.randint(1, 4),
        numbers.randint(6, STEPS - 1),
    )
    run = start(world, log_dir, "with_slow_steps")
    run.wait_for_step(first)
    run.kill()

    run = start(world, log_dir, "with_slow_writers")
    run.wait_until(lambda: list(folder.glob(".*-step=6-*.unfinished/*.distcp")))
    run.kill()
    (unfinished,) = folder.glob(".*-step=6-*")
    assert not list(folder.glob("[!.]*-step=6-*"))
    before = last(log_dir)

    run = start(world, log_dir, "with_slow_steps")
    run.wait_for_step(second)
    run.kill()
    assert (
        f"removing {unfinished}, which a run that was killed did not finish"
        in run.said()
    )
    assert f"resuming from {before}\n" in run.said()

    run = start(world, log_dir, "with_dropout")
    assert run.end() == [0, 0], (first, second, run.said())
    check_equal(log_dir, straight)


def test_told_to_stop_all_ranks_stop_together_and_the_command_goes_on(
    world, straight, tmp_path
):
    log_dir = tmp_path / "run"
    run = start(world, log_dir, "with_slow_steps")
    run.wait_for_step(2)
    run.send(1, signal.SIGUSR1)
    assert run.end() == [REQUEUE, REQUEUE], run.said()
    assert "rank 1 on " in run.said()
    assert "received SIGUSR1; the same command continues" in run.said()
    stopped_at = Contents.read(last(log_dir)).step
    assert stopped_at == max(training_rows(log_dir))

    run = start(world, log_dir, "with_slow_validation")
    run.wait_until((log_dir / "validating").exists)
    run.send(0, signal.SIGTERM)
    assert run.end() == [REQUEUE, REQUEUE], run.said()
    assert Contents.read(last(log_dir)).step == max(training_rows(log_dir)) == 5
    assert not validation_rows(log_dir)

    run = start(
        world, log_dir, "with_slow_steps", exp_manager__max_time_per_run="00:00:00:01"
    )
    assert run.end() == [REQUEUE, REQUEUE], run.said()
    assert "max_time_per_run=00:00:00:01 is over" in run.said()

    run = start(
        world, log_dir, "with_slow_validation"
    )  # stopped in the validation after the end
    run.wait_for_step(STEPS)
    run.send(1, signal.SIGTERM)
    assert run.end() == [REQUEUE, REQUEUE], run.said()
    assert STEPS not in validation_rows(log_dir)
    run = start(world, log_dir, "with_dropout")
    assert run.end() == [0, 0], run.said()
    check_equal(
        log_dir, straight, same_names=False
    )  # the one before the last is of step 12 too


@pytest.mark.parametrize(
    ("change", "sign", "step", "saved"),
    [
        ("with_slow_validation", "validating", 5, 4),
        ("with_slow_archive", "writing", STEPS, STEPS),
    ],
)
def test_ctrl_c_tells_where_the_run_stopped(
    world, tmp_path, change, sign, step, saved
):
    run = start(
        world,
        tmp_path / "run",
        change,
        exp_manager__checkpoint_callback_params__async_save=False,
    )
    run.wait_until((tmp_path / "run" / sign).exists)
    for rank in (1, 0):
        run.send(rank, signal.SIGINT)
    assert run.end() == [128 + signal.SIGINT] * 2
    folder = last(tmp_path / "run")
    assert Contents.read(folder).step == saved
    text = f"interrupted at step {step} of {STEPS}; the last checkpoint is {folder}"
    assert run.said().count("interrupted") == run.said().count(text) == 1
    assert "Traceback" not in run.said()
    assert not list((tmp_path / "run" / "checkpoints").glob("*.nemo"))


def test_a_hanging_rank_is_told_of_with_its_step(world, tmp_path):
    overrides = {
        "trainer__distributed_timeout_minutes": 0.25,
        "trainer__knowledge_distillation__save_interval": 50,
    }
    run = start(world, tmp_path / "run", "with_slow_steps", **overrides)
    run.wait_for_step(3)
    run.send(1, signal.SIGSTOP)
    run.ranks[0].join(120)
    run.kill()
    assert run.ranks[0].exitcode == 1
    assert re.search(r"rank 0 on .* made no progress for 15 s", run.said()), run.said()
    assert re.search(
        r"last step: (step \d+: examples \[\[\d+|after step|saving|waiting for a checkpoint)",
        run.said(),
    )


def test_a_second_run_in_the_folder_is_refused_and_harms_nothing(
    world, straight, tmp_path
):
    """Also where the first one goes on from a checkpoint, when NeMo moves the files of its folder away."""
    log_dir = tmp_path / "run"
    first = start(world, log_dir, "with_slow_steps")
    first.wait_for_step(3)
    first.kill()
    first = start(world, log_dir, "with_slow_steps")
    first.wait_for_step(5)
    for rank in (0, 1):
        first.send(rank, signal.SIGSTOP)
    second = start(world, log_dir, "with_slow_steps")
    assert second.end() == [2, 2]
    for rank in (0, 1):
        first.send(rank, signal.SIGCONT)
    assert (
        "is training there; two runs in one folder would destroy each other's checkpoints"
        in second.said()
    )
    assert first.end() == [0, 0], first.said()
    check_equal(log_dir, straight)


def test_nothing_is_left_to_train(world, straight, tmp_path):
    """The archive is written again, for the run may have been killed after its last checkpoint."""
    log_dir = tmp_path / "run"
    shutil.copytree(straight, log_dir)
    archive = log_dir / "checkpoints" / "megatron_gpt_knowledge_distillation.nemo"
    num_bytes = archive.stat().st_size
    archive.unlink()
    run = start(world, log_dir, "with_dropout")
    assert run.end() == [0, 0], run.said()
    assert "nothing is left to train" in run.said()
    assert archive.stat().st_size == num_bytes
    assert len(metrics(log_dir)) == len(metrics(straight))


def chosen(parent: Path, *arguments: object) -> str:
    try:
        resumes, may_start, source = arguments or (True, False, None)
        manager = ExpManagerConfig(
            resume_if_exists=resumes,
            resume_ignore_no_checkpoint=may_start,
            resume_from_checkpoint=source,
        )
        return str(choose_checkpoint(parent, manager))
    except CheckpointError as error:
        return f"error: {error}"


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize(
    ("name", "harm", "problem"),
    [
        (
            "__1_0.distcp",
            cut,
            r"__1_0.distcp is not as it was written: [\d,]+ of [\d,]+ bytes",
        ),
        ("__0_0.distcp", flip, "__0_0.distcp is not as it was written"),
        ("common.pt", Path.unlink, "common.pt"),
        (".metadata", cut, ".metadata is not as it was written"),
        ("contents.json", cut, "contents.json cannot be read"),
        ("contents.json", Path.unlink, "contents.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_used(
    ranks, straight, tmp_path, name, harm, problem
):
    parent = tmp_path / "checkpoints"
    shutil.copytree(straight / "checkpoints", parent)
    newest = last(tmp_path)
    for folder in checkpoints(parent):
        if Contents.read(folder).step == STEPS and folder != newest:
            shutil.rmtree(folder)
    harm(newest / name)
    found = ranks(2).run(chosen, parent)
    assert found[0] == found[1]
    assert Contents.read(Path(found[0])).step == 10
    assert not newest.exists()
    assert newest.with_name(f"{newest.name}.damaged").is_dir()
    assert ranks(2).run(chosen, parent) == found

    for folder in checkpoints(parent):
        cut(folder / "__0_0.distcp")
    message = ranks(2).run(chosen, parent)[1]
    start = f"error: exp_manager.resume_if_exists: no whole checkpoint to resume in {parent}\n"
    assert message.startswith(start)
    assert "-previous: __0_0.distcp is not as it was written" in message
    assert "to start over remove all of them" in message


def test_where_there_is_no_checkpoint(ranks, straight, tmp_path):
    assert "resume_ignore_no_checkpoint=true" in ranks(2).run(chosen, tmp_path)[0]
    assert ranks(2).run(chosen, tmp_path, True, True, None) == ["None", "None"]
    other = str(checkpoints(straight / "checkpoints")[-1])
    assert ranks(2).run(chosen, tmp_path, False, False, other) == [other, other]
    assert ranks(2).run(chosen, tmp_path, True, False, other) == [other, other]
    assert (
        "contents.json cannot be read"
        in ranks(2).run(chosen, tmp_path, False, False, str(tmp_path))[0]
    )
    contents = json.loads((Path(other) / "contents.json").read_text())
    assert contents["layout"]["data"] == 2
