"""Conversion of a Hydra configuration to a typed one, with errors that name the key."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from nemo_kd.config import ConfigError
from nemo_kd.config.fields import is_path, need

T = TypeVar("T")

HINTS = {
    "model.data.data_prefix": "; give each split's paths: model.data.data_prefix.train=FILE "
    "model.data.data_prefix.validation=FILE",
}
"""What to do about a key whose value has the wrong type."""


def typed(cls: type[T], cfg: DictConfig) -> T:
    """Return the dataclass `cls` filled from `cfg`.

    Raises:
        ConfigError: a key is unknown, mandatory and missing, or of the wrong type; or a check of
            `cls` failed.
            The message names the full key, the value found and what to do.
    """
    environment = {}
    for key, value in leaves(OmegaConf.to_container(cfg, resolve=False)):
        doc = key_doc(cls, key)
        if doc is None:
            close = suggestion(key, known_keys(cls), value)
            raise ConfigError(
                f"{key}: there is no such key{close}, or it is a section; --help lists all"
            )
        is_list = any(typing.get_origin(kind) is list for kind in doc.kinds)
        if is_list and not isinstance(value, list | None) and "${" not in str(value):
            raise ConfigError(f"{key}: {value} is not a list; give [{value}]")
        if "${oc.env:" in str(value):
            environment[key] = value
    try:
        merged = typing.cast(
            DictConfig, OmegaConf.merge(OmegaConf.structured(cls), cfg)
        )
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(
                f"mandatory keys have no value: {', '.join(missing)}. "
                f"Give {missing[0]}=... on the command line."
            )
        config = typing.cast(T, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise config_error(error) from error
    vars(config)["environment"] = environment
    return config


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the full key and the value of everything in nested mappings."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from leaves(inner, f"{prefix}.{name}".lstrip("."))
    else:
        yield prefix, value


def config_error(error: OmegaConfBaseException) -> ConfigError:
    """Return OmegaConf's error as one line that names the key."""
    key = getattr(error, "full_key", None) or "?"
    step = HINTS.get(key, "")
    if isinstance(error, InterpolationKeyError):
        step = "; an environment variable is ${oc.env:NAME}"
    return ConfigError(f"{key}: {str(error).splitlines()[0]}{step}")


@dataclasses.dataclass(frozen=True)
class KeyDoc:
    """One key of a configuration, as `--help` prints it.

    Attributes:
        default: the value without one given; ??? if it is mandatory.
        need: bounds of the value in words.
        kinds: types of the value besides None.
    """

    key: str
    type: str
    default: Any
    doc: str
    need: str
    is_path: bool
    kinds: set[Any]


def known_keys(cls: type) -> list[str]:
    return [each.key for each in describe(cls)]


def key_doc(cls: type, key: str) -> KeyDoc | None:
    """Return the key of `cls` that `key` is, or that holds it in a mapping."""
    return next(
        (each for each in describe(cls) if f"{key}.".startswith(f"{each.key}.")), None
    )


@functools.cache
def describe(cls: type, prefix: str = "") -> list[KeyDoc]:
    """Return every key below the dataclass `cls`, with the docstring that follows its field."""
    docs = _field_docs(cls)
    hints = typing.get_type_hints(cls)
    result = []
    for field in dataclasses.fields(cls):
        key = prefix + field.name
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            result += describe(typing.cast(type, hint), f"{key}.")
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
        kinds = {*(typing.get_args(hint) if is_union else (hint,))} - {types.NoneType}
        doc = docs.get(field.name, "")
        result.append(
            KeyDoc(
                key, str(field.type), default, doc, need(field), is_path(field), kinds
            )
        )
    return result


def _field_docs(cls: type) -> dict[str, str]:
    docs: dict[str, str] = {}
    for owner in reversed(cls.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, body.body[1:], strict=False):
            name = statement.target if isinstance(statement, ast.AnnAssign) else None
            text = following.value if isinstance(following, ast.Expr) else None
            if isinstance(name, ast.Name) and isinstance(text, ast.Constant):
                docs[name.id] = " ".join(str(text.value).split())
    return docs


FOREIGN_NAMES = """
pretrained_checkpoint.restore_from_path input_path
    model model_name model_path model_id model_name_or_path pretrained_model_name_or_path
    base_model hf_model teacher teacher_model teacher_model_name_or_path student
    student_model checkpoint restore_from_path hf_checkpoint student_pretrain
    teacher_pretrain
pretrained_checkpoint.restore_from_path | of compute_topk_logits if it is the teacher
    ref_load
exp_manager.resume_from_checkpoint | without it a run resumes from its own folder
    load
input_path
    input
output_path exp_manager.explicit_log_dir
    output output_dir save_dir out_dir
exp_manager.explicit_log_dir
    log_dir logging_dir save tensorboard_dir
name
    exp_name
overwrite exp_manager.explicit_log_dir | stage 2: a new folder
    overwrite_output_dir
model.optim.lr
    learning_rate lr
model.optim.sched.min_lr
    min_lr
model.optim.weight_decay
    weight_decay
model.optim.betas | [BETA1, BETA2]
    adam_beta1 adam_beta2
model.optim.eps
    adam_epsilon
model.optim.name | adamw or distributed_fused_adam
    optim optimizer
model.optim.sched.warmup_steps
    warmup_steps num_warmup_steps lr_warmup_steps
model.optim.sched.warmup_ratio
    warmup_ratio lr_warmup_fraction
model.optim.sched.name | cosine: CosineAnnealing; linear, constant
    lr_scheduler lr_scheduler_type lr_decay_style scheduler
trainer.knowledge_distillation.max_epochs
    epochs num_epoch num_epochs num_train_epochs max_epochs
trainer.knowledge_distillation.max_steps
    steps max_steps train_iters max_train_steps
trainer.knowledge_distillation.max_steps | optimizer steps; one reads one global batch
    num_rollout
model.global_batch_size evaluate.batch_size data.max_tokens_per_batch
    batch_size
model.global_batch_size
    train_batch_size global_batch_size
model.global_batch_size | every step reads one global batch
    rollout_batch_size
data.max_tokens_per_batch model.data.max_tokens_per_batch
    max_tokens_per_gpu
data.max_tokens_per_batch model.data.max_tokens_per_batch | tokens on a rank; it forms dynamic batches
    use_dynamic_batch_size
model.micro_batch_size | examples per forward pass of one data-parallel rank
    micro_batch_size per_device_train_batch_size per_device_eval_batch_size
    device_batch_size
model.global_batch_size | micro_batch_size x data-parallel ranks x accumulation steps
    gradient_accumulation_steps accumulate_grad_batches grad_accum
trainer.knowledge_distillation.gradient_clip_val
    max_grad_norm clip_grad gradient_clip_val
model.activations_checkpoint_granularity | true: full
    gradient_checkpointing recompute_granularity
model.activations_checkpoint_method
    recompute_method
model.activations_checkpoint_num_layers
    recompute_num_layers
model.max_seq_length
    max_seq_len max_seq_length max_length seq_len seq_length sequence_length cutoff_len
    block_size
trainer.knowledge_distillation.val_check_interval
    eval_steps eval_interval
trainer.knowledge_distillation.save_interval
    save_steps save_interval
exp_manager.checkpoint_callback_params.save_top_k
    save_total_limit
trainer.knowledge_distillation.log_every_n_steps exp_manager.log_interval_s
    logging_steps log_interval
model.peft.lora_tuning.adapter_dim | with model.peft.peft_scheme=lora
    lora_r lora_rank r rank
model.peft.lora_tuning.alpha | with model.peft.peft_scheme=lora
    lora_alpha
model.peft.lora_tuning.adapter_dropout | with model.peft.peft_scheme=lora
    lora_dropout
model.peft.lora_tuning.target_modules | attention_qkv, attention_dense, mlp_fc1, mlp_fc2
    lora_target_modules target_modules
model.peft.peft_scheme | lora or none
    use_lora use_peft
model.peft.lora_tuning.alpha KD.kd_loss_weight | LoRA's, or the weight of KD
    alpha
exp_manager.wandb_logger_kwargs.project | with exp_manager.create_wandb_logger=true
    wandb_project project
exp_manager.wandb_logger_kwargs.name | with exp_manager.create_wandb_logger=true
    wandb_name wandb_run_name run_name
exp_manager.wandb_logger_kwargs.group | with exp_manager.create_wandb_logger=true
    wandb_group
exp_manager.create_wandb_logger | wandb: true
    report_to use_wandb track_with
exp_manager.resume_from_checkpoint | without it a run resumes from its own folder
    resume resume_from_checkpoint
trainer.precision precision | bf16 or 32
    bf16 fp16 dtype torch_dtype mixed_precision
trainer.devices | a number, or auto
    gpus num_gpus n_gpus nproc_per_node devices num_gpus_per_node device_mapping
    actor_num_gpus_per_node
trainer.num_nodes
    nnodes num_nodes nodes actor_num_nodes
model.tensor_model_parallel_size
    tp tp_size tensor_parallel_size tensor_model_parallel_size
model.pipeline_model_parallel_size
    pp pp_size pipeline_parallel_size pipeline_model_parallel_size
model.context_parallel_size
    cp
model.expert_model_parallel_size
    ep
model.data.data_prefix.train data.data.file_path | stage 2: model.data.data_prefix.train=FILE
    dataset dataset_name dataset_path data data_path train_file train_data data_prefix
    validation_file prompt_data file_name
data.data.loss_mask model.data.dataset.loss_mask | qwen: qwen; qwen3: per_turn; distill_qwen: last_turn
    loss_mask_type
data.data.tools_key model.data.dataset.tools_key
    tool_key
model.data.shuffle
    rollout_shuffle
data.data.record_function model.data.dataset.record_function | package.function of a record
    rollout_function_path
model.data.packing data.packing
    use_sequence_packing
model.data.num_workers data.num_workers
    num_workers dataloader_num_workers
model.seed
    seed rollout_seed
KD.kd_loss_weight | KD.kd_loss_weight=W KD.sft_loss_weight=1-W
    kd_alpha kd_ratio distillation_alpha distill_loss_weight
KD.sft_loss_weight | KD.sft_loss_weight=W KD.kd_loss_weight=1-W
    distill_alpha
KD.kd_loss_weight | KD.kd_loss_weight=W KD.sft_loss_weight=1
    kl_loss_coef
KD.kd_loss_weight | above 0
    use_kl_loss
KD.kd_loss_weight | a KL in the reward has no counterpart
    kl_coef
KD.kd_loss | of TRL's GKD, 0: forward_kl; 1: reverse_kl; between: jsd with jsd_beta
    beta
KD.kd_loss | KD.kd_loss=W
    kl_loss_type
KD.kd_loss | KD.kd_loss=W KD.support=renormalize
    kd_objective
KD.kd_loss | sft_loss: KD.kd_loss_weight=0 KD.sft_loss_weight=1; custom_loss: KD.kd_loss=custom
    loss_type
KD.custom_loss | KD.custom_loss=W KD.kd_loss=custom
    custom_loss_function_path
KD.custom_args | the keys of the file, {KEY: VALUE}
    custom_config_path
KD.reduction | true: token; false: sample
    calculate_per_token_loss
KD.temperature | KD.temperature=W; with a teacher_temperature: the scales 1/W and 1/(W * it)
    kd_temperature
KD.target_logits_scale | KD.target_logits_scale=1/W; with a kd_temperature: also divided by it
    teacher_temperature
KD.temperature | KD.temperature=W KD.multiply_by_squared_temperature=true
    distill_temperature
KD.temperature KD.logits_scale
    temperature
cache.temperatures | [W]
    temperature kd_temperature teacher_temperature distill_temperature
top_k model.data.top_k
    topk num_logits logits_topk
n_examples_per_chunk
    chunk_size
""".replace("KD.", "model.knowledge_distillation.")
"""Keys of any command, with a remark on their values after "|"; below them other trainers' names
for these. W is the value of the other name."""


def suggestion(name: str, known: Iterable[str], value: Any = None) -> str:
    """Return " (did you mean KEY?)" with a remark on its value; empty if no key is close.

    Args:
        name: as typed, with or without sections and leading dashes.
        known: keys that it may mean.
        value: as typed, if there is one.
    """
    known = list(known)
    plain = name.strip("- ").replace("-", "_")
    last = plain.rpartition(".")[2]
    foreign: dict[str, str] = {}
    elsewhere: dict[str, str] = {}
    keys = remark = ""
    for line in FOREIGN_NAMES.strip().splitlines():
        if not line.startswith(" "):
            keys, _, remark = line.partition(" | ")
            continue
        for key in keys.split():
            if key in known or key.rpartition(".")[0] in known:
                is_whole = remark.startswith(f"{key}=")
                meaning = remark if is_whole else f"{key}? {remark}".strip()
                foreign = dict.fromkeys(line.split(), meaning) | foreign
                break
        else:
            elsewhere |= dict.fromkeys(line.split(), keys.split()[0])
    names = {key.rpartition(".")[2]: f"{key}?" for key in known}
    names |= {key: f"{key}?" for key in known} | foreign
    close = difflib.get_close_matches(plain, names, n=1, cutoff=0.7)
    if last in foreign:
        close = [last]
    elif last in elsewhere and last not in names:
        return f" (see {elsewhere[last]} of another command)"
    return f" (did you mean {_with_value(names[close[0]], value)})" if close else ""


def _with_value(meaning: str, value: Any) -> str:
    """Put the value of another trainer's key into a remark, where it has W, 1-W or 1/W."""
    if value is None:
        return meaning
    with contextlib.suppress(TypeError, ValueError, ZeroDivisionError):
        meaning = meaning.replace("1-W", f"{1 - float(value):g}")
        meaning = meaning.replace("1/W", f"{1 / float(value):g}")
    return re.sub(r"\bW\b", lambda _: str(value), meaning)
