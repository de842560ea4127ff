"""The Lightning Trainer and NeMo's experiment manager around it: log folder, loggers, resume, checkpoints."""

from __future__ import annotations

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
from nemo_kd.trainer.checkpoints import ValidatedCheckpoints
from nemo_kd.trainer.logging import JsonlLogger, ProgressBar
from nemo_kd.trainer.plan import TrainingPlan
from nemo_kd.trainer.strategy import MegatronStrategy

DEFAULTS = {"seconds_to_sleep": 0, "log_tflops_per_sec_per_gpu": False, "log_step_timing": False}
"""exp_manager keys whose NeMo defaults do not fit: the sleep slows start-up, the others repeat our own metrics."""

WANDB_AXES = {"train": "train_step", "perf": "train_step", "validation": "eval_step", "test": "eval_step"}
"""Sections of metrics and what their charts in Weights & Biases run along: completed steps, at which each was measured."""


def build_trainer(config: TrainStudentConfig, plan: TrainingPlan, groups: ProcessGroups) -> pl.Trainer:
    """A Trainer that runs `plan`, resumes where `exp_manager` finds a checkpoint and logs where it says.

    Raises:
        ConfigError: an unknown or impossible exp_manager key.
    """
    settings = _settings(config)
    loop = config.trainer.knowledge_distillation
    environment = cluster_environment(config.trainer.num_nodes, config.trainer.devices)
    trainer = pl.Trainer(
        accelerator="gpu" if groups.device.type == "cuda" else "cpu",
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        strategy=MegatronStrategy(groups, cluster_environment=environment or LightningEnvironment()),
        precision="32-true",  # Megatron casts by itself
        max_epochs=1,  # to Lightning the whole run is one pass over `plan.max_steps` batches
        max_steps=plan.max_steps,
        val_check_interval=plan.val_check_interval,
        check_val_every_n_epoch=None,
        limit_val_batches=loop.limit_val_batches,
        log_every_n_steps=loop.log_every_n_steps,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[ProgressBar(plan.max_steps)],
    )
    nemo_logging.set_verbosity(nemo_logging.WARNING)
    log_dir = exp_manager(trainer, OmegaConf.create({**settings, "create_checkpoint_callback": False}))
    assert log_dir is not None
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            for section, axis in WANDB_AXES.items():
                logger.experiment.define_metric(f"{section}/*", step_metric=axis)
    trainer.loggers = [*trainer.loggers, JsonlLogger(Path(log_dir) / "metrics" / "metrics.jsonl")]
    if settings["create_checkpoint_callback"]:
        trainer.callbacks.append(_checkpoints(settings, config.name, Path(log_dir), plan, trainer))
    return trainer


def _settings(config: TrainStudentConfig) -> dict[str, Any]:
    schema = OmegaConf.structured(ExpManagerConfig)
    try:
        merged = OmegaConf.merge(schema, DEFAULTS, {"name": config.name}, config.exp_manager)
    except OmegaConfBaseException as error:
        raise ConfigError(f"exp_manager.{error.full_key}: {str(error.args[0]).splitlines()[0]}") from error
    if merged.create_wandb_logger and not (merged.wandb_logger_kwargs or {}).get("project"):
        raise ConfigError(
            "exp_manager.wandb_logger_kwargs.project: create_wandb_logger=True needs a project and a name"
        )
    return OmegaConf.to_container(merged)  # type: ignore[return-value]


def _checkpoints(
    settings: dict[str, Any], name: str, log_dir: Path, plan: TrainingPlan, trainer: pl.Trainer
) -> ValidatedCheckpoints:
    params = {key: settings["checkpoint_callback_params"][key] for key in CallbackParams.__dataclass_fields__}
    del params["filepath"]
    params["dirpath"] = params["dirpath"] or str(log_dir / "checkpoints")
    params["filename"] = params["filename"] or f"{name}--{{{params['monitor']}:.4f}}-{{step}}-{{consumed_samples}}"
    params["prefix"] = params["prefix"] or name
    callback = ValidatedCheckpoints(plan.save_interval, n_resume=bool(settings["resume_if_exists"]), **params)
    callback.last_model_path = str(trainer.ckpt_path or "")
    return callback
