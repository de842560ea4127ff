"""The folder of a run of stage 2: one run at a time, and a run resumes only its own experiment."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nemo_kd import __version__
from nemo_kd.config.exp_manager import (
    ExpManagerConfig,
    allowed_keys,
    compared_defaults,
    compared_values,
)
from nemo_kd.config.shared import PRECISIONS, GPTArchitecture
from nemo_kd.config.student import LOOP, TrainStudentConfig
from nemo_kd.files import Lock
from nemo_kd.mcore.checkpoint import PretrainedModel
from nemo_kd.run.metrics import resolved_config
from nemo_kd.student.checkpoint_folder import (
    CheckpointError,
    Contents,
    checkpoints,
    resumable,
)
from nemo_kd.student.data import StudentData

log = logging.getLogger(__name__)

LOCK = Path(".nemo_kd") / "lock"
"""On resume NeMo's exp_manager moves the files of a log folder away, but not its folders."""

WAIT_S = 3.0
WAIT_AFTER_REQUEUE_S = 30.0
"""Time for the processes of a killed run, or of the job before a requeue, to end."""

REFUSAL = (
    "is training there; two runs in one folder would destroy each other's checkpoints. "
    "Wait until it ends, stop it, or give another exp_manager.explicit_log_dir"
)

STUDENT = "pretrained_checkpoint.restore_from_path"
ARCHITECTURE = "architecture"
FIXED = (
    ARCHITECTURE,
    "model.optim.name",
    "model.peft.peft_scheme",
    "model.peft.lora_tuning.target_modules",
    "model.peft.lora_tuning.adapter_dim",
    "model.peft.lora_tuning.alpha",
    "model.peft.lora_tuning.layer_selection",
)
"""Starts of keys that change a checkpoint's tensors or their meaning: they may never differ."""

LOCATION = ("name", "paths")
"""Parts of a value that name its place; they are shown, not compared."""


def _log_dir(manager: ExpManagerConfig, name: str) -> Path | None:
    """Return the run's folder; None where NeMo names one by date and time."""
    if manager.explicit_log_dir:
        return Path(manager.explicit_log_dir).absolute()
    if manager.resume_if_exists or manager.version:
        parent = Path(manager.exp_dir or "nemo_experiments") / (manager.name or name)
        return (parent / (manager.version or "")).absolute()
    return None


def recorded_date(manager: ExpManagerConfig, name: str) -> str | None:
    """Return the date that chat templates print in a run that is resumed."""
    log_dir = _log_dir(manager, name)
    if log_dir is None or not (log_dir / "config.yaml").exists():
        return None
    config = yaml.safe_load((log_dir / "config.yaml").read_text(encoding="utf-8"))
    date: str | None = config["model"]["data"]["dataset"].get("date")
    return date


def own_run_folder(
    manager: ExpManagerConfig, name: str, stack: contextlib.ExitStack
) -> None:
    """Lock the run's folders, until `stack` ends, before anything in them is read or changed.

    Args:
        name: of the run.

    Raises:
        FileError: another process holds a folder.
        CheckpointError: the run would start over beside the files of an earlier run.
    """
    log_dir = _log_dir(manager, name)
    checkpoint_dir = log_dir and log_dir / "checkpoints"
    folders = [log_dir]
    if manager.checkpoint_callback_params.dirpath:
        checkpoint_dir = Path(manager.checkpoint_callback_params.dirpath).absolute()
        folders.append(checkpoint_dir)
    wait_s = WAIT_AFTER_REQUEUE_S if "SLURM_RESTART_COUNT" in os.environ else WAIT_S
    for folder in filter(None, dict.fromkeys(folders)):
        (folder / LOCK).parent.mkdir(parents=True, exist_ok=True)
        stack.enter_context(Lock(folder / LOCK, REFUSAL, wait_s))
    left: list[Path] = []
    if checkpoint_dir is not None:
        if manager.resume_if_exists and resumable(checkpoint_dir):
            return
        left = [*checkpoints(checkpoint_dir), *sorted(checkpoint_dir.glob("*.nemo"))]
    if log_dir is not None and not manager.resume_if_exists:
        metrics = (log_dir / "metrics").glob("metrics.jsonl")
        left += [path for path in metrics if path.stat().st_size]
    if left:
        raise CheckpointError(
            f"exp_manager.resume_if_exists: {manager.resume_if_exists}, and {left[0]} belongs to a "
            "run that this one would not resume but overwrite. Give another "
            "exp_manager.explicit_log_dir, move the files away, or resume that run from its "
            "checkpoint: exp_manager.resume_if_exists=true"
        )


def experiment_record(
    config: TrainStudentConfig,
    architecture: GPTArchitecture,
    student: Mapping[str, str],
    descriptions: Mapping[str, Mapping[str, Any]],
    steps_per_epoch: int,
) -> dict[str, Any]:
    """Return key -> value of everything that determines the result, as JSON values.

    Args:
        student: name and hash of the weights that the run starts with.
        descriptions: data of every split, with paths and fingerprint.
    """
    loss = config.model.knowledge_distillation
    record = compared_values(config)
    del record["model.data.data_prefix"]
    record[STUDENT] = dict(student)
    record["trainer.precision"] = PRECISIONS[config.trainer.precision]
    record["model.knowledge_distillation.kd_loss"] = loss.objective
    if loss.reduction == "microbatch":
        num_ranks = config.trainer.num_nodes * config.trainer.num_devices
        record["model.knowledge_distillation.reduction.micro_batches"] = {
            "size": config.model.micro_batch_size,
            "tokens": config.model.data.max_tokens_per_batch,
            "packed": config.model.packed,
            "data_parallel": config.model.data_parallel_size(num_ranks),
            "context_parallel": config.model.context_parallel_size,
        }
    if loss.custom_loss is not None:
        module = importlib.import_module(loss.custom_loss.rpartition(".")[0])
        source = getattr(module, "__file__", None)
        digest = source and hashlib.sha256(Path(source).read_bytes()).hexdigest()
        record["model.knowledge_distillation.custom_loss"] = {
            "function": loss.custom_loss,
            "source": digest and f"sha256:{digest}",
        }
    record[f"{LOOP}.limit_train_batches"] = f"{steps_per_epoch} steps an epoch"
    for split, description in descriptions.items():
        if split != "test":
            record[f"model.data.data_prefix.{split}"] = {
                "paths": list(description["paths"]),
                "content": description["fingerprint"],
                "weights": config.model.data.all_weights(split),
            }
    for name, value in dataclasses.asdict(architecture).items():
        if name != "hf_config":
            record[f"{ARCHITECTURE}.{name}"] = value
    return json.loads(json.dumps(record))


def provenance(
    config: TrainStudentConfig,
    pretrained: PretrainedModel,
    data: StudentData,
    adapters: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the origin of the student for its archive: names and hashes, no paths."""
    return {
        "nemo_kd": __version__,
        "student": pretrained.fingerprint(),
        "student_provenance": pretrained.provenance,
        "adapters": adapters,
        "data": {
            split: {key: value for key, value in description.items() if key != "paths"}
            for split, description in data.descriptions.items()
        },
        "data_weights": data.training.order.weights,
        "consumed_samples": data.training.consumed_samples,
        "config": resolved_config(config, paths=False),
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Return key -> "VALUE in the checkpoint, VALUE now" of every difference."""
    # A checkpoint that does not record a key was trained with its default.
    before = {**compared_defaults(TrainStudentConfig), **before}
    found = {}
    for key, value in now.items():
        earlier = before.get(key, value)
        # limit_val_batches=1 is one batch, 1.0 is all of them.
        if type(earlier) is not type(value) or _compared(earlier) != _compared(value):
            found[key] = f"{earlier} in the checkpoint, {value} now"
    return found


def check_same_experiment(
    checkpoint: Path, now: Mapping[str, Any], allow_changed: list[str]
) -> None:
    """Refuse to resume from the checkpoint of another experiment; reads only `contents.json`.

    Raises:
        CheckpointError: lists every difference that is not allowed.
        ConfigError: an entry of `allow_changed` is not a key.
    """
    # The checkpoint of a LoRA run holds the adapters only.
    has_adapters = now.get("model.peft.peft_scheme") not in (None, "none")
    always = (*FIXED, STUDENT) if has_adapters else FIXED
    fixed = [key for key in now if key.startswith(always)]
    allowed = allowed_keys(
        allow_changed, [key for key in now if not key.startswith(f"{ARCHITECTURE}.")]
    ).difference(fixed)
    before = Contents.read(checkpoint).experiment
    if before is None:
        log.warning(
            "%s has no record of its experiment: nothing is compared", checkpoint
        )
        return
    found = differences(before, now)
    refused = [key for key in found if key not in allowed]
    if not refused:
        for key, text in found.items():
            log.warning("allow_changed: %s: %s; the run continues with it", key, text)
        return
    lines = "".join(f"\n  {key}: {found[key]}" for key in refused)
    ways = "Give another folder (exp_manager.explicit_log_dir) to start over"
    if not any(key in fixed for key in refused):
        keys = ",".join(dict.fromkeys([*allow_changed, *refused]))
        ways += f", or continue with the change: 'allow_changed=[{keys}]'"
    raise CheckpointError(
        f"{checkpoint} belongs to another experiment:{lines}\n{ways}"
    )


def _compared(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: part for key, part in value.items() if key not in LOCATION}
