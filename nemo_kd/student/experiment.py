"""The Lightning Trainer and NeMo's experiment manager around it: log folder, loggers, resume, checkpoints."""

from __future__ import annotations

import dataclasses
import logging
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
from nemo_kd.config.student import TrainStudentConfig
from nemo_kd.mcore.groups import ProcessGroups
from nemo_kd.student.checkpoints import StudentCheckpoints, label_of
from nemo_kd.student.lifetime import Lifetime
from nemo_kd.student.logging import JsonlLogger, RunLog, named_os_errors
from nemo_kd.student.resumable_state import StepSchedule
from nemo_kd.student.resume import choose_checkpoint
from nemo_kd.student.run_folder import check_same_experiment
from nemo_kd.student.strategy import LauncherEnvironment, MegatronStrategy
from nemo_kd.student.training_plan import TrainingPlan
from nemo_kd.student.wandb_logger import start_wandb

log = logging.getLogger(__name__)

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
        strategy=MegatronStrategy(
            groups, record, cluster_environment=LauncherEnvironment(config.trainer.num_devices)
        ),
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
    nemo_logging.set_verbosity(
        nemo_logging.ERROR
    )  # it would say that it finds no checkpoint, where it does not look
    nothing = {
        **settings,
        **DONE_HERE,
        "checkpoint_callback_params": {**params, "dirpath": os.devnull},
    }
    with named_os_errors(settings["explicit_log_dir"] or settings["exp_dir"]):
        try:
            log_dir = exp_manager(trainer, OmegaConf.create(nothing))
        except OmegaConfBaseException as error:
            raise ConfigError(
                f"exp_manager.{error.full_key}: {str(error.args[0]).splitlines()[0]}"
            ) from error
    nemo_logging.set_verbosity(nemo_logging.WARNING)
    assert log_dir is not None
    params["dirpath"] = params["dirpath"] or str(log_dir / "checkpoints")
    resume = [
        settings[f"resume_{key}"]
        for key in ("if_exists", "ignore_no_checkpoint", "from_checkpoint")
    ]
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


def experiment_settings(
    config: TrainStudentConfig, measured: Sequence[str] | None = None
) -> dict[str, Any]:
    """All of `exp_manager`'s keys, with defaults.

    Args:
        measured: names of what validation/... reports, by which checkpoints can be ranked; None: not known.

    Raises:
        ConfigError: a value is impossible here.
    """
    key = "exp_manager.checkpoint_callback_params.monitor"
    monitor = config.exp_manager.checkpoint_callback_params.monitor
    known = ["val_loss", *(f"validation/{name}" for name in measured or ())]
    if monitor not in known and measured is not None:
        raise ConfigError(f"{key}: {monitor!r} is not measured; known: {', '.join(known)}")
    settings = dataclasses.asdict(config.exp_manager)
    settings["name"] = settings["name"] or config.name
    return {
        key: value
        for key, value in settings.items()
        if value is not None or key not in NEMO_DEFAULTS
    }


def _checkpoints(
    settings: dict[str, Any], config: TrainStudentConfig, schedule: StepSchedule, lifetime: Lifetime
) -> StudentCheckpoints:
    name = config.name
    params = {**settings["checkpoint_callback_params"], "save_on_train_epoch_end": False}
    if not params["filename"]:
        # As Lightning would from {val_loss:.4f}, but with another label.
        label = label_of(params["monitor"])
        params["filename"] = (
            f"{name}--{label}={{{params['monitor']}:.4f}}-step={{step}}-consumed_samples={{consumed_samples}}"
        )
        params["auto_insert_metric_name"] = False
    params["prefix"] = params["prefix"] or name
    params["n_resume"] = bool(settings["resume_if_exists"])
    return StudentCheckpoints(
        schedule.plan.save_interval, schedule, lifetime, config.export.hf, **params
    )
