"""Checks of paths that need neither model nor torch: they fail within a second, before ranks
start."""

from __future__ import annotations

import os
from pathlib import Path

from nemo_kd.config import ConfigError

MODEL_KEY = "pretrained_checkpoint.restore_from_path"


def check_model(key: str, path: str) -> None:
    """Refuse a model that is not there."""
    if not os.access(path, os.R_OK):
        raise ConfigError(
            f"{key}: {path} does not exist or may not be read; give a Hugging Face folder or a "
            ".nemo archive"
        )


def check_records(key: str, path: str) -> None:
    """Refuse a dataset that cannot be opened."""
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise ConfigError(
            f"{key}: {path}: {error.strerror}; give a file of records, one JSON object a line"
        ) from error


def check_writable(key: str, folder: str | Path | None) -> None:
    """Refuse a folder that does not exist and cannot be made, or cannot be written; None is the
    current one."""
    existing = Path(folder or ".").absolute()
    # Path.exists fails where os.path.exists returns False: in a folder that may not be searched.
    while not os.path.exists(existing):
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{key}: {folder or existing} cannot be written: {existing} is no folder in which you "
            "may write; give another one"
        )
