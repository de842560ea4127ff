"""The shape of a model, how it is spread over ranks, and in which precision it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from nemo_kd.config.typed import ConfigError

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
            raise ConfigError(f"family: {self.family!r} is not supported; supported: {', '.join(FAMILIES)}")
        if self.num_attention_heads % self.num_query_groups:
            raise ConfigError(
                f"num_attention_heads: {self.num_attention_heads} is not a multiple of num_query_groups {self.num_query_groups}"
            )
        if self.num_moe_experts is not None and not 1 <= (self.moe_router_topk or 0) <= self.num_moe_experts:
            raise ConfigError(
                f"moe_router_topk: {self.moe_router_topk} is not from 1 to the {self.num_moe_experts} experts of a layer"
            )


@dataclass
class ParallelConfig:
    """How one model is spread over ranks. Pipeline, context, expert and sequence parallelism are reserved."""

    tensor_model_parallel_size: int = 1
    """Ranks that share one replica of the model: heads, feed-forward and vocabulary are cut into as many parts."""
    pipeline_model_parallel_size: int = 1
    """Reserved; must be 1."""
    context_parallel_size: int = 1
    """Reserved; must be 1."""
    expert_model_parallel_size: int = 1
    """Reserved; must be 1."""
    sequence_parallel: bool = False
    """Reserved; must be False."""

    def __post_init__(self) -> None:
        if self.tensor_model_parallel_size < 1:
            raise ConfigError(f"model.tensor_model_parallel_size: {self.tensor_model_parallel_size} must be at least 1")
        for name in ("pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size"):
            if getattr(self, name) != 1:
                raise ConfigError(f"model.{name}: {getattr(self, name)} is not available in this version; use 1")
        if self.sequence_parallel:
            raise ConfigError("model.sequence_parallel: True is not available in this version; use False")

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas of the model among `world_size` ranks.

        Raises:
            ConfigError: the ranks do not divide evenly.
        """
        if world_size % self.tensor_model_parallel_size:
            raise ConfigError(
                f"model.tensor_model_parallel_size: {self.tensor_model_parallel_size} does not divide the {world_size} "
                "ranks (trainer.num_nodes x trainer.devices)"
            )
        return world_size // self.tensor_model_parallel_size


def check_tensor_parallel(architecture: GPTArchitecture, tensor_model_parallel_size: int) -> None:
    """Refuses a tensor-parallel size that cannot cut the model's heads, groups or feed-forward evenly.

    Raises:
        ConfigError: names the size that does not divide.
    """
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        if getattr(architecture, name) % tensor_model_parallel_size:
            raise ConfigError(
                f"model.tensor_model_parallel_size: {tensor_model_parallel_size} does not divide the model's {name} "
                f"({getattr(architecture, name)})"
            )


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_model_parallel_size: int) -> int:
    """Embedding rows after padding: the next multiple of both `divisible_by` and the tensor-parallel size.

    The same for every tensor-parallel size that divides `divisible_by`, so that optimizer states can be resharded.
    Padding rows are zero and never reach a top-k, a log-sum-exp or a softmax: see `ops.vocab.VocabShard`.
    """
    multiple = math.lcm(divisible_by, tensor_model_parallel_size)
    return -(-vocab_size // multiple) * multiple


def check_batch_sizes(micro_batch_size: int, global_batch_size: int, data_parallel_size: int) -> None:
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
