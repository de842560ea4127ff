"""Keys of stage 2 that determine its result: a run resumes from a checkpoint only if they are
unchanged."""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Iterable
from typing import Any

from nemo_kd.config.errors import ConfigError

KEY = "allow_changed"
FREE_KEYS = (
    # Length of the run, intervals, and the parts of the learning-rate schedule that follow the
    # length.
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
    # Where and how it is computed: the same within rounding.
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
    # The data that they select is compared by content.
    "model.data.data_impl",
    "model.max_seq_length",
    "model.data.n_chunks",
    "model.data.allow_other_template",
    "model.data.chat",
    "model.data.chat_prompt_tokens",
    "model.data.dataset",
    # Logs and files.
    "name",
    "exp_manager",
    "export",
    KEY,
)
"""Keys and sections that may change when a run resumes. Every other key, a new one too, is
compared."""


def compared_values(config: Any) -> dict[str, Any]:
    """Return every key of a configuration that is compared, with its value as JSON has it."""
    return {
        key: json.loads(json.dumps(value))
        for key, value in _leaves(config, "")
        if not is_free(key)
    }


def compared_defaults(config_class: type) -> dict[str, Any]:
    """Return the default of every compared key that has one; a checkpoint that does not know a key
    was trained with it."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        factory = field.default_factory
        default = factory() if factory is not dataclasses.MISSING else field.default
        if default is not dataclasses.MISSING:
            values |= dict(_leaves_of(default, field.name))
    return {
        key: json.loads(json.dumps(value))
        for key, value in values.items()
        if not is_free(key)
    }


def is_free(key: str) -> bool:
    """Return True for a key that may change when a run resumes."""
    return any(_is_within(key, free) for free in FREE_KEYS)


def allowed_keys(allow_changed: Iterable[str], compared: Iterable[str]) -> set[str]:
    """Return the compared keys that `allow_changed` names: whole keys, their last parts, or
    sections.

    Raises:
        ConfigError: an entry names no key, or the last part of several.
    """
    compared = list(compared)
    allowed: set[str] = set()
    for entry in allow_changed:
        found = [key for key in compared if _is_within(key, entry)]
        if not found:
            found = [key for key in compared if key.endswith(f".{entry}")]
            if len(found) > 1:
                raise ConfigError(
                    f"{KEY}: {entry} is the last part of {', '.join(found)}; give one of them whole"
                )
        if (
            not found
            and not is_free(entry)
            and not any(free.endswith(f".{entry}") for free in FREE_KEYS)
        ):
            last_parts = {key.rpartition(".")[2]: key for key in compared}
            close = difflib.get_close_matches(
                entry, [*compared, *last_parts], n=1, cutoff=0.6
            )
            meant = (
                f"; did you mean {last_parts.get(close[0], close[0])}?" if close else ""
            )
            raise ConfigError(f"{KEY}: {entry} is not a key that is compared{meant}")
        allowed.update(found)
    return allowed


def _is_within(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")


def _leaves(config: Any, prefix: str) -> Iterable[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        yield from _leaves_of(getattr(config, field.name), f"{prefix}{field.name}")


def _leaves_of(value: Any, key: str) -> Iterable[tuple[str, Any]]:
    if dataclasses.is_dataclass(value):
        return _leaves(typing.cast(Any, value), f"{key}.")
    return [(key, value)]
