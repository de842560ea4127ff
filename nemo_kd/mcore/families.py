"""From a Hugging Face config.json to an architecture."""

from __future__ import annotations

from typing import Any

from nemo_kd.config import ConfigError
from nemo_kd.config.model import FAMILIES, GPTArchitecture, RopeScaling


def architecture_from_hf(hf_config: dict[str, Any]) -> GPTArchitecture:
    """The architecture that a config.json of transformers 4 or 5 describes.

    Raises:
        ConfigError: another model type, or a feature that is not carried over; never an approximation.
    """
    family = hf_config.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(f"config.json: model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
    for key, allowed in (
        ("hidden_act", "silu"),
        ("quantization_config", None),
        ("attention_bias", False),
        ("mlp_bias", False),
    ):
        value = hf_config.get(key, allowed)
        if value != allowed and not (allowed is False and value is None):
            raise ConfigError(f"config.json: {key} = {value!r} is not supported; supported: {allowed!r}")
    heads, hidden = hf_config["num_attention_heads"], hf_config["hidden_size"]
    base, scaling = _rope(hf_config, hidden_default=10000.0)
    window, window_layers = _window(hf_config)
    return GPTArchitecture(
        family=family,
        vocab_size=hf_config["vocab_size"],
        num_layers=hf_config["num_hidden_layers"],
        hidden_size=hidden,
        ffn_hidden_size=hf_config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=hf_config.get("num_key_value_heads") or heads,
        kv_channels=hf_config.get("head_dim") or hidden // heads,
        max_position_embeddings=hf_config["max_position_embeddings"],
        layernorm_epsilon=hf_config["rms_norm_eps"],
        rotary_base=base,
        rope_scaling=scaling,
        share_embeddings_and_output_weights=bool(hf_config.get("tie_word_embeddings", False)),
        add_qkv_bias=family == "qwen2",
        qk_layernorm=family == "qwen3",
        window_size=window,
        window_layers=window_layers,
        init_method_std=hf_config.get("initializer_range", 0.02),
        hf_config=hf_config,
    )


def _rope(hf_config: dict[str, Any], hidden_default: float) -> tuple[float, RopeScaling | None]:
    """transformers 5 keeps everything in `rope_parameters`, transformers 4 in `rope_theta` and `rope_scaling`."""
    parameters = {**(hf_config.get("rope_scaling") or {}), **(hf_config.get("rope_parameters") or {})}
    base = float(parameters.get("rope_theta") or hf_config.get("rope_theta") or hidden_default)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if float(parameters.get("partial_rotary_factor") or hf_config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ConfigError("config.json: partial_rotary_factor other than 1 is not supported")
    if kind == "default":
        return base, None
    if kind != "llama3":
        raise ConfigError(f"config.json: rope_scaling of type {kind!r} is not supported; supported: llama3, none")
    return base, RopeScaling(
        factor=float(parameters["factor"]),
        low_freq_factor=float(parameters["low_freq_factor"]),
        high_freq_factor=float(parameters["high_freq_factor"]),
        original_max_position_embeddings=int(parameters["original_max_position_embeddings"]),
    )


def _window(hf_config: dict[str, Any]) -> tuple[int | None, list[int]]:
    window, num_layers = hf_config.get("sliding_window"), hf_config["num_hidden_layers"]
    if not window or (hf_config["model_type"].startswith("qwen") and not hf_config.get("use_sliding_window")):
        return None, []
    if hf_config["model_type"] == "llama":
        raise ConfigError("config.json: sliding_window is not supported for model_type llama")
    layer_types = hf_config.get("layer_types")
    if layer_types is None and hf_config["model_type"].startswith("qwen"):
        first = hf_config.get("max_window_layers", num_layers)
        layer_types = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    if layer_types is None:
        return window, []
    layers = [layer for layer, kind in enumerate(layer_types) if kind == "sliding_attention"]
    return (window, layers) if layers else (None, [])
