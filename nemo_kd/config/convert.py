"""Configuration of `convert_checkpoint`."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_kd.config.model import PRECISIONS
from nemo_kd.config.typed import PATH, ConfigError


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
            raise ConfigError(f"precision: {self.precision!r} is not one of {', '.join(PRECISIONS)}")
