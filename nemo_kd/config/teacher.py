"""Configuration of stage 1, `compute_topk_logits`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from typing import Any

from nemo_kd.config.cache import MAX_TOP_K, CacheConfig
from nemo_kd.config.data import DataConfig
from nemo_kd.config.errors import ConfigError
from nemo_kd.config.model import AUTO_PRECISION, PRECISIONS, ParallelConfig
from nemo_kd.config.typed import PATH

SPLIT = "SPLIT"
DEFAULT_MAX_TOKENS_PER_BATCH = 8192
MAX_SEED = 2**32 - 1
MAX_TIMEOUT_MINUTES = 1_000_000


@dataclass
class TrainerConfig:
    """Where the command runs."""

    num_nodes: int = 1
    """Machines; each starts the command (srun and torchrun do so)."""
    devices: int | str = 1
    """Processes per machine: GPUs, or CPU processes where there is no GPU; auto or -1: all GPUs, 1 without any."""
    accelerator: str = "auto"
    """auto (GPU where there is one), gpu or cpu."""
    precision: str = AUTO_PRECISION
    """Dtype of weights and activations: bf16 or 32; auto: bf16 on a GPU, 32 on a CPU."""
    distributed_timeout_minutes: float = 10.0
    """A rank that makes no progress for so long ends the run with an error that tells what it was doing."""

    def __post_init__(self) -> None:
        self.precision = str(self.precision)
        if self.precision not in (AUTO_PRECISION, *PRECISIONS):
            raise ConfigError(
                f"trainer.precision: {self.precision!r} is not one of auto, {', '.join(PRECISIONS)}"
            )
        if self.accelerator not in ("auto", "gpu", "cuda", "cpu"):
            raise ConfigError(
                f"trainer.accelerator: {self.accelerator!r} is not one of auto, gpu, cpu"
            )
        if self.num_nodes < 1:
            raise ConfigError(f"trainer.num_nodes: {self.num_nodes} must be at least 1")
        if isinstance(self.devices, str) and re.fullmatch(r"-?\d+", self.devices):
            self.devices = int(self.devices)
        if self.devices not in ("auto", -1) and not (
            isinstance(self.devices, int) and self.devices >= 1
        ):
            raise ConfigError(
                f"trainer.devices: {self.devices!r} must be at least 1, or auto for all GPUs"
            )
        if not 0 < self.distributed_timeout_minutes <= MAX_TIMEOUT_MINUTES:
            raise ConfigError(
                f"trainer.distributed_timeout_minutes: {self.distributed_timeout_minutes} must be above 0 and at most "
                f"{MAX_TIMEOUT_MINUTES}"
            )

    @property
    def num_devices(self) -> int:
        """Return `devices` as a number; the commands replace auto and -1 before anything is started."""
        if not isinstance(self.devices, int) or self.devices < 1:
            raise ConfigError(
                f"trainer.devices: {self.devices} is for the commands, which count the GPUs; give a number"
            )
        return self.devices


@dataclass
class PretrainedCheckpoint:
    restore_from_path: str = field(default="???", metadata=PATH)
    """The model: a .nemo archive, an extracted one, or a Hugging Face folder."""


@dataclass
class ModelConfig(ParallelConfig):
    """What both stages say about their model."""

    seed: int = 1234
    """Seed of everything random."""
    encoder_seq_length: int | None = None
    """Default of the longest sequence; None: 4096, or the model's own maximum where that is smaller."""
    make_vocab_size_divisible_by: int = 128
    """The embedding is padded to a multiple of this and of the tensor-parallel size; padding never takes part in a result."""
    transformer_engine: str = "auto"
    """auto (Transformer Engine's layers on a GPU where it is installed), on, off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.transformer_engine = {"True": "on", "true": "on", "False": "off", "false": "off"}.get(
            self.transformer_engine, self.transformer_engine
        )
        if self.transformer_engine not in ("auto", "on", "off"):
            raise ConfigError(
                f"model.transformer_engine: {self.transformer_engine!r} is not one of auto, on, off"
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"model.seed: {self.seed} must be from 0 to {MAX_SEED}")
        if self.make_vocab_size_divisible_by < 1:
            raise ConfigError(
                f"model.make_vocab_size_divisible_by: {self.make_vocab_size_divisible_by} must be at least 1"
            )


@dataclass
class TeacherModelConfig(ModelConfig):
    micro_batch_size: int | None = None
    """Most examples in one forward pass; None: as many as data.max_tokens_per_batch allows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ConfigError(f"model.micro_batch_size: {self.micro_batch_size} must be at least 1")


@dataclass
class TeacherDataConfig(DataConfig):
    max_tokens_per_batch: int | None = None
    """Most tokens in one forward pass of one replica of the teacher, padding included; a longer example runs alone. None: 8192, or no limit where model.micro_batch_size is given."""
    packing: bool = True
    """A batch is one row of examples end to end, each with positions and attention of its own, without padding. False: one example a row, padded to the longest, as with context parallelism."""
    num_workers: int = 1
    """Processes that read and tokenize ahead, on every rank; 0: the teacher waits for it."""

    def __post_init__(self) -> None:
        if self.max_tokens_per_batch is not None and self.max_tokens_per_batch < 1:
            raise ConfigError(
                f"data.max_tokens_per_batch: {self.max_tokens_per_batch} must be at least 1"
            )
        if self.num_workers < 0:
            raise ConfigError(f"data.num_workers: {self.num_workers} must not be negative")


@dataclass
class RunConfig:
    """`exp_manager`: what a run tells, and how long it may take."""

    explicit_log_dir: str | None = field(default=None, metadata=PATH)
    """Folder of the metrics file, one JSON line an interval; None: the cache's."""
    log_interval_s: float = 10.0
    """Seconds between two lines of metrics."""
    create_wandb_logger: bool = False
    """Sends the metrics to Weights & Biases too."""
    wandb_logger_kwargs: dict[str, Any] = field(default_factory=dict)
    """project, name and other arguments of wandb.init."""
    max_time_per_run: str | None = None
    """DD:HH:MM:SS after which the run stops between two segments with exit status 75; the same command continues."""

    def __post_init__(self) -> None:
        if not self.log_interval_s > 0:
            raise ConfigError(f"exp_manager.log_interval_s: {self.log_interval_s} must be above 0")
        if self.create_wandb_logger and not self.wandb_logger_kwargs.get("project"):
            raise ConfigError(
                "exp_manager.wandb_logger_kwargs.project: create_wandb_logger=True needs a project"
            )


@dataclass
class ComputeTopkLogitsConfig:
    name: str = "compute_topk_logits"
    """Name of the run."""
    start_from_idx: int = 0
    """First record of the dataset."""
    end_at_idx: int | None = None
    """Last record of the dataset, included; None: the dataset's last."""
    output_path: str = field(default="???", metadata=PATH)
    """A file, or a template whose CHUNK_ID becomes 0, 1, 2 ...; SPLIT becomes the split's name where data.data.file_path names several."""
    n_examples_per_chunk: int | None = None
    """Records that one chunk covers; None: all in one chunk. Needs CHUNK_ID in output_path."""
    top_k: int = 128
    """Most teacher logits kept per position, largest first; `cache` says how many of them where the teacher is certain."""
    shard: str | None = None
    """i/n with i from 0 to n - 1: this job's part of the work where n jobs write one cache at a time. None: the task's number in a Slurm array, if there are several tasks and no range of records is given; else 0/1, everything."""
    dry_run: bool = False
    """Prints layout, first example and plan (disk, time, memory, from a short probe) and writes nothing; `--dry-run` is the same."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    pretrained_checkpoint: PretrainedCheckpoint = field(default_factory=PretrainedCheckpoint)
    model: TeacherModelConfig = field(default_factory=TeacherModelConfig)
    data: TeacherDataConfig = field(default_factory=TeacherDataConfig)
    exp_manager: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= MAX_TOP_K:
            raise ConfigError(f"top_k: {self.top_k} must be from 1 to {MAX_TOP_K}")
        if self.cache.min_k > self.top_k:
            raise ConfigError(f"cache.min_k: {self.cache.min_k} exceeds top_k ({self.top_k})")
        if self.start_from_idx < 0:
            raise ConfigError(f"start_from_idx: {self.start_from_idx} must not be negative")
        if self.end_at_idx is not None and self.end_at_idx < self.start_from_idx:
            raise ConfigError(
                f"end_at_idx: {self.end_at_idx} lies before start_from_idx {self.start_from_idx}"
            )
        self._check_splits()
        self.shard_number()
        if self.n_examples_per_chunk is not None:
            if self.n_examples_per_chunk < 1:
                raise ConfigError(
                    f"n_examples_per_chunk: {self.n_examples_per_chunk} must be at least 1"
                )
            if "CHUNK_ID" not in self.output_path:
                raise ConfigError(
                    f"output_path: {self.output_path!r} has no CHUNK_ID, which n_examples_per_chunk={self.n_examples_per_chunk} needs; "
                    "for example data/train_with_logits_CHUNK_ID.jsonl"
                )

    @property
    def max_tokens_per_batch(self) -> int | None:
        """`data.max_tokens_per_batch`, resolved; None: no limit."""
        if self.data.max_tokens_per_batch is None and self.model.micro_batch_size is None:
            return DEFAULT_MAX_TOKENS_PER_BATCH
        return self.data.max_tokens_per_batch

    def shard_number(self) -> tuple[int, int]:
        """(i, n) of `shard`, or of the task in a Slurm array."""
        if self.shard is not None:
            return self._parsed_shard(self.shard)
        array_size = _array_variable("COUNT", 1)
        if array_size == 1 or self.start_from_idx or self.end_at_idx is not None:
            return 0, 1
        defaults = {"MIN": 0, "STEP": 1, "MAX": array_size - 1}
        first, step, last = (_array_variable(name, value) for name, value in defaults.items())
        if "SLURM_ARRAY_TASK_MAX" in os.environ and last != first + (array_size - 1) * step:
            raise ConfigError(
                f"shard: the Slurm array has {array_size} tasks that are no range; give one (--array=0-{array_size - 1}), "
                "or the shard of each task (shard=i/n)"
            )
        return (_array_variable("ID") - first) // step, array_size

    @staticmethod
    def _parsed_shard(shard: str) -> tuple[int, int]:
        number, slash, count = shard.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
            raise ConfigError(
                f"shard: {shard!r} is not i/n with i from 0 to n - 1; 0/4, 1/4, 2/4 and 3/4 share the work of four jobs"
            )
        return int(number), int(count)

    def splits(self) -> dict[str, ComputeTopkLogitsConfig]:
        """One configuration with one dataset and one output path for each split; its name is empty where there is only one."""
        paths = self.data.data.file_path
        if isinstance(paths, str):
            return {"": self}
        return {
            split: replace(
                self,
                output_path=self.output_path.replace(SPLIT, split),
                data=replace(self.data, data=replace(self.data.data, file_path=path)),
            )
            for split, path in paths.items()
        }

    def _check_splits(self) -> None:
        paths = self.data.data.file_path
        if isinstance(paths, str):
            return
        if (
            not isinstance(paths, dict)
            or not paths
            or not all(isinstance(text, str) for pair in paths.items() for text in pair)
        ):
            raise ConfigError(
                f"data.data.file_path: {paths!r} is neither a path nor {{SPLIT: PATH, SPLIT: PATH ...}}, "
                "for example {train: train.jsonl, validation: validation.jsonl}"
            )
        if SPLIT not in self.output_path:
            raise ConfigError(
                f"output_path: {self.output_path!r} has no {SPLIT}, which the splits {', '.join(paths)} need; "
                f"for example cache/{SPLIT}_with_logits_CHUNK_ID.jsonl.zst"
            )
        if self.start_from_idx or self.end_at_idx is not None:
            raise ConfigError(
                f"start_from_idx, end_at_idx: records of one dataset, but data.data.file_path names {len(paths)}; give one path"
            )


def _array_variable(name: str, default: int | None = None) -> int:
    """Return a number that Slurm tells the tasks of an array.

    Raises:
        ConfigError: it is not set, or no number.
    """
    value = os.environ.get(f"SLURM_ARRAY_TASK_{name}", "" if default is None else str(default))
    if not re.fullmatch(r"\d+", value, re.ASCII) or (name in ("COUNT", "STEP") and int(value) < 1):
        raise ConfigError(
            f"SLURM_ARRAY_TASK_{name}: {value!r} is not what Slurm sets for the tasks of an array; unset it, or give the "
            "shard of this job (shard=i/n)"
        )
    return int(value)
