"""Read an architecture from config.json or model_config.yaml; count its operations."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from nemo_kd.config import ConfigError
from nemo_kd.config.shared import FAMILIES, GPTArchitecture, RopeScaling

_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": FAMILIES,
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "rope_type": ("default", "llama3"),
    "partial_rotary_factor": (1.0, None),
    # Mixtures of experts: all layers alike, every expert chosen by the router.
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "num_shared_experts": (0, None),
    "n_shared_experts": (0, None),
    "shared_expert_intermediate_size": (0, None),
}
"""Supported values of keys of config.json; the first where a key is not there."""

FORMAT_VERSION = 1


def architecture_from_hf(
    hf_config: dict[str, Any], where: str = "config.json"
) -> GPTArchitecture:
    """Return the architecture that a config.json of transformers 4 or 5 describes.

    transformers completes the keys that config.json leaves out.

    Args:
        where: the file, for errors.

    Raises:
        ConfigError: another model type, a wrong value, or an unsupported feature.
    """
    try:
        _check_supported(hf_config)
        # It writes into nested values.
        config = AutoConfig.for_model(**copy.deepcopy(hf_config))
        _check_supported(config.rope_parameters)
        return _architecture(config, hf_config)
    except (StrictDataclassError, KeyError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{where}: {text}") from error


def _check_supported(values: dict[str, Any]) -> None:
    for key, supported in _SUPPORTED.items():
        if values.get(key, supported[0]) not in supported:
            raise ConfigError(
                f"{key} = {values[key]!r:.80} is not supported; "
                f"supported: {', '.join(map(str, supported))}"
            )


def _architecture(config: Any, hf_config: dict[str, Any]) -> GPTArchitecture:
    family = config.model_type
    is_mixture = family in ("mixtral", "qwen3_moe")
    heads = config.num_attention_heads
    rope = config.rope_parameters
    rope_scaling = None
    if rope["rope_type"] == "llama3":
        rope_scaling = RopeScaling(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_position_embeddings=rope["original_max_position_embeddings"],
        )
    window_size, window_layers = _window(config)
    return GPTArchitecture(
        family=family,
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.moe_intermediate_size
        if family == "qwen3_moe"
        else config.intermediate_size,
        num_attention_heads=heads,
        num_query_groups=config.num_key_value_heads or heads,
        kv_channels=getattr(config, "head_dim", None) or config.hidden_size // heads,
        max_position_embeddings=config.max_position_embeddings,
        layernorm_epsilon=float(config.rms_norm_eps),
        rotary_base=float(rope["rope_theta"]),
        rope_scaling=rope_scaling,
        share_embeddings_and_output_weights=config.tie_word_embeddings,
        add_qkv_bias=family == "qwen2",
        qk_layernorm=family in ("qwen3", "qwen3_moe"),
        window_size=window_size,
        window_layers=window_layers,
        num_moe_experts=config.num_experts if is_mixture else None,
        moe_router_topk=config.num_experts_per_tok if is_mixture else None,
        moe_normalize_topk=getattr(config, "norm_topk_prob", True),
        init_method_std=float(config.initializer_range),
        hf_config=hf_config,
    )


def _window(config: Any) -> tuple[int | None, list[int]]:
    """Return the sliding window and its layers, none for all."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or config.model_type == "llama":
        return None, []
    # The other families slide in every layer, whatever layer_types says.
    may_be_full = config.model_type in ("qwen2", "qwen3")
    known = {"sliding_attention", "full_attention" if may_be_full else ""}
    if not set(kinds or []) <= known:
        raise ConfigError(
            f"layer_types = {kinds} is not supported for {config.model_type}"
        )
    layers = [
        layer for layer, kind in enumerate(kinds or []) if kind == "sliding_attention"
    ]
    return (window, layers) if layers or not kinds else (None, [])


def write_model_config(architecture: GPTArchitecture) -> str:
    """Return the text of model_config.yaml."""
    config = {"format_version": FORMAT_VERSION, **dataclasses.asdict(architecture)}
    return yaml.safe_dump(config, sort_keys=False)


def read_model_config(data: bytes, where: str) -> GPTArchitecture:
    """Parse model_config.yaml; nothing is interpolated.

    Args:
        where: the file, for errors.

    Raises:
        ConfigError: it is not valid, another tool wrote it, or a key is wrong.
    """
    try:
        config = yaml.safe_load(data)
        version = config.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"format_version is {version}, so another tool wrote it (nemo_kd writes "
                f"{FORMAT_VERSION}); convert the model to Hugging Face with that tool, then with "
                "convert_checkpoint"
            )
        if config.get("rope_scaling"):
            config["rope_scaling"] = RopeScaling(**config["rope_scaling"])
        return GPTArchitecture(**config)
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error


PEAK_BF16_FLOPS = {
    r"\bH100 PCIe\b": 756e12,
    r"\bH[12]00 NVL\b": 835e12,
    r"\bH[12]00\b": 989e12,
    r"\bA100\b": 312e12,
    r"\bB200\b": 2250e12,
}
"""Dense bf16 FLOP/s by pattern of a device's name, first match; from NVIDIA's data sheets."""


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the FLOP/s of all ranks' GPUs in a dense bf16 product; None if unknown, or for other
    precisions."""
    if device.type != "cuda" or not precision.startswith("bf16"):
        return None
    device_name = torch.cuda.get_device_name(device)
    for pattern, peak in PEAK_BF16_FLOPS.items():
        if re.search(pattern, device_name):
            is_alone = not torch.distributed.is_initialized()
            return peak if is_alone else peak * torch.distributed.get_world_size()
    return None


class ForwardFlops:
    """Floating-point operations of a decoder's forward pass; a multiply-add counts as two.

    Counts matrix products, and attention between a token and those it sees; the output layer at
    positions in the loss only, and of the experts only those that a token is routed to. Padding,
    masked scores and recomputation count nothing, so they lower the utilisation.

    Per token and layer: 2 H (2 heads d + 2 groups d) + 2 * 3 H F; with k of E experts
    2 * 3 H F k + 2 H E. Per pair of a token and one that it sees, itself included, and layer:
    4 heads d (scores, weighted sum). Per loss token: 2 H V.
    """

    def __init__(self, model: GPTArchitecture) -> None:
        hidden_size = model.hidden_size
        heads = model.num_attention_heads
        attention = (
            4 * hidden_size * (heads + model.num_query_groups) * model.kv_channels
        )
        feed_forward = 6 * hidden_size * model.ffn_hidden_size
        if model.num_moe_experts:
            feed_forward *= model.moe_router_topk or 0
            feed_forward += 2 * hidden_size * model.num_moe_experts
        self.window_size = model.window_size or 0
        window_layers = 0
        if self.window_size:
            window_layers = len(model.window_layers) or model.num_layers
        pair = 4 * heads * model.kv_channels
        self.per_token = model.num_layers * (attention + feed_forward)
        self.per_loss_token = 2 * hidden_size * model.vocab_size
        self.per_pair = (model.num_layers - window_layers) * pair
        self.per_window_pair = window_layers * pair

    def example(self, num_tokens: int, num_loss_tokens: int) -> float:
        """Return the FLOPs of one example."""
        within = min(num_tokens, self.window_size)
        pairs = num_tokens * (num_tokens + 1) / 2
        window_pairs = within * (within + 1) / 2 + (num_tokens - within) * within
        return (
            self.per_token * num_tokens
            + self.per_loss_token * num_loss_tokens
            + self.per_pair * pairs
            + self.per_window_pair * window_pairs
        )
