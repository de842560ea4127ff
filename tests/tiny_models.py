"""Small models of every supported family with random weights, as transformers builds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.tiny_tokenizer import train_tokenizer

_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }


MODELS: dict[str, dict[str, Any]] = {
    "llama2": {
        "model_type": "llama",
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
    },
    "llama_mha": {"model_type": "llama"},
    "llama3.1": {
        "model_type": "llama",
        "head_dim": 64,
        "rope_parameters": _llama3_rope(8.0),
    },
    "llama3.2_tied": {
        "model_type": "llama",
        "rope_parameters": _llama3_rope(32.0),
        "tie_word_embeddings": True,
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral_window": {"model_type": "mistral", "sliding_window": 7},
    "qwen2_tied": {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "mixtral": {
        "model_type": "mixtral",
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 24,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "qwen3_moe_raw_topk": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "norm_topk_prob": False,
    },
    "qwen3": {
        "model_type": "qwen3",
        "head_dim": 24,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
}


def build_hf_model(
    name: str, vocab_size: int = 157, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """A float32 model whose weights, norms and biases included, are all random, so that each of them shows in the logits."""
    config = AutoConfig.for_model(
        **{**_SHAPE, **MODELS[name], "vocab_size": vocab_size, **overrides}
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(
                1 + 0.2 * noise if "norm" in parameter_name else 0.08 * noise
            )
    return model


def save_hf_model(
    name: str,
    folder: Path,
    vocab_size: int = 512,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Path:
    """The model and a tokenizer with as many ids as a Hugging Face folder."""
    build_hf_model(name, vocab_size, **overrides).to(dtype).save_pretrained(folder)
    train_tokenizer(vocab_size).save_pretrained(folder)
    return folder
