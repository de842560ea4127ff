"""Configuration of `convert_checkpoint`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nemo_kd.config import ConfigError
from nemo_kd.config.fields import Section, choice, path
from nemo_kd.config.shared import PRECISIONS


@dataclass
class ConvertCheckpointConfig(Section):
    """Keys of `convert_checkpoint`."""

    input_path: str = path()
    """Model to convert: a Hugging Face folder, a .nemo archive or an extracted one."""
    output_path: str = path()
    """Path of the result: an archive if it ends in .nemo, otherwise a Hugging Face folder."""
    precision: str | None = choice(None, PRECISIONS)
    """Dtype of the written weights, bf16 or 32; None: that of the input."""
    overwrite: bool = False
    """Replace output_path if it exists."""


def check_output(output: Path, source: Path, overwrite: bool) -> None:
    """Refuse an output that exists, unless `overwrite` is set and it is a model of the same kind.

    Raises:
        ConfigError: names the key.
    """
    if not output.exists():
        return
    if not overwrite:
        raise ConfigError(
            f"output_path: {output} exists; give another path or overwrite=true"
        )
    is_archive = output.suffix == ".nemo"
    is_model = (output if is_archive else output / "config.json").is_file()
    if not is_model or source.resolve().is_relative_to(output.resolve()):
        raise ConfigError(
            f"output_path: {output} exists and is not such a model; overwrite=true replaces only a "
            ".nemo archive by another, or a folder with config.json that does not hold the input"
        )
