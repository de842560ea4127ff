"""The Lightning Trainer and NeMo's experiment manager around it: log folder, loggers, resume, checkpoints."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from nemo.utils import logging as nemo_logging
from nemo.utils.exp_manager import CallbackParams, ExpManagerConfig, exp_manager
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_kd.config import ConfigError
from nemo_kd.config.student import TrainStudentConfig
from nemo_kd.mcore.groups import ProcessGroups, cluster_environment
from nemo_kd.trainer.checkpoints import StudentCheckpoints, label_of
from nemo_kd.trainer.experiment_record import check_same_experiment
from nemo_kd.trainer.lifetime import Lifetime
from nemo_kd.trainer.logging import JsonlLogger, RunLog, named_os_errors
from nemo_kd.trainer.plan import TrainingPlan
from nemo_kd.trainer.resume import choose_checkpoint
from nemo_kd.trainer.schedule import StepSchedule
from nemo_kd.trainer.strategy import MegatronStrategy
from nemo_kd.trainer.wandb_logger import start_wandb

log = logging.getLogger(__name__)

DEFAULTS = {
    "seconds_to_sleep": 0,
    "log_tflops_per_sec_per_gpu": False,
    "log_step_timing": False,
    "checkpoint_callback_params": {"async_save": True},
}
"""exp_manager keys whose NeMo defaults do not fit: the sleep slows start-up, others repeat our own metrics, and training
need not wait for checkpoints."""

DONE_HERE = {
    "create_checkpoint_callback": False,
    "resume_ignore_no_checkpoint": True,
    "resume_from_checkpoint": None,
    "disable_validation_on_resume": False,
    "max_time_per_run": None,
    "create_wandb_logger": False,
}
"""What exp_manager must leave alone: it knows nothing of damaged checkpoints, nor how all ranks stop at one step, nor
that Weights & Biases may be out of reach."""

WITHOUT_EFFECT = {
    "disable_validation_on_resume": True,
    "resume_past_end": False,
    "create_preemption_callback": True,
    "checkpoint_callback_params.save_last_n_optim_states": -1,
    "checkpoint_callback_params.every_n_epochs": 1,
    "checkpoint_callback_params.save_on_train_epoch_end": False,
}
"""exp_manager keys that nothing here asks, with NeMo's defaults."""


@dataclass
class _Settings(ExpManagerConfig):
    log_interval_s: float = 10.0
    """Seconds between two lines of progress."""


def build_trainer(
    config: TrainStudentConfig,
    settings: dict[str, Any],
    plan: TrainingPlan,
    groups: ProcessGroups,
    lifetime: Lifetime,
    record: dict[str, Any],
) -> pl.Trainer:
    """A Trainer that runs `plan`, goes on from the latest whole checkpoint and logs where `exp_manager` says.

    Args:
        settings: of `experiment_settings`.
        record: of `experiment_record`.

    Raises:
        CheckpointError: there is no checkpoint to go on from, or it belongs to another experiment.
    """
    loop = config.trainer.knowledge_distillation
    run_log = RunLog(plan.max_steps, loop.log_every_n_steps, settings.pop("log_interval_s"))
    schedule = StepSchedule(plan)
    trainer = pl.Trainer(
        accelerator="gpu" if groups.device.type == "cuda" else "cpu",
        devices=config.trainer.num_devices,
        num_nodes=config.trainer.num_nodes,
        strategy=MegatronStrategy(groups, record, cluster_environment=cluster_environment(config.trainer.num_devices)),
        precision="32-true",  # Megatron casts by itself
        max_epochs=1,  # to Lightning the whole run is one pass over `plan.max_steps` batches
        max_steps=-1,  # else it would not finish a run that was stopped after its last step
        val_check_interval=plan.val_check_interval,
        check_val_every_n_epoch=None,
        limit_val_batches=loop.limit_val_batches,
        log_every_n_steps=loop.log_every_n_steps,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        callbacks=[run_log, schedule, lifetime],
    )
    params = settings["checkpoint_callback_params"]
    nemo_logging.set_verbosity(nemo_logging.ERROR)  # it would say that it finds no checkpoint, where it does not look
    nothing = {**settings, **DONE_HERE, "checkpoint_callback_params": {**params, "dirpath": os.devnull}}
    with named_os_errors(settings["explicit_log_dir"] or settings["exp_dir"]):
        log_dir = exp_manager(trainer, OmegaConf.create(nothing))
    nemo_logging.set_verbosity(nemo_logging.WARNING)
    assert log_dir is not None
    params["dirpath"] = params["dirpath"] or str(log_dir / "checkpoints")
    resume = [settings[f"resume_{key}"] for key in ("if_exists", "ignore_no_checkpoint", "from_checkpoint")]
    checkpoint = choose_checkpoint(Path(params["dirpath"]), *resume)
    if checkpoint is not None:
        check_same_experiment(checkpoint, record, config.allow_changed)
    trainer.ckpt_path = str(checkpoint) if checkpoint is not None else None
    wandb_loggers = start_wandb(settings, Path(log_dir))
    metrics_file = JsonlLogger(Path(log_dir) / "metrics" / "metrics.jsonl")
    trainer.loggers = [*trainer.loggers, *wandb_loggers, metrics_file]
    if settings["create_checkpoint_callback"]:
        trainer.callbacks.append(_checkpoints(settings, config, schedule, lifetime))
    return trainer


def experiment_settings(config: TrainStudentConfig, measured: Sequence[str] | None = None) -> dict[str, Any]:
    """All of `exp_manager`'s keys, with defaults.

    Args:
        measured: names of what validation/... reports, by which checkpoints can be ranked; None: not known.

    Raises:
        ConfigError: a key is unknown, or impossible here.
    """
    if "/" in config.name:
        raise ConfigError(f"name: {config.name!r} names files and must not contain a slash")
    schema = OmegaConf.structured(_Settings)
    try:
        merged = OmegaConf.merge(schema, DEFAULTS, {"name": config.name}, config.exp_manager)
    except OmegaConfBaseException as error:
        raise ConfigError(f"exp_manager.{error.full_key}: {str(error.args[0]).splitlines()[0]}") from error
    if merged.create_wandb_logger and not (merged.wandb_logger_kwargs or {}).get("project"):
        raise ConfigError(
            "exp_manager.wandb_logger_kwargs.project: create_wandb_logger=True needs a project and a name"
        )
    if merged.log_interval_s < 0:
        raise ConfigError(
            f"exp_manager.log_interval_s: {merged.log_interval_s} must not be negative; 0 shows every step"
        )
    params = merged.checkpoint_callback_params
    folders: list[tuple[Any, str]] = [(merged, "exp_dir"), (merged, "explicit_log_dir"), (params, "dirpath")]
    for section, key in (*folders, (merged, "resume_from_checkpoint")):
        if section[key]:
            section[key] = os.path.expanduser(section[key])
    for key in ("every_n_train_steps", "train_time_interval"):
        if params[key]:
            raise ConfigError(
                f"exp_manager.checkpoint_callback_params.{key}: {params[key]} has no effect here; use "
                "trainer.knowledge_distillation.save_interval"
            )
    if merged.max_time_per_run is not None and not merged.create_checkpoint_callback:
        raise ConfigError(
            "exp_manager.max_time_per_run: it stops a run that goes on from its checkpoint later, but "
            "exp_manager.create_checkpoint_callback=False writes none; leave one of them out"
        )
    if merged.ema and merged.ema.enable:
        raise ConfigError("exp_manager.ema.enable: True is not supported here; leave it out")
    for key, value in WITHOUT_EFFECT.items():
        if (asked := OmegaConf.select(merged, key)) != value:
            log.warning("exp_manager.%s: %s has no effect here", key, asked)
    _check_checkpoints(config, merged, measured)
    log_dir = "explicit_log_dir" if merged.explicit_log_dir else "exp_dir"
    _check_writable(f"exp_manager.{log_dir}", getattr(merged, log_dir))
    if params.dirpath and merged.create_checkpoint_callback:
        _check_writable("exp_manager.checkpoint_callback_params.dirpath", params.dirpath)
    return OmegaConf.to_container(merged)  # type: ignore[return-value]


def _check_writable(key: str, folder: str | None) -> None:
    """Looks where the folder is, or would have to be made; None stands for the current one."""
    existing = Path(folder or ".").absolute()
    while not os.path.exists(existing):  # which says no, where Path.exists fails, if one may not even look
        existing = existing.parent
    if not existing.is_dir():
        raise ConfigError(f"{key}: {folder} cannot be a folder: {existing} is a file; give another one")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{key}: {folder or existing} cannot be written: you may not write in {existing}; give another one"
        )


def _check_checkpoints(config: TrainStudentConfig, settings: Any, measured: Sequence[str] | None) -> None:
    """How checkpoints are told apart, and what is left of them at the end."""
    key, params = "exp_manager.checkpoint_callback_params", settings.checkpoint_callback_params
    if params.mode not in ("min", "max"):
        raise ConfigError(f"{key}.mode: {params.mode!r} is not one of min, max")
    if params.save_top_k < -1:
        raise ConfigError(f"{key}.save_top_k: {params.save_top_k} must be -1 (all), 0 (none) or more")
    for name in ("filename", "prefix"):
        if "/" in (params[name] or ""):
            raise ConfigError(
                f"{key}.{name}: {params[name]!r} must not contain a slash; dirpath says where checkpoints lie"
            )
    known = ["val_loss", *(f"validation/{name}" for name in measured or ())]
    if params.monitor not in known and measured is not None:
        raise ConfigError(f"{key}.monitor: {params.monitor!r} is not measured; known: {', '.join(known)}")
    if params.save_best_model and params.save_weights_only:
        raise ConfigError(f"{key}: save_best_model needs whole checkpoints; leave save_weights_only out")
    if config.export.hf and not (settings.create_checkpoint_callback and params.save_nemo_on_train_end):
        raise ConfigError(
            f"export.hf: the folder is written with the .nemo archive, which {key}.save_nemo_on_train_end=false or "
            "exp_manager.create_checkpoint_callback=false leaves out; set both to true"
        )


def _checkpoints(
    settings: dict[str, Any], config: TrainStudentConfig, schedule: StepSchedule, lifetime: Lifetime
) -> StudentCheckpoints:
    name = config.name
    params = {key: settings["checkpoint_callback_params"][key] for key in CallbackParams.__dataclass_fields__}
    del params["filepath"]
    if not params["filename"]:
        # As Lightning would from {val_loss:.4f}, but with another label.
        label = label_of(params["monitor"])
        params["filename"] = (
            f"{name}--{label}={{{params['monitor']}:.4f}}-step={{step}}-consumed_samples={{consumed_samples}}"
        )
        params["auto_insert_metric_name"] = False
    params["prefix"] = params["prefix"] or name
    params["n_resume"] = bool(settings["resume_if_exists"])
    return StudentCheckpoints(schedule.plan.save_interval, schedule, lifetime, config.export.hf, **params)
