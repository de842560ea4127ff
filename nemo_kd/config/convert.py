"""Configuration of `convert_checkpoint`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from nemo_kd.config.errors import ConfigError
from nemo_kd.config.model import PRECISIONS
from nemo_kd.config.typed import PATH


@dataclass
class ConvertCheckpointConfig:
    input_path: str = field(default="???", metadata=PATH)
    """What to convert: a Hugging Face folder, a .nemo archive or an extracted one."""
    output_path: str = field(default="???", metadata=PATH)
    """Where to: a path ending in .nemo makes an archive, any other path a Hugging Face folder."""
    precision: str | None = None
    """Dtype of the written weights, bf16 or 32; None keeps that of the input."""
    overwrite: bool = False
    """Replace output_path where it exists."""

    def __post_init__(self) -> None:
        if self.precision is not None and self.precision not in PRECISIONS:
            raise ConfigError(
                f"precision: {self.precision!r} is not one of {', '.join(PRECISIONS)}"
            )


def check_output(output: Path, source: Path, overwrite: bool) -> None:
    """Refuse an output that exists, unless it is to be overwritten and is such a model.

    Raises:
        ConfigError: names the key.
    """
    if not output.exists():
        return
    if not overwrite:
        raise ConfigError(f"output_path: {output} exists; give another path or overwrite=True")
    if source.resolve().is_relative_to(output.resolve()):
        raise ConfigError(
            f"output_path: {output} holds the input, which overwrite=True would delete; give another path"
        )
    replaceable = (
        output.is_file() if output.suffix == ".nemo" else (output / "config.json").is_file()
    )
    if not replaceable:
        raise ConfigError(
            f"output_path: {output} exists and is not such a model; overwrite=True replaces only a .nemo archive by another, "
            "or a folder with config.json"
        )
