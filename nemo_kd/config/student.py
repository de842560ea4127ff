"""Configuration of stage 2, `train_gpt_knowledge_distillation`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from nemo_kd.config.answers import ANSWER_METRICS, EvalConfig
from nemo_kd.config.blend import Source, read_sources
from nemo_kd.config.data import ChatPromptTokens, DataConfig, DatasetConfig
from nemo_kd.config.exp_manager import ExpManagerConfig
from nemo_kd.config.fields import Section, bounded, choice, count, path, positive
from nemo_kd.config.loss import LossConfig
from nemo_kd.config.optim import ExportConfig, OptimConfig, PeftConfig
from nemo_kd.config.shared import (
    ModelConfig,
    PretrainedCheckpoint,
    TrainerConfig,
    check_generation_layout,
)

LOOP = "trainer.knowledge_distillation"
SPLITS = ("train", "validation", "test")
FORM = (
    "model.data.data_prefix.train=train_CHUNK_ID.jsonl "
    "model.data.data_prefix.validation=val_CHUNK_ID.jsonl"
)


@dataclass
class LoopConfig(Section, key=LOOP):
    """`trainer.knowledge_distillation`: length of the training, validation and checkpoints."""

    max_epochs: int = 1
    """Passes over the training data."""
    max_steps: int = bounded(-1, at_least=-1)
    """Optimizer steps; -1: as many as max_epochs gives."""
    val_check_interval: int | float = bounded(100, above=0)
    """Steps between validations, or a fraction of an epoch. Validation also runs after the last
    step."""
    save_interval: int | float | None = bounded(None, above=0)
    """Steps between checkpoints, or a fraction of an epoch. None: at every validation. Checkpoints
    after a validation are ranked by it; the others only keep the latest state."""
    limit_train_batches: int | float = positive(1.0)
    """Training steps per epoch: a number, or a fraction of all."""
    limit_val_batches: int | float = bounded(1.0, at_least=0)
    """Validation batches: a number, or a fraction of all; 0 turns validation off."""
    gradient_clip_val: float | None = bounded(1.0, at_least=0)
    """Largest global norm of the gradient; None or 0 does not clip."""
    log_every_n_steps: int = count(1)
    """Steps between logged values."""
    non_finite: str = choice("stop", ("stop", "skip"))
    """On a step whose loss or gradient is not finite: stop ends the run and names the examples;
    skip keeps the weights and counts the step in train/skipped_steps, up to 10 in a row."""
    inference_metrics: dict[str, Any] | None = None
    """Further metrics of generated responses, as in NeMo-Aligner: NAME: {_target_: CLASS, argument:
    value}. Each evaluation of `eval` calls update(batch, generation_output), compute() and reset(),
    and logs eval/NAME."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, metric in (self.inference_metrics or {}).items():
            if not isinstance(metric, dict) or not metric.get("_target_"):
                raise self.error(
                    f"inference_metrics.{name}",
                    f"{metric!r} names no class; give {{_target_: package.module.Class}}, with its "
                    "arguments beside it",
                )
            if f"eval/{name}" in (*ANSWER_METRICS, "eval/num_examples"):
                raise self.error(
                    f"inference_metrics.{name}",
                    f"eval/{name} is a metric of every evaluation; choose another name",
                )


@dataclass
class StudentTrainerConfig(TrainerConfig):
    """`trainer` of stage 2."""

    knowledge_distillation: LoopConfig = field(default_factory=LoopConfig)


@dataclass
class StudentDatasetConfig(DatasetConfig, key="model.data.dataset"):
    """Format of the datasets that stage 2 tokenizes itself; data_prefix has their paths."""

    file_path: Any = ""
    """Not used: model.data.data_prefix names the files."""


@dataclass
class StudentRecordsConfig(DataConfig, key="model.data"):
    """Stage 2's form of stage 1's `data`."""


@dataclass
class StudentDataConfig(Section, key="model.data"):
    """`model.data`: training, validation and test data of stage 2."""

    data_impl: str = choice(
        "chunked_jsonl", ("chunked_jsonl", "jsonl", "json", "dataset")
    )
    """chunked_jsonl (also jsonl, json) reads a cache of stage 1; dataset reads records (JSONL,
    tables and others), for SFT without a teacher."""
    data_prefix: dict[str, Any] = path({})
    """Paths per split: data_prefix.train=FILE data_prefix.validation=FILE, each a path, paths
    separated by commas, or a list. CHUNK_ID stands for 0, 1, 2 ...; `[a:b]` or `[:10%]` after the
    path of a cache selects rows (inside a list, put such a path in quotes). test is optional, and
    so is validation with trainer.knowledge_distillation.limit_val_batches=0. train may have
    weights, [0.3, PATH, 0.7, PATH]: an epoch has as many samples as all paths together. Each path
    gives its share; it repeats rows if it has fewer, and continues in the next epoch if it has
    more. Without weights every row counts once per epoch. [{path: PATH, weight: 0.3, kd_weight: 1,
    sft_weight: 0.5} ...] also multiplies the losses of a path's tokens, in training only; the
    divisor stays."""
    n_chunks: Any = None
    """Chunks to read: a number, or one per split. None: all."""
    top_k: int | None = count(None)
    """Use this many of the largest teacher logits per position; None: all in the cache."""
    shuffle: bool | str = choice(True, (True, False, "chunks"))
    """True: shuffle the training data every epoch; the same seed gives the same order. chunks:
    shuffle chunks and the rows inside each, so that reads stay local (spinning disks, object
    stores). False: keep the order."""
    drop_ids_outside_vocab: bool = False
    """Move teacher token ids without a student embedding into the tail; otherwise they are an
    error."""
    allow_other_template: bool = False
    """Accept a cache whose conversations were rendered with another chat template than the
    student's."""
    max_tokens_per_batch: int | None = count(None)
    """Largest number of tokens in a micro-batch on one rank, padding included; a longer example
    runs alone. The examples of a global batch are then distributed over micro-batches and
    data-parallel ranks by length, and model.micro_batch_size has no effect. With context
    parallelism of size C the limit is C times this, split over C ranks. None:
    model.micro_batch_size examples per micro-batch."""
    packing: bool = True
    """True: join the examples of a micro-batch to one row without padding; each keeps its own
    positions and attention. False, and always with context parallelism: one example per row, padded
    to the longest."""
    num_workers: int = bounded(2, at_least=0)
    """Processes per rank that prepare batches ahead of the training; 0: the training waits for each
    batch."""
    chat: bool | None = None
    """data_impl=dataset: True requires conversations, False refuses them; None accepts both."""
    chat_prompt_tokens: ChatPromptTokens = field(default_factory=ChatPromptTokens)
    dataset: StudentDatasetConfig = field(default_factory=StudentDatasetConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset.file_path:
            raise self.error(
                "dataset.file_path",
                f"{self.dataset.file_path} is not read; name the files of every split in "
                "model.data.data_prefix",
            )
        chosen = self.n_chunks
        if not isinstance(chosen, dict):
            chosen = {"train": chosen}
        for split, number in chosen.items():
            is_count = number is None or (type(number) is int and number >= 1)
            if split not in SPLITS or not is_count:
                raise self.error(
                    "n_chunks",
                    f"{self.n_chunks!r} is neither a number of chunks nor one for each split, "
                    "{train: 2, validation: 1}",
                )
        for split in self.data_prefix:
            if split not in SPLITS:
                raise self.error(
                    "data_prefix", f"{split} is not one of {', '.join(SPLITS)}"
                )
            weighs = self.weights(split) or self.loss_weights(split)
            if weighs and split != "train":
                raise self.error(
                    f"data_prefix.{split}",
                    "weights are for train only, here every row counts once; give the paths alone",
                )

    def records(self, path: str) -> StudentRecordsConfig:
        """Return the settings of a file of records."""
        dataset = replace(self.dataset, file_path=path)
        return StudentRecordsConfig(self.chat, self.chat_prompt_tokens, dataset)

    def paths(self, split: str) -> list[str]:
        """Return the split's paths."""
        return [source.path for source in self._sources(split)]

    def weights(self, split: str) -> list[float] | None:
        """Return the weight of each of the split's paths; None without weights."""
        weights = [source.weight for source in self._sources(split)]
        return None if None in weights else weights or None  # type: ignore[return-value]

    def loss_weights(self, split: str) -> list[tuple[float, float]] | None:
        """Return (sft_weight, kd_weight) of each of the split's paths; None if all are 1."""
        sources = self._sources(split)
        weights = [(source.sft_weight, source.kd_weight) for source in sources]
        return weights if set(weights) - {(1, 1)} else None

    def all_weights(self, split: str) -> Any:
        """Return all weights of the split's paths, as plain values to compare."""
        weights = self.weights(split)
        of_losses = self.loss_weights(split)
        # Older checkpoints record weights of samples only.
        return {"samples": weights, "losses": of_losses} if of_losses else weights

    def _sources(self, split: str) -> list[Source]:
        entries = self.data_prefix.get(split) or []
        if isinstance(entries, dict):
            entries = [entries]
        if not isinstance(entries, list):
            entries = [part.strip() for part in str(entries).split(",")]
        try:
            return list(read_sources(entries))
        except (TypeError, ValueError):
            raise self.error(
                f"data_prefix.{split}",
                f"{entries} is neither PATH, [PATH, PATH ...], [WEIGHT, PATH, WEIGHT, PATH ...] with "
                "weights above 0, nor [{path: PATH, weight: WEIGHT, kd_weight: X, sft_weight: Y} ...] "
                "with weight for all or none, X and Y at least 0 and not both 0",
            ) from None

    @property
    def uses_cache(self) -> bool:
        return self.data_impl != "dataset"


@dataclass
class StudentModelConfig(ModelConfig):
    """`model` of stage 2."""

    micro_batch_size: int = count(1)
    """Examples per forward pass of one data-parallel rank, unless model.data.max_tokens_per_batch
    is given."""
    global_batch_size: int = count(64)
    """Examples per optimizer step over all data-parallel ranks."""
    virtual_pipeline_model_parallel_size: int | None = count(None)
    """Parts of every pipeline stage. More than one interleaves the stages: they wait less and
    exchange more. None: 1."""
    activations_checkpoint_granularity: str | None = choice(
        None, ("full", "selective")
    )
    """Activations that the backward pass recomputes: full (whole layers) or selective (attention).
    None: none."""
    activations_checkpoint_method: str | None = choice(None, ("uniform", "block"))
    """full: uniform (groups of layers) or block (the first layers of every pipeline stage, or of
    every part of an interleaved one). None: uniform."""
    activations_checkpoint_num_layers: int | None = count(None)
    """full: layers of a group (uniform) or recomputed layers of a stage (block). None: 1."""
    peft: PeftConfig = field(default_factory=PeftConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    knowledge_distillation: LossConfig = field(default_factory=LossConfig)
    data: StudentDataConfig = field(default_factory=StudentDataConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunks_per_stage > 1 and self.pipeline_model_parallel_size == 1:
            raise self.error(
                "virtual_pipeline_model_parallel_size",
                f"{self.chunks_per_stage} with model.pipeline_model_parallel_size=1 interleaves "
                "nothing; leave it out",
            )
        # NeMo-Aligner's files set both beside selective; they are for whole layers, and Megatron
        # refuses them.
        is_full = self.activations_checkpoint_granularity == "full"
        method = self.activations_checkpoint_method or "uniform"
        num_layers = self.activations_checkpoint_num_layers or 1
        self.activations_checkpoint_method = method if is_full else None
        self.activations_checkpoint_num_layers = num_layers if is_full else None
        loss = self.knowledge_distillation
        for name in ("top_k", "drop_ids_outside_vocab"):
            if loss.support == "sampled" and getattr(self.data, name):
                raise self.error(
                    f"data.{name}",
                    "support=sampled needs all ids that the cache keeps; leave it out, or use "
                    "support=tail",
                )
        self._check_loss_weights()
        if not self.data.uses_cache and loss.trains_on_teacher:
            raise self.error(
                "data.data_impl",
                "dataset has no teacher logits, which model.knowledge_distillation.kd_loss_weight="
                f"{loss.kd_loss_weight} needs; set kd_loss_weight=0 and sft_loss_weight=1, or "
                "read a cache",
            )

    def _check_loss_weights(self) -> None:
        """Refuse weights of a path's losses that have no effect, or leave nothing to train."""
        loss = self.knowledge_distillation
        is_custom = loss.objective == "custom"
        for sft_weight, kd_weight in self.data.loss_weights("train") or []:
            unused = {
                "sft_weight": sft_weight != 1
                and (not loss.trains_on_labels or is_custom),
                "kd_weight": kd_weight != 1
                and (not loss.trains_on_teacher or is_custom),
            }
            for name in filter(unused.get, unused):
                raise self.error(
                    "data.data_prefix.train",
                    f"{name} of a path multiplies a term that the loss leaves out, or belongs to a "
                    "run with kd_loss=custom, where all paths weigh alike; leave it out",
                )
            trains = (
                sft_weight and loss.trains_on_labels,
                kd_weight and loss.trains_on_teacher,
            )
            if not any(trains):
                raise self.error(
                    "data.data_prefix.train",
                    f"sft_weight={sft_weight:g} and kd_weight={kd_weight:g} of a path train "
                    "nothing, for the loss leaves out the other term; leave the path out",
                )

    @property
    def packed(self) -> bool:
        """Return True if micro-batches are packed."""
        return self.data.packing and self.context_parallel_size == 1


@dataclass
class TrainStudentConfig(Section):
    """Keys of `train_gpt_knowledge_distillation`."""

    name: str = "megatron_gpt_knowledge_distillation"
    """Name of the run."""
    dry_run: bool = False
    """Compute two steps, print layout, memory and time, and show the first batch with its loss
    masks, also as dry_run/first_batch.html in exp_manager.explicit_log_dir (None: the current
    folder). Train and write nothing else; `--dry-run` is the same."""
    trainer: StudentTrainerConfig = field(default_factory=StudentTrainerConfig)
    pretrained_checkpoint: PretrainedCheckpoint = field(
        default_factory=PretrainedCheckpoint
    )
    model: StudentModelConfig = field(default_factory=StudentModelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    allow_changed: list[str] = field(default_factory=list)
    """Keys that may differ from those of the checkpoint that the run resumes from, for example
    [model.optim.lr]; a key's last part or a section also works. By default, keys that determine the
    result must be the same."""
    exp_manager: ExpManagerConfig = field(default_factory=ExpManagerConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if "/" in self.name:
            raise self.error(
                "name", f"{self.name!r} names files and must not contain a slash"
            )
        if self.export.lora == "adapter" and self.model.peft.lora is None:
            raise self.error(
                "export.lora",
                "adapter, but model.peft.peft_scheme=none trains none; use lora, or "
                "export.lora=merged",
            )
        loop = self.trainer.knowledge_distillation
        manager = self.exp_manager
        params = manager.checkpoint_callback_params
        writes_nemo = (
            manager.create_checkpoint_callback and params.save_nemo_on_train_end
        )
        if self.export.hf and not writes_nemo:
            raise self.error(
                "export.hf",
                "the folder is written with the .nemo archive, which "
                "exp_manager.checkpoint_callback_params.save_nemo_on_train_end=false or "
                "exp_manager.create_checkpoint_callback=false turns off; set both to true",
            )
        for split in SPLITS[: 2 if self.validates else 1]:
            if not self.model.data.paths(split):
                raise self.error(
                    "model.data.data_prefix",
                    f"no {split} data; give {FORM} (or train without validation: "
                    f"{LOOP}.limit_val_batches=0)",
                )
        for key, value in (
            ("create_early_stopping_callback", manager.create_early_stopping_callback),
            (
                "checkpoint_callback_params.save_best_model",
                params.save_best_model and not params.ranks_by_answers,
            ),
        ):
            if value and not self.validates:
                raise self.error(
                    f"exp_manager.{key}",
                    f"True needs validation, which {LOOP}.limit_val_batches=0 turns off; leave one "
                    "of them out",
                )
        if self.eval.interval:
            check_generation_layout(self.model, f"eval.interval={self.eval.interval}")
        if loop.inference_metrics and not self.eval.interval:
            raise self.error(
                f"{LOOP}.inference_metrics",
                "the metrics measure generated responses; set eval.interval (steps), eval.data "
                "(JSONL records) and eval.answer_field",
            )

    @property
    def validates(self) -> bool:
        """Return True if the run validates."""
        return self.trainer.knowledge_distillation.limit_val_batches > 0
