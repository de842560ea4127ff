"""Keys of stage 2 that determine its result: a run resumes from a checkpoint only if they are
unchanged."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable
from typing import Any

from nemo_kd.config.errors import ConfigError
from nemo_kd.config.typed import describe, suggestion

KEY = "allow_changed"
FREE_KEYS = [
    "trainer.knowledge_distillation.max_epochs",
    "trainer.knowledge_distillation.max_steps",
    "trainer.knowledge_distillation.val_check_interval",
    "trainer.knowledge_distillation.save_interval",
    "trainer.knowledge_distillation.log_every_n_steps",
    "trainer.knowledge_distillation.non_finite",
    "model.optim.sched.warmup_steps",
    "model.optim.sched.warmup_ratio",
    "model.optim.sched.constant_steps",
    "model.optim.sched.constant_ratio",
    "trainer.num_nodes",
    "trainer.devices",
    "trainer.accelerator",
    "trainer.distributed_timeout_minutes",
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.virtual_pipeline_model_parallel_size",
    "model.context_parallel_size",
    "model.expert_model_parallel_size",
    "model.sequence_parallel",
    "model.micro_batch_size",
    "model.make_vocab_size_divisible_by",
    "model.transformer_engine",
    "model.activations_checkpoint_granularity",
    "model.activations_checkpoint_method",
    "model.activations_checkpoint_num_layers",
    "model.knowledge_distillation.compile",
    "model.knowledge_distillation.cross_tokenizer",
    "model.data.max_tokens_per_batch",
    "model.data.packing",
    "model.data.num_workers",
    "model.data.data_impl",
    "model.max_seq_length",
    "model.data.n_chunks",
    "model.data.allow_other_template",
    "model.data.chat",
    "model.data.chat_prompt_tokens",
    "model.data.dataset",
    "name",
    "exp_manager",
    "export",
    "allow_changed",
]
"""Keys and sections that may change when a run resumes. Every other key, a new one too, is
compared.

First the length of the run, intervals, and the parts of the learning-rate schedule that follow the
length; then where and how it is computed, which is the same within rounding; then keys that select
data, which is compared by content; then logs and files.
"""


def compared_values(config: Any) -> dict[str, Any]:
    """Return every key of a configuration that is compared, with its value as JSON has it."""
    keys = compared_defaults(type(config))
    values = {key: operator.attrgetter(key)(config) for key in keys}
    return json.loads(json.dumps(values))


def compared_defaults(config_class: type) -> dict[str, Any]:
    """Return the default of every compared key; a checkpoint that does not know a key was trained
    with it."""
    docs = describe(config_class)
    return {each.key: each.default for each in docs if not is_free(each.key)}


def is_free(key: str) -> bool:
    """Return True for a key that may change when a run resumes."""
    return any(f"{key}.".startswith(f"{free}.") for free in FREE_KEYS)


def allowed_keys(allow_changed: Iterable[str], compared: Iterable[str]) -> set[str]:
    """Return the compared keys that `allow_changed` names: whole keys, parts of them, or sections.

    Raises:
        ConfigError: an entry names no key.
    """
    allowed: set[str] = set()
    compared = set(compared)
    for entry in allow_changed:
        found = {key for key in compared if f".{entry}." in f".{key}."}
        is_free_part = any(f".{free}".endswith(f".{entry}") for free in FREE_KEYS)
        if not found and not is_free_part and not is_free(entry):
            close = suggestion(entry, compared)
            raise ConfigError(f"{KEY}: there is no key {entry}{close}")
        allowed |= found
    return allowed
