"""config.json -> architecture, against what transformers reads from the same file and against published files."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from nemo_kd.config import ConfigError
from nemo_kd.config.shared import RopeScaling
from nemo_kd.mcore.architecture import architecture_from_hf

SHAPE = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}
LLAMA_31 = {
    **SHAPE,
    "model_type": "llama",
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "torch_dtype": "bfloat16",
}


QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "rope_scaling": None,
}


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama"},
        {
            "model_type": "llama",
            "num_key_value_heads": 4,
            "head_dim": 20,
            "tie_word_embeddings": True,
        },
        {"model_type": "mistral"},
        {"model_type": "mistral", "sliding_window": None, "head_dim": None},
        {"model_type": "qwen2"},
        {
            "model_type": "qwen2",
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 3,
        },
        {"model_type": "qwen3", "num_key_value_heads": 4},
        {
            "model_type": "qwen3",
            "use_sliding_window": True,
            "max_window_layers": 1,
            "rope_theta": 1000000.0,
        },
        {"model_type": "mixtral"},
        {
            "model_type": "mixtral",
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "sliding_window": 9,
        },
        {"model_type": "qwen3_moe"},
        {
            "model_type": "qwen3_moe",
            "num_experts": 6,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 24,
        },
        {
            "model_type": "qwen3_moe",
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 9,
        },
        LLAMA_31,
    ],
    ids=str,
)
def test_fields_are_those_that_transformers_reads(config):
    architecture = architecture_from_hf({**SHAPE, **config})
    theirs = AutoConfig.for_model(**{**SHAPE, **config})
    head_dim = (
        getattr(theirs, "head_dim", None)
        or theirs.hidden_size // theirs.num_attention_heads
    )
    layer_types = (
        getattr(theirs, "layer_types", None)
        or ["sliding_attention"] * theirs.num_hidden_layers
    )
    window = getattr(theirs, "sliding_window", None)
    sliding = [
        i
        for i, kind in enumerate(layer_types)
        if window and kind == "sliding_attention"
    ]
    window_layers = architecture.window_layers or list(range(4))
    assert architecture.num_query_groups == theirs.num_key_value_heads
    assert architecture.kv_channels == head_dim
    assert architecture.rotary_base == theirs.rope_parameters["rope_theta"]
    assert (architecture.rope_scaling is not None) == (
        theirs.rope_parameters["rope_type"] == "llama3"
    )
    assert (
        architecture.share_embeddings_and_output_weights == theirs.tie_word_embeddings
    )
    assert (
        architecture.window_size,
        window_layers if architecture.window_size else [],
    ) == (
        window if sliding else None,
        sliding,
    )

    if config["model_type"] in ("mixtral", "qwen3_moe"):
        assert (
            architecture.num_moe_experts
            == theirs.num_experts
            == theirs.num_local_experts
        )
        assert architecture.moe_router_topk == theirs.num_experts_per_tok
        assert architecture.ffn_hidden_size == getattr(
            theirs, "moe_intermediate_size", theirs.intermediate_size
        )
        assert architecture.moe_normalize_topk == getattr(
            theirs, "norm_topk_prob", True
        )
        # transformers 5 writes the number of experts under another name than transformers 4.
        assert (
            architecture_from_hf(theirs.to_dict()).num_moe_experts
            == theirs.num_experts
        )
    else:
        assert architecture.num_moe_experts is None


def test_transformers_4_and_5_write_the_same_rope_differently():
    version_5 = {
        key: value for key, value in LLAMA_31.items() if not key.startswith("rope")
    }
    version_5["rope_parameters"] = {**LLAMA_31["rope_scaling"], "rope_theta": 500000.0}
    older = {
        **LLAMA_31,
        "rope_scaling": {**LLAMA_31["rope_scaling"], "type": "llama3"},
    }
    del older["rope_scaling"]["rope_type"]
    for config in (LLAMA_31, version_5, older):
        architecture = architecture_from_hf(config)
        assert architecture.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
        assert architecture.rotary_base == 500000.0
        assert architecture.hf_config == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "gpt2"},
            r"model_type = 'gpt2' is not supported; supported: llama, mistral, mixtral, qwen2, qwen3, qwen3_moe",
        ),
        ({"model_type": None}, "model_type = None is not supported"),
        (
            {"hidden_act": "gelu"},
            "hidden_act = 'gelu' is not supported; supported: silu",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"mlp_bias": True}, "mlp_bias = True is not supported"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type = 'linear' is not supported",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_type = 'yarn' is not supported",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "Missing required keys .*low_freq_factor",
        ),
        (
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor = 0.5 is not supported",
        ),
        ({"rms_norm_eps": None}, "'rms_norm_eps' expected float, got NoneType"),
        (
            QWEN3_MOE | {"decoder_sparse_step": 2},
            "decoder_sparse_step = 2 is not supported; supported: 1",
        ),
        (
            QWEN3_MOE | {"mlp_only_layers": [0]},
            r"mlp_only_layers = \[0\] is not supported; supported: \[\]",
        ),
        (
            QWEN3_MOE | {"shared_expert_intermediate_size": 64},
            "shared_expert_intermediate_size = 64 is not supported",
        ),
        (
            QWEN3_MOE | {"num_experts_per_tok": 5},
            "moe_router_topk: 5 experts per token are not supported .* 4 and",
        ),
        (
            QWEN3_MOE | {"num_experts_per_tok": 1, "norm_topk_prob": True},
            "moe_router_topk: 1 experts per token .* moe_normalize_topk is True; supported: from 2 to all",
        ),
        (
            {"num_key_value_heads": 5},
            "num_attention_heads: 32 is not a multiple of num_query_groups 5",
        ),
        (
            {
                "model_type": "qwen3",
                "use_sliding_window": True,
                "layer_types": ["chunked_attention"] * 4,
            },
            "layer_types = .* is not supported for qwen3",
        ),
    ],
)
def test_what_is_not_carried_over_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        architecture_from_hf({**LLAMA_31, **change})
