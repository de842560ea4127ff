"""What needs no model fails before torch is imported, within a second, in the process that starts the ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_kd.cli import (
    compute_topk_logits,
    convert_checkpoint,
    evaluate_gpt,
    train_gpt_knowledge_distillation,
)
from nemo_kd.config import ConfigError, UserInputError
from nemo_kd.config.convert import ConvertCheckpointConfig
from nemo_kd.config.data import DatasetConfig
from nemo_kd.config.evaluation import (
    EvaluateGPTConfig,
    EvaluationConfig,
    EvaluationDataConfig,
)
from nemo_kd.config.exp_manager import ExpManagerConfig
from nemo_kd.config.student import (
    StudentDataConfig,
    StudentModelConfig,
    StudentTrainerConfig,
    TrainStudentConfig,
)
from nemo_kd.config.teacher import (
    ComputeTopkLogitsConfig,
    PretrainedCheckpoint,
    RunConfig,
    TeacherDataConfig,
    TeacherModelConfig,
    TrainerConfig,
)

ROOT = Path(__file__).resolve().parents[2]


COMMANDS = (
    compute_topk_logits.COMMAND,
    train_gpt_knowledge_distillation.COMMAND,
    convert_checkpoint.COMMAND,
)


def check_before_start(config) -> None:
    (command,) = (one for one in COMMANDS if one.config_class is type(config))
    command.check(config)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    (tmp_path / "file").write_text("{}\n")
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "state.json").touch()
    for number in range(2):
        (tmp_path / f"train_{number}.jsonl").write_text("{}\n")
    return tmp_path


def teacher(
    model="model",
    data="file",
    output="cache/t_CHUNK_ID.jsonl",
    log=None,
    devices=1,
    tensor=1,
    max_time=None,
):
    return ComputeTopkLogitsConfig(
        output_path=output,
        pretrained_checkpoint=PretrainedCheckpoint(model),
        data=TeacherDataConfig(data=DatasetConfig(file_path=data)),
        trainer=TrainerConfig(devices=devices),
        model=TeacherModelConfig(tensor_model_parallel_size=tensor),
        exp_manager=RunConfig(explicit_log_dir=log, max_time_per_run=max_time),
    )


def student(
    model="model",
    train="train_CHUNK_ID.jsonl",
    log="log",
    devices=1,
    tensor=1,
    batch=8,
    impl="chunked_jsonl",
):
    weights = {"kd_loss_weight": 0.0, "sft_loss_weight": 1.0}
    validation = "train_0.jsonl@[:1]" if impl == "dataset" else "train_0.jsonl[:1]"
    config = StudentModelConfig(
        tensor_model_parallel_size=tensor,
        global_batch_size=batch,
        data=StudentDataConfig(data_prefix={"train": train, "validation": validation}),
    )
    for name, value in weights.items():
        setattr(config.knowledge_distillation, name, value)
    config.data.data_impl = impl
    return TrainStudentConfig(
        trainer=StudentTrainerConfig(devices=devices),
        pretrained_checkpoint=PretrainedCheckpoint(model),
        model=config,
        exp_manager=ExpManagerConfig(explicit_log_dir=log),
    )


def test_what_can_work_passes(here):
    for config in (
        teacher(),
        teacher(data="file@[:1]"),
        teacher(data=["file", "train_*.jsonl@[-1:]", "s3://bucket/train.jsonl"]),
        teacher(data="dataset"),
        student(train="file@[:1]", impl="dataset"),
        student(),
        student(train=["train_1.jsonl", "train_CHUNK_ID.jsonl[0:1]"]),
    ):
        check_before_start(config)
    check_before_start(ConvertCheckpointConfig("model", "new/model.nemo"))
    assert sorted(path.name for path in here.iterdir()) == [
        "dataset",
        "file",
        "model",
        "train_0.jsonl",
        "train_1.jsonl",
    ]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            lambda: teacher(model="none"),
            "pretrained_checkpoint.restore_from_path: none does not exist or may not be read; give",
        ),
        (lambda: teacher(model="."), "restore_from_path: . is neither a Hugging Face"),
        (
            lambda: student(model="file"),
            "restore_from_path: file is neither a Hugging",
        ),
        (
            lambda: ConvertCheckpointConfig(".", "b"),
            "input_path: . is neither a Hugging",
        ),
        (
            lambda: teacher(data="none.jsonl"),
            "data.data.file_path: none.jsonl: expected a regular file, found none; check",
        ),
        (
            lambda: teacher(data="model"),
            "data.data.file_path: model: a folder, but none that `datasets` saved; of a folder of",
        ),
        (
            lambda: teacher(data=["file", "none_*.jsonl"]),
            "data.data.file_path: none_*.jsonl: no file matches this pattern",
        ),
        (
            lambda: teacher(data="none.jsonl@[:5]"),
            "data.data.file_path: none.jsonl: expected a regular file, found none; check",
        ),
        (
            lambda: teacher(output="c/t.jsonl.gz"),
            "output_path: c/t.jsonl.gz ends in none of .jsonl.zst, .jsonl, .json",
        ),
        (
            lambda: teacher(output="file/t.jsonl"),
            "output_path: file cannot be written: ",
        ),
        (lambda: teacher(output="CHUNK_ID/t.jsonl"), "CHUNK_ID stands in the folder"),
        (
            lambda: teacher(log="file"),
            "exp_manager.explicit_log_dir: file cannot be written: ",
        ),
        (
            lambda: teacher(devices=2, tensor=3),
            "3 x 1 x 1 = 3 does not divide the 2 ranks",
        ),
        (
            lambda: teacher(max_time="1h"),
            "exp_manager.max_time_per_run: '1h' is not DD:HH:MM:SS",
        ),
        (
            lambda: student(model="none"),
            "pretrained_checkpoint.restore_from_path: none does not exist",
        ),
        (
            lambda: student(train="none/t_CHUNK_ID.jsonl"),
            "model.data.data_prefix.train: there is no file none/t_CHUNK_ID.jsonl; give",
        ),
        (
            lambda: student(train="tarin_CHUNK_ID.jsonl"),
            "train: there is no file tarin_CHUNK_ID.jsonl; give the output_path",
        ),
        (
            lambda: student(train="none.jsonl", impl="dataset"),
            "model.data.data_prefix.train: none.jsonl: expected a regular file, found none",
        ),
        (
            lambda: student(log="file/log"),
            "exp_manager.explicit_log_dir: file/log cannot be written: ",
        ),
        (
            lambda: student(devices=2, batch=3),
            "model.global_batch_size: 3 must be a multiple of",
        ),
        (lambda: student(devices=3, tensor=2), "does not divide the 3 ranks"),
        (
            lambda: ConvertCheckpointConfig("none", "b"),
            "input_path: none does not exist",
        ),
        (
            lambda: ConvertCheckpointConfig("model", "file"),
            "output_path: {here}/file exists; give another path or overwrite",
        ),
        (
            lambda: ConvertCheckpointConfig("model", "file/b"),
            "output_path: {here}/file cannot be written",
        ),
    ],
)
def test_what_cannot_work_names_its_key(here, config, message):
    with pytest.raises(UserInputError) as error:
        check_before_start(config())
    assert message.format(here=here) in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folders_without_permission_are_named(here):
    (here / "closed").mkdir(mode=0o500)
    with pytest.raises(
        ConfigError,
        match="output_path: closed/a cannot be written: .*/closed is no folder in which you may",
    ):
        check_before_start(teacher(output="closed/a/t.jsonl"))


@pytest.mark.parametrize(
    ("module", "keys"),
    [
        (
            "compute_topk_logits",
            "pretrained_checkpoint.restore_from_path=none data.data.file_path=file output_path=t.jsonl",
        ),
        (
            "train_gpt_knowledge_distillation",
            "pretrained_checkpoint.restore_from_path=none model.data.data_prefix={train:[a],validation:[b]}",
        ),
        ("convert_checkpoint", "input_path=none output_path=b.nemo"),
    ],
)
def test_torch_is_not_imported_for_it_and_no_rank_is_started(here, module, keys):
    devices = ["trainer.devices=2"] if module != "convert_checkpoint" else []
    code = (
        f"import atexit, json, sys; sys.argv = {[module, *keys.split(), *devices]!r}\n"
        "heavy = ('torch', 'lightning', 'transformers')\n"
        "atexit.register(lambda: print(json.dumps([n for n in heavy if n in sys.modules])))\n"
        f"from nemo_kd.cli.{module} import main; main()\n"
    )
    started_s = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert result.returncode == 2, result.stderr
    assert json.loads(result.stdout) == []
    assert result.stderr.count("\n") == 1
    assert "none does not exist" in result.stderr
    assert (
        time.monotonic() - started_s < 10
    )  # a second on a quiet machine; importing torch and Megatron takes longer


@pytest.mark.parametrize(
    "data",
    [
        "file",
        "file@[:1]",
        "train_?.jsonl",
        ["file", "train_*.jsonl@[-1:]"],
        "saved",
        "memory://anywhere.jsonl",
        "s3://bucket/*.parquet@[3:]",
    ],
)
def test_every_kind_of_dataset_passes_and_what_is_missing_does_not(here, data):
    """URLs are asked later."""
    (here / "saved").mkdir()
    (here / "saved" / "state.json").touch()
    check_before_start(teacher(data=data))
    evaluation = EvaluateGPTConfig(
        pretrained_checkpoint=PretrainedCheckpoint("model"),
        data=EvaluationDataConfig(data=DatasetConfig(file_path=data)),
        evaluate=EvaluationConfig(output_dir="out"),
    )
    evaluate_gpt.COMMAND.check(evaluation)
    names = data if isinstance(data, list) else [data]
    training = student(train=names, impl="dataset")
    training.model.data.data_prefix["validation"] = "train_0.jsonl@[:1]"
    check_before_start(training)
    with pytest.raises(
        UserInputError, match=r"data\.data\.file_path: missing: expected"
    ):
        check_before_start(teacher(data=["file", "missing@[:2]"]))
    with pytest.raises(UserInputError, match="no file matches this pattern"):
        check_before_start(teacher(data="none_*.jsonl"))
