"""A small chat dataset and the configurations of both stages over it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from nemo_kd.config.evaluation import EvaluateGPTConfig
from nemo_kd.config.student import TrainStudentConfig
from nemo_kd.config.teacher import ComputeTopkLogitsConfig
from nemo_kd.config.typed import typed
from tests.tiny_tokenizer import docstrings


def write_chat_dataset(path: Path, num_records: int, start: int = 0) -> Path:
    """Questions of different lengths with real sentences as answers; record 5 has no answer and so no loss token."""
    texts = (docstrings() * 5)[start : start + num_records]
    with path.open("w") as file:
        for number, text in enumerate(texts):
            messages = [
                {"role": "user", "content": f"Say {number}" + " please" * (number % 3)}
            ]
            if number != 5:
                messages.append(
                    {"role": "assistant", "content": text[: 20 + (number * 37) % 90]}
                )
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def aligner_rows(path: Path, loss_masks: Sequence[int]) -> Path:
    """A file as NeMo-Aligner caches it, without a manifest: a row for each mask, which counts for all of its tokens."""
    random = np.random.default_rng(0)
    length = 6
    rows = [
        {
            "tokens": random.integers(9, 250, length).tolist(),
            "labels": random.integers(9, 250, length).tolist(),
            "loss_mask": [mask] * length,
            "topk_logits": [[4.0, 3.0, 2.0]] * length,
            "topk_token_ids": [[1, 2, 3]] * length,
            "log_sum_exp_logits": [6.0] * length,
        }
        for mask in loss_masks
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def teacher_config(
    model: Path, dataset: Path, output: Path, **overrides: Any
) -> ComputeTopkLogitsConfig:
    """Stage 1 in float32; `overrides` by dotted key with __ for dots."""
    return typed(
        ComputeTopkLogitsConfig,
        _with(
            {
                "pretrained_checkpoint": {"restore_from_path": str(model)},
                "trainer": {"precision": "32"},
                "data": {"data": {"file_path": str(dataset)}},
                "output_path": str(output),
                "top_k": 8,
            },
            overrides,
        ),
    )


def student_config(
    model: Path, train: Path, validation: Path, log_dir: Path, **overrides: Any
) -> TrainStudentConfig:
    """Stage 2 in float32, without processes that read ahead: they take longer to start than a few steps take."""
    return typed(
        TrainStudentConfig,
        _with(
            {
                "pretrained_checkpoint": {"restore_from_path": str(model)},
                "trainer": {
                    "precision": "32",
                    "knowledge_distillation": {"val_check_interval": 4},
                },
                "model": {
                    "micro_batch_size": 2,
                    "global_batch_size": 8,
                    "knowledge_distillation": {
                        "kd_loss_weight": 1.0,
                        "sft_loss_weight": 0.5,
                    },
                    "optim": {"lr": 1e-3, "sched": {"warmup_steps": 0, "min_lr": 0.0}},
                    "data": {
                        "data_prefix": {
                            "train": [str(train)],
                            "validation": [str(validation)],
                        },
                        "num_workers": 0,
                    },
                },
                "exp_manager": {
                    "explicit_log_dir": str(log_dir),
                    "resume_if_exists": True,
                    "resume_ignore_no_checkpoint": True,
                    "checkpoint_callback_params": {
                        "save_top_k": -1,
                        "save_nemo_on_train_end": True,
                    },
                },
            },
            overrides,
        ),
    )


def evaluation_config(
    model: Path, dataset: Path, output: Path, **overrides: Any
) -> EvaluateGPTConfig:
    """An evaluation in float32."""
    return typed(
        EvaluateGPTConfig,
        _with(
            {
                "pretrained_checkpoint": {"restore_from_path": str(model)},
                "trainer": {"precision": "32"},
                "data": {"data": {"file_path": str(dataset)}},
                "evaluate": {"output_dir": str(output)},
            },
            overrides,
        ),
    )


def _with(base: dict[str, Any], overrides: dict[str, Any]) -> Any:
    cfg = OmegaConf.create(base)
    for key, value in overrides.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, merge=False)
    return cfg
