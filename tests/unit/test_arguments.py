"""Values as typed, and an answer for every other way to write them; YAML files that cannot be read."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from nemo_kd.cli.aligner_keys import translate
from nemo_kd.cli.arguments import read_command_line
from nemo_kd.cli.compose import check_yaml, compose
from nemo_kd.config import ConfigError
from nemo_kd.config.convert import ConvertCheckpointConfig
from nemo_kd.config.foreign_keys import FOREIGN
from nemo_kd.config.student import TrainStudentConfig
from nemo_kd.config.teacher import ComputeTopkLogitsConfig
from nemo_kd.config.typed import describe, typed

ROOT = Path(__file__).resolve().parents[2]
ODD_PATHS = (
    "run/kd--val_loss=2.1-step=100-last",
    "my data (v2)/x",
    "set[1]/x",
    "données/模型",
    "a#1/x",
    "a,b",
    "it's",
    'say "x"',
    "back\\slash\\",
    "{x}",
    "a: b",
    "f(x)",
    "-5",
    "1e3",
    "true",
    "*",
)


COMMANDS = {
    ComputeTopkLogitsConfig: "compute_topk_logits",
    TrainStudentConfig: "train_gpt_knowledge_distillation",
    ConvertCheckpointConfig: "convert_checkpoint",
}

STAGE_1 = (
    "pretrained_checkpoint.restore_from_path=t",
    "data.data.file_path=d",
    "output_path=o.jsonl",
)


def value_of(key: str, value: str, config_class: type) -> object:
    (override,) = read_command_line(
        [f"{key}={value}"], config_class, COMMANDS[config_class]
    ).overrides
    return OverridesParser.create().parse_override(override).value()


@pytest.mark.parametrize("path", ODD_PATHS)
def test_text_is_taken_as_typed(path):
    assert value_of("output_path", path, ConvertCheckpointConfig) == path
    assert (
        value_of("pretrained_checkpoint.restore_from_path", path, TrainStudentConfig)
        == path
    )
    if path[0] not in "{[":
        assert value_of("data.data.file_path", path, ComputeTopkLogitsConfig) == path


@pytest.mark.parametrize(
    "path", [path for path in ODD_PATHS if path not in ("-5", "1e3", "true")]
)
def test_keys_of_any_type_take_what_the_grammar_cannot_read(path):
    assert value_of(
        "exp_manager.wandb_logger_kwargs.name", path, ComputeTopkLogitsConfig
    ) in (
        path,
        {"x": ""},
    )


def test_numbers_lists_mappings_quotes_and_null_keep_their_meaning():
    assert value_of("top_k", "7", ComputeTopkLogitsConfig) == 7
    assert value_of("end_at_idx", "null", ComputeTopkLogitsConfig) is None
    assert value_of("cache.temperatures", "[1.0, 2]", ComputeTopkLogitsConfig) == [1.0, 2]
    assert value_of("output_path", "'a=b'", ConvertCheckpointConfig) == "a=b"
    assert value_of(
        "model.data.data_prefix",
        "{train: [0.3, a], validation: ['b=1']}",
        TrainStudentConfig,
    ) == {
        "train": [0.3, "a"],
        "validation": ["b=1"],
    }
    assert value_of("model.data.shuffle", "false", TrainStudentConfig) is False
    assert value_of("model.data.shuffle", "chunks", TrainStudentConfig) == "chunks"
    assert value_of("trainer.devices", "auto", TrainStudentConfig) == "auto"
    assert value_of("trainer.devices", "-1", TrainStudentConfig) == -1


@pytest.mark.parametrize(
    ("config_class", "line", "answer"),
    [
        (ComputeTopkLogitsConfig, "top_k 5", "top_k 5: write top_k=5, with ="),
        (
            TrainStudentConfig,
            "learning_rate 1e-4",
            "learning_rate 1e-4: write model.optim.lr=1e-4",
        ),
        (
            TrainStudentConfig,
            "--lr 1e-4",
            "--lr: keys are given as key=value, without dashes: model.optim.lr=1e-4",
        ),
        (
            TrainStudentConfig,
            "--num-train-epochs=3",
            "trainer.knowledge_distillation.max_epochs=3",
        ),
        (TrainStudentConfig, "--model.optim.lr 3", "without dashes: model.optim.lr=3"),
        (
            TrainStudentConfig,
            "--config d/my.yaml",
            "--config: give the folder and the file of a YAML: --config-path d --config-name",
        ),
        (
            TrainStudentConfig,
            "--nonsense",
            "--nonsense: is not an option; keys are given as key=value",
        ),
        (
            ConvertCheckpointConfig,
            "a b",
            "a: arguments are given as key=value: input_path=a output_path=b",
        ),
        (
            ConvertCheckpointConfig,
            "input_path=a b",
            "b: arguments are given as key=value: output_path=b",
        ),
        (ConvertCheckpointConfig, "--dry-run", "--dry-run: is not an option"),
        (ComputeTopkLogitsConfig, "top_k", "top_k: has no value; write top_k=VALUE"),
        (ComputeTopkLogitsConfig, "1x=3", "1x: is not the name of a key"),
        (
            ComputeTopkLogitsConfig,
            "cache.temperatures=2",
            "cache.temperatures: 2 is not a list; give cache.temperatures=[2]",
        ),
        (
            TrainStudentConfig,
            "model.data.data_prefix=x.jsonl",
            "x.jsonl is not a mapping; give each split's paths: model.data.data_prefix.train=x.jsonl",
        ),
        (
            TrainStudentConfig,
            "'model.data.data_prefix={train: [a[1].jsonl]}'",
            "texts that hold brackets, commas or quotes need quotes",
        ),
        (ComputeTopkLogitsConfig, "top-k=5", "given as key=value, here top_k=5;"),
        (ComputeTopkLogitsConfig, "'top_k =5'", "given as key=value, here top_k=5;"),
        (
            ComputeTopkLogitsConfig,
            "cache..codec=json",
            "cache..codec: is not the name of a key",
        ),
        (
            ComputeTopkLogitsConfig,
            "cache/codec=json",
            "cache/codec: is not the name of a key",
        ),
        (ComputeTopkLogitsConfig, "--output '$HOME/a`b'", "'output_path=$HOME/a`b'"),
        (
            TrainStudentConfig,
            "model.data.data_prefix={train:",
            "model.data.data_prefix: {train: cannot be read",
        ),
        (TrainStudentConfig, f"model.data.data_prefix={'[' * 9000}", "cannot be read"),
        (TrainStudentConfig, "--config-name", "--config-name: needs a value"),
        (TrainStudentConfig, "--cfg foo", "--cfg: foo is not one of job, hydra, all"),
        (TrainStudentConfig, "--resolve", "--resolve: goes with --cfg"),
        (
            TrainStudentConfig,
            "--multirun --cfg job",
            "--multirun: does not go with --cfg",
        ),
    ],
)
def test_other_ways_to_write_a_key_are_answered(config_class, line, answer):
    with pytest.raises(ConfigError) as error:
        read_command_line(shlex.split(line), config_class, COMMANDS[config_class])
    assert answer in str(error.value)
    assert "\n" not in str(error.value)


def test_a_path_that_exists_is_no_name_of_a_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher").mkdir()
    with pytest.raises(ConfigError, match="input_path=teacher output_path=out"):
        read_command_line(
            ["teacher", "out"], ConvertCheckpointConfig, "convert_checkpoint"
        )


@pytest.mark.parametrize(
    "path", ["run/val_loss=2.1", "~/b", "#1", "é a/文.jsonl", "it's", "a;b", "$x", "(v2)"]
)
def test_texts_in_lists_and_mappings_need_no_quotes(path):
    value = f"{{train: [0.5, {path}, 0.5, 'q'], validation: {path}}}"
    expected = {"train": [0.5, path, 0.5, "q"], "validation": path}
    assert value_of("model.data.data_prefix", value, TrainStudentConfig) == expected


@pytest.mark.parametrize(
    ("argument", "answer"),
    [
        (
            "data.data=d.jsonl",
            "data.data: d.jsonl is not a mapping of keys; did you mean data.data.file_path?",
        ),
        (
            "cache=3",
            "cache: 3 is not a mapping of keys; its keys are cache.codec, cache.min_probability",
        ),
        (
            "cache.temperatures=[nan]",
            "cache.temperatures: [nan] must be above 0 and finite",
        ),
        (
            "trainer.distributed_timeout_minutes=inf",
            "trainer.distributed_timeout_minutes: inf must be above 0 and",
        ),
        (
            "exp_manager.log_interval_s=nan",
            "exp_manager.log_interval_s: nan must be above 0",
        ),
        (
            "model.seed=99999999999999999999",
            "model.seed: 99999999999999999999 must be from 0 to 4294967295",
        ),
    ],
)
def test_values_that_cannot_work_name_their_key(argument, answer):
    line = read_command_line(
        [*STAGE_1, argument], ComputeTopkLogitsConfig, "compute_topk_logits"
    )
    with pytest.raises(ConfigError) as error:
        typed(ComputeTopkLogitsConfig, compose(line, "compute_topk_logits"))
    assert answer in str(error.value)
    assert "\n" not in str(error.value)


def test_keys_may_stand_for_others_that_have_their_default_in_code():
    line = read_command_line(
        [*STAGE_1, "output_path=${name}.jsonl"],
        ComputeTopkLogitsConfig,
        "compute_topk_logits",
    )
    cfg, _ = translate(
        compose(line, "compute_topk_logits"),
        "compute_topk_logits",
        ComputeTopkLogitsConfig,
    )
    assert typed(ComputeTopkLogitsConfig, cfg).output_path == "compute_topk_logits.jsonl"


def test_every_foreign_name_leads_to_a_key_that_exists():
    classes = (ComputeTopkLogitsConfig, TrainStudentConfig, ConvertCheckpointConfig)
    known = {each.key for config_class in classes for each in describe(config_class)}
    for name, (keys, _) in FOREIGN.items():
        assert any(
            key in known
            or key.rpartition(".")[0] in known
            or key.startswith("exp_manager.")
            for key in keys
        ), name


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("learning_rate", "did you mean model.optim.lr?"),
        (
            "gradient_accumulation_steps",
            "model.global_batch_size? micro_batch_size x data-parallel ranks x accumulation",
        ),
        ("per_device_train_batch_size", "model.micro_batch_size?"),
        (
            "lora_r",
            "model.peft.lora_tuning.adapter_dim? with model.peft.peft_scheme=lora",
        ),
        ("bf16", "trainer.precision? bf16 or 32"),
        ("kd_loss_weight", "model.knowledge_distillation.kd_loss_weight?"),
        ("data_prefix", "model.data.data_prefix.train=FILE"),
    ],
)
def test_names_of_other_trainers_are_answered(key, answer):
    with pytest.raises(ConfigError) as error:
        typed(TrainStudentConfig, OmegaConf.create({key: 1}))
    assert answer in str(error.value)


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    teacher = {
        "pretrained_checkpoint": {"restore_from_path": "~/t"},
        "output_path": "~/c/t_SPLIT.jsonl",
    }
    teacher |= {
        "data": {"data": {"file_path": {"train": "~/d.jsonl", "validation": "v"}}}
    }
    found = typed(
        ComputeTopkLogitsConfig,
        OmegaConf.create({**teacher, "exp_manager": {"explicit_log_dir": "~/log"}}),
    )
    assert found.output_path == "/home/me/c/t_SPLIT.jsonl"
    assert found.pretrained_checkpoint.restore_from_path == "/home/me/t"
    assert found.data.data.file_path == {"train": "/home/me/d.jsonl", "validation": "v"}
    assert found.exp_manager.explicit_log_dir == "/home/me/log"
    prefix = {"train": [0.5, "~/a", 0.5, "b"], "validation": "~/v[:10%]"}
    student = {
        "pretrained_checkpoint": {"restore_from_path": "~"},
        "model": {"data": {"data_prefix": prefix}},
    }
    found = typed(TrainStudentConfig, OmegaConf.create(student))
    assert found.model.data.paths("train") == ["/home/me/a", "b"]
    assert found.model.data.paths("validation") == ["/home/me/v[:10%]"]
    assert (
        typed(
            ConvertCheckpointConfig,
            OmegaConf.create({"input_path": "~/a", "output_path": "b~"}),
        ).input_path
        == "/home/me/a"
    )
    with pytest.raises(
        ConfigError, match="input_path: ~nobody_here/a: there is no user for ~nobody_here"
    ):
        typed(
            ConvertCheckpointConfig,
            OmegaConf.create({"input_path": "~nobody_here/a", "output_path": "b"}),
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", ":3: found duplicate key a"),
        ("a: [1\nb: 2", ":2: "),
        ("- a\n", ":1: a configuration is a mapping"),
        ("a: " + "[" * 5000, ":1: nested more than 50 deep"),
        ("a: &a [*a]\n", ":1: *a stands for something that is not complete"),
        (
            "\n".join(
                f"{n}: &n{n} [{', '.join([f'*n{n - 1}' if n else 'x'] * 10)}]"
                for n in range(9)
            ),
            "more than 100,000 values",
        ),
        ("#" * 1_000_001, "bytes are too many"),
        ("a: \x00", "my.yaml"),
    ],
    ids=["duplicate", "torn", "list", "deep", "circle", "bomb", "large", "control"],
)
def test_yaml_files_that_cannot_be_read_are_named_with_their_line(
    tmp_path, text, message
):
    (tmp_path / "my.yaml").write_text(text)
    line = read_command_line(
        ["--config-path", str(tmp_path), "--config-name", "my"],
        ComputeTopkLogitsConfig,
        "compute_topk_logits",
    )
    with pytest.raises(ConfigError) as error:
        compose(line, "compute_topk_logits")
    assert str(tmp_path / "my.yaml") in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_yaml_files_that_are_not_there_and_interpolations_without_a_key(tmp_path):
    (tmp_path / "my.yaml").write_text(
        "output_path: ${HOME}/x\ntop_k: ${oc.env:NO_SUCH_VARIABLE}\n"
    )
    check_yaml(tmp_path / "my.yaml")
    arguments = ["--config-path", str(tmp_path), "--config-name"]
    with pytest.raises(ConfigError, match=r"there is no your\.yaml in .*; there are: my"):
        compose(
            read_command_line(
                [*arguments, "your"], ComputeTopkLogitsConfig, "compute_topk_logits"
            ),
            "",
        )
    with pytest.raises(
        ConfigError,
        match="my.yaml is a file; give its folder and its name: --config-path",
    ):
        compose(
            read_command_line(
                ["--config-path", str(tmp_path / "my.yaml")],
                ComputeTopkLogitsConfig,
                "compute_topk_logits",
            ),
            "",
        )
    line = [sys.executable, "-m", "nemo_kd.cli.compute_topk_logits", *arguments, "my"]
    result = subprocess.run(
        line, capture_output=True, text=True, check=False, cwd=ROOT, timeout=60
    )
    expected = "error: output_path: ${HOME} stands for a key of that name, and there is none; an environment variable is ${oc.env:HOME}\n"
    assert (result.returncode, result.stderr) == (2, expected)


def test_versions_and_wrong_options():
    def of(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", f"nemo_kd.cli.{module}", *arguments]
        return subprocess.run(
            line, capture_output=True, text=True, check=False, cwd=ROOT, timeout=60
        )

    for module in ("compute_topk_logits", "logit_cache", "plot_runs"):
        assert of(module, "--version").stdout.startswith("nemo_kd ")
    result = of("logit_cache", "inspekt", "x")
    assert result.returncode == 2
    assert result.stderr.startswith(
        "error: argument SUBCOMMAND: invalid choice: 'inspekt'"
    )
