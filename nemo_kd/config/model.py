"""The shape of a model, how it is spread over ranks, and in which precision it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from nemo_kd.config.errors import ConfigError

FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")

PRECISIONS = {
    "32": "float32",
    "fp32": "float32",
    "32-true": "float32",
    "bf16": "bfloat16",
    "bf16-true": "bfloat16",
    "bf16-mixed": "bfloat16",
}
"""`trainer.precision` -> dtype of weights and activations. With bfloat16 the optimizer keeps float32 weights and gradients."""

AUTO_PRECISION = "auto"
"""`trainer.precision` that `run.process_group.join_ranks` replaces once the device is known."""

MOST_LAYERS = 1 << 12

_MOST = {
    "vocab_size": 1 << 24,
    "num_layers": MOST_LAYERS,
    "hidden_size": 1 << 18,
    "ffn_hidden_size": 1 << 20,
    "num_attention_heads": 1 << 14,
    "num_query_groups": 1 << 14,
    "kv_channels": 1 << 14,
    "max_position_embeddings": (1 << 31) - 1,
    "window_size": (1 << 31) - 1,
    "num_moe_experts": 1 << 14,
    "moe_router_topk": 1 << 14,
}
"""Bounds far above every known model: a damaged file must not ask for any amount of memory."""

TENSOR = "tensor_model_parallel_size"
PARALLEL_SIZES = (
    TENSOR,
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)


@dataclass
class RopeScaling:
    """Llama 3.1's rescaling of rotary frequencies (Hugging Face `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass
class GPTArchitecture:
    """Everything that fixes a decoder's weights and forward pass; written to model_config.yaml of a .nemo archive."""

    family: str
    """One of FAMILIES: chooses the Hugging Face layout on export."""
    vocab_size: int
    """Real vocabulary: rows of the embedding that stand for a token. Padding for tensor parallelism is not counted."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Of every expert in a mixture of experts."""
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads."""
    kv_channels: int
    """Size of one attention head."""
    max_position_embeddings: int
    layernorm_epsilon: float
    rotary_base: float
    rope_scaling: RopeScaling | None = None
    share_embeddings_and_output_weights: bool = False
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    window_size: int | None = None
    """Sliding attention: how many positions a token sees, itself included. None sees all."""
    window_layers: list[int] = field(default_factory=list)
    """0-based layers that use `window_size`; empty means all of them."""
    num_moe_experts: int | None = None
    """Experts of every layer; None: a dense model."""
    moe_router_topk: int | None = None
    """Experts that a token goes through."""
    moe_normalize_topk: bool = True
    """The weights of a token's experts sum to 1."""
    init_method_std: float = 0.02
    hf_config: dict[str, Any] = field(default_factory=dict)
    """config.json of the Hugging Face model it came from, kept for export."""

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ConfigError(
                f"family: {self.family!r} is not supported; supported: {', '.join(FAMILIES)}"
            )
        for name, most in _MOST.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise ConfigError(
                    f"{name}: found {value:,}, expected an integer from 1 to {most:,}"
                )
        numbers = {
            name: getattr(self, name)
            for name in ("layernorm_epsilon", "rotary_base", "init_method_std")
        }
        if self.rope_scaling is not None:
            numbers |= {
                f"rope_scaling.{name}": value for name, value in vars(self.rope_scaling).items()
            }
        for name, value in numbers.items():
            if not 0 < value < math.inf:
                raise ConfigError(f"{name}: found {value}, expected a number above 0")
        if not all(0 <= layer < self.num_layers for layer in self.window_layers):
            raise ConfigError(
                f"window_layers: numbers outside the {self.num_layers} layers, which count from 0"
            )
        if self.num_attention_heads % self.num_query_groups:
            raise ConfigError(
                f"num_attention_heads: {self.num_attention_heads} is not a multiple of num_query_groups {self.num_query_groups}"
            )
        # One expert with a normalised weight has the weight 1: nothing for a router to learn, and Megatron refuses it.
        fewest = 2 if self.moe_normalize_topk else 1
        if (
            self.num_moe_experts is not None
            and not fewest <= (self.moe_router_topk or 0) <= self.num_moe_experts
        ):
            raise ConfigError(
                f"moe_router_topk: {self.moe_router_topk} experts for a token are not supported where a layer has "
                f"{self.num_moe_experts} and moe_normalize_topk is {self.moe_normalize_topk}; supported: from {fewest} to all"
            )


@dataclass
class ParallelConfig:
    """How one model is spread over ranks: tensor x pipeline x context sizes make a replica, the rest is data parallelism."""

    tensor_model_parallel_size: int = 1
    """Ranks that share every layer: heads, feed-forward and vocabulary are cut into as many parts."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are cut into, equally many each; batches run through them one behind the other."""
    context_parallel_size: int = 1
    """Ranks that share every sequence: for long ones, whose activations one rank cannot hold."""
    expert_model_parallel_size: int = 1
    """Ranks that the experts of a layer are spread over: neighbours in context and data parallelism, which step together then. Each expert is also cut over the tensor-parallel ranks."""
    sequence_parallel: bool = False
    """Cuts the activations between the tensor-parallel regions along the sequence; nothing at tensor-parallel size 1."""

    def __post_init__(self) -> None:
        for name in PARALLEL_SIZES:
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}: {getattr(self, name)} must be at least 1")

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas of the model among `world_size` ranks.

        Raises:
            ConfigError: the ranks do not divide evenly.
        """
        sizes = {
            name: getattr(self, name) for name in PARALLEL_SIZES[:3] if getattr(self, name) > 1
        }
        ranks = math.prod(sizes.values())
        if world_size % ranks:
            product = " x ".join(map(str, sizes.values())) + (
                f" = {ranks}" if len(sizes) > 1 else ""
            )
            raise ConfigError(
                f"{' x '.join(f'model.{name}' for name in sizes)}: {product} does not divide the {world_size} ranks "
                "(trainer.num_nodes x trainer.devices)"
            )
        sharing = world_size // ranks * self.context_parallel_size
        if sharing % self.expert_model_parallel_size:
            raise ConfigError(
                f"model.expert_model_parallel_size: {self.expert_model_parallel_size} does not divide the {sharing} ranks of "
                "data and context parallelism, which the experts are spread over; each is cut over the tensor-parallel ranks too"
            )
        return world_size // ranks

    @property
    def chunks_per_stage(self) -> int:
        """Parts that the layers of a pipeline stage are cut into; several where stages are interleaved."""
        return 1

    @property
    def replicas_in_lockstep(self) -> int:
        """Replicas of the model that have to run their forward passes together, as their experts are spread over all of them."""
        return (
            math.lcm(self.expert_model_parallel_size, self.context_parallel_size)
            // self.context_parallel_size
        )


def check_layout(architecture: GPTArchitecture, parallel: ParallelConfig) -> None:
    """Refuses sizes that cannot cut the model's layers, heads, groups, feed-forward or experts evenly.

    Raises:
        ConfigError: names the size that does not divide.
    """
    cut_by = {
        TENSOR: ("num_attention_heads", "num_query_groups", "ffn_hidden_size"),
        "pipeline_model_parallel_size": ("num_layers",),
    }
    for key, names in cut_by.items():
        for name in names:
            if getattr(architecture, name) % getattr(parallel, key):
                raise ConfigError(
                    f"model.{key}: {getattr(parallel, key)} does not divide the model's {name} ({getattr(architecture, name)})"
                )
    chunks = parallel.pipeline_model_parallel_size * parallel.chunks_per_stage
    if architecture.num_layers % chunks:
        raise ConfigError(
            f"model.virtual_pipeline_model_parallel_size: {parallel.chunks_per_stage} parts of {parallel.pipeline_model_parallel_size} "
            f"pipeline stages do not divide the model's num_layers ({architecture.num_layers})"
        )
    experts, size = architecture.num_moe_experts, parallel.expert_model_parallel_size
    if size > 1 and (experts is None or experts % size):
        found = "has none" if experts is None else f"has {experts} a layer"
        raise ConfigError(
            f"model.expert_model_parallel_size: {size} does not divide the model's experts: it {found}"
        )


def check_training_layout(architecture: GPTArchitecture, parallel: ParallelConfig) -> None:
    """As `check_layout`, and what Megatron refuses in training only.

    Raises:
        ConfigError: names the size that does not divide, or the key to set.
    """
    check_layout(architecture, parallel)
    tensor_size = parallel.tensor_model_parallel_size
    if (
        architecture.num_moe_experts is not None
        and tensor_size > 1
        and not parallel.sequence_parallel
    ):
        raise ConfigError(
            f"model.sequence_parallel: False with model.{TENSOR}={tensor_size}, but a mixture of experts is trained on "
            "tensor-parallel ranks with sequence parallelism only; set it to true"
        )


def length_multiple(parallel: ParallelConfig) -> int:
    """What the number of positions of every batch has to be a multiple of in this layout.

    Context parallelism deals two chunks to every rank; sequence parallelism cuts what a rank has among the
    tensor-parallel ranks.
    """
    context = parallel.context_parallel_size
    chunks = 2 * context if context > 1 else 1
    return math.lcm(
        chunks, context * parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    )


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_model_parallel_size: int) -> int:
    """Embedding rows after padding: the next multiple of both `divisible_by` and the tensor-parallel size.

    The same for every tensor-parallel size that divides `divisible_by`, so that optimizer states can be resharded.
    Padding rows are zero and never reach a top-k, a log-sum-exp or a softmax: see `ops.vocab.VocabShard`.
    """
    multiple = math.lcm(divisible_by, tensor_model_parallel_size)
    return -(-vocab_size // multiple) * multiple


def check_batch_sizes(
    micro_batch_size: int, global_batch_size: int, data_parallel_size: int
) -> None:
    """Refuses batch sizes that do not split into whole micro-batches on every data-parallel rank.

    Raises:
        ConfigError: names both keys and the multiple that is needed.
    """
    if micro_batch_size < 1:
        raise ConfigError(f"model.micro_batch_size: {micro_batch_size} must be at least 1")
    multiple = micro_batch_size * data_parallel_size
    if global_batch_size < 1 or global_batch_size % multiple:
        raise ConfigError(
            f"model.global_batch_size: {global_batch_size} must be a multiple of model.micro_batch_size x data-parallel size "
            f"= {micro_batch_size} x {data_parallel_size} = {multiple}"
        )
