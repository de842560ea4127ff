"""The Lightning Trainer of a run, with the folder and the loggers of NeMo's experiment manager."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from nemo.utils import logging as nemo_logging
from nemo.utils.exp_manager import exp_manager
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_kd.config import ConfigError
from nemo_kd.config.exp_manager import PARAMS
from nemo_kd.config.student import TrainStudentConfig
from nemo_kd.mcore.groups import ProcessGroups
from nemo_kd.run.collective import on_rank_zero
from nemo_kd.run.resolved_config import resolved_config, save_config
from nemo_kd.student.checkpoint_folder import choose_checkpoint
from nemo_kd.student.checkpoints import Checkpoints, CheckpointWriter
from nemo_kd.student.course import Course
from nemo_kd.student.lifetime import Lifetime
from nemo_kd.student.progress import RunLog, named_os_errors, start_wandb
from nemo_kd.student.run_folder import check_same_experiment
from nemo_kd.student.schedule import TrainingPlan
from nemo_kd.student.strategy import LauncherEnvironment, MegatronStrategy

NOT_NEMOS = {
    "create_checkpoint_callback": False,
    "resume_ignore_no_checkpoint": True,
    "resume_from_checkpoint": None,
    "disable_validation_on_resume": False,
    "max_time_per_run": None,
    "create_wandb_logger": False,
}
"""Keys that nemo_kd handles itself.

NeMo's `exp_manager` does not check checkpoints for damage, does not stop all ranks at one step, and
fails if Weights & Biases is out of reach."""

NEMO_DEFAULTS = (
    "mlflow_logger_kwargs",
    "clearml_logger_kwargs",
    "dllogger_logger_kwargs",
    "step_timing_kwargs",
    "ipl_epoch_stopper_callback_params",
    "straggler_detection_params",
    "fault_tolerance",
    "ema",
)
"""Keys whose default None stands for NeMo's own."""


def build_trainer(
    config: TrainStudentConfig,
    settings: dict[str, Any],
    plan: TrainingPlan,
    groups: ProcessGroups,
    lifetime: Lifetime,
    record: dict[str, Any],
) -> tuple[pl.Trainer, Checkpoints | None]:
    """Return a Trainer that runs `plan` from the latest whole checkpoint on, and its checkpoints.

    Args:
        settings: of `experiment_settings`.
        record: of `experiment_record`.

    Raises:
        CheckpointError: there is no checkpoint to resume, or it belongs to another experiment.
    """
    loop = config.trainer.knowledge_distillation
    run_log = RunLog(
        plan.max_steps, loop.log_every_n_steps, settings.pop("log_interval_s")
    )
    writer = CheckpointWriter(groups.layout(), record)
    trainer = pl.Trainer(
        accelerator="gpu" if groups.device.type == "cuda" else "cpu",
        devices=config.trainer.num_devices,
        num_nodes=config.trainer.num_nodes,
        strategy=MegatronStrategy(
            groups,
            writer,
            cluster_environment=LauncherEnvironment(config.trainer.num_devices),
        ),
        precision="32-true",  # Megatron casts by itself
        max_epochs=-1,  # `Course` ends the run after `plan.max_steps`
        val_check_interval=plan.val_check_interval,
        check_val_every_n_epoch=None,  # counts steps over the whole run
        limit_val_batches=loop.limit_val_batches,
        log_every_n_steps=loop.log_every_n_steps,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        callbacks=[run_log],
    )
    log_dir = _set_up_folder(trainer, settings)
    params = settings["checkpoint_callback_params"]
    params["dirpath"] = params["dirpath"] or str(log_dir / "checkpoints")
    dirpath = Path(params["dirpath"])
    resume = [
        settings[f"resume_{key}"]
        for key in ("if_exists", "ignore_no_checkpoint", "from_checkpoint")
    ]
    resumed = choose_checkpoint(dirpath, *resume)
    if resumed is not None:
        check_same_experiment(resumed, record, config.allow_changed)
        trainer.ckpt_path = str(resumed)
    on_rank_zero(lambda: save_config(log_dir / "config.yaml", resolved_config(config)))
    run_log.log_dir = log_dir
    trainer.loggers = [*trainer.loggers, *start_wandb(settings, log_dir)]
    checkpoints = None
    if settings["create_checkpoint_callback"]:
        checkpoints = Checkpoints(config, dirpath, writer, lifetime.watchdog)
    trainer.callbacks.append(Course(plan, lifetime, checkpoints))
    return trainer, checkpoints


def _set_up_folder(trainer: pl.Trainer, settings: dict[str, Any]) -> Path:
    """Let NeMo make the run's folder, its loggers and callbacks; return the folder."""
    # It logs that it finds no checkpoint, in the place where it is made to look.
    nemo_logging.set_verbosity(nemo_logging.ERROR)
    params = {**settings["checkpoint_callback_params"], "dirpath": os.devnull}
    keys = OmegaConf.create(
        {**settings, **NOT_NEMOS, "checkpoint_callback_params": params}
    )
    with named_os_errors(settings["explicit_log_dir"] or settings["exp_dir"]):
        try:
            log_dir = exp_manager(trainer, keys)
        except OmegaConfBaseException as error:
            raise ConfigError(
                f"exp_manager.{error.full_key}: {str(error.args[0]).splitlines()[0]}"
            ) from error
    nemo_logging.set_verbosity(nemo_logging.WARNING)
    assert log_dir is not None
    return Path(log_dir)


def experiment_settings(
    config: TrainStudentConfig, measured: Sequence[str] | None = None
) -> dict[str, Any]:
    """Return all keys of `exp_manager`, with defaults.

    Args:
        measured: metrics under validation/... by which checkpoints can be ranked; None: unknown.

    Raises:
        ConfigError: a value cannot work.
    """
    monitor = config.exp_manager.checkpoint_callback_params.monitor
    known = ["val_loss", *(f"validation/{name}" for name in measured or ())]
    if monitor not in known and measured is not None:
        raise ConfigError(
            f"{PARAMS}.monitor: {monitor!r} is not measured; known: {', '.join(known)}"
        )
    settings = dataclasses.asdict(config.exp_manager)
    settings["name"] = settings["name"] or config.name
    return {
        key: value
        for key, value in settings.items()
        if value is not None or key not in NEMO_DEFAULTS
    }
