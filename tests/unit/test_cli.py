"""The command line: help, overrides, NeMo-Aligner's keys, errors."""

from __future__ import annotations

import os
import resource
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import yaml

from nemo_kd.cli import (
    compute_topk_logits,
    convert_checkpoint,
    evaluate_gpt,
    train_gpt_knowledge_distillation,
)
from nemo_kd.cli.compose import conf_dir
from nemo_kd.cli.run import help_text
from nemo_kd.config import ConfigError
from nemo_kd.config.shared import TrainerConfig
from nemo_kd.config.student import LOOP
from nemo_kd.config.typed import describe
from nemo_kd.run.launch import needs_launch
from tests.unit.test_conf import run

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [
    module.COMMAND
    for module in (
        compute_topk_logits,
        train_gpt_knowledge_distillation,
        evaluate_gpt,
        convert_checkpoint,
    )
]
MINIMAL = {
    "compute_topk_logits": "pretrained_checkpoint.restore_from_path=t data.data.file_path=d.jsonl output_path=o.jsonl",
    "train_gpt_knowledge_distillation": "pretrained_checkpoint.restore_from_path=s model.data.data_prefix={train:[t],validation:[v]}",
    "evaluate_gpt": "pretrained_checkpoint.restore_from_path=m data.data.file_path=d.jsonl evaluate.output_dir=o",
    "convert_checkpoint": "input_path=a output_path=b",
}
# NeMo-Aligner's user guide, with other paths.
GUIDE_STAGE_1 = """
trainer.num_nodes=1 trainer.devices=8 trainer.precision=bf16
pretrained_checkpoint.restore_from_path=teacher.nemo model.megatron_amp_O2=True model.tensor_model_parallel_size=1
data.chat=True data.sample=True data.num_workers=0 data.data.max_seq_length=4096 data.data.file_path=train.jsonl
data.data.add_eos=False data.data.hf_dataset=True top_k=4 model.global_batch_size=16 model.micro_batch_size=2
start_from_idx=0 end_at_idx=56439 output_path=train_with_logits_0.jsonl
"""
OLDER_GUIDE_STAGE_1 = """
trainer.num_nodes=1 trainer.devices=8 trainer.precision=bf16 pretrained_checkpoint.restore_from_path=teacher.nemo
model.megatron_amp_O2=True model.tensor_model_parallel_size=8 data.chat=True data.sample=True data.num_workers=0
data.data.max_seq_length=4096 data.data.file_path=train.jsonl data.data.add_eos=False data.data.hf_dataset=True
top_k=25 batch_size=16 forward_micro_batch_size=2 start_from_idx=0 output_path=train.jsonl data.data.index_mapping_dir=index
"""
GUIDE_STAGE_2 = """
trainer.num_nodes=1 trainer.devices=8 trainer.precision=bf16 trainer.knowledge_distillation.limit_val_batches=5
trainer.knowledge_distillation.max_steps=100 trainer.knowledge_distillation.val_check_interval=1000
trainer.knowledge_distillation.save_interval=1000 pretrained_checkpoint.restore_from_path=student.nemo
model.megatron_amp_O2=True ++model.tensor_model_parallel_size=1 ++model.pipeline_model_parallel_size=1
model.micro_batch_size=1 model.global_batch_size=128 model.optim.lr=1e-5 model.optim.name=distributed_fused_adam
model.optim.weight_decay=0.01 model.optim.sched.constant_steps=0
model.knowledge_distillation.target_logits_scale=1.0 model.knowledge_distillation.logits_scale=1.0
model.knowledge_distillation.sft_loss_weight=0.4 model.knowledge_distillation.kd_loss_weight=1
model.knowledge_distillation.kd_loss=fwd_kl
"model.data.data_prefix={train: [train_CHUNK_ID.jsonl], validation: [val_CHUNK_ID.jsonl], test: [val_CHUNK_ID.jsonl]}"
++model.data.data_impl=chunked_jsonl ++model.data.n_chunks=1
++"model.data.n_examples_per_chunk={train: 56440, validation: 2938, test: 2938}" ++model.data.seq_length=4096
model.data.splits_string=\\'98,1,1\\' exp_manager.create_wandb_logger=True
exp_manager.wandb_logger_kwargs.name=kd exp_manager.wandb_logger_kwargs.project=kd
exp_manager.explicit_log_dir=results exp_manager.resume_if_exists=True exp_manager.resume_ignore_no_checkpoint=True
exp_manager.checkpoint_callback_params.monitor=val_loss exp_manager.checkpoint_callback_params.save_nemo_on_train_end=True
"""
# Every key of NeMo-Aligner's gpt_knowledge_distillation.yaml with its default.
ALIGNER_STAGE_2 = """
name: megatron_gpt_knowledge_distillation
trainer:
  {num_nodes: 1, devices: 1, accelerator: gpu, precision: bf16, logger: false, enable_checkpointing: false,
   use_distributed_sampler: false, max_time: null, max_epochs: "${.knowledge_distillation.max_epochs}",
   max_steps: "${.knowledge_distillation.max_steps}",
   knowledge_distillation: {max_epochs: 1, max_steps: -1, val_check_interval: 100, save_interval: "${.val_check_interval}",
     limit_train_batches: 1.0, limit_val_batches: 1.0, gradient_clip_val: 1.0}}
exp_manager:
  {explicit_log_dir: null, exp_dir: null, name: "${name}", create_wandb_logger: false,
   wandb_logger_kwargs: {project: null, name: null}, resume_if_exists: true, resume_ignore_no_checkpoint: true,
   create_checkpoint_callback: true, checkpoint_callback_params: {monitor: val_loss, save_top_k: 5, mode: min,
     save_nemo_on_train_end: false, filename: "sft--{${.monitor}:.3f}-{step}-{consumed_samples}-{epoch}",
     model_parallel_size: "${model.tensor_model_parallel_size}", save_best_model: false}}
pretrained_checkpoint: {restore_from_path: null}
model:
  mcore_gpt: true
  micro_batch_size: 1
  global_batch_size: 64
  megatron_amp_O2: true
  tensor_model_parallel_size: 1
  encoder_seq_length: 4096
  peft: {peft_scheme: none, restore_from_path: null, lora_tuning: {target_modules: [attention_qkv], adapter_dim: 32,
    adapter_dropout: 0.0, column_init_method: xavier, row_init_method: zero, layer_selection: null, weight_tying: false,
    position_embedding_strategy: null}}
  optim: {name: distributed_fused_adam, lr: 3e-5, weight_decay: 0.01, betas: [0.9, 0.98],
    sched: {name: CosineAnnealing, warmup_steps: 10, constant_steps: 1000, min_lr: 9e-7}}
  knowledge_distillation: {target_logits_scale: 1.0, logits_scale: 1.0, kd_loss_weight: 1.0, sft_loss_weight: 0.0,
    kd_loss: fwd_kl, cross_tokenizer: false}
  data: {data_impl: chunked_jsonl, n_chunks: null, n_examples_per_chunk: null, splits_string: null,
    seq_length: "${model.encoder_seq_length}", skip_warmup: true, num_workers: 0, dataloader_type: single,
    reset_position_ids: false, reset_attention_mask: false, eod_mask_loss: false, index_mapping_dir: null,
    data_prefix: null, top_k: null}
  overwrite_base_config: {data: {data_prefix: true}}
"""
# Every key of its compute_topk_logits.yaml.
ALIGNER_STAGE_1 = """
name: megatron_gpt_infer_topk_logits
start_from_idx: null
end_at_idx: null
output_path: null
top_k: 100
trainer: {num_nodes: 1, devices: 1, accelerator: gpu, precision: bf16, logger: false, enable_checkpointing: false,
  use_distributed_sampler: false, max_time: null, max_epochs: 1}
pretrained_checkpoint: {restore_from_path: null}
model: {mcore_gpt: true, micro_batch_size: 1, global_batch_size: 1, megatron_amp_O2: true, seed: 1234,
  tensor_model_parallel_size: 1, pipeline_model_parallel_size: 1, restore_from_path: "???", resume_from_checkpoint: null,
  save_nemo_on_validation_end: true, sync_batch_comm: false, encoder_seq_length: 4096, sequence_parallel: false,
  activations_checkpoint_granularity: null, activations_checkpoint_method: null, activations_checkpoint_num_layers: null,
  activations_checkpoint_layers_per_pipeline: null, answer_only_loss: false, gradient_as_bucket_view: false,
  seq_len_interpolation_factor: null, use_flash_attention: null, hidden_dropout: 0.0, attention_dropout: 0.0, ffn_dropout: 0.0}
data:
  chat: false
  chat_prompt_tokens: {system_turn_start: "<extra_id_0>", turn_start: "<extra_id_1>", label_start: "<extra_id_2>",
    end_of_turn: "\\n", end_of_name: "\\n"}
  sample: false
  num_workers: 0
  dataloader_type: single
  data: {file_path: "???", shuffle: true, memmap_workers: null, max_seq_length: "${model.encoder_seq_length}",
    min_seq_length: 1, drop_last: true, label_key: output, add_eos: true, add_sep: false, add_bos: false,
    truncation_field: input, index_mapping_dir: null, prompt_template: "{input} {output}", hf_dataset: false,
    truncation_method: right}
"""


def compose(command: str, line: str, base: str | None = None):
    """The typed configuration of a command line on top of the text of a YAML file."""
    words = shlex.split(line)
    if base is None:
        return run(command, *words)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "base.yaml").write_text(base)
        return run(command, "--config-path", folder, "--config-name", "base", *words)


def command(
    name: str, *arguments: str, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments]
    return subprocess.run(
        line, capture_output=True, text=True, check=False, cwd=cwd, timeout=120
    )


@pytest.mark.parametrize("spec", COMMANDS, ids=lambda spec: spec.name)
def test_help_explains_every_key_within_two_cpu_seconds(spec, tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = command(spec.name, "--help", cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 2
    assert result.returncode == 0
    undocumented = [key.key for key in describe(spec.config_class) if not key.doc]
    assert not undocumented
    for key in describe(spec.config_class):
        assert f"\n  {key.key}  (" in result.stdout
    assert help_text(spec).splitlines()[0] == result.stdout.splitlines()[0]


@pytest.mark.parametrize("spec", COMMANDS, ids=lambda spec: spec.name)
def test_shipped_yaml_composes_from_any_folder_and_leaves_nothing_behind(
    spec, tmp_path
):
    result = command(
        spec.name, "--cfg", "job", *shlex.split(MINIMAL[spec.name]), cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load(result.stdout)
    assert not list(tmp_path.iterdir())
    assert (conf_dir() / f"{spec.name}.yaml").is_file()


def test_own_yaml_is_found_relative_to_the_current_folder(tmp_path):
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "run.yaml").write_text("top_k: 7\n")
    result = command(
        "compute_topk_logits",
        "--config-path",
        "my",
        "--config-name",
        "run",
        "--cfg",
        "job",
        "end_at_idx=3",
        cwd=tmp_path,
    )
    assert yaml.safe_load(result.stdout) == {"top_k": 7, "end_at_idx": 3}


def test_nemo_aligners_guide_runs_unchanged():
    teacher, warnings = compose("compute_topk_logits", GUIDE_STAGE_1)
    assert (teacher.top_k, teacher.end_at_idx, teacher.model.micro_batch_size) == (
        4,
        56439,
        2,
    )
    assert [line.split("=")[0] for line in warnings] == [
        "data.sample",
        "data.data.hf_dataset",
        "model.global_batch_size",
    ]
    older, warnings = compose("compute_topk_logits", OLDER_GUIDE_STAGE_1)
    assert older.model.micro_batch_size == 2
    assert (
        "batch_size=16: data.max_tokens_per_batch and model.micro_batch_size set the"
        in "\n".join(warnings)
    )
    student, warnings = compose("train_gpt_knowledge_distillation", GUIDE_STAGE_2)
    assert student.model.knowledge_distillation.sft_loss_weight == 0.4
    assert student.model.data.paths("test") == ["val_CHUNK_ID.jsonl"]
    assert student.exp_manager.wandb_logger_kwargs == {"name": "kd", "project": "kd"}
    assert [line.split("=")[0] for line in warnings] == [
        "model.data.n_examples_per_chunk.train",
        "model.data.n_examples_per_chunk.validation",
        "model.data.n_examples_per_chunk.test",
        "model.data.splits_string",
    ]


def test_nemo_aligners_yaml_files_are_taken():
    teacher, warnings = compose(
        "compute_topk_logits", MINIMAL["compute_topk_logits"], ALIGNER_STAGE_1
    )
    assert teacher.start_from_idx == 0
    assert teacher.model.max_seq_length == 4096
    assert all("=" in line and ": " in line for line in warnings)
    student, _ = compose(
        "train_gpt_knowledge_distillation",
        MINIMAL["train_gpt_knowledge_distillation"],
        ALIGNER_STAGE_2,
    )
    assert student.trainer.knowledge_distillation.save_interval == 100
    assert student.model.max_seq_length == 4096
    assert (
        student.exp_manager.checkpoint_callback_params.filename
        == "sft--{val_loss:.3f}-{step}-{consumed_samples}-{epoch}"
    )


def test_keys_for_apexs_distributed_optimizer_are_answered():
    _, warnings = compose(
        "train_gpt_knowledge_distillation",
        MINIMAL["train_gpt_knowledge_distillation"]
        + " model.optim.bucket_cap_mb=200 model.optim.overlap_grad_sync=False model.optim.contiguous_grad_bucket=True",
    )
    assert [line.split("=")[0].removeprefix("model.optim.") for line in warnings] == [
        "bucket_cap_mb",
        "overlap_grad_sync",
        "contiguous_grad_bucket",
    ]
    assert all(
        line.endswith(": Megatron Core lays out and reduces gradients by itself")
        for line in warnings
    )


def test_a_warmup_by_ratio_needs_no_other_key():
    student, _ = compose(
        "train_gpt_knowledge_distillation",
        MINIMAL["train_gpt_knowledge_distillation"]
        + " model.optim.sched.warmup_ratio=0.1",
    )
    assert student.model.optim.sched.phases(200)[0] == 20


def test_ignored_keys_tell_why():
    _, warnings = compose(
        "compute_topk_logits", MINIMAL["compute_topk_logits"] + " data.sample=True"
    )
    assert warnings == ["data.sample=True: every example is cached once"]


def test_aliases_must_not_contradict():
    expected = (
        r"forward_micro_batch_size=8 and model\.micro_batch_size=4: both are names of "
        r"model\.micro_batch_size; give one of them"
    )
    with pytest.raises(ConfigError, match=expected):
        compose(
            "compute_topk_logits",
            MINIMAL["compute_topk_logits"]
            + " forward_micro_batch_size=8 model.micro_batch_size=4",
        )
    with pytest.raises(
        ConfigError,
        match=r"^lr=1 and model\.optim\.lr=2: both are names of model\.optim\.lr",
    ):
        compose("train_gpt_knowledge_distillation", "lr=1 model.optim.lr=2")


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        (
            "compute_topk_logits",
            "top_kk=3",
            "top_kk: there is no such key (did you mean top_k?)",
        ),
        ("compute_topk_logits", "model.nope.deep=3", "model.nope.deep"),
        (
            "compute_topk_logits",
            "top_k=0",
            "top_k: 0 must be at least 1 and at most 65535",
        ),
        ("compute_topk_logits", "top_k=many", "top_k: Value 'many'"),
        (
            "compute_topk_logits",
            "n_examples_per_chunk=5",
            "has no CHUNK_ID, which n_examples_per_chunk=5 needs",
        ),
        (
            "compute_topk_logits",
            "start_from_idx=5 end_at_idx=4",
            "end_at_idx: 4 is before start_from_idx 5",
        ),
        (
            "compute_topk_logits",
            "trainer.precision=fp8",
            "trainer.precision: 'fp8' is not one of",
        ),
        (
            "compute_topk_logits",
            "model.pipeline_model_parallel_size=0",
            "model.pipeline_model_parallel_size: 0 must be at least 1",
        ),
        (
            "train_gpt_knowledge_distillation",
            "model.virtual_pipeline_model_parallel_size=2",
            "virtual_pipeline_model_parallel_size: 2 with model.pipeline_model_parallel_size=1 interleaves nothing",
        ),
        (
            "train_gpt_knowledge_distillation",
            "model.knowledge_distillation.kd_loss=fkl",
            "'fkl' is not one of forward_kl, reverse_kl, jsd, skewed_forward_kl",
        ),
        (
            "train_gpt_knowledge_distillation",
            "model.knowledge_distillation.kd_loss_weight=0",
            "are both 0",
        ),
        (
            "train_gpt_knowledge_distillation",
            "model.data.data_impl=dataset",
            "has no teacher logits",
        ),
        (
            "train_gpt_knowledge_distillation",
            "model.data.data_impl=mmap",
            "'mmap' is not one of chunked_jsonl, jsonl, json, dataset",
        ),
        (
            "train_gpt_knowledge_distillation",
            "model.data.dataset.file_path=d.jsonl",
            "file_path: d.jsonl is not read; name",
        ),
        ("train_gpt_knowledge_distillation", "model.optim.lr=null", "model.optim.lr"),
        (
            "train_gpt_knowledge_distillation",
            "'model.data.data_prefix={train: [a]}'",
            "no validation data",
        ),
        (
            "train_gpt_knowledge_distillation",
            "model.peft.peft_scheme=ptuning",
            "'ptuning' is not one of none, lora",
        ),
        (
            "train_gpt_knowledge_distillation",
            "model.optim.name=sgd",
            "'sgd' is not one of distributed_fused_adam",
        ),
        *(
            (
                "train_gpt_knowledge_distillation",
                f"'{LOOP}.{key}={value}'",
                f"{LOOP}.{key}: {value} must",
            )
            for key, value in (
                ("max_steps", -7),
                ("limit_train_batches", 0),
                ("limit_train_batches", -3),
                ("limit_val_batches", -1),
                ("gradient_clip_val", -1.0),
                ("log_every_n_steps", 0),
            )
        ),
        *(
            (
                "train_gpt_knowledge_distillation",
                f"'model.data.n_chunks={value}'",
                "is neither a number of chunks nor one",
            )
            for value in ("two", "1.5", "[1, 1]", "{trian: 2}", "{train: 0}", "true")
        ),
        (
            "train_gpt_knowledge_distillation",
            "model.data.seq_length=0",
            "model.max_seq_length: 0 must be at least 2",
        ),
        (
            "train_gpt_knowledge_distillation",
            "model.data.dataset.format=foo",
            "model.data.dataset.format: 'foo' is not",
        ),
        (
            "compute_topk_logits",
            "data.data.format=foo",
            "data.data.format: 'foo' is not one of",
        ),
    ],
)
def test_wrong_values_are_named(name, override, message):
    with pytest.raises(ConfigError) as error:
        compose(name, f"{MINIMAL[name]} {override}")
    assert message in str(error.value)


def test_the_command_ends_with_the_message_and_status_2(tmp_path):
    result = command(
        "compute_topk_logits",
        *shlex.split(MINIMAL["compute_topk_logits"]),
        "trainer.devices=2",
        "top_kk=1",
        cwd=tmp_path,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: top_kk: there is no such key (did")
    assert "Traceback" not in result.stderr


def test_hydras_rerun_which_unpickles_is_no_option(tmp_path):
    (tmp_path / "config.pickle").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    result = command(
        "compute_topk_logits",
        "--experimental-rerun",
        str(tmp_path / "config.pickle"),
        cwd=tmp_path,
    )
    assert result.returncode == 2
    assert "--experimental-rerun: arguments are given as key=value" in result.stderr
    assert not (tmp_path / "ran").exists()


def test_mandatory_keys_that_a_yaml_leaves_null_are_named():
    with pytest.raises(
        ConfigError,
        match=r"mandatory keys have no value: .*output_path, pretrained_checkpoint\.restore",
    ):
        compose("compute_topk_logits", "data.data.file_path=d.jsonl", ALIGNER_STAGE_1)


def test_launching(monkeypatch):
    for variable in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    assert not needs_launch(TrainerConfig(devices=1))
    assert needs_launch(TrainerConfig(devices=2))
    with pytest.raises(
        ConfigError, match=r"trainer\.num_nodes: 2 machines need a launcher"
    ):
        needs_launch(TrainerConfig(num_nodes=2))
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert needs_launch(TrainerConfig(devices=2))
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_LOCALID", "0")
    assert not needs_launch(TrainerConfig(num_nodes=2, devices=2))


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "job.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"job\.yaml: .*codec can't decode"):
        run(
            "compute_topk_logits",
            "--config-path",
            str(tmp_path),
            "--config-name",
            "job",
        )


def test_megatrons_plans_for_gptmodel_are_not_shown_but_its_other_warnings_are():
    code = """
import logging
from nemo_kd.cli.run import configure_logging
configure_logging()
logging.getLogger("megatron.core.models.gpt.gpt_model").warning("GPTModel IS DEPRECATED")
logging.getLogger("megatron.core.optimizer").warning("another warning")
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stderr == "another warning\n"


def test_while_libraries_load_nothing_is_collected_and_without_gpu_nothing_compiled(
    tmp_path: Path,
):
    (tmp_path / "library.py").write_text(
        "import gc, os, torch\n"
        "def function(): pass\n"
        "def is_compiled():\n"
        "    return torch.compile(function) is not function\n"
        "at_import = gc.isenabled(), is_compiled()\n"
        "def main(config):\n"
        "    print(gc.get_freeze_count() > 10_000, 'TORCHDYNAMO_DISABLE' in os.environ)\n"
        "    print(at_import, (gc.isenabled(), is_compiled()))\n"
    )
    program = (
        "from dataclasses import replace\n"
        "from nemo_kd.cli import convert_checkpoint, run\n"
        "command = convert_checkpoint.COMMAND\n"
        "command = replace(command, check=print, function='library:main')\n"
        "run.run(command, ['input_path=a', 'output_path=b'])\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    has_gpu = torch.cuda.is_available()
    assert found.stdout.splitlines()[-2:] == [
        "True False",
        f"(False, {has_gpu}) (True, True)",
    ], found.stderr
