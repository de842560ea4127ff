"""Megatron Core's GPTModel: built from an architecture, run, and taken apart.

Everything that depends on the model's class and on the layout of its modules is in this file.

Shape legend: B rows, S positions, N single positions, H hidden size, v this rank's part of the
vocabulary. Context parallelism cuts S over its ranks, sequence parallelism over the tensor-parallel
ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nemo_kd.batch import Batch
from nemo_kd.config.shared import (
    PARALLEL_SIZES,
    GPTArchitecture,
    ModelConfig,
    check_layout,
    padded_vocab_size,
)
from nemo_kd.mcore.groups import cuda_methods_on_cpu
from nemo_kd.mcore.layers import RMSNorm, SDPACoreAttention

ADAPTERS = "lora"
"""Name of the module in a layer that holds its adapters."""


_SAME = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "layernorm_epsilon",
    "qk_layernorm",
    "add_qkv_bias",
    "init_method_std",
    "num_moe_experts",
)
"""Fields of an architecture that have the same name in TransformerConfig."""


def transformer_config(
    architecture: GPTArchitecture,
    model: ModelConfig,
    dtype: torch.dtype,
    **more: Any,
) -> TransformerConfig:
    """Return Megatron's configuration of the decoder; `more` sets further fields.

    Raises:
        ConfigError: the parallel sizes do not divide the model.
    """
    check_layout(architecture, model)
    num_chunks = model.chunks_per_stage
    has_experts = architecture.num_moe_experts is not None
    window = architecture.window_size
    layers = range(architecture.num_layers)
    slides = [int(layer in architecture.window_layers) for layer in layers]
    fields: dict[str, Any] = {name: getattr(architecture, name) for name in _SAME}
    fields |= {name: getattr(model, name) for name in PARALLEL_SIZES}
    return TransformerConfig(
        **fields,
        sequence_parallel=model.sequence_parallel
        and model.tensor_model_parallel_size > 1,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not torch.cuda.is_available(),
        # `window_size` counts the token itself; (left, right) of Megatron does not.
        window_size=None if window is None else (window - 1, 0),
        window_attn_skip_freq=slides if architecture.window_layers else None,
        # With context parallelism; Transformer Engine's default refuses windows.
        cp_comm_type=None if window is None else "all_gather",
        moe_router_topk=architecture.moe_router_topk or 2,
        moe_ffn_hidden_size=architecture.ffn_hidden_size if has_experts else None,
        # A softmax over all experts gives weights that do not sum to 1; over the chosen ones
        # it normalizes them.
        moe_router_pre_softmax=not architecture.moe_normalize_topk,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        # Moves each token only to its experts; ranks may have different numbers of tokens.
        moe_token_dispatcher_type="alltoall",
        # Megatron 0.16 computes wrong results where two interleaved stages exchange in batches.
        virtual_pipeline_model_parallel_size=num_chunks if num_chunks > 1 else None,
        overlap_p2p_comm=num_chunks > 1,
        batch_p2p_comm=num_chunks == 1,
        # Only old versions of torch needed to wait for the GPU after every exchange between stages.
        batch_p2p_sync=False,
        # For training; losses are sums over tokens.
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        # Only the graph of a sent output is needed, but interleaved ones may still be in transit.
        deallocate_pipeline_outputs=num_chunks == 1,
        **more,
    )


def build_gpt_model(
    architecture: GPTArchitecture,
    config: TransformerConfig,
    make_vocab_size_divisible_by: int,
    transformer_engine: bool,
    own_norms: bool = False,
) -> Any:
    """Build this rank's part of the model on its device with random weights.

    Its logits are this rank's vocabulary columns [B, S, v]. The vocabulary is padded
    (`padded_vocab_size`): ignore the columns from `architecture.vocab_size` on. Needs
    `initialize_model_parallel`.

    Args:
        own_norms: build norms as modules with Transformer Engine too, not as parts of the
            projections after them.

    Returns:
        A GPTModel; a ModuleList of this rank's chunks where pipeline stages are interleaved.
    """
    block = (
        _transformer_engine_layer(config, own_norms)
        if transformer_engine
        else _torch_block(config)
    )
    vocab_size = padded_vocab_size(
        architecture.vocab_size,
        make_vocab_size_divisible_by,
        config.tensor_model_parallel_size,
    )

    def build(chunk: int | None) -> GPTModel:
        position = {"ignore_virtual": chunk is None, "vp_stage": chunk}
        model = GPTModel(
            config,
            block,
            vocab_size=vocab_size,
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(**position),
            post_process=parallel_state.is_pipeline_last_stage(**position),
            share_embeddings_and_output_weights=architecture.share_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_base=architecture.rotary_base,
            vp_stage=chunk,
        )
        if architecture.rope_scaling is not None:
            rotary = model.rotary_pos_emb
            rotary.inv_freq = _scaled_frequencies(architecture, rotary.inv_freq.device)
        return model

    num_chunks = config.virtual_pipeline_model_parallel_size
    with cuda_methods_on_cpu():  # for a tied embedding on two stages
        if num_chunks is None:
            return build(None)
        return torch.nn.ModuleList(map(build, range(num_chunks)))


def _scaled_frequencies(
    architecture: GPTArchitecture, device: torch.device
) -> torch.Tensor:
    """Return rotary frequencies of Llama 3.1; GPTModel's option fixes all but the factor."""
    scaling: Any = architecture.rope_scaling
    config = LlamaConfig(
        head_dim=architecture.kv_channels,
        max_position_embeddings=architecture.max_position_embeddings,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": architecture.rotary_base,
            **vars(scaling),
        },
    )
    return ROPE_INIT_FUNCTIONS["llama3"](config, device)[0]


def _torch_block(config: TransformerConfig) -> TransformerBlockSubmodules:
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
    )
    if config.num_moe_experts is not None:
        # Transformer Engine's experts hold no norm either: archives of both are the same.
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = SDPACoreAttention
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    num_chunks = config.virtual_pipeline_model_parallel_size or 1
    num_layers = config.num_layers // config.pipeline_model_parallel_size // num_chunks
    return TransformerBlockSubmodules(
        layer_specs=[layer] * num_layers, layer_norm=RMSNorm
    )


def _transformer_engine_layer(
    config: TransformerConfig, own_norms: bool
) -> ModuleSpec:
    layer = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm
    )
    if own_norms:
        # Importable only where Transformer Engine is.
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelLinear,
            TENorm,
        )

        parts = layer.submodules
        parts.input_layernorm = TENorm
        parts.self_attention.submodules.linear_qkv = TEColumnParallelLinear
        # Archives are the same with and without own norms.
        names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
        if config.num_moe_experts is None:
            parts.pre_mlp_layernorm = TENorm
            # A ModuleSpec up to Megatron 0.17, a functools.partial later.
            mlp = (
                getattr(parts.mlp, "submodules", None)
                or parts.mlp.keywords["submodules"]
            )
            mlp.linear_fc1 = TEColumnParallelLinear
            names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
        parts.sharded_state_dict_keys_map = names
    return layer


def chunks(model: torch.nn.Module) -> Sequence[Any]:
    """Return this rank's parts of a model in layer order: one, or those of an interleaved stage."""
    parts: Any = model if isinstance(model, torch.nn.ModuleList) else [model]
    return parts


def unwrapped(model: torch.nn.Module) -> GPTModel:
    """Return the GPTModel inside DistributedDataParallel."""
    return getattr(model, "module", model)


def layers(model: torch.nn.Module) -> Iterator[Any]:
    """Yield this rank's transformer layers."""
    return (layer for chunk in chunks(model) for layer in chunk.decoder.layers)


def named_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield this rank's weights, without adapters, under their names in a whole model.

    Layers and experts are numbered over all ranks.
    """
    for chunk in chunks(model):
        for name, parameter in chunk.named_parameters():
            parts = name.split(".")
            if ADAPTERS in parts:
                continue
            if name.startswith("decoder.layers."):
                layer = chunk.decoder.layers[int(parts[2])]
                parts[2] = str(layer.layer_number - 1)
                if "local_experts" in parts:
                    place = parts.index("local_experts") + 1
                    parts[place] = str(
                        layer.mlp.local_expert_indices[int(parts[place])]
                    )
            yield ".".join(parts), parameter.detach()


def sharded_weights(model: torch.nn.Module) -> dict[str, Any]:
    """Return the weights for a distributed checkpoint, without adapters.

    The states of Transformer Engine's FP8 are left out: they are pickles.
    """
    return {
        f"{number}.{name}": part
        for number, chunk in enumerate(chunks(model))
        for name, part in chunk.sharded_state_dict().items()
        if ADAPTERS not in name.split(".") and not name.endswith("_extra_state")
    }


def forward(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return the logits [B, S, v] of this rank's vocabulary columns, padding columns included."""
    packed = _packed_seq_params(batch)
    return model(
        batch.tokens_BS, batch.position_ids_BS, None, packed_seq_params=packed
    )


def hidden_states(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return the output layer's input [S, B, H]; S is cut by sequence parallelism."""
    with without_output_layer(model):
        return forward(model, batch)


@contextlib.contextmanager
def without_output_layer(model: torch.nn.Module) -> Iterator[None]:
    """Let a forward pass return hidden states inside the block."""
    gpt = unwrapped(model)
    post_process = gpt.post_process
    gpt.post_process = False
    try:
        yield
    finally:
        gpt.post_process = post_process


def output_weight(model: torch.nn.Module) -> torch.nn.Parameter:
    """Return this rank's rows [v, H] of the output projection, or of the tied embedding.

    In training it waits until the last step's weight is gathered, as modules do when called.
    """
    gpt = unwrapped(model)
    weight = gpt.output_layer.weight
    if gpt.share_embeddings_and_output_weights:
        weight = gpt.shared_embedding_or_output_weight()
    if (
        isinstance(model, DistributedDataParallel)
        and model.use_forward_hook
        and weight.requires_grad
    ):
        model.param_to_bucket_group[weight].finish_param_sync()
    return weight


def project(
    model: torch.nn.Module, hidden_SBH: torch.Tensor, gather_output: bool = False
) -> torch.Tensor:
    """Return the logits [B, S, v] of `hidden_states`; `gather_output` gathers all columns."""
    output_layer = unwrapped(model).output_layer
    logits_SBv, _ = output_layer(
        hidden_SBH,
        weight=output_weight(model),
        runtime_gather_output=gather_output,
    )
    return logits_SBv.transpose(0, 1).contiguous()


def hidden_at(
    hidden_SBH: torch.Tensor,
    positions_N: torch.Tensor,
    batch_size: int,
    model: torch.nn.Module,
) -> torch.Tensor:
    """Return the hidden states [N, H] at positions b * S + s.

    Gradients are summed over the tensor-parallel ranks. With sequence parallelism every
    tensor-parallel rank calls it, and gathers the whole of S for the moment.
    """
    if unwrapped(model).config.sequence_parallel:
        hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH)
    length = len(hidden_SBH)
    hidden_NH = hidden_SBH.flatten(0, 1)[
        positions_N % length * batch_size + positions_N // length
    ]
    if unwrapped(model).config.sequence_parallel:
        return hidden_NH
    return copy_to_tensor_model_parallel_region(hidden_NH)


def _packed_seq_params(batch: Batch) -> PackedSeqParams | None:
    if batch.cu_seqlens is None:
        return None
    bounds = batch.cu_seqlens.to(batch.tokens_BS.device)
    # The exact length: Megatron would give a longer row's rotary frequencies to these positions.
    longest = int(batch.cu_seqlens.diff().max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
