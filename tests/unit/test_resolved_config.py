"""The configuration that a run records: every key, no secrets, nothing of an earlier run lost."""

from __future__ import annotations

import pytest
import yaml
from omegaconf import OmegaConf

from nemo_kd.config.student import TrainStudentConfig
from nemo_kd.config.teacher import ComputeTopkLogitsConfig
from nemo_kd.config.typed import describe, typed
from nemo_kd.run.metrics import resolved_config, save_config

STUDENT = {
    "pretrained_checkpoint": {"restore_from_path": "student"},
    "model": {"data": {"data_prefix": {"train": "a.jsonl", "validation": "b.jsonl"}}},
}
SECRETS = (
    "hf_abcdefghijklmnopqrstuvwxyz0123",
    "0123456789abcdef0123456789abcdef01234567",
    "sk-abcdefghijklmnop1234",
    "https://me:hunter22@host/cache.jsonl",
)


def student(**overrides) -> TrainStudentConfig:
    return typed(TrainStudentConfig, OmegaConf.merge(STUDENT, overrides))


def leaves(values: dict, prefix: str = "") -> set[str]:
    keys = set()
    for name, value in values.items():
        is_section = isinstance(value, dict) and value and "kwargs" not in name
        keys |= (
            leaves(value, f"{prefix}{name}.") if is_section else {f"{prefix}{name}"}
        )
    return keys


def test_every_key_is_recorded_and_gives_the_same_configuration(tmp_path):
    config = student(model={"optim": {"lr": 1e-4}})
    save_config(tmp_path / "config.yaml", resolved_config(config))
    again = yaml.safe_load((tmp_path / "config.yaml").read_text())
    known = {one.key for one in describe(TrainStudentConfig)}
    assert {
        key.replace("data_prefix.train", "data_prefix") for key in leaves(again)
    } - {"model.data.data_prefix.validation"} == known
    assert typed(TrainStudentConfig, OmegaConf.create(again)) == config


@pytest.mark.parametrize("secret", SECRETS)
def test_values_that_look_like_secrets_are_left_out(secret, tmp_path):
    config = student(
        exp_manager={
            "exp_dir": secret,
            "wandb_logger_kwargs": {"project": "p", "x": [secret], "y": {"z": secret}},
        }
    )
    save_config(tmp_path / "config.yaml", resolved_config(config))
    text = (tmp_path / "config.yaml").read_text()
    assert secret not in text
    assert "project: p" in text


def test_names_that_look_like_secrets_are_left_out():
    names = (
        "api_key",
        "apiKey",
        "key",
        "hf_token",
        "password",
        "client_secret",
        "authorization",
    )
    kwargs = {name: "abc" for name in names}
    config = student(exp_manager={"wandb_logger_kwargs": {**kwargs, "name": "run"}})
    found = resolved_config(config)
    assert found["exp_manager"]["wandb_logger_kwargs"] == {"name": "run"}
    assert found["model"]["data"]["dataset"]["label_key"] == "output"


def test_values_of_environment_variables_stay_references(monkeypatch):
    monkeypatch.setenv("MY_PLACE", "somewhere/secret-place")
    monkeypatch.setenv("WANDB_API_KEY", "short-but-secret")
    config = student(
        name="kd",
        exp_manager={
            "explicit_log_dir": "${oc.env:MY_PLACE}/x",
            "version": "a-short-but-secret-b",
            "wandb_logger_kwargs": {
                "entity": "${oc.env:WANDB_API_KEY}",
                "group": "${name}",
            },
        },
    )
    found = resolved_config(config)
    assert "secret" not in yaml.safe_dump(found)
    assert found["exp_manager"]["explicit_log_dir"] == "${oc.env:MY_PLACE}/x"
    kwargs = found["exp_manager"]["wandb_logger_kwargs"]
    assert kwargs == {"entity": "${oc.env:WANDB_API_KEY}", "group": "kd"}


def test_splits_of_stage_1_keep_references(monkeypatch):
    monkeypatch.setenv("MY_SEED", "4242")
    given = {
        "pretrained_checkpoint": {"restore_from_path": "t"},
        "output_path": "SPLIT.jsonl",
        "data": {"data": {"file_path": {"train": "t.jsonl", "validation": "v.jsonl"}}},
        "model": {"seed": "${oc.env:MY_SEED}"},
    }
    config = typed(ComputeTopkLogitsConfig, OmegaConf.create(given))
    for split, part in config.splits().items():
        found = resolved_config(part)
        assert found["model"]["seed"] == "${oc.env:MY_SEED}"
        assert found["output_path"] == f"{split}.jsonl"


def test_other_values_keep_the_earlier_files(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("mine: true\n")
    for number in (1, 2, 2, 3):
        save_config(path, {"top_k": number})
    texts = {
        file.name: yaml.safe_load(file.read_text()) for file in tmp_path.iterdir()
    }
    assert texts == {
        "config.yaml": {"top_k": 3},
        "config-1.yaml": {"mine": True},
        "config-2.yaml": {"top_k": 1},
        "config-3.yaml": {"top_k": 2},
    }
