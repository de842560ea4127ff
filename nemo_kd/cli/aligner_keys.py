"""Other names of keys, and NeMo-Aligner's keys that have no effect here.

Every key in the two YAML files and the guide of NeMo-Aligner is a field of the configuration, an
alias of one, or listed here, so that its command lines and files run unchanged.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from nemo_kd.config import ConfigError

_IGNORED = """
both:
  trainer.logger: ["nemo_kd configures the Trainer itself", false, null]
  trainer.enable_checkpointing: ["nemo_kd configures the Trainer itself", false, null]
  trainer.use_distributed_sampler: ["nemo_kd configures the Trainer itself", false, null]
  trainer.max_time: ["use exp_manager.max_time_per_run", null]
  model.mcore_gpt: ["every model is a Megatron Core model", true]
  model.megatron_amp_O2:
    ["with bf16 the weights are bf16 and the optimizer keeps float32 copies", true]
  model.restore_from_path: ["the model is read from pretrained_checkpoint.restore_from_path", null]
  model.resume_from_checkpoint:
    ["a run resumes from its own log folder (exp_manager.resume_if_exists)", null]
  model.save_nemo_on_validation_end:
    ["the .nemo archive is written at the end of training", true, false]
  model.sync_batch_comm: ["Megatron Core decides", false]
  model.gradient_as_bucket_view: ["Megatron Core's gradient buffers always are", false, true]
  model.answer_only_loss: ["the loss mask comes from the data format", false, true]
  model.seq_len_interpolation_factor: ["the model's own value is used", null]
  model.use_flash_attention: ["the model's own value is used", null]
  model.hidden_dropout: ["distillation runs without dropout", 0.0, null]
  model.attention_dropout: ["distillation runs without dropout", 0.0, null]
  model.ffn_dropout: ["distillation runs without dropout", 0.0, null]
  model.dist_ckpt_load_strictness: ["checkpoints are always loaded strictly"]
  model.activations_checkpoint_layers_per_pipeline:
    ["model.activations_checkpoint_num_layers holds for every stage", null]
compute_topk_logits:
  trainer.max_epochs: ["the teacher reads the dataset once", 1]
  model.activations_checkpoint_granularity: ["the teacher runs no backward pass", null]
  model.activations_checkpoint_method: ["the teacher runs no backward pass", null]
  model.activations_checkpoint_num_layers: ["the teacher runs no backward pass", null]
  model.global_batch_size: ["data.max_tokens_per_batch and model.micro_batch_size set the batches"]
  batch_size: ["data.max_tokens_per_batch and model.micro_batch_size set the batches"]
  data.sample: ["every example is cached once", false]
  data.dataloader_type: ["examples are cached in the dataset's order", "single"]
  data.data.shuffle: ["examples are cached in the dataset's order; training shuffles", false]
  data.data.drop_last: ["no example is dropped", false]
  data.data.hf_dataset: ["JSONL files are read by byte offsets", false]
  data.data.memmap_workers: ["JSONL files are read by byte offsets", null]
  data.data.index_mapping_dir: ["no index files are written for datasets", null]
  data.data.concat_sampling_probabilities: ["every split has its own cache", null]
train_gpt_knowledge_distillation:
  trainer.max_epochs: ["use trainer.knowledge_distillation.max_epochs"]
  trainer.max_steps: ["use trainer.knowledge_distillation.max_steps"]
  trainer.knowledge_distillation.inference_metrics: ["no metric needs generation", null]
  model.peft.lora_tuning.weight_tying: ["every layer has its own adapters", false, null]
  model.peft.lora_tuning.position_embedding_strategy: ["every layer has its own adapters", null]
  model.optim.average_grad_sync: ["Megatron Core lays out and reduces gradients by itself"]
  model.optim.bucket_cap_mb: ["Megatron Core lays out and reduces gradients by itself"]
  model.optim.contiguous_grad_bucket: ["Megatron Core lays out and reduces gradients by itself"]
  model.optim.contiguous_param_bucket: ["Megatron Core lays out and reduces gradients by itself"]
  model.optim.grad_sync_dtype: ["Megatron Core lays out and reduces gradients by itself"]
  model.optim.overlap_grad_sync: ["Megatron Core lays out and reduces gradients by itself"]
  model.optim.overlap_param_sync: ["Megatron Core lays out and reduces gradients by itself"]
  model.overwrite_base_config: ["the checkpoint's architecture is never overwritten by this file"]
  model.data.n_examples_per_chunk: ["every chunk has its own index", null]
  model.data.splits_string: ["data_prefix names the file of every split", null]
  model.data.skip_warmup: ["there is nothing to warm up", true]
  model.data.dataloader_type: ["use model.data.shuffle", "single"]
  model.data.reset_position_ids: ["every example has its own positions", false, true]
  model.data.reset_attention_mask: ["every example has its own attention", false, true]
  model.data.eod_mask_loss: ["the cache holds the loss mask", false]
  model.data.index_mapping_dir: ["the index lies beside each chunk", null]
  exp_manager.checkpoint_callback_params.model_parallel_size: ["checkpoints load in any layout"]
  exp_manager.checkpoint_callback_params.filepath: ["dirpath and filename give the place", null]
  exp_manager.checkpoint_callback_params.every_n_epochs:
    ["trainer.knowledge_distillation.save_interval sets the steps", 1, null]
  exp_manager.checkpoint_callback_params.save_on_train_epoch_end:
    ["trainer.knowledge_distillation.save_interval sets the steps", false, null]
  exp_manager.checkpoint_callback_params.save_last_n_optim_states:
    ["every resumable checkpoint has the optimizer's state", -1, null]
  exp_manager.disable_validation_on_resume: ["a validation that is due runs", true, null]
  exp_manager.resume_past_end: ["a run resumes from its last checkpoint", false, null]
  exp_manager.create_preemption_callback: ["SIGTERM and SIGUSR1 always save and stop", true, null]
convert_checkpoint:
"""
"""Per command: a key or section without effect, the reason, and values that cause no warning."""

SEQ_LENGTH = "model.max_seq_length"
STUDENT = "train_gpt_knowledge_distillation"

ALIASES: dict[str, dict[str, str]] = {
    "compute_topk_logits": {
        "model": "pretrained_checkpoint.restore_from_path",
        "data": "data.data.file_path",
        "output": "output_path",
        "shard": "part",
        "max_seq_length": SEQ_LENGTH,
        "data.data.max_seq_length": SEQ_LENGTH,
        "model.encoder_seq_length": SEQ_LENGTH,
        "forward_micro_batch_size": "model.micro_batch_size",
        "max_time_per_run": "exp_manager.max_time_per_run",
    },
    STUDENT: {
        "model": "pretrained_checkpoint.restore_from_path",
        "data": "model.data.data_prefix.train",
        "validation": "model.data.data_prefix.validation",
        "output": "exp_manager.explicit_log_dir",
        "lr": "model.optim.lr",
        "epochs": "trainer.knowledge_distillation.max_epochs",
        "max_seq_length": SEQ_LENGTH,
        "model.data.dataset.max_seq_length": SEQ_LENGTH,
        "model.data.seq_length": SEQ_LENGTH,
        "model.encoder_seq_length": SEQ_LENGTH,
    },
    "convert_checkpoint": {"model": "input_path", "output": "output_path"},
}
"""Per command: another name -> the key; the first value given in this order counts."""

YIELDS = "model.encoder_seq_length"
"""Alias that gives way to another value without an error, as NeMo-Aligner's files have both."""

_NULL_MEANS_DEFAULT = (
    "start_from_idx",
    "name",
    "output_path",
    "pretrained_checkpoint.restore_from_path",
    "model.data.data_prefix",
)
"""Keys that NeMo-Aligner's YAML files set to null and that have a value here."""

_INTERPOLATED = ("trainer.max_epochs", "trainer.max_steps")
"""Keys that NeMo-Aligner's own YAML sets to the value of the keys that count."""


def key_of(name: str, value: Any, command: str) -> str:
    """Return the key that `name` stands for; `model` and `data` with a mapping are sections."""
    if isinstance(value, dict) or str(value).lstrip().startswith("{"):
        is_splits = (name, command) == ("data", STUDENT)
        return "model.data.data_prefix" if is_splits else name
    return ALIASES[command].get(name, name)


def translate(
    cfg: DictConfig, command: str, config_class: type
) -> tuple[DictConfig, list[str]]:
    """Return `cfg` with keys for aliases and without ignored keys, and warnings "key=value:
    reason".

    Raises:
        ConfigError: an alias and its key, or two aliases, have different values.
    """
    values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=False)  # type: ignore[assignment]
    for alias, key in ALIASES[command].items():
        if not isinstance(_get(values, alias), dict):
            values = _with_references(values, alias, key)
    for key in _NULL_MEANS_DEFAULT:
        if _get(values, key, "") is None:
            _pop(values, key)
    for alias in ALIASES[command]:
        if (
            _get(values, alias) is not None
            and key_of(alias, _get(values, alias), command) != alias
        ):
            _rename(values, alias, command, config_class)
        elif not isinstance(_get(values, alias), dict):
            _pop(values, alias)
    warnings = _remove_ignored(values, command)
    return OmegaConf.create(values), warnings


def without(cfg: DictConfig, names: list[str]) -> DictConfig:
    """Return `cfg` without the values of these names; sections of the same name stay."""
    values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=False)  # type: ignore[assignment]
    for name in names:
        if not isinstance(_get(values, name), dict):
            _pop(values, name)
    return OmegaConf.create(values)


def _rename(values: dict[str, Any], alias: str, command: str, config_class: type) -> None:
    value = _pop(values, alias)
    key = key_of(alias, value, command)
    if value in ("???", f"${{{key}}}"):
        return
    other = _get(values, key)
    default = OmegaConf.select(OmegaConf.structured(config_class), key)
    if other in (None, "???", value, default):
        _set(values, key, value)
    elif alias != YIELDS:
        raise ConfigError(
            f"{alias}: {value} is another name of {key}, which is {other}; give one of them"
        )


def _remove_ignored(values: dict[str, Any], command: str) -> list[str]:
    warnings = []
    for key, (reason, *agrees) in ignored_keys(command).items():
        value = _get(values, key, "???")
        _pop(values, key)
        is_reference = isinstance(value, str) and value.startswith("${")
        if value == "???" or (is_reference and key in _INTERPOLATED):
            continue
        if (None if is_reference else value) not in agrees:
            shown = "..." if isinstance(value, dict) else value
            warnings.append(f"{key}={shown}: {reason}")
    return warnings


@functools.cache
def ignored_keys(command: str) -> dict[str, list[Any]]:
    """Return key -> [reason, values without a warning ...] for the keys without effect."""
    tables = yaml.safe_load(_IGNORED)
    return tables["both"] | tables[command] if tables.get(command) else {}


def _with_references(value: Any, alias: str, key: str) -> Any:
    """Return a value with `${alias}` replaced by `${key}` in every text."""
    if isinstance(value, dict):
        return {name: _with_references(each, alias, key) for name, each in value.items()}
    if isinstance(value, list):
        return [_with_references(each, alias, key) for each in value]
    if not isinstance(value, str):
        return value
    return re.sub(rf"\$\{{{re.escape(alias)}\}}", f"${{{key}}}", value)


def _parent(values: dict[str, Any], key: str) -> tuple[Any, str]:
    *sections, name = key.split(".")
    parent: Any = values
    for section in sections:
        parent = parent.get(section) if isinstance(parent, dict) else None
    return (parent if isinstance(parent, dict) else {}), name


def _get(values: dict[str, Any], key: str, default: Any = None) -> Any:
    parent, name = _parent(values, key)
    return parent.get(name, default)


def _pop(values: dict[str, Any], key: str) -> Any:
    parent, name = _parent(values, key)
    return parent.pop(name, None)


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        values[section] = values.get(section) or {}
        values = values[section]
    values[name] = value
