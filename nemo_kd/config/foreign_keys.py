"""Names that other trainers give to the keys, for whoever brings their command lines along."""

from __future__ import annotations

import difflib
from typing import NamedTuple


class Foreign(NamedTuple):
    """The keys that a name may mean here, of whichever command, and how its value becomes theirs."""

    keys: tuple[str, ...]
    how: str = ""


_MODEL = Foreign(("pretrained_checkpoint.restore_from_path", "input_path"))
_MICRO = Foreign(("model.micro_batch_size",), "examples per forward pass of one data-parallel rank")
_EPOCHS = Foreign(("trainer.knowledge_distillation.max_epochs",))
_STEPS = Foreign(("trainer.knowledge_distillation.max_steps",))
_LENGTH = Foreign(("model.data.seq_length", "data.data.max_seq_length"))
_OUTPUT = Foreign(("output_path", "exp_manager.explicit_log_dir"))
_LORA_RANK = Foreign(("model.peft.lora_tuning.adapter_dim",), "with model.peft.peft_scheme=lora")
_LORA_ALPHA = Foreign(("model.peft.lora_tuning.alpha",), "with model.peft.peft_scheme=lora")
_LORA_TARGETS = Foreign(
    ("model.peft.lora_tuning.target_modules",),
    "q/k/v_proj: attention_qkv, o_proj: attention_dense, gate/up_proj: mlp_fc1, down_proj: mlp_fc2",
)
_WARMUP = Foreign(("model.optim.sched.warmup_steps",))
_SCHEDULE = Foreign(("model.optim.sched.name",), "cosine: CosineAnnealing; linear, constant")
_CLIP = Foreign(("trainer.knowledge_distillation.gradient_clip_val",))
_EVAL = Foreign(("trainer.knowledge_distillation.val_check_interval",))
_SAVE = Foreign(("trainer.knowledge_distillation.save_interval",))
_LOG = Foreign(("trainer.knowledge_distillation.log_every_n_steps", "exp_manager.log_interval_s"))
_SAVE_LIMIT = Foreign(("exp_manager.checkpoint_callback_params.save_top_k",))
_WANDB = Foreign(
    ("exp_manager.wandb_logger_kwargs.project",), "with exp_manager.create_wandb_logger=true"
)
_WANDB_NAME = Foreign(
    ("exp_manager.wandb_logger_kwargs.name",), "with exp_manager.create_wandb_logger=true"
)
_RESUME = Foreign(
    ("exp_manager.resume_from_checkpoint",), "without it a run resumes from its own folder"
)
_PRECISION = Foreign(("trainer.precision", "precision"), "bf16 or 32")
_GPUS = Foreign(("trainer.devices",), "a number, or auto")
_NODES = Foreign(("trainer.num_nodes",))
_TRAIN_DATA = Foreign(
    ("model.data.data_prefix", "data.data.file_path"),
    "stage 2: '{train: [FILE], validation: [FILE]}'",
)
_TENSOR = Foreign(("model.tensor_model_parallel_size",))
_PIPELINE = Foreign(("model.pipeline_model_parallel_size",))
_WORKERS = Foreign(("model.data.num_workers", "data.num_workers"))
_RECOMPUTE = Foreign(("model.activations_checkpoint_granularity",), "true: full")
_KD_WEIGHT = Foreign(
    ("model.knowledge_distillation.kd_loss_weight",),
    "kd_loss_weight=a and sft_loss_weight=1-a for a weight a",
)
_TEMPERATURE = Foreign(
    (
        "model.knowledge_distillation.temperature",
        "model.knowledge_distillation.logits_scale",
        "cache.temperatures",
    )
)
_ACCUMULATION = Foreign(
    ("model.global_batch_size",), "micro_batch_size x data-parallel ranks x accumulation steps"
)

FOREIGN: dict[str, Foreign] = {
    "model": _MODEL,
    "model_name": _MODEL,
    "model_path": _MODEL,
    "model_id": _MODEL,
    "model_name_or_path": _MODEL,
    "pretrained_model_name_or_path": _MODEL,
    "base_model": _MODEL,
    "hf_model": _MODEL,
    "teacher": _MODEL,
    "teacher_model": _MODEL,
    "teacher_model_name_or_path": _MODEL,
    "student": _MODEL,
    "student_model": _MODEL,
    "checkpoint": _MODEL,
    "restore_from_path": _MODEL,
    "input": Foreign(("input_path",)),
    "output": _OUTPUT,
    "output_dir": _OUTPUT,
    "save_dir": _OUTPUT,
    "out_dir": _OUTPUT,
    "log_dir": Foreign(("exp_manager.explicit_log_dir",)),
    "logging_dir": Foreign(("exp_manager.explicit_log_dir",)),
    "overwrite_output_dir": Foreign(
        ("overwrite", "exp_manager.explicit_log_dir"), "stage 2: a new folder"
    ),
    "learning_rate": Foreign(("model.optim.lr",)),
    "lr": Foreign(("model.optim.lr",)),
    "min_lr": Foreign(("model.optim.sched.min_lr",)),
    "weight_decay": Foreign(("model.optim.weight_decay",)),
    "adam_beta1": Foreign(("model.optim.betas",), "[BETA1, BETA2]"),
    "adam_beta2": Foreign(("model.optim.betas",), "[BETA1, BETA2]"),
    "adam_epsilon": Foreign(("model.optim.eps",)),
    "optim": Foreign(("model.optim.name",), "adamw or distributed_fused_adam"),
    "optimizer": Foreign(("model.optim.name",), "adamw or distributed_fused_adam"),
    "warmup_steps": _WARMUP,
    "num_warmup_steps": _WARMUP,
    "lr_warmup_steps": _WARMUP,
    "warmup_ratio": Foreign(("model.optim.sched.warmup_ratio",)),
    "lr_scheduler": _SCHEDULE,
    "lr_scheduler_type": _SCHEDULE,
    "lr_decay_style": _SCHEDULE,
    "scheduler": _SCHEDULE,
    "epochs": _EPOCHS,
    "num_epochs": _EPOCHS,
    "num_train_epochs": _EPOCHS,
    "max_epochs": _EPOCHS,
    "steps": _STEPS,
    "max_steps": _STEPS,
    "train_iters": _STEPS,
    "max_train_steps": _STEPS,
    "batch_size": Foreign(("model.global_batch_size", "data.max_tokens_per_batch")),
    "train_batch_size": Foreign(("model.global_batch_size",)),
    "global_batch_size": Foreign(("model.global_batch_size",)),
    "micro_batch_size": _MICRO,
    "per_device_train_batch_size": _MICRO,
    "per_device_eval_batch_size": _MICRO,
    "device_batch_size": _MICRO,
    "gradient_accumulation_steps": _ACCUMULATION,
    "accumulate_grad_batches": _ACCUMULATION,
    "grad_accum": _ACCUMULATION,
    "max_grad_norm": _CLIP,
    "clip_grad": _CLIP,
    "gradient_clip_val": _CLIP,
    "gradient_checkpointing": _RECOMPUTE,
    "max_seq_len": _LENGTH,
    "max_seq_length": _LENGTH,
    "max_length": _LENGTH,
    "seq_len": _LENGTH,
    "seq_length": _LENGTH,
    "sequence_length": _LENGTH,
    "cutoff_len": _LENGTH,
    "block_size": _LENGTH,
    "eval_steps": _EVAL,
    "eval_interval": _EVAL,
    "save_steps": _SAVE,
    "save_interval": _SAVE,
    "save_total_limit": _SAVE_LIMIT,
    "logging_steps": _LOG,
    "log_interval": _LOG,
    "lora_r": _LORA_RANK,
    "lora_rank": _LORA_RANK,
    "r": _LORA_RANK,
    "rank": _LORA_RANK,
    "lora_alpha": _LORA_ALPHA,
    "lora_dropout": Foreign(
        ("model.peft.lora_tuning.adapter_dropout",), "with model.peft.peft_scheme=lora"
    ),
    "lora_target_modules": _LORA_TARGETS,
    "target_modules": _LORA_TARGETS,
    "use_lora": Foreign(("model.peft.peft_scheme",), "lora or none"),
    "use_peft": Foreign(("model.peft.peft_scheme",), "lora or none"),
    "alpha": Foreign(
        ("model.peft.lora_tuning.alpha", "model.knowledge_distillation.kd_loss_weight"),
        "LoRA's, or the weight of KD",
    ),
    "wandb_project": _WANDB,
    "project": _WANDB,
    "wandb_name": _WANDB_NAME,
    "wandb_run_name": _WANDB_NAME,
    "run_name": _WANDB_NAME,
    "report_to": Foreign(("exp_manager.create_wandb_logger",), "wandb: true"),
    "resume": _RESUME,
    "resume_from_checkpoint": _RESUME,
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "dtype": _PRECISION,
    "torch_dtype": _PRECISION,
    "mixed_precision": _PRECISION,
    "gpus": _GPUS,
    "num_gpus": _GPUS,
    "n_gpus": _GPUS,
    "nproc_per_node": _GPUS,
    "devices": _GPUS,
    "nnodes": _NODES,
    "num_nodes": _NODES,
    "nodes": _NODES,
    "tp": _TENSOR,
    "tensor_parallel_size": _TENSOR,
    "tensor_model_parallel_size": _TENSOR,
    "pp": _PIPELINE,
    "pipeline_parallel_size": _PIPELINE,
    "pipeline_model_parallel_size": _PIPELINE,
    "cp": Foreign(("model.context_parallel_size",)),
    "ep": Foreign(("model.expert_model_parallel_size",)),
    "dataset": _TRAIN_DATA,
    "dataset_name": _TRAIN_DATA,
    "dataset_path": _TRAIN_DATA,
    "data": _TRAIN_DATA,
    "data_path": _TRAIN_DATA,
    "train_file": _TRAIN_DATA,
    "train_data": _TRAIN_DATA,
    "data_prefix": _TRAIN_DATA,
    "validation_file": _TRAIN_DATA,
    "num_workers": _WORKERS,
    "dataloader_num_workers": _WORKERS,
    "seed": Foreign(("model.seed",)),
    "kd_alpha": _KD_WEIGHT,
    "kd_ratio": _KD_WEIGHT,
    "distillation_alpha": _KD_WEIGHT,
    "lmbda": _KD_WEIGHT,
    "temperature": _TEMPERATURE,
    "kd_temperature": _TEMPERATURE,
    "topk": Foreign(("top_k", "model.data.top_k")),
    "num_logits": Foreign(("top_k", "model.data.top_k")),
    "chunk_size": Foreign(("n_examples_per_chunk",)),
}


def find_key(name: str, known: list[str]) -> tuple[str, str]:
    """Return the key that `name` most likely means and how its value becomes the key's; both empty where none is close.

    Args:
        name: as typed, with or without sections and leading dashes.
        known: the command's keys.
    """
    plain = name.lstrip("-").replace("-", "_")
    foreign = FOREIGN.get(plain) or FOREIGN.get(plain.rpartition(".")[2])
    if plain in known:
        return plain, ""
    if foreign is not None:
        for key in foreign.keys:
            if key in known:
                return key, foreign.how
    same_end = [key for key in known if key.rpartition(".")[2] == plain]
    if len(same_end) == 1:
        return same_end[0], ""
    close = difflib.get_close_matches(plain, known, n=1, cutoff=0.7)
    return (close[0], "") if close else ("", "")
