"""From a Hugging Face config.json to an architecture."""

from __future__ import annotations

from typing import Any

from nemo_kd.config import ConfigError
from nemo_kd.config.model import FAMILIES, MOST_LAYERS, GPTArchitecture, RopeScaling

_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "mixtral": {
        "num_key_value_heads": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "rope_theta": 1e6,
    },
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "head_dim": 128,
    },
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
}
"""What transformers assumes for a family where config.json is silent, if it is no value all families share."""

_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
    # Mixtures of experts: all layers alike, every expert chosen by the router.
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "num_shared_experts": (0, None),
    "n_shared_experts": (0, None),
    "shared_expert_intermediate_size": (0, None),
}
"""Keys whose other values would need code that is not here."""


MOST = (1 << 31) - 1


def architecture_from_hf(hf_config: dict[str, Any]) -> GPTArchitecture:
    """The architecture that a config.json of transformers 4 or 5 describes.

    Raises:
        ConfigError: another model type, a missing key, or a feature that is not carried over; never an approximation.
    """
    family = hf_config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ConfigError(
            f"config.json: model_type {_shown(family)} is not supported; supported: {', '.join(FAMILIES)}"
        )
    hf = {**_DEFAULTS[family], **hf_config}
    for key, allowed in _ONLY.items():
        if hf.get(key, allowed[0]) not in allowed:
            raise ConfigError(
                f"config.json: {key} = {_shown(hf[key])} is not supported; supported: {allowed[0]!r}"
            )
    heads = _integer(hf, "num_attention_heads")
    hidden = _integer(hf, "hidden_size")
    rotary_base, rope_scaling = _rope(hf)
    window_size, window_layers = _window(hf)
    is_mixture = family in ("mixtral", "qwen3_moe")
    # transformers 5 writes num_local_experts for both families.
    experts_key = "num_local_experts" if hf.get("num_local_experts") else "num_experts"
    try:
        return GPTArchitecture(
            family=family,
            vocab_size=_integer(hf, "vocab_size"),
            num_layers=_integer(hf, "num_hidden_layers"),
            hidden_size=hidden,
            ffn_hidden_size=_integer(
                hf, "moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"
            ),
            num_attention_heads=heads,
            num_query_groups=_integer(hf, "num_key_value_heads")
            if hf.get("num_key_value_heads")
            else heads,
            kv_channels=_integer(hf, "head_dim") if hf.get("head_dim") else hidden // heads,
            max_position_embeddings=_integer(hf, "max_position_embeddings"),
            layernorm_epsilon=_number(hf, "rms_norm_eps"),
            rotary_base=rotary_base,
            rope_scaling=rope_scaling,
            share_embeddings_and_output_weights=_flag(hf, "tie_word_embeddings"),
            add_qkv_bias=family == "qwen2",
            qk_layernorm=family in ("qwen3", "qwen3_moe"),
            window_size=window_size,
            window_layers=window_layers,
            num_moe_experts=_integer(hf, experts_key) if is_mixture else None,
            moe_router_topk=_integer(hf, "num_experts_per_tok") if is_mixture else None,
            moe_normalize_topk=family != "qwen3_moe" or _flag(hf, "norm_topk_prob"),
            init_method_std=_number({"initializer_range": 0.02, **hf}, "initializer_range"),
            hf_config=hf_config,
        )
    except ConfigError as error:
        text = str(error)
        raise ConfigError(
            text if text.startswith("config.json: ") else f"config.json: {text}"
        ) from error


def _required(values: dict[str, Any], key: str, inside: str = "") -> Any:
    if values.get(key) is None:
        raise ConfigError(f"config.json: {inside}{key} is missing")
    return values[key]


def _integer(values: dict[str, Any], key: str, inside: str = "") -> int:
    value = _required(values, key, inside)
    if type(value) is not int or not 1 <= value <= MOST:
        raise ConfigError(
            f"config.json: {inside}{key}: found {_shown(value)}, expected an integer from 1 to {MOST:,}"
        )
    return value


def _number(values: dict[str, Any], key: str, inside: str = "") -> float:
    value = _required(values, key, inside)
    # An integer may be too large for a float.
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise ConfigError(
            f"config.json: {inside}{key}: found {_shown(value)}, expected a number above 0"
        )
    return float(value)


def _flag(values: dict[str, Any], key: str) -> bool:
    value = values.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"config.json: {key}: found {_shown(value)}, expected true or false")
    return bool(value)


def _mapping(values: dict[str, Any], key: str) -> dict[str, Any]:
    value = values.get(key)
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"config.json: {key}: found {_shown(value)}, expected an object")
    return value or {}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _rope(hf: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """transformers 5 keeps everything in `rope_parameters`, transformers 4 in `rope_theta` and `rope_scaling`."""
    parameters = {**_mapping(hf, "rope_scaling"), **_mapping(hf, "rope_parameters")}
    base = 10000.0
    for values, inside in ((hf, ""), (parameters, "rope_parameters.")):
        if values.get("rope_theta"):
            base = _number(values, "rope_theta", inside)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if parameters.get("partial_rotary_factor") not in _ONLY["partial_rotary_factor"]:
        raise ConfigError(
            "config.json: rope_parameters.partial_rotary_factor other than 1 is not supported"
        )
    if kind == "default":
        return base, None
    if kind != "llama3":
        raise ConfigError(
            f"config.json: rope_scaling of type {_shown(kind)} is not supported; supported: llama3 or none"
        )
    return base, RopeScaling(
        factor=_number(parameters, "factor", "rope_scaling."),
        low_freq_factor=_number(parameters, "low_freq_factor", "rope_scaling."),
        high_freq_factor=_number(parameters, "high_freq_factor", "rope_scaling."),
        original_max_position_embeddings=_integer(
            parameters, "original_max_position_embeddings", "rope_scaling."
        ),
    )


def _window(hf: dict[str, Any]) -> tuple[int | None, list[int]]:
    """The sliding window and its layers; Qwen's configurations carry a `sliding_window` that is mostly switched off."""
    family = hf["model_type"]
    window = _integer(hf, "sliding_window") if hf.get("sliding_window") else None
    num_layers = min(_integer(hf, "num_hidden_layers"), MOST_LAYERS)
    if window is None or (family.startswith("qwen") and not hf.get("use_sliding_window")):
        return None, []
    if family == "llama":
        raise ConfigError(
            f"config.json: sliding_window = {window} is not supported for model_type llama"
        )
    kinds = hf.get("layer_types")
    if kinds is None and family in ("qwen2", "qwen3"):
        first = _integer(hf, "max_window_layers") if hf["max_window_layers"] else 0
        kinds = [
            "sliding_attention" if layer >= first else "full_attention"
            for layer in range(num_layers)
        ]
    if kinds is None:
        return window, []
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise ConfigError(
            f"config.json: layer_types: found {_shown(kinds)}, expected a list of names"
        )
    # The others slide in every layer of transformers' models whatever layer_types says.
    known = {"sliding_attention"} | ({"full_attention"} if family in ("qwen2", "qwen3") else set())
    if len(kinds) != num_layers or not set(kinds) <= known:
        raise ConfigError(
            f"config.json: layer_types = {_shown(kinds)} is not supported for {num_layers} layers of {family}"
        )
    layers = [layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"]
    return (window, layers) if layers else (None, [])
