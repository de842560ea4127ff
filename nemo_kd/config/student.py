"""Configuration of stage 2, `train_gpt_knowledge_distillation`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from nemo_kd.config.data import ChatPromptTokens, DataConfig, DatasetConfig
from nemo_kd.config.errors import ConfigError
from nemo_kd.config.exp_manager import ExpManagerConfig
from nemo_kd.config.loss import LossConfig
from nemo_kd.config.optim import OptimConfig
from nemo_kd.config.peft import ExportConfig, PeftConfig
from nemo_kd.config.teacher import ModelConfig, PretrainedCheckpoint, TrainerConfig
from nemo_kd.config.typed import PATH

LOOP = "trainer.knowledge_distillation"
SPLITS = ("train", "validation", "test")
CACHE_IMPLS = ("chunked_jsonl", "jsonl", "json")


@dataclass
class LoopConfig:
    """`trainer.knowledge_distillation`: how long to train and when to validate and save."""

    max_epochs: int = 1
    """Passes over the training data."""
    max_steps: int = -1
    """Optimizer steps; -1: as many as max_epochs gives."""
    val_check_interval: int | float = 100
    """Steps between validations, or a fraction of an epoch; validation also runs after the last step."""
    save_interval: int | float | None = None
    """Steps between checkpoints, or a fraction of an epoch; None: at every validation. Those that follow a validation are ranked by it, the others only keep the latest state."""
    limit_train_batches: int | float = 1.0
    """Training steps an epoch: a number, or a fraction of them."""
    limit_val_batches: int | float = 1.0
    """Validation batches: a number, or a fraction of them; 0 validates never."""
    gradient_clip_val: float | None = 1.0
    """Largest global norm of the gradient; None or 0 does not clip."""
    log_every_n_steps: int = 1
    """Steps between logged values."""
    non_finite: str = "stop"
    """A step whose loss or gradient is not a finite number: stop ends the run and names the examples; skip leaves the weights as they are and counts the step in train/skipped_steps, up to 10 in a row."""

    def __post_init__(self) -> None:
        if self.max_steps < -1:
            raise ConfigError(f"{LOOP}.max_steps: {self.max_steps} must be -1 or more")
        if not self.limit_train_batches > 0:
            raise ConfigError(
                f"{LOOP}.limit_train_batches: {self.limit_train_batches} must be above 0"
            )
        if not self.limit_val_batches >= 0:
            raise ConfigError(
                f"{LOOP}.limit_val_batches: {self.limit_val_batches} must not be negative"
            )
        if self.limit_val_batches > 1 and self.limit_val_batches != int(self.limit_val_batches):
            raise ConfigError(
                f"{LOOP}.limit_val_batches: {self.limit_val_batches} is neither a whole number of batches nor a fraction up to 1.0"
            )
        if self.gradient_clip_val is not None and not self.gradient_clip_val >= 0:
            raise ConfigError(
                f"{LOOP}.gradient_clip_val: {self.gradient_clip_val} must not be negative"
            )
        if self.log_every_n_steps < 1:
            raise ConfigError(
                f"{LOOP}.log_every_n_steps: {self.log_every_n_steps} must be at least 1"
            )
        if self.non_finite not in ("stop", "skip"):
            raise ConfigError(f"{LOOP}.non_finite: {self.non_finite!r} is not one of stop, skip")


@dataclass
class StudentTrainerConfig(TrainerConfig):
    knowledge_distillation: LoopConfig = field(default_factory=LoopConfig)


@dataclass
class StudentDatasetConfig(DatasetConfig):
    """Formatting of the datasets that stage 2 reads itself, whose paths stand in data_prefix."""

    KEY: ClassVar[str] = "model.data.dataset"
    PATH_KEY: ClassVar[str] = "model.data.data_prefix"

    file_path: Any = ""
    """Not used: model.data.data_prefix names the files."""


@dataclass
class StudentRecordsConfig(DataConfig):
    """What stage 1 calls `data`."""

    KEY: ClassVar[str] = "model.data"


@dataclass
class StudentDataConfig:
    """The training, validation and test data of stage 2."""

    data_impl: str = "chunked_jsonl"
    """chunked_jsonl reads a cache of stage 1; dataset reads plain JSONL records, for SFT without a teacher."""
    data_prefix: dict[str, Any] = field(default_factory=dict, metadata=PATH)
    """{train: PATHS, validation: PATHS, test: PATHS}, a path or a list of them; CHUNK_ID stands for 0, 1, 2 ..., `[a:b]` or `[:10%]` after the path of a cache selects rows (inside a list or mapping the command line wants such a path in quotes); test is optional, and validation with trainer.knowledge_distillation.limit_val_batches=0. Train may give weights, [0.3, PATH, 0.7, PATH]: an epoch has as many samples as all paths together, each path gives its share of them, repeats where it has fewer, and goes on in the next epoch where it left off where it has more. Without weights every row counts once an epoch."""
    n_chunks: Any = None
    """Chunks to read, a number or one a split; None: all there are."""
    seq_length: int | None = None
    """Longer examples are dropped and counted; None: 4096, or the model's own maximum where that is smaller."""
    top_k: int | None = None
    """Teacher logits used per position, the largest; None: all in the cache."""
    shuffle: bool | str = True
    """True: a new order of the training data every epoch, the same for the same seed. chunks: mixes the chunks, and the rows inside each, so that reads stay local (spinning disks, object stores). False: as they lie."""
    drop_ids_outside_vocab: bool = False
    """Teacher token ids that the student has no embedding for join the tail; otherwise they are an error."""
    allow_other_template: bool = False
    """Takes a cache whose conversations were rendered with another chat template than the student's tokenizer has."""
    max_tokens_per_batch: int | None = None
    """Most tokens of a micro-batch on one rank, padding included; a longer example is alone. The examples of a global batch are spread over micro-batches and data-parallel ranks by length then, and model.micro_batch_size has no effect. With context parallelism every rank holds its part of so many times as many. None: model.micro_batch_size examples a micro-batch."""
    packing: bool = True
    """A micro-batch is one row of examples end to end, each with positions and attention of its own, without padding. False: one example a row, padded to the longest; so it is with context parallelism too, whatever is said here."""
    num_workers: int = 2
    """Processes of every rank that read, decode and put together batches ahead of the training; 0: it waits for that."""
    chat: bool | None = None
    """data_impl=dataset: as stage 1's data.chat."""
    chat_prompt_tokens: ChatPromptTokens = field(default_factory=ChatPromptTokens)
    dataset: StudentDatasetConfig = field(default_factory=StudentDatasetConfig)
    """data_impl=dataset: as stage 1's data.data, without file_path."""

    def __post_init__(self) -> None:
        if self.data_impl in ("mmap", "packed_jsonl"):
            raise ConfigError(
                f"model.data.data_impl: {self.data_impl!r} is not read here; use chunked_jsonl or dataset"
            )
        if self.data_impl not in (*CACHE_IMPLS, "dataset"):
            raise ConfigError(
                f"model.data.data_impl: {self.data_impl!r} is not one of chunked_jsonl, dataset"
            )
        if self.dataset.file_path:
            raise ConfigError(
                f"model.data.dataset.file_path: {self.dataset.file_path} is not read; name the files of every split in model.data.data_prefix"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"model.data.top_k: {self.top_k} must be at least 1")
        if self.seq_length is not None and self.seq_length < 2:
            raise ConfigError(f"model.data.seq_length: {self.seq_length} must be at least 2")
        self._check_num_chunks()
        if self.max_tokens_per_batch is not None and self.max_tokens_per_batch < 1:
            raise ConfigError(
                f"model.data.max_tokens_per_batch: {self.max_tokens_per_batch} must be at least 1"
            )
        if self.num_workers < 0:
            raise ConfigError(f"model.data.num_workers: {self.num_workers} must not be negative")
        if not isinstance(self.shuffle, bool) and self.shuffle != "chunks":
            raise ConfigError(
                f"model.data.shuffle: {self.shuffle!r} is not one of true, false, chunks"
            )
        unknown = sorted(set(self.data_prefix) - set(SPLITS))
        if unknown:
            raise ConfigError(
                f"model.data.data_prefix: unknown splits {', '.join(unknown)}; known: train, validation, test"
            )
        for split in self.data_prefix:
            if self.weights(split) is not None and split != "train":
                raise ConfigError(
                    f"model.data.data_prefix.{split}: weights are for train only, here every row counts once; give the paths alone"
                )

    def _check_num_chunks(self) -> None:
        chosen = self.n_chunks if isinstance(self.n_chunks, dict) else {"train": self.n_chunks}
        for split, number in chosen.items():
            is_count = isinstance(number, int) and not isinstance(number, bool) and number >= 1
            if split not in SPLITS or not (is_count or number is None):
                raise ConfigError(
                    f"model.data.n_chunks: {self.n_chunks!r} is neither a number of chunks nor one for each split, "
                    "{train: 2, validation: 1}"
                )

    def paths(self, split: str) -> list[str]:
        """The split's paths; an empty list where there are none."""
        return [path for _, path in self._weighted_paths(split)]

    def weights(self, split: str) -> list[float] | None:
        """The weight of each of the split's paths; None without weights."""
        weights = [weight for weight, _ in self._weighted_paths(split)]
        return None if None in weights or not weights else weights  # type: ignore[return-value]

    def _weighted_paths(self, split: str) -> list[tuple[float | None, str]]:
        key, value = f"model.data.data_prefix.{split}", self.data_prefix.get(split) or []
        entries = list(value) if isinstance(value, list | tuple) else [value]
        if not any(_is_number(entry) for entry in entries):
            pairs: list[Any] = [(None, entry) for entry in entries]
        elif len(entries) % 2 or not all(_is_number(entry) for entry in entries[::2]):
            raise ConfigError(
                f"{key}: {entries} has weights for some paths only; give [WEIGHT, PATH, WEIGHT, PATH ...]"
            )
        else:
            pairs = list(zip(entries[::2], entries[1::2], strict=True))
        for weight, path in pairs:
            if not isinstance(path, str):
                raise ConfigError(
                    f"{key}: {path!r} is not a path; give PATH, [PATH, PATH ...] or [WEIGHT, PATH, WEIGHT, PATH ...]"
                )
            if weight is not None and not 0 < weight < math.inf:
                raise ConfigError(f"{key}: the weight {weight} of {path} must be above 0")
        return pairs

    @property
    def uses_cache(self) -> bool:
        return self.data_impl != "dataset"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass
class StudentModelConfig(ModelConfig):
    micro_batch_size: int = 1
    """Examples in one forward pass on one data-parallel rank, where model.data.max_tokens_per_batch is not given."""
    global_batch_size: int = 64
    """Examples in one optimizer step over all data-parallel ranks."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Parts that the layers of every pipeline stage are cut into: stages are interleaved, so that they wait less and exchange more. None: one."""
    activations_checkpoint_granularity: str | None = None
    """What the backward pass computes anew instead of keeping it: full (whole layers) or selective (attention); None: nothing."""
    activations_checkpoint_method: str | None = None
    """full: uniform (groups of layers) or block (the first layers of every pipeline stage, or of every part of an interleaved one); None: uniform."""
    activations_checkpoint_num_layers: int | None = None
    """full: layers of a group (uniform) or recomputed layers of a stage (block); None: 1."""
    peft: PeftConfig = field(default_factory=PeftConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    knowledge_distillation: LossConfig = field(default_factory=LossConfig)
    data: StudentDataConfig = field(default_factory=StudentDataConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        key = "model.virtual_pipeline_model_parallel_size"
        if self.chunks_per_stage < 1:
            raise ConfigError(f"{key}: {self.chunks_per_stage} must be at least 1")
        if self.chunks_per_stage > 1 and self.pipeline_model_parallel_size == 1:
            raise ConfigError(
                f"{key}: {self.chunks_per_stage} with model.pipeline_model_parallel_size=1 interleaves nothing; leave it out"
            )
        self._check_recomputation()
        for name in ("top_k", "drop_ids_outside_vocab"):
            if self.knowledge_distillation.support == "sampled" and getattr(self.data, name):
                raise ConfigError(
                    f"model.data.{name}: {getattr(self.data, name)} with support=sampled: the tail samples stand for what lies outside "
                    "the ids that the cache keeps; leave it out, or use support=tail"
                )
        if not self.data.uses_cache and self.knowledge_distillation.kd_loss_weight:
            raise ConfigError(
                "model.data.data_impl: dataset has no teacher logits, which model.knowledge_distillation.kd_loss_weight="
                f"{self.knowledge_distillation.kd_loss_weight} needs; set kd_loss_weight=0 and sft_loss_weight=1, or read a cache"
            )

    @property
    def chunks_per_stage(self) -> int:
        return (
            1
            if self.virtual_pipeline_model_parallel_size is None
            else self.virtual_pipeline_model_parallel_size
        )

    @property
    def packed(self) -> bool:
        """Whether micro-batches are packed."""
        return self.data.packing and self.context_parallel_size == 1

    def _check_recomputation(self) -> None:
        granularity, method = (
            self.activations_checkpoint_granularity,
            self.activations_checkpoint_method,
        )
        num_layers = self.activations_checkpoint_num_layers
        if granularity not in (None, "full", "selective"):
            raise ConfigError(
                f"model.activations_checkpoint_granularity: {granularity!r} is not one of full, selective"
            )
        if method not in (None, "uniform", "block"):
            raise ConfigError(
                f"model.activations_checkpoint_method: {method!r} is not one of uniform, block"
            )
        if num_layers is not None and num_layers < 1:
            raise ConfigError(
                f"model.activations_checkpoint_num_layers: {num_layers} must be at least 1"
            )
        if granularity == "full":
            self.activations_checkpoint_method = method or "uniform"
            self.activations_checkpoint_num_layers = num_layers or 1
        elif granularity == "selective":
            # Megatron refuses what NeMo-Aligner's files say beside it; both are about whole layers.
            self.activations_checkpoint_method = self.activations_checkpoint_num_layers = None


@dataclass
class TrainStudentConfig:
    name: str = "megatron_gpt_knowledge_distillation"
    """Name of the run."""
    trainer: StudentTrainerConfig = field(default_factory=StudentTrainerConfig)
    pretrained_checkpoint: PretrainedCheckpoint = field(default_factory=PretrainedCheckpoint)
    model: StudentModelConfig = field(default_factory=StudentModelConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    allow_changed: list[str] = field(default_factory=list)
    """Keys that may differ from those of the checkpoint that the run goes on from, [model.optim.lr]; a key's last part or a section will do. By default what determines the result must be the same."""
    exp_manager: ExpManagerConfig = field(default_factory=ExpManagerConfig)

    def __post_init__(self) -> None:
        if self.export.lora == "adapter" and self.model.peft.lora is None:
            raise ConfigError(
                "export.lora: adapter, but model.peft.peft_scheme=none trains none; use lora, or export.lora=merged"
            )
        self._check_splits()

    def _check_splits(self) -> None:
        form = "'{train: [train_CHUNK_ID.jsonl], validation: [val_CHUNK_ID.jsonl]}'"
        if not self.model.data.paths("train"):
            raise ConfigError(f"model.data.data_prefix: no train data; give {form}")
        if not self.validates:
            self._check_settings_without_validation()
        elif not self.model.data.paths("validation"):
            raise ConfigError(
                f"model.data.data_prefix: no validation data; give {form}, or train without any: {LOOP}.limit_val_batches=0"
            )

    @property
    def validates(self) -> bool:
        """Whether the run validates at all."""
        return self.trainer.knowledge_distillation.limit_val_batches > 0

    def _check_settings_without_validation(self) -> None:
        settings = self.exp_manager
        needing = {
            "create_early_stopping_callback": settings.create_early_stopping_callback,
            "checkpoint_callback_params.save_best_model": settings.checkpoint_callback_params.save_best_model,
        }
        for key, value in needing.items():
            if value:
                raise ConfigError(
                    f"exp_manager.{key}: True needs validations, which {LOOP}.limit_val_batches=0 leaves out; "
                    "leave one of them out"
                )


def check_experiment(config: TrainStudentConfig) -> None:
    """Check name, folders and checkpoints of a run against each other and the file system; needs no torch.

    Raises:
        ConfigError: names the key.
    """
    if "/" in config.name:
        raise ConfigError(f"name: {config.name!r} names files and must not contain a slash")
    settings = config.exp_manager
    if config.export.hf and not (
        settings.create_checkpoint_callback
        and settings.checkpoint_callback_params.save_nemo_on_train_end
    ):
        raise ConfigError(
            "export.hf: the folder is written with the .nemo archive, which "
            "exp_manager.checkpoint_callback_params.save_nemo_on_train_end=false or "
            "exp_manager.create_checkpoint_callback=false leaves out; set both to true"
        )
    settings.check_folders()
