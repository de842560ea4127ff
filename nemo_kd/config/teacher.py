"""Configuration of stage 1, `compute_topk_logits`."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_kd.config.cache import MAX_TOP_K, CacheConfig
from nemo_kd.config.data import DataConfig
from nemo_kd.config.model import PRECISIONS, ParallelConfig
from nemo_kd.config.typed import ConfigError


@dataclass
class TrainerConfig:
    """Where the command runs."""

    num_nodes: int = 1
    """Machines; each starts the command (srun and torchrun do so)."""
    devices: int = 1
    """Processes a machine: GPUs, or CPU processes where there is no GPU."""
    accelerator: str = "auto"
    """auto (GPU where there is one), gpu or cpu."""
    precision: str = "bf16"
    """Dtype of weights and activations: bf16 or 32."""

    def __post_init__(self) -> None:
        self.precision = str(self.precision)
        if self.precision not in PRECISIONS:
            raise ConfigError(f"trainer.precision: {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if self.accelerator not in ("auto", "gpu", "cuda", "cpu"):
            raise ConfigError(f"trainer.accelerator: {self.accelerator!r} is not one of auto, gpu, cpu")
        for name in ("num_nodes", "devices"):
            if getattr(self, name) < 1:
                raise ConfigError(f"trainer.{name}: {getattr(self, name)} must be at least 1")


@dataclass
class PretrainedCheckpoint:
    restore_from_path: str = "???"
    """The model: a .nemo archive, an extracted one, or a Hugging Face folder."""


@dataclass
class ModelConfig(ParallelConfig):
    """What both stages say about their model."""

    micro_batch_size: int = 1
    """Examples in one forward pass on one data-parallel rank."""
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
            raise ConfigError(f"model.transformer_engine: {self.transformer_engine!r} is not one of auto, on, off")
        if self.seed < 0:
            raise ConfigError(f"model.seed: {self.seed} must not be negative")
        if self.make_vocab_size_divisible_by < 1:
            raise ConfigError(
                f"model.make_vocab_size_divisible_by: {self.make_vocab_size_divisible_by} must be at least 1"
            )


@dataclass
class ComputeTopkLogitsConfig:
    name: str = "compute_topk_logits"
    """Name of the run."""
    start_from_idx: int = 0
    """First record of the dataset."""
    end_at_idx: int | None = None
    """Last record of the dataset, included; None: the dataset's last."""
    output_path: str = "???"
    """A file, or a template whose CHUNK_ID becomes 0, 1, 2 ..."""
    n_examples_per_chunk: int | None = None
    """Records that one chunk covers; None: all in one chunk. Needs CHUNK_ID in output_path."""
    top_k: int = 128
    """Most teacher logits kept per position, largest first; `cache` says how many of them where the teacher is certain."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    pretrained_checkpoint: PretrainedCheckpoint = field(default_factory=PretrainedCheckpoint)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= MAX_TOP_K:
            raise ConfigError(f"top_k: {self.top_k} must be from 1 to {MAX_TOP_K}")
        if self.cache.min_k > self.top_k:
            raise ConfigError(f"cache.min_k: {self.cache.min_k} exceeds top_k ({self.top_k})")
        if self.start_from_idx < 0:
            raise ConfigError(f"start_from_idx: {self.start_from_idx} must not be negative")
        if self.end_at_idx is not None and self.end_at_idx < self.start_from_idx:
            raise ConfigError(f"end_at_idx: {self.end_at_idx} lies before start_from_idx {self.start_from_idx}")
        if self.n_examples_per_chunk is not None:
            if self.n_examples_per_chunk < 1:
                raise ConfigError(f"n_examples_per_chunk: {self.n_examples_per_chunk} must be at least 1")
            if "CHUNK_ID" not in self.output_path:
                raise ConfigError(
                    f"output_path: {self.output_path!r} has no CHUNK_ID, which n_examples_per_chunk={self.n_examples_per_chunk} needs; "
                    "for example data/train_with_logits_CHUNK_ID.jsonl"
                )
