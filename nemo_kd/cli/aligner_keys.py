"""NeMo-Aligner's keys that are no keys here: other names, and those that have nothing to do.

Everything in the two YAML files and the guide of NeMo-Aligner is a field of the configuration, an alias of one or
listed here, so that its command lines and files run unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, Node, OmegaConf

from nemo_kd.config import ConfigError


@dataclass(frozen=True)
class Ignored:
    """A key, or a whole subtree, without effect.

    Attributes:
        reason: why, for the user.
        agrees: values that ask for what happens anyway; they cause no warning.
    """

    reason: str
    agrees: tuple[Any, ...] = ()


_LIGHTNING = Ignored("nemo_kd configures the Trainer itself", (False, None))
_DROPOUT = Ignored("distillation runs without dropout", (0.0, None))
_CACHED = Ignored("the model's own value is used", (None,))
_BUCKETS = Ignored("Megatron Core lays out and reduces gradients by itself")
_SAVES = "trainer.knowledge_distillation.save_interval says when"
_BUCKET_KEYS = (
    "average_grad_sync",
    "bucket_cap_mb",
    "contiguous_grad_bucket",
    "contiguous_param_bucket",
    "grad_sync_dtype",
    "overlap_grad_sync",
    "overlap_param_sync",
)
"""What NeMo passes on to Apex's distributed optimizer."""

SHARED: dict[str, Ignored] = {
    "trainer.logger": _LIGHTNING,
    "trainer.enable_checkpointing": _LIGHTNING,
    "trainer.use_distributed_sampler": _LIGHTNING,
    "trainer.max_time": Ignored("use exp_manager.max_time_per_run", (None,)),
    "model.mcore_gpt": Ignored("every model is a Megatron Core model", (True,)),
    "model.megatron_amp_O2": Ignored(
        "with bf16 the weights are bf16 and the optimizer keeps float32 copies", (True,)
    ),
    "model.restore_from_path": Ignored(
        "the model is read from pretrained_checkpoint.restore_from_path", (None,)
    ),
    "model.resume_from_checkpoint": Ignored(
        "a run resumes from its own log folder (exp_manager.resume_if_exists)", (None,)
    ),
    "model.save_nemo_on_validation_end": Ignored(
        "the .nemo archive is written at the end of training", (True, False)
    ),
    "model.sync_batch_comm": Ignored("Megatron Core decides", (False,)),
    "model.gradient_as_bucket_view": Ignored(
        "Megatron Core's gradient buffers always are", (False, True)
    ),
    "model.answer_only_loss": Ignored("the loss mask comes from the data format", (False, True)),
    "model.seq_len_interpolation_factor": _CACHED,
    "model.use_flash_attention": _CACHED,
    "model.hidden_dropout": _DROPOUT,
    "model.attention_dropout": _DROPOUT,
    "model.ffn_dropout": _DROPOUT,
    "model.dist_ckpt_load_strictness": Ignored("checkpoints are always loaded strictly"),
    "model.activations_checkpoint_layers_per_pipeline": Ignored(
        "model.activations_checkpoint_num_layers holds for every stage", (None,)
    ),
}

IGNORED: dict[str, dict[str, Ignored]] = {
    "compute_topk_logits": {
        **SHARED,
        "trainer.max_epochs": Ignored("the teacher reads the dataset once", (1,)),
        "model.activations_checkpoint_granularity": Ignored(
            "the teacher runs no backward pass", (None,)
        ),
        "model.activations_checkpoint_method": Ignored(
            "the teacher runs no backward pass", (None,)
        ),
        "model.activations_checkpoint_num_layers": Ignored(
            "the teacher runs no backward pass", (None,)
        ),
        "model.global_batch_size": Ignored(
            "data.max_tokens_per_batch and model.micro_batch_size say what is computed together"
        ),
        "batch_size": Ignored(
            "data.max_tokens_per_batch and model.micro_batch_size say what is computed together"
        ),
        "data.sample": Ignored("every example is cached once", (False,)),
        "data.dataloader_type": Ignored("examples are cached in the dataset's order", ("single",)),
        "data.data.shuffle": Ignored(
            "examples are cached in the dataset's order; training shuffles", (False,)
        ),
        "data.data.drop_last": Ignored("no example is dropped", (False,)),
        "data.data.hf_dataset": Ignored("JSONL files are read by byte offsets", (False,)),
        "data.data.memmap_workers": Ignored("JSONL files are read by byte offsets", (None,)),
        "data.data.index_mapping_dir": Ignored("no index files are written for datasets", (None,)),
        "data.data.concat_sampling_probabilities": Ignored(
            "every split has a cache of its own", (None,)
        ),
    },
    "train_gpt_knowledge_distillation": {
        **SHARED,
        "trainer.max_epochs": Ignored("use trainer.knowledge_distillation.max_epochs"),
        "trainer.max_steps": Ignored("use trainer.knowledge_distillation.max_steps"),
        "trainer.knowledge_distillation.inference_metrics": Ignored(
            "no metric needs generation", (None,)
        ),
        "model.peft.lora_tuning.weight_tying": Ignored(
            "every layer has adapters of its own", (False, None)
        ),
        "model.peft.lora_tuning.position_embedding_strategy": Ignored(
            "every layer has adapters of its own", (None,)
        ),
        **{f"model.optim.{name}": _BUCKETS for name in _BUCKET_KEYS},
        "model.overwrite_base_config": Ignored(
            "the checkpoint's architecture is never overwritten by this file"
        ),
        "model.data.n_examples_per_chunk": Ignored("every chunk has an index of its own", (None,)),
        "model.data.splits_string": Ignored("data_prefix names the file of every split", (None,)),
        "model.data.skip_warmup": Ignored("there is nothing to warm up", (True,)),
        "model.data.dataloader_type": Ignored("use model.data.shuffle", ("single",)),
        "model.data.reset_position_ids": Ignored(
            "every example has positions of its own", (False, True)
        ),
        "model.data.reset_attention_mask": Ignored(
            "every example has attention of its own", (False, True)
        ),
        "model.data.eod_mask_loss": Ignored("the cache holds the loss mask", (False,)),
        "model.data.index_mapping_dir": Ignored("the index lies beside each chunk", (None,)),
        "exp_manager.checkpoint_callback_params.model_parallel_size": Ignored(
            "checkpoints load in any layout"
        ),
        "exp_manager.checkpoint_callback_params.filepath": Ignored(
            "dirpath and filename say where", (None,)
        ),
        "exp_manager.checkpoint_callback_params.every_n_epochs": Ignored(_SAVES, (1, None)),
        "exp_manager.checkpoint_callback_params.save_on_train_epoch_end": Ignored(
            _SAVES, (False, None)
        ),
        "exp_manager.checkpoint_callback_params.save_last_n_optim_states": Ignored(
            "every checkpoint that a run can go on from has the optimizer's state", (-1, None)
        ),
        "exp_manager.disable_validation_on_resume": Ignored(
            "a validation that was due is done", (True, None)
        ),
        "exp_manager.resume_past_end": Ignored(
            "a run goes on from its last checkpoint", (False, None)
        ),
        "exp_manager.create_preemption_callback": Ignored(
            "SIGTERM and SIGUSR1 always save and stop", (True, None)
        ),
    },
    "convert_checkpoint": {},
}

ALIASES: dict[str, dict[str, str]] = {
    "compute_topk_logits": {
        "forward_micro_batch_size": "model.micro_batch_size",
        "max_time_per_run": "exp_manager.max_time_per_run",
    },
    "train_gpt_knowledge_distillation": {},
    "convert_checkpoint": {},
}

_NULL_MEANS_DEFAULT = (
    "start_from_idx",
    "name",
    "output_path",
    "pretrained_checkpoint.restore_from_path",
    "model.data.data_prefix",
)
"""Keys that NeMo-Aligner's YAML files set to null and that have a value here."""

_INTERPOLATED = {"trainer.max_epochs", "trainer.max_steps"}
"""NeMo-Aligner's own YAML points these at the keys that count."""


def translate(cfg: DictConfig, command: str) -> tuple[DictConfig, list[str]]:
    """`cfg` with its aliases renamed and without ignored keys, and a line "key=value: reason" for each that had a say.

    Raises:
        ConfigError: an alias and its key have different values.
    """
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    warnings: list[str] = []
    for key in _NULL_MEANS_DEFAULT:
        if _holds(cfg, key) and _is_null(cfg, key):
            _pop(cfg, key)
    for alias, key in ALIASES[command].items():
        if not _holds(cfg, alias):
            continue
        value, other = _pop(cfg, alias), OmegaConf.select(cfg, key)
        if other is not None and other != value:
            raise ConfigError(
                f"{alias}: {value} is another name of {key}, which is {other}; give one of them"
            )
        OmegaConf.update(cfg, key, value)
    for key, ignored in IGNORED[command].items():
        if not _holds(cfg, key):
            continue
        if key in _INTERPOLATED and OmegaConf.is_interpolation(*_parent(cfg, key)):
            _pop(cfg, key)
            continue
        if OmegaConf.is_missing(*_parent(cfg, key)):
            _pop(cfg, key)
            continue
        value = _pop(cfg, key)
        if value not in ignored.agrees:
            shown = "..." if isinstance(value, DictConfig) else value
            warnings.append(f"{key}={shown}: {ignored.reason}")
    return cfg, warnings


def _parent(cfg: DictConfig, key: str) -> tuple[DictConfig, str]:
    path, _, name = key.rpartition(".")
    return (OmegaConf.select(cfg, path) if path else cfg), name


def _holds(cfg: DictConfig, key: str) -> bool:
    parent, name = _parent(cfg, key)
    return isinstance(parent, DictConfig) and name in parent.keys()  # noqa: SIM118 (`in` itself is False for ???)


def _is_null(cfg: DictConfig, key: str) -> bool:
    """Return True for null as written: ${...} is not resolved, since it may stand for a key with its default in code."""
    parent, name = _parent(cfg, key)
    node = parent._get_node(name)
    return isinstance(node, Node) and node._is_none()


def _pop(cfg: DictConfig, key: str) -> Any:
    parent, name = _parent(cfg, key)
    value = (
        None
        if OmegaConf.is_missing(parent, name) or OmegaConf.is_interpolation(parent, name)
        else parent[name]
    )
    del parent[name]
    return value
