"""Offline knowledge distillation of language models on Megatron Core.

The names below are the stable Python interface (docs/python.md). They load on first use, so
that `import nemo_kd` is cheap and each part needs only its own packages.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_kd.api import compute_topk_logits as compute_topk_logits
    from nemo_kd.api import convert_checkpoint as convert_checkpoint
    from nemo_kd.api import evaluate_gpt as evaluate_gpt
    from nemo_kd.api import train_student as train_student
    from nemo_kd.batch import Batch as Batch
    from nemo_kd.cache.reader import CacheReader as CacheReader
    from nemo_kd.cache.writer import CacheWriter as CacheWriter
    from nemo_kd.config.loss import LossConfig as LossConfig
    from nemo_kd.data.batches import collate as collate
    from nemo_kd.ops.distillation import distillation_loss as distillation_loss
    from nemo_kd.ops.student_logits import log_probs_at as log_probs_at

__version__ = "0.1.0"

_MODULES = {
    "Batch": "nemo_kd.batch",
    "CacheReader": "nemo_kd.cache.reader",
    "CacheWriter": "nemo_kd.cache.writer",
    "LossConfig": "nemo_kd.config.loss",
    "collate": "nemo_kd.data.batches",
    "compute_topk_logits": "nemo_kd.api",
    "convert_checkpoint": "nemo_kd.api",
    "distillation_loss": "nemo_kd.ops.distillation",
    "evaluate_gpt": "nemo_kd.api",
    "log_probs_at": "nemo_kd.ops.student_logits",
    "train_student": "nemo_kd.api",
}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
