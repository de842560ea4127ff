"""The folder of a run of stage 2: one run at a time, and a run resumes only its own experiment."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_kd import __version__
from nemo_kd.config.experiment import allowed_keys, compared_defaults, compared_values
from nemo_kd.config.model import PRECISIONS, GPTArchitecture
from nemo_kd.config.student import LOOP, TrainStudentConfig
from nemo_kd.files import Lock, explained
from nemo_kd.mcore.checkpoint import PretrainedModel
from nemo_kd.run.collective import on_rank_zero
from nemo_kd.run.resolved_config import resolved_config
from nemo_kd.student.checkpoint_folder import (
    CheckpointError,
    Contents,
    checkpoints,
    read_contents,
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
"""Keys and sections that change a checkpoint's tensors or their meaning: they may never differ."""

LOCATION = ("name", "paths")
"""Parts of a value that name its place; they are shown, not compared."""


@contextlib.contextmanager
def own_run_folder(settings: dict[str, Any]) -> Iterator[None]:
    """Lock the run's folders before anything in them is read or changed; every rank calls this.

    Raises:
        UserInputError: on every rank, if another process holds a folder, or if the run would start
            over in the folder of an earlier run.
    """
    with contextlib.ExitStack() as stack:
        on_rank_zero(lambda: _claim(settings, stack))
        yield


def _claim(settings: dict[str, Any], stack: contextlib.ExitStack) -> None:
    log_dir, checkpoint_dir = _folders(settings)
    inside = log_dir and log_dir / "checkpoints"
    wait_s = WAIT_AFTER_REQUEUE_S if "SLURM_RESTART_COUNT" in os.environ else WAIT_S
    for folder in dict.fromkeys((log_dir, checkpoint_dir)):
        if folder is not None and folder != inside:
            with explained(folder):
                (folder / LOCK).parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(Lock(folder / LOCK, REFUSAL, wait_s))
    _check_nothing_is_trained_over(settings, log_dir, checkpoint_dir)


def _folders(settings: dict[str, Any]) -> tuple[Path | None, Path | None]:
    """Return the folders of logs and checkpoints; None for one that NeMo names by date and time."""
    log_dir = None
    if settings["explicit_log_dir"]:
        log_dir = Path(settings["explicit_log_dir"]).absolute()
    elif settings["resume_if_exists"] or settings["version"]:
        parent = Path(settings["exp_dir"] or "nemo_experiments") / settings["name"]
        log_dir = (parent / (settings["version"] or "")).absolute()
    dirpath = settings["checkpoint_callback_params"]["dirpath"]
    return log_dir, Path(
        dirpath
    ).absolute() if dirpath else log_dir and log_dir / "checkpoints"


def _check_nothing_is_trained_over(
    settings: dict[str, Any], log_dir: Path | None, checkpoint_dir: Path | None
) -> None:
    """
    Raises:
        CheckpointError: the run would start over beside the files of an earlier run.
    """
    found = checkpoints(checkpoint_dir) if checkpoint_dir is not None else []
    source = settings["resume_from_checkpoint"]
    resumes = settings["resume_if_exists"]
    if (resumes and any(map(_may_resume, found))) or (
        source and Path(source).absolute() in found
    ):
        return
    left = [
        *found,
        *(sorted(checkpoint_dir.glob("*.nemo")) if checkpoint_dir is not None else []),
    ]
    if log_dir is not None and not resumes:
        metrics = log_dir / "metrics" / "metrics.jsonl"
        left += [metrics] if metrics.exists() and metrics.stat().st_size else []
    if left and resumes:
        raise CheckpointError(
            f"exp_manager.resume_if_exists: {checkpoint_dir} holds files of another run "
            f"({left[0].name}), but no checkpoint to resume from, so this run would start over and "
            "replace them. Give another exp_manager.explicit_log_dir, or move the files away"
        )
    if left:
        raise CheckpointError(
            f"exp_manager.resume_if_exists: False, but {log_dir or checkpoint_dir} holds a run "
            f"({left[0].name}), which this one would overwrite. Give another "
            "exp_manager.explicit_log_dir, or resume that run: exp_manager.resume_if_exists=true"
        )


def _may_resume(folder: Path) -> bool:
    """Return True for damaged ones too: these are reported where a checkpoint is chosen."""
    contents = read_contents(folder)
    return contents is None or contents.resumable


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
    if loss.custom_loss is not None:
        record["model.knowledge_distillation.custom_loss"] = {
            "function": loss.custom_loss,
            "source": _source_hash(loss.custom_loss),
        }
    record[f"{LOOP}.limit_train_batches"] = f"{steps_per_epoch} steps an epoch"
    for split, description in descriptions.items():
        if split != "test":
            record[f"model.data.data_prefix.{split}"] = {
                "paths": list(description["paths"]),
                "content": description["fingerprint"],
                "weights": config.model.data.weights(split),
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
    origin: dict[str, Any] = {
        "nemo_kd": __version__,
        "student": pretrained.fingerprint(),
        "data": {
            split: {key: value for key, value in description.items() if key != "paths"}
            for split, description in data.descriptions.items()
        },
        "data_weights": data.training.order.weights,
        "consumed_samples": data.training.consumed_samples,
        "config": resolved_config(config, paths=False),
        "knowledge_distillation": dataclasses.asdict(config.model.knowledge_distillation),
    }
    if adapters is not None:
        origin["adapters"] = adapters
    if pretrained.provenance is not None:
        origin["student_provenance"] = pretrained.provenance
    return origin


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Return key -> "VALUE in the checkpoint, VALUE now" of every difference."""
    defaults = compared_defaults(TrainStudentConfig)
    found = {}
    for key, value in now.items():
        if key not in before and key not in defaults:
            continue
        earlier = before.get(key, defaults.get(key))
        # limit_val_batches=1 is one batch, 1.0 is all of them.
        if type(earlier) is not type(value) or _compared(earlier) != _compared(value):
            found[key] = f"{_shown(earlier)} in the checkpoint, {_shown(value)} now"
    return found


def check_same_experiment(
    checkpoint: Path, now: Mapping[str, Any], allow_changed: list[str]
) -> None:
    """Refuse to resume from the checkpoint of another experiment; reads only `contents.json`.

    Raises:
        CheckpointError: lists every difference that is not allowed.
        ConfigError: an entry of `allow_changed` is not a key.
    """
    allowed = allowed_keys(
        allow_changed, [key for key in now if not key.startswith(f"{ARCHITECTURE}.")]
    )
    before = Contents.read(checkpoint).experiment
    if before is None:
        log.warning(
            "%s: an earlier version wrote this checkpoint without the record of student, data, "
            "loss and optimizer, so nothing was compared; make sure that they are the same",
            checkpoint,
        )
        return
    found = differences(before, now)
    fixed = [key for key in found if _is_fixed(key, now)]
    refused = [key for key in found if key in fixed or key not in allowed]
    if not refused:
        for key, text in found.items():
            log.warning("allow_changed: %s: %s; the run continues with it", key, text)
        return
    lines = "".join(f"\n  {key}: {found[key]}" for key in refused)
    ways = "Give another folder (exp_manager.explicit_log_dir) to start over"
    if fixed:
        ways += f"; the checkpoint cannot be used with another {', '.join(fixed)}"
    else:
        keys = ",".join(dict.fromkeys([*allow_changed, *refused]))
        ways += f", or continue with the change: 'allow_changed=[{keys}]'"
    raise CheckpointError(f"{checkpoint} belongs to another experiment:{lines}\n{ways}")


def _is_fixed(key: str, now: Mapping[str, Any]) -> bool:
    if key == STUDENT:  # the checkpoint of a LoRA run holds the adapters only
        return now.get("model.peft.peft_scheme") not in (None, "none")
    return any(key == section or key.startswith(f"{section}.") for section in FIXED)


def _compared(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: part for key, part in value.items() if key not in LOCATION}


def _shown(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    parts = ", ".join(
        f"{key} {part}" for key, part in _compared(value).items() if part is not None
    )
    places = [value[key] for key in LOCATION if value.get(key)]
    names = [", ".join(place) if isinstance(place, list) else place for place in places]
    return f"{' '.join(names)} ({parts})" if names else parts


def _source_hash(function: str) -> str | None:
    """Return the hash of a function's source file; None if it has none."""
    path = getattr(importlib.import_module(function.rpartition(".")[0]), "__file__", None)
    return path and f"sha256:{hashlib.sha256(Path(path).read_bytes()).hexdigest()}"
