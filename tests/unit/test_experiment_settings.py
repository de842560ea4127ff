"""Keys of exp_manager: what is refused before any work, and what is only told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_kd.cli.aligner_keys import config_of, with_keys
from nemo_kd.cli.train_gpt_knowledge_distillation import check_folders
from nemo_kd.config import ConfigError
from nemo_kd.config.exp_manager import CheckpointParams
from nemo_kd.student.checkpoint_folder import CONTENTS
from nemo_kd.student.checkpoints import Checkpoints
from nemo_kd.student.job import check_monitor
from nemo_kd.student.loss import StudentLoss
from tests.tiny_data import student_config

PARAMS = "exp_manager__checkpoint_callback_params__"
STOPPING = "exp_manager__early_stopping_callback_params__"
LOOP = "trainer__knowledge_distillation__"
EVAL = {"eval__interval": 5, "eval__data": "q.jsonl", "eval__answer_field": "answer"}
COMMAND = "train_gpt_knowledge_distillation"


def settings(**overrides):
    config = student_config(
        Path("m"), Path("t.jsonl"), Path("v.jsonl"), Path("log"), **overrides
    )
    check_folders(config.exp_manager)
    loss = StudentLoss(config.model.knowledge_distillation, config.model.data)
    check_monitor(config, loss)
    return config.exp_manager


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"name": "a/b"}, r"name: 'a/b' names files and must not contain a slash"),
        ({f"{PARAMS}filename": "{validation/loss}"}, "filename: .* must not contain a slash"),
        ({f"{PARAMS}monitor": "validation_loss"}, "monitor: 'validation_loss' is not measured; known: val_loss, validation/loss"),
        ({f"{PARAMS}monitor": "validation/teacher_lk"}, "monitor: 'validation/teacher_lk' is not measured"),
        ({f"{PARAMS}monitor": "validation/entropy"}, "monitor: 'validation/entropy' is not measured"),
        ({f"{PARAMS}monitor": "eval/accuracy"}, "monitor: eval/accuracy needs evaluations; set eval.interval, eval.data and"),
        ({"exp_manager__create_early_stopping_callback": True, f"{STOPPING}monitor": "eval/accuracy"}, "early_stopping_callback_params.monitor: eval/accuracy needs evaluations; set"),
        ({**EVAL, "exp_manager__create_early_stopping_callback": True, f"{STOPPING}monitor": "eval/acuracy"}, "early_stopping_callback_params.monitor: 'eval/acuracy' is not measured; known: val_loss, .*, eval/accuracy"),
        ({"exp_manager__create_early_stopping_callback": True, f"{STOPPING}monitor": "val_los"}, "early_stopping_callback_params.monitor: 'val_los' is not measured; known: val_loss"),
        ({**EVAL, f"{PARAMS}monitor": "eval/acuracy"}, "monitor: 'eval/acuracy' is not measured; known: val_loss, .*, eval/accuracy, eval/reward"),
        ({"eval__interval": 5}, "eval.data: missing; eval.interval=5 needs questions"),
        ({"eval__data": "q.jsonl"}, "eval.interval: eval.data=q.jsonl is read every eval.interval steps"),
        ({"eval__interval": 5, "eval__data": "q.jsonl"}, "eval.answer_field: missing; name the field of q.jsonl"),
        ({**EVAL, "eval__interval": -1}, "eval.interval: -1 must be at least 0"),
        ({**EVAL, "eval__top_p": 0.0}, "eval.top_p: 0.0 must be above 0 and at most 1"),
        ({**EVAL, "model__context_parallel_size": 2}, "model.context_parallel_size: 2, but eval.interval=5 generates responses, which needs 1"),
        ({f"{LOOP}inference_metrics": {"match": {"_target_": "a.B"}}}, "inference_metrics: the metrics measure generated responses; set eval.interval"),
        ({**EVAL, f"{LOOP}inference_metrics": {"match": "a.B"}}, r"inference_metrics.match: 'a.B' names no class; give \{_target_: "),
        ({**EVAL, f"{LOOP}inference_metrics": {"accuracy": {"_target_": "a.B"}}}, "inference_metrics.accuracy: eval/accuracy is a metric of every evaluation"),
        ({f"{PARAMS}mode": "lowest"}, "mode: 'lowest' is not one of min, max"),
        ({f"{PARAMS}save_top_k": -2}, "save_top_k: -2 must be at least -1"),
        ({f"{PARAMS}save_best_model": True, f"{PARAMS}save_weights_only": True}, "save_best_model: needs whole checkpoints"),
        ({"export__hf": True, f"{PARAMS}save_nemo_on_train_end": False}, "export.hf: .*save_nemo_on_train_end=false"),
        ({"export__hf": True, "exp_manager__create_checkpoint_callback": False}, "export.hf: .*create_checkpoint_callback"),
        ({"exp_manager__explicit_log_dir": f"{__file__}/runs/1"}, "explicit_log_dir: .* cannot be written: .*settings.py is no folder"),
        ({"exp_manager__log_interval_s": -1.0}, "exp_manager.log_interval_s: -1.0 must be at least 0"),
        ({"exp_manager__resume_if_exist": True}, r"resume_if_exist: there is no such key \(did you mean exp_manager.resume_if_exists\?\)"),
        ({f"{PARAMS}save_topk": 2}, r"save_topk: there is no such key \(did you mean exp_manager.checkpoint_callback_params.save_top_k\?\)"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        settings(**overrides)


def test_only_folders_that_are_written_have_to_be_writable(tmp_path, monkeypatch):
    (tmp_path / "current").mkdir()
    (tmp_path / "results").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    monkeypatch.setattr(
        os, "access", lambda path, _: Path(path) != tmp_path / "current"
    )
    results = str(tmp_path / "results" / "run")
    settings(exp_manager__explicit_log_dir=results)
    settings(exp_manager__explicit_log_dir=None, exp_manager__exp_dir=results)
    for key in ("exp_manager__explicit_log_dir", f"{PARAMS}dirpath"):
        with pytest.raises(
            ConfigError,
            match=rf"{key.split('__')[-1]}: .*: {tmp_path / 'current'} is no folder in which you",
        ):
            settings(
                **{
                    "exp_manager__explicit_log_dir": results,
                    key: str(tmp_path / "current" / "run"),
                }
            )
    settings(
        **{
            "exp_manager__explicit_log_dir": results,
            "exp_manager__create_checkpoint_callback": False,
            f"{PARAMS}dirpath": str(tmp_path / "current" / "run"),
        }
    )
    with pytest.raises(
        ConfigError, match="exp_manager.exp_dir: .*current cannot be written"
    ):
        settings(exp_manager__explicit_log_dir=None)


def test_a_folder_that_may_not_be_looked_at_is_not_written(monkeypatch):
    """As /root/results is for others: whether it exists cannot be told."""
    monkeypatch.setattr(os.path, "exists", lambda path: str(path) in ("/", "/root"))
    monkeypatch.setattr(os, "access", lambda path, _: str(path) == "/")
    with pytest.raises(
        ConfigError,
        match="explicit_log_dir: /root/results cannot be written: /root is no folder in which you",
    ):
        settings(exp_manager__explicit_log_dir="/root/results")


def test_what_nothing_here_asks_is_told():
    given = {
        "exp_manager": {
            "resume_past_end": True,
            "checkpoint_callback_params": {"every_n_epochs": 2},
        }
    }
    _, warnings = config_of(with_keys(given, COMMAND), COMMAND)
    assert warnings == [
        "exp_manager.resume_past_end=True: a run resumes from its last checkpoint",
        "exp_manager.checkpoint_callback_params.every_n_epochs=2: trainer.knowledge_distillation.save_interval sets the steps",
    ]


def test_a_moving_average_is_refused():
    with pytest.raises(
        ConfigError, match="exp_manager.ema.enable: True is not supported"
    ):
        settings(exp_manager__ema={"enable": True})
    assert settings(exp_manager__ema={"enable": False})


@pytest.mark.parametrize(
    "key",
    ["create_early_stopping_callback", "checkpoint_callback_params__save_best_model"],
)
def test_what_needs_validations_is_refused_without_them(key):
    with pytest.raises(
        ConfigError, match=key.replace("__", ".") + ": True needs validation"
    ):
        settings(
            **{
                f"exp_manager__{key}": True,
                "trainer__knowledge_distillation__limit_val_batches": 0,
            }
        )


def test_a_home_folder_is_found_whoever_looks_for_it():
    found = settings(
        exp_manager__explicit_log_dir="~/runs",
        exp_manager__resume_from_checkpoint="~/old",
    )
    assert found.explicit_log_dir == os.path.expanduser("~/runs")
    assert found.resume_from_checkpoint == os.path.expanduser("~/old")


def test_scores_are_taken_over_for_checkpoints_of_the_folder_alone(tmp_path):
    """Earlier versions named the checkpoints with .ckpt, and in the folder of that time."""
    folder = tmp_path / "checkpoints"
    for name in ("kd-step=1", "kd-step=2", "kd-step=3"):
        (folder / name).mkdir(parents=True)
        (folder / name / CONTENTS).touch()
    found = {
        "/moved/kd-step=1.ckpt": torch.tensor(2.5),
        str(folder / "kd-step=2"): 1.25,
        str(tmp_path / "precious"): 0.0,
    }
    unused: Any = None
    checkpoints = Checkpoints(CheckpointParams(), "kd", folder, {}, {}, unused)
    checkpoints.load_state_dict({"best_k_models": found})
    assert checkpoints.scores == {
        folder / "kd-step=1": 2.5,
        folder / "kd-step=2": 1.25,
    }
    assert checkpoints.best == folder / "kd-step=2"
