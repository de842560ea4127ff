"""The commands as Python functions."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nemo_kd.cli.aligner_keys import config_of, with_keys
from nemo_kd.cli.compute_topk_logits import COMMAND as STAGE_1
from nemo_kd.cli.convert_checkpoint import COMMAND as CONVERSION
from nemo_kd.cli.evaluate_gpt import COMMAND as EVALUATION
from nemo_kd.cli.run import Command, silence_libraries
from nemo_kd.cli.train_gpt_knowledge_distillation import COMMAND as STAGE_2
from nemo_kd.config import ConfigError
from nemo_kd.config.convert import ConvertCheckpointConfig
from nemo_kd.config.evaluation import EvaluateGPTConfig
from nemo_kd.config.student import TrainStudentConfig
from nemo_kd.config.teacher import ComputeTopkLogitsConfig
from nemo_kd.config.typed import typed
from nemo_kd.run.launch import needs_launch
from nemo_kd.run.ranks import join_ranks

if TYPE_CHECKING:
    from nemo_kd.student.reports import StudentRun
    from nemo_kd.teacher.reports import CacheReport


def compute_topk_logits(
    config: ComputeTopkLogitsConfig | Mapping[str, Any],
) -> list[CacheReport]:
    """Run the teacher over a dataset and write its cache (stage 1).

    Args:
        config: a typed configuration, or the command's keys and values. Dotted keys are accepted:
            `{"pretrained_checkpoint.restore_from_path": "teacher/", "output_path": ...}`.

    Returns:
        One report per dataset with paths and counts; none for `dry_run`.

    Raises:
        UserInputError: the configuration, model or dataset is invalid; the message names the key.
        Requeue: the run was told to stop; the same call continues it.
    """
    return _run(STAGE_1, config)


def train_student(config: TrainStudentConfig | Mapping[str, Any]) -> StudentRun:
    """Train a student from cached teacher logits, or from labels alone (stage 2).

    Args and errors are those of `compute_topk_logits`; the keys are those of the command
    `train_gpt_knowledge_distillation`.

    Returns:
        The run: `folder`, `step` and `archive`, the path of the .nemo file or None.
    """
    return _run(STAGE_2, config)


def convert_checkpoint(config: ConvertCheckpointConfig | Mapping[str, Any]) -> None:
    """Convert a Hugging Face folder to a `.nemo` archive, or back.

    Args and errors are those of `compute_topk_logits`; the keys are those of the command.
    """
    _run(CONVERSION, config)


def evaluate_gpt(config: EvaluateGPTConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Measure a model's loss, and generate and check its answers.

    Args and errors are those of `compute_topk_logits`; the keys are those of the command.

    Returns:
        The content of evaluation.json.
    """
    return _run(EVALUATION, config)


def _run(command: Command, config: Any) -> Any:
    silence_libraries()
    if isinstance(config, Mapping):
        cfg, _ = config_of(with_keys(config, command.name), command.name)
        config = typed(command.config_class, cfg)
    trainer = getattr(config, "trainer", None)
    if trainer is not None and needs_launch(trainer):
        raise ConfigError(
            f"trainer.devices: {trainer.num_devices} devices need as many processes; start the "
            f"script with `torchrun --nproc-per-node {trainer.num_devices}`, or use the command "
            f"{command.name}"
        )
    command.check(config)
    if trainer is not None:
        join_ranks(trainer)
    return pkgutil.resolve_name(command.function)(config)
