"""Configuration of a run's folder, logs and checkpoints in stage 2 (`exp_manager`, with NeMo's
keys), and the keys that may change when a run resumes."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from nemo_kd.config import ConfigError
from nemo_kd.config.fields import Section, bounded, choice, path
from nemo_kd.config.shared import RunConfig
from nemo_kd.config.typed import describe, suggestion

PARAMS = "exp_manager.checkpoint_callback_params"


@dataclass
class CheckpointParams(Section, key=PARAMS):
    """`exp_manager.checkpoint_callback_params`: checkpoints and archives of a run."""

    dirpath: str | None = path(None)
    """Folder of the checkpoints; None: checkpoints/ in the log folder."""
    filename: str | None = None
    """Name of a checkpoint, with {metric} placeholders; None: name, monitored value, step and
    samples."""
    prefix: str | None = None
    """Start of the name of the .nemo archive; None: name."""
    postfix: str = ".nemo"
    """End of the name of the archive."""
    monitor: str = "val_loss"
    """Metric that ranks checkpoints: val_loss, a validation/... metric, or an eval/... metric of
    generated responses."""
    mode: str = choice("min", ("min", "max"))
    """Values of the metric that are better: min or max."""
    save_top_k: int = bounded(5, at_least=-1)
    """Number of ranked checkpoints to keep; -1: all, 0: none."""
    save_last: bool = True
    """Keep the latest state after each validation, to resume from."""
    save_weights_only: bool = False
    """Save only the weights in ranked checkpoints; a run cannot resume from these."""
    save_best_model: bool = False
    """Put the best weights into the .nemo archive instead of the last ones."""
    save_nemo_on_train_end: bool = True
    """Write a .nemo archive at the end of training."""
    always_save_nemo: bool = False
    """Write a .nemo archive with every checkpoint."""
    async_save: bool = True
    """Continue training while a checkpoint is written."""
    auto_insert_metric_name: bool = True
    """filename: put the name of each metric before its value."""
    verbose: bool = True
    """Log each ranked checkpoint."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("filename", "prefix"):
            if "/" in (getattr(self, name) or ""):
                raise self.error(
                    name,
                    f"{getattr(self, name)!r} must not contain a slash; dirpath is the folder of "
                    "checkpoints",
                )
        if self.save_best_model and self.save_weights_only:
            raise self.error(
                "save_best_model",
                "needs whole checkpoints; leave save_weights_only out",
            )

    @property
    def ranks_by_answers(self) -> bool:
        """Return True if checkpoints are ranked by a metric of generated responses."""
        return self.monitor.startswith("eval/")


@dataclass
class EarlyStoppingParams(Section, key="exp_manager.early_stopping_callback_params"):
    """`exp_manager.early_stopping_callback_params`: the end of a run that no longer improves."""

    monitor: str = "val_loss"
    """Metric to watch."""
    mode: str = choice("min", ("min", "max"))
    """Values of the metric that are better: min or max."""
    min_delta: float = 0.001
    """Smallest change that counts as better."""
    patience: int = 10
    """End the run after this many validations without a better value."""
    verbose: bool = True
    """Log each better value."""
    strict: bool = True
    """Fail if the metric is not measured."""
    check_finite: bool = True
    """End the run if the metric is not finite."""
    stopping_threshold: float | None = None
    """End the run at a value better than this."""
    divergence_threshold: float | None = None
    """End the run at a value worse than this."""
    check_on_train_epoch_end: bool | None = None
    """Check at the end of the training instead of after validations."""
    log_rank_zero_only: bool = False
    """Log on rank 0 only."""


@dataclass
class ExpManagerConfig(RunConfig):
    """`exp_manager`: folder, logs and checkpoints of a run of stage 2."""

    explicit_log_dir: str | None = path(None)
    """Folder of the run; None: exp_dir/name, which all runs of that name share."""
    exp_dir: str | None = path(None)
    """Folder of runs without explicit_log_dir; None: nemo_experiments."""
    name: str | None = None
    """Folder below exp_dir; None: name."""
    version: str | None = None
    """Folder below that. None: none with resume_if_exists, otherwise a new one."""
    use_datetime_version: bool = True
    """Name a new version by date and time; False: by a number."""
    resume_if_exists: bool = True
    """Resume from the latest checkpoint in the folder. False refuses a folder that holds a run."""
    resume_ignore_no_checkpoint: bool = True
    """Start if there is no checkpoint to resume from; False: that is an error."""
    resume_from_checkpoint: str | None = path(None)
    """Checkpoint to resume from if the folder has none."""
    log_interval_s: float = bounded(10.0, at_least=0)
    """Seconds between two lines of progress; 0 prints every step."""
    create_checkpoint_callback: bool = True
    """Write checkpoints and the .nemo archive."""
    checkpoint_callback_params: CheckpointParams = field(
        default_factory=CheckpointParams
    )
    create_early_stopping_callback: bool = False
    """End the run when it no longer improves."""
    early_stopping_callback_params: EarlyStoppingParams = field(
        default_factory=EarlyStoppingParams
    )
    create_tensorboard_logger: bool = True
    """Write files for TensorBoard."""
    summary_writer_kwargs: dict[str, Any] | None = None
    """Arguments of the TensorBoard logger."""
    create_mlflow_logger: bool = False
    """Send the metrics to MLflow."""
    mlflow_logger_kwargs: dict[str, Any] | None = None
    """Arguments of the MLflow logger."""
    create_clearml_logger: bool = False
    """Send the metrics to ClearML."""
    clearml_logger_kwargs: dict[str, Any] | None = None
    """Arguments of the ClearML logger."""
    create_neptune_logger: bool = False
    """Send the metrics to Neptune."""
    neptune_logger_kwargs: dict[str, Any] | None = None
    """Arguments of the Neptune logger."""
    files_to_copy: list[str] | None = None
    """Files to copy into the folder of the run."""
    log_step_timing: bool = False
    """Log NeMo's step times beside perf/step_time_s."""
    log_delta_step_timing: bool = False
    """Log NeMo's times between steps."""
    step_timing_kwargs: dict[str, Any] | None = None
    """Arguments of NeMo's timer."""
    log_tflops_per_sec_per_gpu: bool = False
    """Log NeMo's estimate of TFLOP/s."""
    seconds_to_sleep: float = 0
    """Seconds that all ranks but the first wait at the start."""
    create_straggler_detection_callback: bool = False
    """Add NeMo's detection of slow GPUs (needs nvidia-resiliency-ext)."""
    straggler_detection_params: dict[str, Any] | None = None
    """Arguments of the callback."""
    create_fault_tolerance_callback: bool = False
    """Add NeMo's fault tolerance (needs nvidia-resiliency-ext)."""
    fault_tolerance: dict[str, Any] | None = None
    """Arguments of the callback."""
    ema: dict[str, Any] | None = None
    """Not supported: no moving average of weights is kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.ema or {}).get("enable"):
            raise self.error(
                "ema.enable",
                "True is not supported: no moving average of weights is kept",
            )
        if self.max_time_per_run is not None and not self.create_checkpoint_callback:
            raise self.error(
                "max_time_per_run",
                "it stops a run that resumes from its checkpoint later, but "
                "exp_manager.create_checkpoint_callback=False writes none; leave one of them out",
            )


KEY = "allow_changed"
FREE_KEYS = [
    "trainer.knowledge_distillation.max_epochs",
    "trainer.knowledge_distillation.max_steps",
    "trainer.knowledge_distillation.val_check_interval",
    "trainer.knowledge_distillation.save_interval",
    "trainer.knowledge_distillation.log_every_n_steps",
    "trainer.knowledge_distillation.non_finite",
    "trainer.knowledge_distillation.inference_metrics",
    "eval",
    "model.optim.sched.warmup_steps",
    "model.optim.sched.warmup_ratio",
    "model.optim.sched.constant_steps",
    "model.optim.sched.constant_ratio",
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
    "model.data.data_impl",
    "model.max_seq_length",
    "model.data.n_chunks",
    "model.data.allow_other_template",
    "model.data.chat",
    "model.data.chat_prompt_tokens",
    "model.data.dataset",
    "name",
    "exp_manager",
    "export",
    "allow_changed",
]
"""Keys and sections that may change when a run resumes. Every other key, a new one too, is
compared.

First the length of the run, intervals, and the parts of the learning-rate schedule that follow the
length; then where and how it is computed, which is the same within rounding; then keys that select
data, which is compared by content; then logs and files.
"""


def compared_values(config: Any) -> dict[str, Any]:
    """Return every key of a configuration that is compared, with its value as JSON has it."""
    keys = compared_defaults(type(config))
    values = {key: operator.attrgetter(key)(config) for key in keys}
    return json.loads(json.dumps(values))


def compared_defaults(config_class: type) -> dict[str, Any]:
    """Return the default of every compared key; a checkpoint without a key was trained
    with it."""
    docs = describe(config_class)
    return {each.key: each.default for each in docs if not is_free(each.key)}


def is_free(key: str) -> bool:
    """Return True for a key that may change when a run resumes."""
    return any(f"{key}.".startswith(f"{free}.") for free in FREE_KEYS)


def allowed_keys(allow_changed: Iterable[str], compared: Iterable[str]) -> set[str]:
    """Return the compared keys that `allow_changed` names: whole keys, parts of them, or sections.

    Raises:
        ConfigError: an entry names no key.
    """
    allowed: set[str] = set()
    compared = set(compared)
    for entry in allow_changed:
        found = {key for key in compared if f".{entry}." in f".{key}."}
        is_free_part = any(f".{free}".endswith(f".{entry}") for free in FREE_KEYS)
        if not found and not is_free_part and not is_free(entry):
            close = suggestion(entry, compared)
            raise ConfigError(f"{KEY}: there is no key {entry}{close}")
        allowed |= found
    return allowed
