"""Values as typed, and an answer for every other way to write them; YAML files that cannot be read."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_kd.cli.compose import compose, conf_dir, option_parser, read_argument
from nemo_kd.config import ConfigError
from nemo_kd.config.convert import ConvertCheckpointConfig
from nemo_kd.config.student import TrainStudentConfig
from nemo_kd.config.teacher import ComputeTopkLogitsConfig
from nemo_kd.config.typed import FOREIGN_NAMES, describe, typed

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
    name, found = read_argument(f"{key}={value}", COMMANDS[config_class], config_class)
    assert name == key
    return found


def config_of(config_class: type, *arguments: str):
    options, keys = option_parser().parse_known_args(arguments)
    cfg, _ = compose(options, keys, COMMANDS[config_class], config_class)
    return typed(config_class, cfg)


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
        {"x": None},
    )


def test_numbers_lists_mappings_quotes_and_null_keep_their_meaning():
    assert value_of("top_k", "7", ComputeTopkLogitsConfig) == 7
    assert value_of("end_at_idx", "null", ComputeTopkLogitsConfig) is None
    assert value_of("cache.temperatures", "[1.0, 2]", ComputeTopkLogitsConfig) == [
        1.0,
        2,
    ]
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
        (
            ComputeTopkLogitsConfig,
            "top_k 5",
            "top_k: arguments are given as key=value",
        ),
        (TrainStudentConfig, "--lr 1e-4", "--lr: arguments are given as key=value"),
        (
            TrainStudentConfig,
            "--lr 1e-4",
            "(did you mean model.optim.lr?); --help lists",
        ),
        (TrainStudentConfig, "--num-train-epochs=3", "distillation.max_epochs?"),
        (ConvertCheckpointConfig, "a b", "a: arguments are given as key=value"),
        (ComputeTopkLogitsConfig, "top_k", "dashes and blanks; --help lists"),
        (ComputeTopkLogitsConfig, "1x=3", "1x: arguments are given as key=value"),
        (ComputeTopkLogitsConfig, "top-k=5", "(did you mean top_k?)"),
        (ComputeTopkLogitsConfig, "'top_k =5'", "(did you mean top_k?)"),
        (ComputeTopkLogitsConfig, "cache..codec=json", "(did you mean cache.codec?)"),
        (ComputeTopkLogitsConfig, "cache/codec=json", "(did you mean cache.codec?)"),
        (ConvertCheckpointConfig, "--dry-run", "dry_run: there is no such key"),
        (
            ComputeTopkLogitsConfig,
            "cache.temperatures=2",
            "cache.temperatures: 2 is not a list; give [2]",
        ),
        (
            TrainStudentConfig,
            "model.data.data_prefix=x.jsonl",
            "; give each split's paths: model.data.data_prefix.train=FILE",
        ),
        (
            TrainStudentConfig,
            "'model.data.data_prefix={train: [a[1].jsonl]}'",
            "texts that hold brackets, commas or quotes need quotes",
        ),
        (
            TrainStudentConfig,
            "model.data.data_prefix={train:",
            "model.data.data_prefix: {train: cannot be read",
        ),
        (TrainStudentConfig, "data={train:[a]}", "data.train: there is no such key"),
        (
            ComputeTopkLogitsConfig,
            "--config-name recipes/nix",
            "nix.yaml in {conf}; there are: recipes/qwen3_8b_to_0.6b_compute_topk_logits,",
        ),
        (
            ComputeTopkLogitsConfig,
            "--config-path none",
            "there are: none (--config-path . reads the current folder)",
        ),
    ],
)
def test_arguments_that_cannot_be_read_are_answered(config_class, line, answer):
    with pytest.raises(ConfigError) as error:
        config_of(config_class, *shlex.split(line))
    assert answer.replace("{conf}", str(conf_dir())) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "path", ["run/val_loss=2.1", "~/b", "é a/文.jsonl", "it's", "a;b", "$x", "(v2)"]
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
            "data.data: there is no such key (did you mean data.data.file_path? ",
        ),
        (
            "cache=3",
            "cache: there is no such key",
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
    ],
)
def test_values_that_cannot_work_name_their_key(argument, answer):
    with pytest.raises(ConfigError) as error:
        config_of(ComputeTopkLogitsConfig, *STAGE_1, argument)
    assert answer in str(error.value)
    assert "\n" not in str(error.value)


def test_keys_may_stand_for_others_that_have_their_default_in_code():
    config = config_of(ComputeTopkLogitsConfig, *STAGE_1, "output_path=${name}.jsonl")
    assert config.output_path == "compute_topk_logits.jsonl"


def test_every_foreign_name_leads_to_a_key_that_exists():
    classes = (ComputeTopkLogitsConfig, TrainStudentConfig, ConvertCheckpointConfig)
    known = {each.key for config_class in classes for each in describe(config_class)}
    for line in FOREIGN_NAMES.strip().splitlines():
        assert line.startswith(" ") or any(
            key in known
            or key.rpartition(".")[0] in known
            or key.startswith("exp_manager.")
            for key in line.partition(" | ")[0].split()
        ), line


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("learning_rate", "did you mean model.optim.lr?"),
        ("batch_size", "did you mean model.global_batch_size?"),
        ("modell", "did you mean pretrained_checkpoint.restore_from_path?"),
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


KD = "model.knowledge_distillation"


@pytest.mark.parametrize(
    ("argument", "answer"),
    [
        # ROLL
        ("distill_loss_weight=0.85", f"{KD}.kd_loss_weight=0.85 {KD}.sft_loss_weight=0.15)"),
        ("kd_temperature=4", f"{KD}.temperature=4; with a teacher_temperature: the scales 0.25 and 1/(4"),
        ("teacher_temperature=4", f"{KD}.target_logits_scale=0.25; with a kd_temperature"),
        ("kd_objective=reverse_kl", f"{KD}.kd_loss=reverse_kl {KD}.support=renormalize)"),
        ("skew_lambda=0.1", f"{KD}.skew_lambda?)"),
        ("adaptive_kl_alpha=0.1", f"{KD}.adaptive_kl_alpha?)"),
        ("logits_topk=64", "model.data.top_k?)"),
        ("student.training_args.learning_rate=1e-5", "model.optim.lr?)"),
        ("student.training_args.max_grad_norm=1", "distillation.gradient_clip_val?)"),
        ("student.model_args.dtype=bf16", "trainer.precision? bf16 or 32)"),
        ("student_pretrain=x", "pretrained_checkpoint.restore_from_path?)"),
        ("exp_name=x", "name?)"),
        ("sequence_length=4096", "model.max_seq_length?)"),
        ("num_gpus_per_node=8", "trainer.devices? a number, or auto)"),
        # slime, as keys and as options
        ("kl_loss_coef=0.5", f"{KD}.kd_loss_weight=0.5 {KD}.sft_loss_weight=1)"),
        ("--kl-loss-coef=0.5", f"{KD}.kd_loss_weight=0.5 {KD}.sft_loss_weight=1)"),
        ("--kl-loss-coef", f"{KD}.kd_loss_weight=W {KD}.sft_loss_weight=1)"),
        ("kl_loss_type=low_var_kl", f"{KD}.kd_loss=low_var_kl)"),
        ("use_kl_loss=true", f"{KD}.kd_loss_weight? above 0)"),
        ("loss_type=sft_loss", f"sft_loss: {KD}.kd_loss_weight=0 {KD}.sft_loss_weight=1;"),
        ("custom_loss_function_path=a.b", f"{KD}.custom_loss=a.b {KD}.kd_loss=custom)"),
        ("distill_alpha=0.25", f"{KD}.sft_loss_weight=0.25 {KD}.kd_loss_weight=0.75)"),
        ("distill_temperature=2", f"{KD}.temperature=2 {KD}.multiply_by_squared_temperature=true)"),
        ("max_tokens_per_gpu=9216", "model.data.max_tokens_per_batch?)"),
        ("use_dynamic_batch_size=true", "model.data.max_tokens_per_batch? tokens on a rank; it"),
        ("rollout_batch_size=128", "model.global_batch_size? every step reads one global batch)"),
        ("num_epoch=3", "trainer.knowledge_distillation.max_epochs?)"),
        ("prompt_data=a.jsonl", "model.data.data_prefix.train=FILE)"),
        ("label_key=x", "model.data.dataset.label_key?)"),
        ("tool_key=x", "model.data.dataset.tools_key?)"),
        ("loss_mask_type=qwen3", "model.data.dataset.loss_mask? qwen: qwen; qwen3: per_turn;"),
        ("calculate_per_token_loss=true", f"{KD}.reduction? true: token; false: sample)"),
        ("rollout_function_path=a.b", "model.data.dataset.record_function? package.function of"),
        ("input_key=x", "model.data.dataset.input_key?)"),
        ("question_key=x", "model.data.dataset.question_key?)"),
        ("hf_checkpoint=x", "pretrained_checkpoint.restore_from_path?)"),
        ("ref_load=x", "of compute_topk_logits if it is the teacher)"),
        ("lr_warmup_fraction=0.1", "model.optim.sched.warmup_ratio?)"),
        ("clip_grad=1", "trainer.knowledge_distillation.gradient_clip_val?)"),
        ("recompute_num_layers=1", "model.activations_checkpoint_num_layers?)"),
        ("actor_num_gpus_per_node=8", "trainer.devices? a number, or auto)"),
        ("wandb_group=g", "exp_manager.wandb_logger_kwargs.group? with"),
        # of the other stage
        ("n_examples_per_chunk=8", "there is no such key"),
        ("chunk_size=8", "(see n_examples_per_chunk of another command)"),
    ],
)  # fmt: skip
def test_keys_of_slime_and_roll_are_answered_with_key_and_value(argument, answer):
    with pytest.raises(ConfigError) as error:
        config_of(TrainStudentConfig, argument)
    assert answer in str(error.value)


def test_keys_of_the_other_stage_are_named():
    for argument, answer in (
        ("distill_loss_weight=0.5", f"(see {KD}.kd_loss_weight of another command)"),
        ("kd_temperature=2", "(did you mean cache.temperatures? [2])"),
        ("teacher_pretrain=t", "pretrained_checkpoint.restore_from_path?)"),
        ("max_tokens_per_gpu=9216", "(did you mean data.max_tokens_per_batch?)"),
    ):
        with pytest.raises(ConfigError) as error:
            config_of(ComputeTopkLogitsConfig, *STAGE_1, argument)
        assert answer in str(error.value)


def test_keys_of_slime_that_need_nothing_do_nothing():
    line = ["disable_compute_advantages_and_returns=true", "debug_train_only=true"]
    options, keys = option_parser().parse_known_args(
        [*line, "logits_transfer_backend=ray"]
    )
    _, warnings = compose(
        options, keys, COMMANDS[TrainStudentConfig], TrainStudentConfig
    )
    assert warnings == [
        "logits_transfer_backend=ray: the cache carries the teacher's logits"
    ]


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
    paths = {split: part.data.data.file_path for split, part in found.splits().items()}
    assert paths == {"train": "/home/me/d.jsonl", "validation": "v"}
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3"),
        ("a: [1\nb: 2", "line 2"),
        ("a: \x00", "my.yaml"),
    ],
    ids=["duplicate", "torn", "control"],
)
def test_yaml_files_that_cannot_be_read_are_named_with_their_line(
    tmp_path, text, message
):
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        config_of(
            ComputeTopkLogitsConfig, f"--config-path={tmp_path}", "--config-name", "my"
        )
    assert str(tmp_path / "my.yaml") in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_interpolations_without_a_key(tmp_path):
    (tmp_path / "my.yaml").write_text(
        "output_path: ${HOME}/x\ntop_k: ${oc.env:NO_SUCH_VARIABLE}\n"
    )
    arguments = ["--config-path", str(tmp_path), "--config-name", "my"]
    line = [sys.executable, "-m", "nemo_kd.cli.compute_topk_logits", *arguments]
    result = subprocess.run(
        line, capture_output=True, text=True, check=False, cwd=ROOT, timeout=60
    )
    expected = "error: output_path: Interpolation key 'HOME' not found; an environment variable is ${oc.env:NAME}\n"
    assert (result.returncode, result.stderr) == (2, expected)


def test_versions_and_wrong_options():
    def of(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", f"nemo_kd.cli.{module}", *arguments]
        return subprocess.run(
            line, capture_output=True, text=True, check=False, cwd=ROOT, timeout=60
        )

    for module in (
        "compute_topk_logits",
        "filter_sft_data",
        "logit_cache",
        "plot_runs",
        "preprocess_openassistant",
    ):
        assert of(module, "--version").stdout.startswith("nemo_kd ")
    result = of("logit_cache", "inspekt", "x")
    assert result.returncode == 2
    assert result.stderr.startswith(
        "error: argument SUBCOMMAND: invalid choice: 'inspekt'"
    )
