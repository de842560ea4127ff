"""The same command again, with or without a changed key: what it takes over from the run before and what it leaves."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

import nemo_kd
from nemo_kd.mcore.checkpoint_write import file_sum
from nemo_kd.student.checkpoint_folder import CONTENTS
from tests.integration.test_stage_1 import run_stage_1
from tests.integration.test_stage_2 import metrics, run_stage_2
from tests.tiny_data import write_chat_dataset
from tests.tiny_models import save_hf_model
from tests.tiny_tokenizer import CHATML

SETTINGS = {
    "name": "run",
    "model__optim__sched__name": "constant",
    "trainer__knowledge_distillation__max_steps": 2,
    "trainer__knowledge_distillation__val_check_interval": 1,
}


@pytest.fixture(scope="module")
def world(ranks, tmp_path_factory):
    """Student, training and validation cache."""
    folder = tmp_path_factory.mktemp("reruns")
    teacher = save_hf_model("qwen3", folder / "teacher", 300, seed=1)
    caches = []
    for split, count, start in (("train", 40, 0), ("validation", 5, 60)):
        dataset = write_chat_dataset(folder / f"{split}.jsonl", count, start)
        caches.append(folder / f"{split}_CHUNK_ID.jsonl")
        assert ranks(1).run(
            run_stage_1, teacher, dataset, caches[-1], {"top_k": 4}
        ) == [""]
    return save_hf_model(
        "llama2", folder / "student", 300, num_hidden_layers=1
    ), *caches


@pytest.fixture
def train(ranks, world, tmp_path):
    """Runs in `tmp_path`, again and again."""

    def train(**overrides) -> list[dict]:
        """The lines of metrics that it adds."""
        before = len(metrics(tmp_path)) if (tmp_path / "metrics").exists() else 0
        assert ranks(1).run(
            run_stage_2, *world, tmp_path, {**SETTINGS, **overrides}
        ) == [""]
        return metrics(tmp_path)[before:]

    return train


def trained(rows: list[dict]) -> list[int]:
    return [row["step"] for row in rows if "train/loss" in row]


def last_checkpoint(folder: Path) -> Path:
    (found,) = (folder / "checkpoints").glob("*-last")
    return found


@pytest.mark.parametrize("optimizer", ["adamw", "distributed_fused_adam"])
def test_learning_rate_and_weight_decay_are_those_of_now(train, optimizer):
    overrides = {"model__optim__name": optimizer, "model__optim__lr": 1e-3}
    assert {round(row["lr"], 8) for row in train(**overrides) if "lr" in row} == {1e-3}
    # So much weight decay that the first step leaves nothing of the matrices, and the second sees equal logits.
    overrides |= {"model__optim__lr": 1e-5, "model__optim__weight_decay": 1e5}
    overrides["allow_changed"] = ["lr", "weight_decay"]
    rows = train(trainer__knowledge_distillation__max_steps=4, **overrides)
    assert trained(rows) == [3, 4]
    assert {round(row["lr"], 8) for row in rows if "lr" in row} == {1e-5}
    third, fourth = (row["train/sft_loss"] for row in rows if "train/sft_loss" in row)
    assert abs(third - math.log(300)) > 1e-3
    assert fourth == pytest.approx(math.log(300), abs=1e-5)


def test_another_experiment_is_refused_or_goes_on_as_allowed(
    ranks, world, train, tmp_path
):
    """Finished runs too: the archive of one experiment is never the result of another."""
    train()
    archive = tmp_path / "checkpoints" / "run.nemo"
    written_ns = archive.stat().st_mtime_ns
    student = save_hf_model(
        "llama2", tmp_path / "other" / "student", 300, num_hidden_layers=1, seed=9
    )
    loss = {
        "model__knowledge_distillation__kd_loss": "reverse_kl",
        "model__optim__lr": 2e-3,
    }
    message = ranks(1).run(
        run_stage_2, student, *world[1:], tmp_path, {**SETTINGS, **loss}
    )[0]
    assert message.startswith(
        f"CheckpointError: {last_checkpoint(tmp_path)} belongs to another experiment:\n"
    )
    assert (
        "\n  model.knowledge_distillation.kd_loss: forward_kl in the checkpoint, reverse_kl now\n"
        in message
    )
    assert "\n  model.optim.lr: 0.001 in the checkpoint, 0.002 now\n" in message
    assert "\n  pretrained_checkpoint.restore_from_path: {'name': 'student'" in message
    assert archive.stat().st_mtime_ns == written_ns
    outside = {
        **SETTINGS,
        **loss,
        "exp_manager__resume_from_checkpoint": str(last_checkpoint(tmp_path)),
    }
    refused = ranks(1).run(run_stage_2, *world, tmp_path / "elsewhere", outside)[0]
    assert "kd_loss: forward_kl in the checkpoint, reverse_kl now" in refused
    more = {
        "allow_changed": ["kd_loss", "lr"],
        "trainer__knowledge_distillation__max_steps": 3,
    }
    assert ranks(1).run(
        run_stage_2, *world, tmp_path / "elsewhere", {**outside, **more}
    ) == [""]
    assert trained(metrics(tmp_path / "elsewhere")) == [3]
    assert trained(train(**loss, **more)) == [3]
    batch = {
        "model__global_batch_size": 4,
        "trainer__knowledge_distillation__max_steps": 5,
    }
    rows = train(
        **loss, **batch, allow_changed=["global_batch_size", "limit_train_batches"]
    )
    assert trained(rows) == [4, 5]


def weights_in(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as tar:
        return {
            member.name: tar.extractfile(member).read()
            for member in tar.getmembers()
            if member.name.endswith(".distcp")
        }


def test_a_run_that_was_stopped_early_stays_stopped(train, tmp_path):
    """Nothing is learnt at a learning rate of 0, so the second validation is no better than the first."""
    overrides = {
        "model__optim__lr": 0.0,
        "trainer__knowledge_distillation__max_steps": 4,
        "exp_manager__create_early_stopping_callback": True,
        "exp_manager__early_stopping_callback_params": {
            "monitor": "val_loss",
            "mode": "min",
            "patience": 1,
        },
    }
    assert trained(train(**overrides)) == [1, 2]
    archive = tmp_path / "checkpoints" / "run.nemo"
    before = weights_in(archive)
    assert trained(train(**overrides)) == []
    assert weights_in(archive) == before
    assert trained(
        train(**overrides | {"exp_manager__create_early_stopping_callback": False})
    ) == [
        3,
        4,
    ]


def test_a_run_without_validation_data(world, train, tmp_path):
    settings = {
        "model__data__data_prefix": {"train": [str(world[1])]},
        "trainer__knowledge_distillation__limit_val_batches": 0,
    }
    rows = train(**settings)
    rows += train(**settings, trainer__knowledge_distillation__max_steps=3)
    assert trained(rows) == [1, 2, 3]
    assert not [name for row in rows for name in row if name.startswith("val")]
    assert "step=3" in last_checkpoint(tmp_path).name
    assert (tmp_path / "checkpoints" / "run.nemo").is_file()


def test_a_metric_with_a_slash_ranks_checkpoints_and_they_are_found(train, tmp_path):
    overrides = {
        "exp_manager__checkpoint_callback_params": {
            "monitor": "validation/teacher_kl", "save_top_k": 1, "save_nemo_on_train_end": True,
        },
    }  # fmt: skip
    rows = train(**overrides)
    values = {
        row["step"]: row["validation/teacher_kl"] for row in rows if "val_loss" in row
    }
    best = int(min(values, key=lambda step: values[step]))
    (ranked,) = (
        path
        for path in (tmp_path / "checkpoints").iterdir()
        if path.name.endswith(("=8.0", "=16.0"))
    )
    assert ranked.name.startswith(
        f"run--validation_teacher_kl={values[best]:.4f}-step={best}-consumed_samples="
    )
    assert trained(
        train(**overrides, trainer__knowledge_distillation__max_steps=3)
    ) == [3]


def test_a_finished_run_writes_its_weights_again_in_the_forms_that_are_asked_for(
    train, tmp_path
):
    train()
    archive = tmp_path / "checkpoints" / "run.nemo"
    before = weights_in(archive)
    archive.write_bytes(b"as if the run had been killed over an earlier one")
    assert not train(export__hf=True)
    assert weights_in(archive) == before
    assert (tmp_path / "checkpoints" / "run-hf" / "model.safetensors").exists()


class _Harmful:
    def __reduce__(self):
        return os.system, ("true",)


def test_a_checkpoint_that_would_run_code_is_refused(ranks, world, train, tmp_path):
    train()
    checkpoint = last_checkpoint(tmp_path)
    metadata, contents = (
        checkpoint / ".metadata",
        json.loads((checkpoint / CONTENTS).read_text()),
    )
    metadata.unlink()  # other checkpoints share the file
    metadata.write_bytes(pickle.dumps(_Harmful()))
    contents["files"][".metadata"] = list(file_sum(metadata))
    (checkpoint / CONTENTS).unlink()
    (checkpoint / CONTENTS).write_text(json.dumps(contents))
    overrides = {**SETTINGS, "trainer__knowledge_distillation__max_steps": 3}
    assert (
        "it refers to posix.system"
        in ranks(1).run(run_stage_2, *world, tmp_path, overrides)[0]
    )


def test_a_checkpoint_of_weights_alone_is_nothing_to_go_on_from(
    ranks, world, train, tmp_path
):
    params = {
        "save_weights_only": True,
        "save_top_k": 1,
        "save_nemo_on_train_end": True,
    }
    train(exp_manager__checkpoint_callback_params=params)
    (ranked,) = (
        path
        for path in (tmp_path / "checkpoints").iterdir()
        if path.name.endswith(("=8.0", "=16.0"))
    )
    overrides = {**SETTINGS, "exp_manager__resume_from_checkpoint": str(ranked)}
    message = ranks(1).run(run_stage_2, *world, tmp_path / "other", overrides)[0]
    assert f"\n  {ranked}: it holds weights only" in message


def test_the_command_ends_with_processes_that_read_ahead(world, tmp_path):
    """They take no signals, so nothing but the run itself ends them."""
    student, train, validation = world
    line = [
        sys.executable, str(Path(nemo_kd.__file__).parents[1] / "examples" / "train_gpt_knowledge_distillation.py"),
        f"pretrained_checkpoint.restore_from_path={student}", f"exp_manager.explicit_log_dir={tmp_path / 'run'}",
        f"model.data.data_prefix={{train: [{train}], validation: [{validation}]}}", "trainer.precision=32",
        "trainer.devices=2", "model.global_batch_size=8", "trainer.knowledge_distillation.max_steps=1",
        "model.data.num_workers=2", "model.knowledge_distillation.kd_loss_weight=1.0",
    ]  # fmt: skip
    result = subprocess.run(
        line, capture_output=True, text=True, check=False, timeout=240
    )
    assert result.returncode == 0, result.stderr
    assert not re.search(r"Warning|NeMo W|HINT", result.stderr), result.stderr
    assert list((tmp_path / "run" / "checkpoints").glob("*.nemo"))


def test_the_recorded_configuration_runs_again(train, tmp_path):
    first = train(name="again", model__optim__lr=2e-3)
    assert (
        yaml.safe_load((tmp_path / "config.yaml").read_text())["model"]["optim"]["lr"]
        == 2e-3
    )
    command = [
        *(sys.executable, "-m", "nemo_kd.cli.train_gpt_knowledge_distillation"),
        *("--config-dir", str(tmp_path), "--config-name", "config"),
        f"output={tmp_path / 'again'}",
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    losses = [
        [row["train/loss"] for row in rows if "train/loss" in row]
        for rows in (first, metrics(tmp_path / "again"))
    ]
    assert losses[0] == losses[1]
    (archive,) = (tmp_path / "again").rglob("*.nemo")
    with tarfile.open(archive) as tar:
        provenance = json.load(tar.extractfile("./provenance.json"))
    assert provenance["config"]["model"]["optim"]["lr"] == 2e-3
    assert str(tmp_path) not in json.dumps(provenance["config"])


def test_a_resumed_run_keeps_the_date_that_its_chat_template_prints(
    ranks, world, tmp_path
):
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%Y-%m-%d') }}" + CHATML)
    records = [
        write_chat_dataset(tmp_path / f"{name}.jsonl", count)
        for name, count in (("train", 40), ("validation", 4))
    ]
    settings = {
        **SETTINGS,
        "model__data__data_impl": "dataset",
        "model__data__dataset__chat_template": str(template),
        "model__knowledge_distillation__kd_loss_weight": 0.0,
    }
    runs = (
        {"model__data__dataset__date": "2024-02-29"},
        {"trainer__knowledge_distillation__max_steps": 4},
    )
    for overrides in runs:
        log_dir = tmp_path / "run"
        arguments = (world[0], *records, log_dir, {**settings, **overrides})
        assert ranks(1).run(run_stage_2, *arguments) == [""]
        config = yaml.safe_load((log_dir / "config.yaml").read_text())
        assert config["model"]["data"]["dataset"]["date"] == "2024-02-29"
    assert max(trained(metrics(log_dir))) == 4
