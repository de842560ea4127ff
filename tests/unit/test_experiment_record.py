"""Which keys a resumed run is compared by, and what it is told."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_kd.config import ConfigError
from nemo_kd.config.exp_manager import (
    FREE_KEYS,
    allowed_keys,
    compared_defaults,
    compared_values,
    is_free,
)
from nemo_kd.config.shared import GPTArchitecture
from nemo_kd.config.student import TrainStudentConfig
from nemo_kd.config.typed import describe
from nemo_kd.student.checkpoint_folder import CheckpointError, Contents, seal
from nemo_kd.student.run_folder import (
    check_same_experiment,
    differences,
    experiment_record,
)
from tests.tiny_data import student_config

LOSS = "model.knowledge_distillation"


def config(**overrides) -> TrainStudentConfig:
    return student_config(
        Path("m"), Path("t.jsonl"), Path("v.jsonl"), Path("log"), **overrides
    )


def test_every_key_is_compared_unless_it_is_listed_as_free():
    keys = [one.key for one in describe(TrainStudentConfig)]
    compared = compared_values(config())
    assert set(compared) == {key for key in keys if not is_free(key)}
    assert f"{LOSS}.kd_loss" in compared
    assert "model.optim.lr" in compared
    for free in FREE_KEYS:
        assert any(key == free or key.startswith(f"{free}.") for key in keys), (
            f"{free} is not a key"
        )
    assert set(compared_defaults(TrainStudentConfig)) == set(compared)


def test_a_key_that_nobody_has_listed_is_compared():
    @dataclasses.dataclass
    class WithNewKey(TrainStudentConfig):
        new_loss_weight: float = 0.0

    old = config()
    new = WithNewKey(
        **{field.name: getattr(old, field.name) for field in dataclasses.fields(old)},
        new_loss_weight=2.0,
    )
    assert compared_values(new)["new_loss_weight"] == 2.0
    assert compared_defaults(WithNewKey)["new_loss_weight"] == 0.0


def test_a_checkpoint_that_does_not_know_a_key_was_trained_with_its_default():
    now = compared_values(config())
    before = dict(now)
    del before[f"{LOSS}.support"]
    assert differences(before, now) == {}
    assert differences(before, {**now, f"{LOSS}.support": "truncate"}) == {
        f"{LOSS}.support": "tail in the checkpoint, truncate now"
    }


def test_one_batch_and_all_batches_are_not_the_same():
    key = "trainer.knowledge_distillation.limit_val_batches"
    now = compared_values(config(trainer__knowledge_distillation__limit_val_batches=1))
    assert differences({**now, key: 1.0}, now) == {key: "1.0 in the checkpoint, 1 now"}


def test_a_custom_loss_that_was_edited_is_another_loss(tmp_path, monkeypatch):
    source = tmp_path / "loss_that_is_edited.py"
    source.write_text("def loss():\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "loss_that_is_edited", raising=False)
    custom = {
        f"{LOSS}.kd_loss".replace(".", "__"): "custom",
        f"{LOSS}.custom_loss".replace(".", "__"): f"{source.stem}.loss",
    }

    def record() -> dict[str, Any]:
        return experiment_record(
            config(**custom),
            GPTArchitecture("llama", 100, 1, 8, 8, 1, 1, 8, 512, 1e-5, 1e4),
            {},
            {},
            1,
        )

    before = record()
    assert differences(before, record()) == {}
    source.write_text("def loss():\n    return 2\n")
    (text,) = differences(before, record()).values()
    assert text.startswith(
        "{'function': 'loss_that_is_edited.loss', 'source': 'sha256:"
    )


@pytest.mark.parametrize(
    "change",
    [{"model__micro_batch_size": 4}, {"model__data__max_tokens_per_batch": 4096}, {"trainer__devices": 2}],
)  # fmt: skip
def test_micro_batches_are_compared_where_the_loss_depends_on_them(change):
    key = f"{LOSS}.reduction"
    architecture = GPTArchitecture("llama", 100, 1, 8, 8, 1, 1, 8, 512, 1e-5, 1e4)
    for reduction, changed in (
        ("token", []),
        ("microbatch", [f"{key}.micro_batches"]),
    ):
        mean = {key.replace(".", "__"): reduction}
        before, now = (
            experiment_record(config(**mean, **more), architecture, {}, {}, 1)
            for more in ({}, change)
        )
        assert list(differences(before, now)) == changed


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        ([f"{LOSS}.kd_loss"], {f"{LOSS}.kd_loss"}),
        (["kd_loss", "optim.lr"], {f"{LOSS}.kd_loss", "model.optim.lr"}),
        (["max_steps"], set()),
        (["sched.name"], {"model.optim.sched.name"}),
        (
            ["model.optim.sched"],
            {"model.optim.sched.name", "model.optim.sched.min_lr"},
        ),
    ],
)
def test_keys_that_may_change(entries, found):
    assert allowed_keys(entries, compared_values(config())) == found


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("adapter_din", "allow_changed: there is no key adapter_din \\(did you mean model.peft.lora_tuning.adapter_dim\\?\\)"),
        ("xyz", "allow_changed: there is no key xyz$"),
    ],
)  # fmt: skip
def test_entries_that_name_no_key(entry, message):
    with pytest.raises(ConfigError, match=message):
        allowed_keys([entry], compared_values(config()))


def checkpoint(folder: Path, experiment: dict) -> Path:
    folder.mkdir()
    seal(folder, Contents(2, True, {"data": 1}, {}, experiment))
    return folder


def test_every_difference_is_told_with_both_ways_out(tmp_path, caplog):
    data = {"paths": ["a.jsonl"], "content": "sha256:1", "weights": None}
    now = {
        **compared_values(config()),
        "pretrained_checkpoint.restore_from_path": {
            "name": "student",
            "weights": "sha256:a",
        },
        "model.data.data_prefix.train": data,
        "architecture.num_layers": 2,
    }
    folder = checkpoint(tmp_path / "c", now)
    assert json.loads((folder / "contents.json").read_text())["experiment"] == now
    moved = {"model.data.data_prefix.train": {**data, "paths": ["b.jsonl"]}}
    check_same_experiment(folder, {**now, **moved}, [])
    changed = {
        **now,
        f"{LOSS}.kd_loss": "reverse_kl",
        "model.data.data_prefix.train": {
            **data,
            "paths": ["b.jsonl"],
            "content": "sha256:2",
        },
    }
    with pytest.raises(CheckpointError) as refused:
        check_same_experiment(folder, changed, [])
    assert str(refused.value).splitlines() == [
        f"{folder} belongs to another experiment:",
        f"  {LOSS}.kd_loss: forward_kl in the checkpoint, reverse_kl now",
        f"  model.data.data_prefix.train: {data} in the checkpoint, {changed['model.data.data_prefix.train']} now",
        "Give another folder (exp_manager.explicit_log_dir) to start over, or continue with the change: "
        f"'allow_changed=[{LOSS}.kd_loss,model.data.data_prefix.train]'",
    ]
    with caplog.at_level(logging.WARNING, "nemo_kd"):
        check_same_experiment(folder, changed, ["kd_loss", "data_prefix.train"])
    assert (
        f"allow_changed: {LOSS}.kd_loss: forward_kl in the checkpoint, reverse_kl now; the run continues"
        in caplog.text
    )
    for key, value in (
        ("architecture.num_layers", 3),
        ("model.optim.name", "adam"),
        ("model.peft.peft_scheme", "lora"),
    ):
        with pytest.raises(
            CheckpointError,
            match=r"to start over$",
        ):
            check_same_experiment(
                folder,
                {**now, key: value},
                [] if key.startswith("architecture") else [key],
            )


def test_adapters_go_on_with_their_own_student_only(tmp_path):
    student = "pretrained_checkpoint.restore_from_path"
    now = {
        **compared_values(config(model__peft__peft_scheme="lora")),
        student: {"name": "a", "weights": "sha256:a"},
    }
    folder = checkpoint(tmp_path / "c", now)
    with pytest.raises(CheckpointError, match=r"to start over$"):
        check_same_experiment(
            folder, {**now, student: {"name": "b", "weights": "sha256:b"}}, [student]
        )
