"""Checks that need neither model nor torch: they fail within a second, in the process that would
start the ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nemo_kd.cache.layout import SUFFIXES, CacheLayout, path_of
from nemo_kd.config import ConfigError
from nemo_kd.config.convert import ConvertCheckpointConfig, check_output
from nemo_kd.config.exp_manager import PARAMS, ExpManagerConfig
from nemo_kd.config.model import check_batch_sizes
from nemo_kd.config.student import SPLITS, TrainStudentConfig
from nemo_kd.config.teacher import ComputeTopkLogitsConfig
from nemo_kd.run.interruption import parse_max_time

MODEL_KEY = "pretrained_checkpoint.restore_from_path"


def check_before_start(config: Any) -> None:
    """Refuse paths that are not there or cannot be written, and sizes that do not divide.

    Raises:
        ConfigError, CacheError: names the key.
    """
    max_time = (
        config.exp_manager.max_time_per_run if hasattr(config, "exp_manager") else None
    )
    if max_time is not None:
        parse_max_time(max_time)
    if isinstance(config, ComputeTopkLogitsConfig):
        _check_teacher(config)
    elif isinstance(config, TrainStudentConfig):
        _check_student(config)
    elif isinstance(config, ConvertCheckpointConfig):
        _check_model("input_path", config.input_path)
        output = Path(config.output_path).absolute()
        check_output(output, Path(config.input_path).absolute(), config.overwrite)
        check_writable("output_path", output.parent)


def _check_teacher(config: ComputeTopkLogitsConfig) -> None:
    _check_model(MODEL_KEY, config.pretrained_checkpoint.restore_from_path)
    config.model.data_parallel_size(config.trainer.num_nodes * config.trainer.num_devices)
    for part in config.splits().values():
        _check_file("data.data.file_path", part.data.data.file_path)
        path = part.output_path
        if not path.endswith(SUFFIXES):
            raise ConfigError(
                f"output_path: {path} ends in none of {', '.join(SUFFIXES)}, which tell how lines "
                "are stored; for example "
                "cache/train_with_logits_CHUNK_ID.jsonl.zst"
            )
        layout = CacheLayout(path)
        if not config.dry_run:
            check_writable("output_path", layout.folder)
    if config.exp_manager.explicit_log_dir is not None and not config.dry_run:
        check_writable(
            "exp_manager.explicit_log_dir", Path(config.exp_manager.explicit_log_dir)
        )


def _check_student(config: TrainStudentConfig) -> None:
    _check_model(MODEL_KEY, config.pretrained_checkpoint.restore_from_path)
    model = config.model
    data = config.model.data
    data_parallel_size = model.data_parallel_size(
        config.trainer.num_nodes * config.trainer.num_devices
    )
    if data.max_tokens_per_batch is None:
        check_batch_sizes(
            model.micro_batch_size, model.global_batch_size, data_parallel_size
        )
    else:
        check_batch_sizes(1, model.global_batch_size, 1)
    for split in SPLITS:
        for path in data.paths(split):
            key = f"model.data.data_prefix.{split}"
            if not data.uses_cache:
                _check_file(key, path)
            elif "://" not in path:
                _check_chunks(key, path_of(path))
    check_run_folders(config.exp_manager)


def check_run_folders(settings: ExpManagerConfig) -> None:
    """Refuse folders of logs and checkpoints that cannot be made or written."""
    name = "explicit_log_dir" if settings.explicit_log_dir else "exp_dir"
    check_writable(f"exp_manager.{name}", getattr(settings, name))
    dirpath = settings.checkpoint_callback_params.dirpath
    if dirpath and settings.create_checkpoint_callback:
        check_writable(f"{PARAMS}.dirpath", dirpath)


def check_writable(key: str, folder: str | Path | None) -> None:
    """Refuse a folder that does not exist and cannot be made, or cannot be written; None is the
    current one."""
    existing = Path(folder or ".").absolute()
    # Path.exists fails where os.path.exists returns False: in a folder that may not be searched.
    while not os.path.exists(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise ConfigError(
            f"{key}: {folder} cannot be a folder: {existing} is a file; give another one"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{key}: {folder or existing} cannot be written: you may not write in {existing}; "
            "give another one"
        )


def _check_model(key: str, path: str) -> None:
    if not os.path.exists(path):
        raise ConfigError(
            f"{key}: {path} does not exist; give a Hugging Face folder or a .nemo archive"
        )
    if not os.access(path, os.R_OK):
        raise ConfigError(
            f"{key}: {path} cannot be read: permission denied; have its owner permit it"
        )


def _check_file(key: str, path: str) -> None:
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise ConfigError(
            f"{key}: {path}: {error.strerror}; give a file of records, one JSON object a line"
        ) from error


def _check_chunks(key: str, path: str) -> None:
    layout = CacheLayout(path)
    if layout.existing_chunks() or layout.manifest_path.exists():
        return
    if not layout.folder.is_dir() and str(layout.folder) != "":
        raise ConfigError(
            f"{key}: {path}: there is no folder {layout.folder}; give the output_path of "
            "compute_topk_logits"
        )
    near = sorted(
        name
        for name in os.listdir(layout.folder or ".")
        if name.endswith(SUFFIXES) and not name.startswith(".")
    )
    there = f"{', '.join(near[:3])}{' ...' if len(near) > 3 else ''}" if near else "none"
    raise ConfigError(
        f"{key}: {path}: there is no such file, caches in its folder: {there}; give the "
        "output_path of compute_topk_logits"
    )
