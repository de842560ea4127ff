"""The Lightning Trainer and NeMo's experiment manager around it: log folder, loggers, resume, checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.loggers import WandbLogger
from nemo.utils import logging as nemo_logging
from nemo.utils.exp_manager import CallbackParams, ExpManagerConfig, exp_manager
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_kd.config import ConfigError
from nemo_kd.config.student import TrainStudentConfig
from nemo_kd.mcore.groups import ProcessGroups, cluster_environment
from nemo_kd.trainer.checkpoints import StudentCheckpoints
from nemo_kd.trainer.lifetime import Lifetime
from nemo_kd.trainer.logging import JsonlLogger, ProgressBar
from nemo_kd.trainer.plan import TrainingPlan
from nemo_kd.trainer.resume import choose_checkpoint
from nemo_kd.trainer.schedule import StepSchedule
from nemo_kd.trainer.strategy import MegatronStrategy

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
}
"""What exp_manager must leave alone: it knows nothing of damaged checkpoints, nor how all ranks stop at one step."""

WANDB_AXES = {"train": "train_step", "perf": "train_step", "validation": "eval_step", "test": "eval_step"}
"""Sections of metrics and what their charts in Weights & Biases run along: completed steps, at which each was measured."""


def build_trainer(
    config: TrainStudentConfig,
    settings: dict[str, Any],
    plan: TrainingPlan,
    groups: ProcessGroups,
    lifetime: Lifetime,
) -> pl.Trainer:
    """A Trainer that runs `plan`, goes on from the latest whole checkpoint and logs where `exp_manager` says.

    Args:
        settings: of `experiment_settings`.

    Raises:
        CheckpointError: there is no checkpoint to go on from.
    """
    loop = config.trainer.knowledge_distillation
    schedule = StepSchedule(plan)
    environment = cluster_environment(config.trainer.num_nodes, config.trainer.devices)
    trainer = pl.Trainer(
        accelerator="gpu" if groups.device.type == "cuda" else "cpu",
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        strategy=MegatronStrategy(groups, cluster_environment=environment or LightningEnvironment()),
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
        callbacks=[ProgressBar(plan.max_steps), schedule, lifetime],
    )
    params = settings["checkpoint_callback_params"]
    nemo_logging.set_verbosity(nemo_logging.ERROR)  # it would say that it finds no checkpoint, where it does not look
    nothing = {**settings, **DONE_HERE, "checkpoint_callback_params": {**params, "dirpath": os.devnull}}
    log_dir = exp_manager(trainer, OmegaConf.create(nothing))
    nemo_logging.set_verbosity(nemo_logging.WARNING)
    assert log_dir is not None
    params["dirpath"] = params["dirpath"] or str(log_dir / "checkpoints")
    resume = [settings[f"resume_{key}"] for key in ("if_exists", "ignore_no_checkpoint", "from_checkpoint")]
    checkpoint = choose_checkpoint(Path(params["dirpath"]), *resume)
    trainer.ckpt_path = str(checkpoint) if checkpoint is not None else None
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            for section, axis in WANDB_AXES.items():
                logger.experiment.define_metric(f"{section}/*", step_metric=axis)
    trainer.loggers = [*trainer.loggers, JsonlLogger(Path(log_dir) / "metrics" / "metrics.jsonl")]
    if settings["create_checkpoint_callback"]:
        trainer.callbacks.append(_checkpoints(settings, config.name, schedule, lifetime))
    return trainer


def experiment_settings(config: TrainStudentConfig) -> dict[str, Any]:
    """All of `exp_manager`'s keys, with defaults.

    Raises:
        ConfigError: a key is unknown, or impossible here.
    """
    schema = OmegaConf.structured(ExpManagerConfig)
    try:
        merged = OmegaConf.merge(schema, DEFAULTS, {"name": config.name}, config.exp_manager)
    except OmegaConfBaseException as error:
        raise ConfigError(f"exp_manager.{error.full_key}: {str(error.args[0]).splitlines()[0]}") from error
    if merged.create_wandb_logger and not (merged.wandb_logger_kwargs or {}).get("project"):
        raise ConfigError(
            "exp_manager.wandb_logger_kwargs.project: create_wandb_logger=True needs a project and a name"
        )
    params = merged.checkpoint_callback_params
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
    return OmegaConf.to_container(merged)  # type: ignore[return-value]


def _checkpoints(settings: dict[str, Any], name: str, schedule: StepSchedule, lifetime: Lifetime) -> StudentCheckpoints:
    params = {key: settings["checkpoint_callback_params"][key] for key in CallbackParams.__dataclass_fields__}
    del params["filepath"]
    params["filename"] = params["filename"] or f"{name}--{{{params['monitor']}:.4f}}-{{step}}-{{consumed_samples}}"
    params["prefix"] = params["prefix"] or name
    resumes = bool(settings["resume_if_exists"])
    return StudentCheckpoints(schedule.plan.save_interval, schedule, lifetime, n_resume=resumes, **params)
