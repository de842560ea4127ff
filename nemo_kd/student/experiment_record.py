"""The record of what determines a run's result: each checkpoint holds it, and a run that goes on is compared with it."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_kd.config.experiment import allowed_keys, compared_defaults, compared_values
from nemo_kd.config.model import PRECISIONS, GPTArchitecture
from nemo_kd.config.student import LOOP, TrainStudentConfig
from nemo_kd.run.collective import on_rank_zero
from nemo_kd.student.checkpoint_folder import CheckpointError, Contents

log = logging.getLogger(__name__)

STUDENT = "pretrained_checkpoint.restore_from_path"
ARCHITECTURE = "architecture"
CUSTOM_LOSS = "model.knowledge_distillation.custom_loss"
OTHER_STATE = (
    ARCHITECTURE,
    "model.optim.name",
    "model.peft.peft_scheme",
    "model.peft.lora_tuning.target_modules",
    "model.peft.lora_tuning.adapter_dim",
    "model.peft.lora_tuning.alpha",
    "model.peft.lora_tuning.layer_selection",
)
"""Keys and sections by which a checkpoint holds other tensors, or tensors of other meaning: no run can go on with a changed value."""
PLACES = ("name", "paths")
"""Parts of a value that say where something lies; they are shown, not compared."""


def experiment_record(
    config: TrainStudentConfig,
    architecture: GPTArchitecture,
    student: Mapping[str, str],
    descriptions: Mapping[str, Mapping[str, Any]],
    steps_per_epoch: int,
) -> dict[str, Any]:
    """Return key -> value of all that determines the result, as JSON has it.

    Args:
        student: name and hash of the weights that the run starts with.
        descriptions: the data of every split, with paths and fingerprint.
    """
    record = compared_values(config)
    del record["model.data.data_prefix"]
    record[STUDENT] = dict(student)
    record["trainer.precision"] = PRECISIONS[config.trainer.precision]
    record["model.knowledge_distillation.kd_loss"] = config.model.knowledge_distillation.objective
    loss = config.model.knowledge_distillation
    if loss.custom_loss is not None:
        record[CUSTOM_LOSS] = {
            "function": loss.custom_loss,
            "source": _source_hash(loss.custom_loss),
        }
    record[f"{LOOP}.limit_train_batches"] = f"{steps_per_epoch} steps an epoch"
    for split in ("train", "validation"):
        if split in descriptions:
            description = descriptions[split]
            record[f"model.data.data_prefix.{split}"] = {
                "paths": list(description["paths"]),
                "content": description["fingerprint"],
                "weights": config.model.data.weights(split),
            }
    for name, value in dataclasses.asdict(architecture).items():
        if name != "hf_config":
            record[f"{ARCHITECTURE}.{name}"] = value
    return json.loads(json.dumps(record))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Return key -> "VALUE in the checkpoint, VALUE now" for all that differs."""
    defaults = compared_defaults(TrainStudentConfig)
    found = {}
    for key, value in now.items():
        if key not in before and key not in defaults:
            continue
        earlier = before.get(key, defaults.get(key))
        if _comparable(earlier) != _comparable(value) or _is_count(earlier) != _is_count(value):
            found[key] = f"{_shown(earlier)} in the checkpoint, {_shown(value)} now"
    return found


def check_same_experiment(
    checkpoint: Path, now: Mapping[str, Any], allow_changed: list[str]
) -> None:
    """Refuse to go on from the checkpoint of another experiment; reads nothing but `contents.json`.

    Raises:
        CheckpointError: lists every difference that is not allowed.
        ConfigError: `allow_changed` names no key.
    """
    allowed = allowed_keys(
        allow_changed, [key for key in now if not key.startswith(f"{ARCHITECTURE}.")]
    )
    before = Contents.read(checkpoint).experiment
    if before is None:
        log.warning(
            "%s: an earlier version wrote this checkpoint, which does not tell student, data, loss or optimizer; nothing was "
            "compared, make sure that they are the same",
            checkpoint,
        )
        return
    found = differences(before, now)
    refused = {
        key: text for key, text in found.items() if key not in allowed or _changes_state(key, now)
    }
    if not refused:
        for key, text in found.items():
            log.warning("allow_changed: %s: %s; the run goes on with it", key, text)
        return
    lines = "".join(f"\n  {key}: {text}" for key, text in refused.items())
    changeable = [key for key in refused if not _changes_state(key, now)]
    ways = "Give another folder (exp_manager.explicit_log_dir) to start over"
    if len(changeable) == len(refused):
        wanted = ",".join(dict.fromkeys([*allow_changed, *changeable]))
        ways += f", or go on with what is changed: 'allow_changed=[{wanted}]'"
    else:
        ways += f"; with another {', '.join(key for key in refused if _changes_state(key, now))} it cannot be used"
    raise CheckpointError(f"{checkpoint}: it belongs to another experiment:{lines}\n{ways}")


def agreed_fingerprint(pretrained: Any) -> dict[str, str]:
    """Return the student's fingerprint on all ranks; one of them reads the files."""
    return on_rank_zero(pretrained.fingerprint)


def _comparable(value: Any) -> Any:
    return (
        {key: part for key, part in value.items() if key not in PLACES}
        if isinstance(value, dict)
        else value
    )


def _changes_state(key: str, now: Mapping[str, Any]) -> bool:
    has_adapters = now.get("model.peft.peft_scheme") not in (None, "none")
    if key == STUDENT and has_adapters:  # the checkpoint holds adapters alone
        return True
    return any(key == section or key.startswith(f"{section}.") for section in OTHER_STATE)


def _is_count(value: Any) -> bool:
    """Return True for a whole number: limit_val_batches=1 is one batch, 1.0 is all of them."""
    return isinstance(value, int) and not isinstance(value, bool)


def _source_hash(function: str) -> str | None:
    """Return the hash of the file that a function is imported from; None for one without a source file."""
    module = importlib.import_module(function.rpartition(".")[0])
    path = getattr(module, "__file__", None)
    return (
        f"sha256:{hashlib.sha256(Path(path).read_bytes()).hexdigest()}"
        if path is not None
        else None
    )


def _shown(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    parts = [f"{key} {part}" for key, part in _comparable(value).items() if part is not None]
    places = [
        ", ".join(place) if isinstance(place, list) else place
        for key in PLACES
        if (place := value.get(key))
    ]
    return f"{' '.join(places)} ({', '.join(parts)})" if places else ", ".join(parts)
