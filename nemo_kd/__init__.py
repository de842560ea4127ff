"""Offline knowledge distillation of language models on Megatron Core.

The names below are the stable Python interface (docs/python.md). They load on first use, so that `import nemo_kd`
costs nothing, and so that each part needs only its own packages.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_kd.api import compute_topk_logits as compute_topk_logits
    from nemo_kd.api import convert_checkpoint as convert_checkpoint
    from nemo_kd.api import train_student as train_student
    from nemo_kd.cache.reader import CacheReader as CacheReader
    from nemo_kd.cache.writer import CacheWriter as CacheWriter

__version__ = "0.1.0"

_MODULES = {
    "CacheReader": "nemo_kd.cache.reader",
    "CacheWriter": "nemo_kd.cache.writer",
    "compute_topk_logits": "nemo_kd.api",
    "convert_checkpoint": "nemo_kd.api",
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
