"""Configuration of a run's folder, logs and checkpoints in stage 2: `exp_manager`, with the keys of NeMo's that act."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_kd.config.errors import ConfigError

KEY = "exp_manager"
PARAMS = f"{KEY}.checkpoint_callback_params"


@dataclass
class CheckpointParams:
    """`exp_manager.checkpoint_callback_params`: which checkpoints are kept, and what a run leaves."""

    dirpath: str | None = None
    """Folder of the checkpoints; None: checkpoints/ in the log folder."""
    filename: str | None = None
    """Name of a checkpoint, with {metric} placeholders; None: name, monitored value, step and samples."""
    prefix: str | None = None
    """What the name of the .nemo archive begins with; None: name."""
    postfix: str = ".nemo"
    """What the name of the archive ends with."""
    monitor: str = "val_loss"
    """Metric that ranks checkpoints: val_loss, or a validation/... metric."""
    mode: str = "min"
    """Which values of it are better: min or max."""
    save_top_k: int = 5
    """Ranked checkpoints that are kept; -1: all, 0: none."""
    save_last: bool = True
    """Keeps the latest state after each validation, to go on from."""
    save_weights_only: bool = False
    """Ranked checkpoints hold weights alone, which no run can go on from."""
    save_best_model: bool = False
    """The .nemo archive holds the best weights instead of the last ones."""
    save_nemo_on_train_end: bool = True
    """Leaves a .nemo archive at the end of training."""
    always_save_nemo: bool = False
    """Writes a .nemo archive with every checkpoint."""
    async_save: bool = True
    """Trains on while a checkpoint is written."""
    auto_insert_metric_name: bool = True
    """filename: puts the name of each metric before its value."""
    verbose: bool = True
    """Tells of each ranked checkpoint."""
    every_n_train_steps: int | None = None
    """Not used: trainer.knowledge_distillation.save_interval gives the steps between checkpoints."""
    train_time_interval: Any = None
    """Not used: trainer.knowledge_distillation.save_interval gives the steps between checkpoints."""

    def __post_init__(self) -> None:
        self.dirpath = _expanded(self.dirpath)
        for key in ("every_n_train_steps", "train_time_interval"):
            if getattr(self, key):
                raise ConfigError(
                    f"{PARAMS}.{key}: {getattr(self, key)} has no effect here; use trainer.knowledge_distillation.save_interval"
                )
        if self.mode not in ("min", "max"):
            raise ConfigError(f"{PARAMS}.mode: {self.mode!r} is not one of min, max")
        if self.save_top_k < -1:
            raise ConfigError(
                f"{PARAMS}.save_top_k: {self.save_top_k} must be -1 (all), 0 (none) or more"
            )
        for name in ("filename", "prefix"):
            if "/" in (getattr(self, name) or ""):
                raise ConfigError(
                    f"{PARAMS}.{name}: {getattr(self, name)!r} must not contain a slash; dirpath says where checkpoints lie"
                )
        if self.save_best_model and self.save_weights_only:
            raise ConfigError(
                f"{PARAMS}: save_best_model needs whole checkpoints; leave save_weights_only out"
            )


@dataclass
class EarlyStoppingParams:
    """`exp_manager.early_stopping_callback_params`: when a run ends because it no longer gets better."""

    monitor: str = "val_loss"
    """Metric that is watched."""
    mode: str = "min"
    """Which values of it are better: min or max."""
    min_delta: float = 0.001
    """Smallest change that counts as better."""
    patience: int = 10
    """Validations without a better value after which the run ends."""
    verbose: bool = True
    """Tells of each better value."""
    strict: bool = True
    """A metric that is not measured is an error."""
    check_finite: bool = True
    """Ends the run when the metric is not a finite number."""
    stopping_threshold: float | None = None
    """Ends the run at a value better than this."""
    divergence_threshold: float | None = None
    """Ends the run at a value worse than this."""
    check_on_train_epoch_end: bool | None = None
    """Looks at the end of the training instead of after validations."""
    log_rank_zero_only: bool = False
    """Only rank 0 tells."""

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise ConfigError(
                f"{KEY}.early_stopping_callback_params.mode: {self.mode!r} is not one of min, max"
            )


@dataclass
class ExpManagerConfig:
    """`exp_manager`: where a run of stage 2 logs, and from what it goes on."""

    explicit_log_dir: str | None = None
    """Folder of the run; None: exp_dir/name, which all runs of that name share."""
    exp_dir: str | None = None
    """Folder of runs without explicit_log_dir; None: nemo_experiments."""
    name: str | None = None
    """Folder below exp_dir; None: name."""
    version: str | None = None
    """Folder below that; None: none where resume_if_exists, else a new one."""
    use_datetime_version: bool = True
    """A new version is called by date and time; False: by a number."""
    resume_if_exists: bool = True
    """Goes on from the latest checkpoint of the folder. False: a folder that holds a run is refused."""
    resume_ignore_no_checkpoint: bool = True
    """Starts where there is no checkpoint to go on from; False: that is an error."""
    resume_from_checkpoint: str | None = None
    """Checkpoint to go on from where the folder has none."""
    max_time_per_run: str | None = None
    """DD:HH:MM:SS after which the run saves and stops with exit status 75; the same command continues."""
    log_interval_s: float = 10.0
    """Seconds between two lines of progress; 0 shows every step."""
    create_checkpoint_callback: bool = True
    """Writes checkpoints and the .nemo archive."""
    checkpoint_callback_params: CheckpointParams = field(default_factory=CheckpointParams)
    create_early_stopping_callback: bool = False
    """Ends the run when it no longer gets better."""
    early_stopping_callback_params: EarlyStoppingParams = field(default_factory=EarlyStoppingParams)
    create_tensorboard_logger: bool = True
    """Writes files for TensorBoard."""
    summary_writer_kwargs: dict[str, Any] | None = None
    """Arguments of the TensorBoard logger."""
    create_wandb_logger: bool = False
    """Sends the metrics to Weights & Biases."""
    wandb_logger_kwargs: dict[str, Any] | None = None
    """project, name and other arguments of wandb.init."""
    create_mlflow_logger: bool = False
    """Sends the metrics to MLflow."""
    mlflow_logger_kwargs: dict[str, Any] | None = None
    """Arguments of the MLflow logger."""
    create_clearml_logger: bool = False
    """Sends the metrics to ClearML."""
    clearml_logger_kwargs: dict[str, Any] | None = None
    """Arguments of the ClearML logger."""
    create_dllogger_logger: bool = False
    """Writes the metrics with DLLogger."""
    dllogger_logger_kwargs: dict[str, Any] | None = None
    """Arguments of DLLogger."""
    create_neptune_logger: bool = False
    """Sends the metrics to Neptune."""
    neptune_logger_kwargs: dict[str, Any] | None = None
    """Arguments of the Neptune logger."""
    files_to_copy: list[str] | None = None
    """Files that are copied into the folder of the run."""
    log_step_timing: bool = False
    """Logs NeMo's times of steps beside perf/step_time_s."""
    log_delta_step_timing: bool = False
    """Logs NeMo's times between steps."""
    step_timing_kwargs: dict[str, Any] | None = None
    """Arguments of NeMo's timer."""
    log_tflops_per_sec_per_gpu: bool = False
    """Logs NeMo's estimate of TFLOP/s."""
    seconds_to_sleep: float = 0
    """Seconds that ranks other than the first wait at the start."""
    create_ipl_epoch_stopper_callback: bool = False
    """Adds NeMo's callback of that name."""
    ipl_epoch_stopper_callback_params: dict[str, Any] | None = None
    """Its arguments."""
    create_straggler_detection_callback: bool = False
    """Adds NeMo's detection of slow GPUs (needs nvidia-resiliency-ext)."""
    straggler_detection_params: dict[str, Any] | None = None
    """Its arguments."""
    create_fault_tolerance_callback: bool = False
    """Adds NeMo's fault tolerance (needs nvidia-resiliency-ext)."""
    fault_tolerance: dict[str, Any] | None = None
    """Its arguments."""
    ema: dict[str, Any] | None = None
    """Not supported: no moving average of weights is kept."""

    def __post_init__(self) -> None:
        if (self.ema or {}).get("enable"):
            raise ConfigError(
                f"{KEY}.ema.enable: True is not supported: no moving average of weights is kept; leave it out"
            )
        for name in ("explicit_log_dir", "exp_dir", "resume_from_checkpoint"):
            setattr(self, name, _expanded(getattr(self, name)))
        if self.log_interval_s < 0:
            raise ConfigError(
                f"{KEY}.log_interval_s: {self.log_interval_s} must not be negative; 0 shows every step"
            )
        if self.create_wandb_logger and not (self.wandb_logger_kwargs or {}).get("project"):
            raise ConfigError(
                f"{KEY}.wandb_logger_kwargs.project: create_wandb_logger=True needs a project and a name"
            )
        if self.max_time_per_run is not None and not self.create_checkpoint_callback:
            raise ConfigError(
                f"{KEY}.max_time_per_run: it stops a run that goes on from its checkpoint later, but "
                f"{KEY}.create_checkpoint_callback=False writes none; leave one of them out"
            )

    def check_folders(self) -> None:
        """Look whether the folders that are written can be made and written.

        Raises:
            ConfigError: names the key and the folder that stands in the way.
        """
        log_dir = "explicit_log_dir" if self.explicit_log_dir else "exp_dir"
        check_writable(f"{KEY}.{log_dir}", getattr(self, log_dir))
        dirpath = self.checkpoint_callback_params.dirpath
        if dirpath and self.create_checkpoint_callback:
            check_writable(f"{PARAMS}.dirpath", dirpath)


def _expanded(path: str | None) -> str | None:
    return os.path.expanduser(path) if path else path


def check_writable(key: str, folder: str | Path | None) -> None:
    """Look where the folder is, or would have to be made; None stands for the current one."""
    existing = Path(folder or ".").absolute()
    while not os.path.exists(
        existing
    ):  # which says no, where Path.exists fails, if one may not even look
        existing = existing.parent
    if not existing.is_dir():
        raise ConfigError(
            f"{key}: {folder} cannot be a folder: {existing} is a file; give another one"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{key}: {folder or existing} cannot be written: you may not write in {existing}; give another one"
        )
