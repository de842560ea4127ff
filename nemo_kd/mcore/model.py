"""Megatron Core's GPTModel built from an architecture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_TE,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from nemo_kd.config import ConfigError
from nemo_kd.config.model import GPTArchitecture, RopeScaling, check_layout, padded_vocab_size
from nemo_kd.config.shared import ModelConfig
from nemo_kd.mcore.attention import SDPACoreAttention
from nemo_kd.mcore.cpu import cuda_methods_on_cpu
from nemo_kd.mcore.experts import expert_fields
from nemo_kd.mcore.norm import RMSNorm


def use_transformer_engine(choice: str) -> bool:
    """Whether `model.transformer_engine` (auto, on, off) means Transformer Engine on this machine.

    Raises:
        ConfigError: on, but it or a GPU is missing.
    """
    available = HAVE_TE and torch.cuda.is_available()
    if choice == "on" and not available:
        missing = (
            "is not installed (pip install 'nemo_kd[gpu]')"
            if not HAVE_TE
            else "needs a GPU and torch finds none"
        )
        raise ConfigError(
            f"model.transformer_engine: on, but Transformer Engine {missing}; use auto or off"
        )
    return available and choice != "off"


def transformer_config(
    architecture: GPTArchitecture, model: ModelConfig, dtype: torch.dtype, **training: Any
) -> TransformerConfig:
    """Megatron's configuration of the decoder; `training` sets or overrides its fields.

    Raises:
        ConfigError: the parallel sizes do not divide the model.
    """
    check_layout(architecture, model)
    fields: dict[str, Any] = {
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size": architecture.ffn_hidden_size,
        "num_attention_heads": architecture.num_attention_heads,
        "num_query_groups": architecture.num_query_groups,
        "kv_channels": architecture.kv_channels,
        "normalization": "RMSNorm",
        "layernorm_epsilon": architecture.layernorm_epsilon,
        "qk_layernorm": architecture.qk_layernorm,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "add_qkv_bias": architecture.add_qkv_bias,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": architecture.init_method_std,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "tensor_model_parallel_size": model.tensor_model_parallel_size,
        "pipeline_model_parallel_size": model.pipeline_model_parallel_size,
        "context_parallel_size": model.context_parallel_size,
        "expert_model_parallel_size": model.expert_model_parallel_size,
        **_interleaving(model.chunks_per_stage),
        "sequence_parallel": model.sequence_parallel and model.tensor_model_parallel_size > 1,
        # Waiting for the GPU after every exchange between stages is for versions of torch that are long gone.
        "batch_p2p_sync": False,
        "use_cpu_initialization": not torch.cuda.is_available(),
        # Fused kernels that need Apex or change results slightly; Transformer Engine's layers do not use them.
        "persist_layer_norm": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
    }
    fields |= expert_fields(architecture)
    if architecture.window_size is not None:
        # (left, right) of Megatron and Transformer Engine do not count the token itself; `window_size` does.
        fields["window_size"] = (architecture.window_size - 1, 0)
        if architecture.window_layers:
            fields["window_attn_skip_freq"] = [
                int(layer in architecture.window_layers) for layer in range(architecture.num_layers)
            ]
        if model.context_parallel_size > 1:
            fields["cp_comm_type"] = "all_gather"  # Transformer Engine's default refuses windows
    return TransformerConfig(**{**fields, **training})


def _interleaving(chunks_per_stage: int) -> dict[str, Any]:
    if chunks_per_stage == 1:
        return {}
    return {
        "virtual_pipeline_model_parallel_size": chunks_per_stage,
        # Megatron 0.16 computes nonsense, and says nothing, where two interleaved stages exchange in batches.
        "overlap_p2p_comm": True,
        "batch_p2p_comm": False,
    }


def chunks(model: torch.nn.Module) -> Sequence[Any]:
    """This rank's parts of a model, in the order of their layers: one, or those of an interleaved pipeline stage."""
    return model if isinstance(model, torch.nn.ModuleList) else [model]  # type: ignore[return-value]


def build_chunks(
    architecture: GPTArchitecture,
    config: TransformerConfig,
    make_vocab_size_divisible_by: int,
    transformer_engine: bool,
    own_norms: bool = False,
) -> GPTModel | torch.nn.ModuleList:
    """As `build_gpt_model`; a list of models where pipeline stages are interleaved."""
    size = config.virtual_pipeline_model_parallel_size
    arguments = architecture, config, make_vocab_size_divisible_by, transformer_engine, own_norms
    if size is None:
        return build_gpt_model(*arguments)
    return torch.nn.ModuleList(build_gpt_model(*arguments, number) for number in range(size))


def build_gpt_model(
    architecture: GPTArchitecture,
    config: TransformerConfig,
    make_vocab_size_divisible_by: int,
    transformer_engine: bool,
    own_norms: bool = False,
    chunk: int | None = None,
) -> GPTModel:
    """This rank's part of the model on its device, randomly initialised; the logits are its vocabulary columns [B, S, v].

    The vocabulary is padded (`padded_vocab_size`): columns from `architecture.vocab_size` on mean nothing. Needs
    `initialize_model_parallel`. Transformer Engine's layers were not run against the reference models: only a GPU has them.

    Args:
        own_norms: norms are modules of their own with Transformer Engine too, not parts of the projections after them.
        chunk: of an interleaved pipeline stage's parts the one to build.
    """
    block = (
        _transformer_engine_block(config, own_norms) if transformer_engine else _torch_block(config)
    )
    position = {"ignore_virtual": chunk is None, "vp_stage": chunk}
    with cuda_methods_on_cpu():
        model = GPTModel(
            config,
            block,
            vocab_size=padded_vocab_size(
                architecture.vocab_size,
                make_vocab_size_divisible_by,
                config.tensor_model_parallel_size,
            ),
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(**position),
            post_process=parallel_state.is_pipeline_last_stage(**position),
            parallel_output=True,
            share_embeddings_and_output_weights=architecture.share_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_base=architecture.rotary_base,
            vp_stage=chunk,
        )
    if architecture.rope_scaling is not None:
        rotary = model.rotary_pos_emb
        rotary.inv_freq = _scaled_frequencies(rotary.inv_freq, architecture.rope_scaling)
    return model


def _scaled_frequencies(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Rescale rotary frequencies as Llama 3.1 does. GPTModel's own option fixes all values but the factor."""
    original = scaling.original_max_position_embeddings
    lengths = 2 * math.pi / frequencies
    low = scaling.low_freq_factor
    high = scaling.high_freq_factor
    smooth = (original / lengths - low) / (high - low)
    blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    shortened = torch.where(lengths < original / high, frequencies, blended)
    return torch.where(lengths > original / low, frequencies / scaling.factor, shortened)


def _torch_block(config: TransformerConfig) -> TransformerBlockSubmodules:
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
    )
    if config.num_moe_experts is not None:
        # As with Transformer Engine, whose experts have no norm in them: archives of both are the same.
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = SDPACoreAttention
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return _block(config, layer, RMSNorm)


def _transformer_engine_block(
    config: TransformerConfig, own_norms: bool
) -> TransformerBlockSubmodules:
    # Importable only where Transformer Engine is.
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

    layer = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm
    )
    if own_norms:
        parts = layer.submodules
        parts.input_layernorm, parts.self_attention.submodules.linear_qkv = (
            TENorm,
            TEColumnParallelLinear,
        )
        # Archives are the same with and without.
        parts.sharded_state_dict_keys_map = {
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_"
        }
        if config.num_moe_experts is None:
            parts.pre_mlp_layernorm, parts.mlp.submodules.linear_fc1 = (
                TENorm,
                TEColumnParallelLinear,
            )
            parts.sharded_state_dict_keys_map["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return _block(config, layer, TENorm)


def _block(config: TransformerConfig, layer: ModuleSpec, norm: Any) -> TransformerBlockSubmodules:
    num_chunks = config.pipeline_model_parallel_size * (
        config.virtual_pipeline_model_parallel_size or 1
    )
    num_layers = config.num_layers // num_chunks
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)
