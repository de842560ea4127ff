"""Settings of both stages: shape of a model, its distribution over ranks, precision, trainer, logs."""

from __future__ import annotations

import contextlib
import math
from dataclasses import MISSING, dataclass, field
from typing import Any

from nemo_kd.config import ConfigError
from nemo_kd.config.fields import Section, bounded, choice, count, path, positive

FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")

PRECISIONS = {
    "32": "float32",
    "fp32": "float32",
    "32-true": "float32",
    "bf16": "bfloat16",
    "bf16-true": "bfloat16",
    "bf16-mixed": "bfloat16",
}
"""`trainer.precision` -> dtype of weights and activations; with bfloat16 the optimizer keeps
float32 copies."""

AUTO_PRECISION = "auto"
"""`trainer.precision` that `run.ranks.join_ranks` replaces once the device is known."""

FP8_MULTIPLE = 16
"""Divides rows and columns of FP8 matrix products."""

TENSOR = "tensor_model_parallel_size"
PARALLEL_SIZES = (
    TENSOR,
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)


@dataclass
class RopeScaling(Section, key="rope_scaling"):
    """Rescaling of rotary frequencies of Llama 3.1 (Hugging Face `rope_type: llama3`)."""

    factor: float = positive()
    low_freq_factor: float = positive()
    high_freq_factor: float = positive()
    original_max_position_embeddings: int = positive()


@dataclass
class GPTArchitecture(Section):
    """A decoder's weights and forward pass; written to model_config.yaml of a .nemo archive."""

    family: str = choice(MISSING, FAMILIES)
    """Hugging Face layout of the weights."""
    vocab_size: int = count()
    """Embedding rows that stand for a token, without the padding for tensor parallelism."""
    num_layers: int = bounded(at_least=1, at_most=1 << 12)
    hidden_size: int = count()
    ffn_hidden_size: int = count()
    """Feed-forward size; that of every expert in a mixture of experts."""
    num_attention_heads: int = count()
    num_query_groups: int = count()
    """Key/value heads."""
    kv_channels: int = count()
    """Size of one attention head."""
    max_position_embeddings: int = count()
    layernorm_epsilon: float = positive()
    rotary_base: float = positive()
    rope_scaling: RopeScaling | None = None
    share_embeddings_and_output_weights: bool = False
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    window_size: int | None = count(None)
    """Sliding attention: positions that a token attends to, itself included. None: all."""
    window_layers: list[int] = field(default_factory=list)
    """0-based layers that use `window_size`; empty means all of them."""
    num_moe_experts: int | None = count(None)
    """Experts of every layer; None: a dense model."""
    moe_router_topk: int | None = count(None)
    """Experts per token."""
    moe_normalize_topk: bool = True
    """The weights of a token's experts sum to 1."""
    init_method_std: float = positive(0.02)
    hf_config: dict[str, Any] = field(default_factory=dict)
    """config.json of the Hugging Face model, kept for export."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_attention_heads % self.num_query_groups:
            raise ConfigError(
                f"num_attention_heads: {self.num_attention_heads} is not a multiple of "
                f"num_query_groups {self.num_query_groups}"
            )
        # One expert with a normalised weight has the weight 1: nothing for a router to learn, and
        # Megatron refuses it.
        fewest = 2 if self.moe_normalize_topk else 1
        if (
            self.num_moe_experts is not None
            and not fewest <= (self.moe_router_topk or 0) <= self.num_moe_experts
        ):
            raise ConfigError(
                f"moe_router_topk: {self.moe_router_topk} experts per token are not supported if a "
                "layer has "
                f"{self.num_moe_experts} and moe_normalize_topk is {self.moe_normalize_topk}; "
                f"supported: from {fewest} to all"
            )


@dataclass
class ParallelConfig(Section, key="model"):
    """Distribution of one model over ranks.

    A replica has tensor x pipeline x context ranks; the rest is data parallelism.
    """

    tensor_model_parallel_size: int = count(1)
    """Ranks that split every layer: heads, feed-forward and vocabulary."""
    pipeline_model_parallel_size: int = count(1)
    """Pipeline stages; each has the same number of layers."""
    context_parallel_size: int = count(1)
    """Ranks that split every sequence, for sequences whose activations do not fit on one rank."""
    expert_model_parallel_size: int = count(1)
    """Ranks that the experts of a layer are distributed over: neighbours in context and data
    parallelism, which then step together. Each expert is also split over the tensor-parallel
    ranks."""
    sequence_parallel: bool = False
    """Split the activations between tensor-parallel regions along the sequence. No effect at
    tensor-parallel size 1."""

    def data_parallel_size(self, world_size: int) -> int:
        """Return the number of replicas on `world_size` ranks.

        Raises:
            ConfigError: the ranks do not divide evenly.
        """
        sizes = [getattr(self, name) for name in PARALLEL_SIZES[:3]]
        ranks = math.prod(sizes)
        if world_size % ranks:
            raise ConfigError(
                f"model.{' x model.'.join(PARALLEL_SIZES[:3])}: {' x '.join(map(str, sizes))} = "
                f"{ranks} does not divide the {world_size} ranks (trainer.num_nodes x "
                "trainer.devices)"
            )
        sharing = world_size // ranks * self.context_parallel_size
        if sharing % self.expert_model_parallel_size:
            raise self.error(
                "expert_model_parallel_size",
                f"{self.expert_model_parallel_size} does not divide the {sharing} ranks of data "
                "and context parallelism, which the experts are distributed over",
            )
        return world_size // ranks

    @property
    def chunks_per_stage(self) -> int:
        """Return the parts of a pipeline stage; more than one if stages are interleaved."""
        return getattr(self, "virtual_pipeline_model_parallel_size", None) or 1

    @property
    def replicas_in_lockstep(self) -> int:
        """Return how many replicas must run their forward passes together because they share
        experts."""
        return (
            math.lcm(self.expert_model_parallel_size, self.context_parallel_size)
            // self.context_parallel_size
        )


def check_layout(architecture: GPTArchitecture, parallel: ParallelConfig) -> None:
    """Refuse sizes that do not divide the model's layers, heads, groups, feed-forward or experts.

    Raises:
        ConfigError: names the size that does not divide.
    """
    tensor = parallel.tensor_model_parallel_size
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        if getattr(architecture, name) % tensor:
            raise ConfigError(
                f"model.{TENSOR}: {tensor} does not divide the model's {name} "
                f"({getattr(architecture, name)})"
            )
    chunks = parallel.pipeline_model_parallel_size * parallel.chunks_per_stage
    if architecture.num_layers % chunks:
        raise ConfigError(
            "model.pipeline_model_parallel_size x model.virtual_pipeline_model_parallel_size: "
            f"{chunks} does not divide the model's num_layers ({architecture.num_layers})"
        )
    experts = architecture.num_moe_experts or 0
    size = parallel.expert_model_parallel_size
    if size > 1 and (not experts or experts % size):
        raise ConfigError(
            f"model.expert_model_parallel_size: {size} does not divide the model's {experts} "
            "experts a layer"
        )


def check_fp8(architecture: GPTArchitecture, parallel: ParallelConfig) -> None:
    """Refuse sizes that FP8 matrix products do not take.

    Raises:
        ConfigError: a size of a rank's weights is not a multiple of 16.
    """
    tensor = parallel.tensor_model_parallel_size
    group = architecture.num_query_groups // tensor * architecture.kv_channels
    ffn = architecture.ffn_hidden_size // tensor
    if math.gcd(architecture.hidden_size, group, ffn) % FP8_MULTIPLE:
        raise ConfigError(
            f"model.fp8: hidden_size {architecture.hidden_size}, and a rank's keys {group} and "
            f"ffn_hidden_size {ffn} must be multiples of {FP8_MULTIPLE}; leave fp8 out, or lower "
            f"model.{TENSOR} ({tensor})"
        )


def check_training_layout(
    architecture: GPTArchitecture, parallel: ParallelConfig
) -> None:
    """Check as `check_layout` does, and what Megatron refuses in training only.

    Raises:
        ConfigError: names the size that does not divide, or the key to set.
    """
    check_layout(architecture, parallel)
    is_split = (
        parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel
    )
    if architecture.num_moe_experts is not None and is_split:
        raise ConfigError(
            f"model.sequence_parallel: False with model.{TENSOR}="
            f"{parallel.tensor_model_parallel_size}, but tensor-parallel training of a mixture of "
            "experts needs sequence parallelism; set it to true"
        )


def check_generation_layout(parallel: ParallelConfig, wanted_by: str) -> None:
    """Refuse a layout that cannot generate responses; `wanted_by` is the key that asks for them.

    Raises:
        ConfigError: sequences are split over ranks.
    """
    context = parallel.context_parallel_size
    if context > 1:
        raise ConfigError(
            f"model.context_parallel_size: {context}, but {wanted_by} generates responses, which "
            "needs 1; set it to 1, or export the model and run evaluate_gpt on it in another layout"
        )


def length_multiple(parallel: ParallelConfig, per_rank: int = 1) -> int:
    """Return a number that must divide the positions of every batch in this layout.

    `per_rank` must divide those of a rank.

    Context parallelism gives two chunks to every rank; sequence parallelism splits those of a rank
    over the tensor-parallel ranks.
    """
    context = parallel.context_parallel_size
    chunks = 2 * context if context > 1 else 1
    tensor = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return math.lcm(chunks, context * tensor * per_rank)


def padded_vocab_size(
    vocab_size: int, divisible_by: int, tensor_model_parallel_size: int
) -> int:
    """Return the embedding rows after padding to a multiple of `divisible_by` and the
    tensor-parallel size.

    All tensor-parallel sizes that divide `divisible_by` give the same number, so optimizer states
    can be resharded. Padding rows are zero and never reach a top-k, a log-sum-exp or a softmax: see
    `ops.vocab.VocabShard`.
    """
    multiple = math.lcm(divisible_by, tensor_model_parallel_size)
    return -(-vocab_size // multiple) * multiple


def check_batch_sizes(
    micro_batch_size: int, global_batch_size: int, data_parallel_size: int
) -> None:
    """Refuse batch sizes that do not split into whole micro-batches on every data-parallel rank.

    Raises:
        ConfigError: names both keys and the multiple that is needed.
    """
    multiple = micro_batch_size * data_parallel_size
    if global_batch_size % multiple:
        raise ConfigError(
            f"model.global_batch_size: {global_batch_size} must be a multiple of "
            "model.micro_batch_size x data-parallel size = "
            f"{micro_batch_size} x {data_parallel_size} = {multiple}"
        )


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
        if str(self.precision).startswith(("16", "fp16")):
            raise self.error(
                "precision",
                f"{self.precision} is not supported: losses and gradients are sums over the tokens "
                "of a batch, which leave float16's range; use bf16, which needs as little memory, "
                "or 32",
            )
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
