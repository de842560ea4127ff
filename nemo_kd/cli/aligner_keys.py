"""Other names of keys, and keys of NeMo-Aligner, slime and ROLL that have no effect here.

Every key in the two YAML files and the guide of NeMo-Aligner is a field of the configuration, an
alias of one, or listed here, so that its command lines and files run unchanged. Names of other
trainers are errors that name the key: `FOREIGN_NAMES` in config/typed.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from nemo_kd.config import ConfigError
from nemo_kd.config.typed import leaves

ALIASES: dict[str, dict[str, str]] = yaml.safe_load("""
compute_topk_logits:
  model: pretrained_checkpoint.restore_from_path
  data: data.data.file_path
  output: output_path
  shard: part
  max_seq_length: model.max_seq_length
  data.data.max_seq_length: model.max_seq_length
  model.encoder_seq_length: model.max_seq_length
  forward_micro_batch_size: model.micro_batch_size
  max_time_per_run: exp_manager.max_time_per_run
train_gpt_knowledge_distillation:
  model: pretrained_checkpoint.restore_from_path
  data: model.data.data_prefix.train
  validation: model.data.data_prefix.validation
  output: exp_manager.explicit_log_dir
  lr: model.optim.lr
  epochs: trainer.knowledge_distillation.max_epochs
  max_seq_length: model.max_seq_length
  model.data.dataset.max_seq_length: model.max_seq_length
  model.data.seq_length: model.max_seq_length
  model.encoder_seq_length: model.max_seq_length
convert_checkpoint:
  model: input_path
  output: output_path
evaluate_gpt:
  model: pretrained_checkpoint.restore_from_path
  data: data.data.file_path
  cache: evaluate.cache
  output: evaluate.output_dir
  max_seq_length: model.max_seq_length
""")
"""Per command: another name -> the key. `model` and `data` with keys below them are sections."""

_NULL_MEANS_DEFAULT = (
    "start_from_idx",
    "name",
    "output_path",
    "pretrained_checkpoint.restore_from_path",
    "model.data.data_prefix",
)
"""Keys that NeMo-Aligner's YAML files set to null and that have a value here."""

IGNORED = """
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
  disable_compute_advantages_and_returns: ["nothing here computes advantages", true]
  debug_train_only: ["training starts no inference engine", true]
  logits_transfer_backend: ["the cache carries the teacher's logits"]
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
  exp_manager.checkpoint_callback_params.every_n_train_steps:
    ["trainer.knowledge_distillation.save_interval sets the steps", null]
  exp_manager.checkpoint_callback_params.train_time_interval:
    ["trainer.knowledge_distillation.save_interval sets the steps", null]
  exp_manager.checkpoint_callback_params.every_n_epochs:
    ["trainer.knowledge_distillation.save_interval sets the steps", 1, null]
  exp_manager.checkpoint_callback_params.save_on_train_epoch_end:
    ["trainer.knowledge_distillation.save_interval sets the steps", false, null]
  exp_manager.checkpoint_callback_params.save_last_n_optim_states:
    ["every resumable checkpoint has the optimizer's state", -1, null]
  exp_manager.disable_validation_on_resume: ["a validation that is due runs", true, null]
  exp_manager.resume_past_end: ["a run resumes from its last checkpoint", false, null]
  exp_manager.create_preemption_callback: ["SIGTERM and SIGUSR1 always save and stop", true, null]
convert_checkpoint: {}
evaluate_gpt: {}
"""
"""Per command: a key or section without effect, the reason, and values that cause no warning."""


def with_keys(given: Any, command: str) -> dict[str, Any]:
    """Return key -> value of what one file or command line gives, without other names.

    Args:
        given: values by dotted or nested names.

    Raises:
        ConfigError: two names of one key have different values.
    """
    aliases = ALIASES[command]
    text = json.dumps(dict(leaves(given)), default=str)
    for alias, key in aliases.items():
        text = text.replace(f"${{{alias}}}", f"${{{key}}}")
    names: dict[str, str] = {}
    values: dict[str, Any] = {}
    for name, value in sorted(json.loads(text).items(), key=_yields):
        key = aliases.get(name, name)
        is_default = value is None and name in _NULL_MEANS_DEFAULT
        if is_default or value in ("???", f"${{{key}}}"):
            continue
        if values.get(key) is None:
            values[key] = value
            names[key] = name
        elif value not in (None, values[key]) and not _yields((name, value)):
            raise ConfigError(
                f"{names[key]}={values[key]} and {name}={value}: both are names of {key}; give "
                "one of them"
            )
    return values


def _yields(item: tuple[str, Any]) -> bool:
    """Return True for the alias that gives way to another value without an error: NeMo-Aligner's
    files have both."""
    return item[0] == "model.encoder_seq_length"


def config_of(values: Mapping[str, Any], command: str) -> tuple[DictConfig, list[str]]:
    """Return the configuration of key -> value, and a warning "key=value: reason" for each key
    that has no effect."""
    tables = yaml.safe_load(IGNORED)
    ignored = {**tables["both"], **tables[command]}
    cfg = OmegaConf.create()
    warnings = []
    for key, value in values.items():
        names = [name for name in ignored if f"{key}.".startswith(f"{name}.")]
        if not names:
            OmegaConf.update(cfg, key, value)
            continue
        reason, *agrees = ignored[names[0]]
        if value not in agrees and "${" not in str(value):
            warnings.append(f"{key}={value}: {reason}")
    return cfg, warnings
