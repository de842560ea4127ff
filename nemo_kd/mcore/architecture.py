"""Read an architecture from config.json or model_config.yaml, files that may come from anywhere."""

from __future__ import annotations

import dataclasses
from typing import Any

import yaml
from omegaconf import DictConfig

from nemo_kd.config import ConfigError
from nemo_kd.config.model import FAMILIES, MOST_LAYERS, GPTArchitecture, RopeScaling
from nemo_kd.config.typed import typed

_QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "mixtral": {
        "num_key_value_heads": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "rope_theta": 1e6,
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
}
"""Defaults of transformers that differ between families, for keys that config.json leaves out."""

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
"""Supported values of keys whose other values would need more code. The first is the default."""

_MAX_INTEGER = (1 << 31) - 1
FORMAT_VERSION = 1
MAX_DEPTH = 32
MAX_SCALAR_LENGTH = 10_000
MAX_LIST_LENGTH = 10_000


def architecture_from_hf(hf_config: dict[str, Any]) -> GPTArchitecture:
    """Return the architecture that a config.json of transformers 4 or 5 describes.

    Raises:
        ConfigError: another model type, a missing key, or an unsupported feature.
    """
    family = hf_config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ConfigError(
            f"config.json: model_type {_shown(family)} is not supported; "
            f"supported: {', '.join(FAMILIES)}"
        )
    hf = {**_DEFAULTS[family], "initializer_range": 0.02, **hf_config}
    for key, allowed in _ONLY.items():
        if hf.get(key, allowed[0]) not in allowed:
            raise ConfigError(
                f"config.json: {key} = {_shown(hf[key])} is not supported; "
                f"supported: {allowed[0]!r}"
            )
    is_mixture = family in ("mixtral", "qwen3_moe")
    # transformers 5 writes num_local_experts for both families.
    experts_key = "num_local_experts" if hf.get("num_local_experts") else "num_experts"
    ffn_key = "moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"
    heads = _integer(hf, "num_attention_heads")
    hidden = _integer(hf, "hidden_size")
    rotary_base, rope_scaling = _rope(hf)
    window_size, window_layers = _window(hf)
    try:
        return GPTArchitecture(
            family=family,
            vocab_size=_integer(hf, "vocab_size"),
            num_layers=_integer(hf, "num_hidden_layers"),
            hidden_size=hidden,
            ffn_hidden_size=_integer(hf, ffn_key),
            num_attention_heads=heads,
            num_query_groups=_integer_or_none(hf, "num_key_value_heads") or heads,
            kv_channels=_integer_or_none(hf, "head_dim") or hidden // heads,
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
            init_method_std=_number(hf, "initializer_range"),
            hf_config=hf_config,
        )
    except ConfigError as error:
        text = str(error).removeprefix("config.json: ")
        raise ConfigError(f"config.json: {text}") from error


def _required(values: dict[str, Any], key: str, inside: str) -> Any:
    if values.get(key) is None:
        raise ConfigError(f"config.json: {inside}{key} is missing")
    return values[key]


def _integer(values: dict[str, Any], key: str, inside: str = "") -> int:
    value = _required(values, key, inside)
    if type(value) is not int or not 1 <= value <= _MAX_INTEGER:
        raise ConfigError(
            f"config.json: {inside}{key}: found {_shown(value)}, "
            f"expected an integer from 1 to {_MAX_INTEGER:,}"
        )
    return value


def _integer_or_none(values: dict[str, Any], key: str) -> int | None:
    return _integer(values, key) if values.get(key) else None


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
        raise ConfigError(
            f"config.json: {key}: found {_shown(value)}, expected true or false"
        )
    return bool(value)


def _mapping(values: dict[str, Any], key: str) -> dict[str, Any]:
    value = values.get(key)
    if value is not None and not isinstance(value, dict):
        raise ConfigError(
            f"config.json: {key}: found {_shown(value)}, expected an object"
        )
    return value or {}


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # a number of more than 4,300 digits
        return "a number that is too long"
    return text if len(text) <= 80 else f"{text[:80]}..."


def _rope(hf: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Return base and scaling.

    transformers 5 writes `rope_parameters`, transformers 4 `rope_theta` and `rope_scaling`.
    """
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
            f"config.json: rope_scaling of type {_shown(kind)} is not supported; "
            "supported: llama3 or none"
        )
    original = "original_max_position_embeddings"
    return base, RopeScaling(
        **{
            key: _number(parameters, key, "rope_scaling.")
            for key in ("factor", "low_freq_factor", "high_freq_factor")
        },
        original_max_position_embeddings=_integer(parameters, original, "rope_scaling."),
    )


def _window(hf: dict[str, Any]) -> tuple[int | None, list[int]]:
    """Return the sliding window and its layers, none for all.

    Qwen's configurations mostly switch the window off.
    """
    family = hf["model_type"]
    window = _integer_or_none(hf, "sliding_window")
    num_layers = min(_integer(hf, "num_hidden_layers"), MOST_LAYERS)
    if window is None or (family.startswith("qwen") and not hf.get("use_sliding_window")):
        return None, []
    if family == "llama":
        raise ConfigError(
            f"config.json: sliding_window = {window} is not supported for model_type llama"
        )
    has_full_layers = family in ("qwen2", "qwen3")
    kinds = hf.get("layer_types")
    if kinds is None and not has_full_layers:
        return window, []
    if kinds is None:
        layers = list(range(_integer_or_none(hf, "max_window_layers") or 0, num_layers))
    else:
        if not isinstance(kinds, list) or not all(
            isinstance(kind, str) for kind in kinds
        ):
            raise ConfigError(
                f"config.json: layer_types: found {_shown(kinds)}, expected a list of names"
            )
        # The others slide in every layer of transformers' models, whatever layer_types says.
        known = (
            {"sliding_attention", "full_attention"}
            if has_full_layers
            else {"sliding_attention"}
        )
        if len(kinds) != num_layers or not set(kinds) <= known:
            raise ConfigError(
                f"config.json: layer_types = {_shown(kinds)} is not supported "
                f"for {num_layers} layers of {family}"
            )
        layers = [
            layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"
        ]
    return (window, layers) if layers else (None, [])


def write_model_config(architecture: GPTArchitecture) -> str:
    """Return the text of model_config.yaml."""
    config = {"format_version": FORMAT_VERSION, **dataclasses.asdict(architecture)}
    return yaml.safe_dump(config, sort_keys=False)


def read_model_config(data: bytes, where: str) -> GPTArchitecture:
    """Parse model_config.yaml in time and memory proportional to its length.

    Nothing is interpolated, neither environment variables nor other keys.

    Args:
        where: the file, for errors.

    Raises:
        ConfigError: it is not valid, another tool wrote it, or a key is wrong.
    """
    try:
        config = yaml.load(data.decode("utf-8"), _PlainLoader)
    # A date or a number that Python cannot hold is a ValueError or an OverflowError.
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{where}: not valid YAML ({reason})") from error
    version = config.pop("format_version", None) if isinstance(config, dict) else None
    if type(version) is not int or version != FORMAT_VERSION:
        raise ConfigError(
            f"{where}: format_version is {_shown(version)}, so another tool wrote it "
            f"(nemo_kd writes {FORMAT_VERSION}); "
            "convert the model to Hugging Face with that tool, then with convert_checkpoint"
        )
    hf_config = config.pop("hf_config", {})  # kept as it is; it may hold anything
    if not isinstance(hf_config, dict):
        raise ConfigError(
            f"{where}: hf_config is {_shown(hf_config)}, not a mapping; write the archive again"
        )
    _check_mapping(config, GPTArchitecture, where)
    try:
        architecture = typed(GPTArchitecture, DictConfig(config))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return dataclasses.replace(architecture, hf_config=hf_config)


def check_size(architecture: GPTArchitecture, num_stored: int, where: str) -> None:
    """Refuse an architecture of more weights than are stored, before allocating them.

    Args:
        num_stored: upper bound of the number of stored weights.
    """
    heads = architecture.num_attention_heads + architecture.num_query_groups
    attention = 2 * architecture.hidden_size * architecture.kv_channels * heads
    experts = architecture.num_moe_experts or 1
    feed_forward = 3 * architecture.hidden_size * architecture.ffn_hidden_size * experts
    vocabulary = architecture.hidden_size * architecture.vocab_size
    num_weights = architecture.num_layers * (attention + feed_forward) + vocabulary
    if num_weights > num_stored:
        raise ConfigError(
            f"{where}: calls for at least {num_weights:,} weights, but {num_stored:,} are stored "
            "at most; copy or write the model again"
        )


def _check_mapping(config: dict[Any, Any], schema: type, where: str) -> None:
    """Refuse values that OmegaConf would interpolate, convert or take long for.

    OmegaConf checks the types. Resolving `${oc.env:NAME}` would give this machine's variables to
    the archive's author.
    """
    known = {field.name for field in dataclasses.fields(schema)}
    for key, value in config.items():
        if key not in known:
            raise ConfigError(
                f"{where}: the key {_shown(key)} is unknown; write the archive again"
            )
        if isinstance(value, dict):
            _check_mapping(value, RopeScaling, where)
            continue
        parts = value if isinstance(value, list) else [value]
        if len(parts) > MAX_LIST_LENGTH:
            raise ConfigError(
                f"{where}: {key} has {len(parts):,} entries, more than any model has layers"
            )
        for part in parts:
            is_interpolated = isinstance(part, str) and "${" in part
            if is_interpolated or not isinstance(part, str | int | float | None):
                raise ConfigError(
                    f"{where}: {key}: {_shown(part)} is not a plain value; write the archive again"
                )


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader that refuses small files for large values: aliases, deep nesting, long scalars."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(
                f"an alias (*{self.peek_event().anchor}), which nemo_kd does not write"
            )
        if self.depth == MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} deep")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, yaml.ScalarNode) and len(node.value) > MAX_SCALAR_LENGTH:
            raise yaml.YAMLError(f"a value of {len(node.value):,} characters")
        return node
