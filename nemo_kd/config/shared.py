"""Configuration that both stages have: trainer, model, checkpoint, logging."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

from nemo_kd.config.fields import Section, bounded, choice, count, path, positive
from nemo_kd.config.model import AUTO_PRECISION, PRECISIONS, ParallelConfig


@dataclass
class TrainerConfig(Section, key="trainer"):
    """Machines, devices and precision of a command."""

    num_nodes: int = count(1)
    """Number of machines; each starts the command, as srun and torchrun do."""
    devices: int | str = 1
    """Processes per machine: one per GPU, or CPU processes if there is no GPU. auto or -1 uses all
    GPUs, or 1 process if there are none."""
    accelerator: str = choice("auto", ("auto", "gpu", "cuda", "cpu"))
    """auto (GPU if there is one), gpu or cpu."""
    precision: str = choice(AUTO_PRECISION, (AUTO_PRECISION, *PRECISIONS))
    """Dtype of weights and activations: bf16 or 32. auto uses bf16 on a GPU and 32 on a CPU."""
    distributed_timeout_minutes: float = positive(10.0)
    """End the run with an error after this many minutes without progress on a rank."""

    def __post_init__(self) -> None:
        super().__post_init__()
        with contextlib.suppress(ValueError):
            self.devices = int(self.devices)
        if self.devices not in ("auto", -1) and self.devices not in range(1, 1 << 20):
            raise self.error(
                "devices", f"{self.devices!r} must be at least 1, or auto for all GPUs"
            )

    @property
    def num_devices(self) -> int:
        """Return `devices` as a number; the commands replace auto and -1 before anything starts."""
        assert isinstance(self.devices, int), self.devices
        return self.devices


@dataclass
class PretrainedCheckpoint(Section):
    """The model that a stage starts with."""

    restore_from_path: str = path()
    """Model to load: a .nemo archive, an extracted one, or a Hugging Face folder."""


@dataclass
class ModelConfig(ParallelConfig):
    """Model settings that both stages have."""

    seed: int = bounded(1234, at_least=0)
    """Seed of all random numbers."""
    max_seq_length: int | None = bounded(None, at_least=2)
    """Longest example in tokens; longer ones are dropped and counted. None: 4096, or the model's
    own maximum if that is smaller."""
    make_vocab_size_divisible_by: int = count(128)
    """Pad the embedding to a multiple of this and of the tensor-parallel size. Padding does not
    change results."""
    transformer_engine: str = choice("auto", ("auto", "on", "off"))
    """Use the layers of Transformer Engine: auto (on a GPU, if it is installed), on or off."""


@dataclass
class RunConfig(Section, key="exp_manager"):
    """`exp_manager`: logging and run time."""

    explicit_log_dir: str | None = path(None)
    """Folder of the metrics file, which gets one JSON line per interval. None: the folder of the
    cache."""
    log_interval_s: float = positive(10.0)
    """Seconds between two lines of metrics."""
    create_wandb_logger: bool = False
    """Send the metrics to Weights & Biases."""
    wandb_logger_kwargs: dict[str, Any] = field(default_factory=dict)
    """project, name and other arguments of wandb.init."""
    max_time_per_run: str | None = None
    """Stop after this time, DD:HH:MM:SS, with exit status 75. The same command continues the
    run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.create_wandb_logger and not self.wandb_logger_kwargs.get("project"):
            raise self.error(
                "wandb_logger_kwargs.project",
                "create_wandb_logger=True needs a project",
            )
