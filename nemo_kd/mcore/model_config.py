"""model_config.yaml of a .nemo archive: an architecture, read from a file that may come from anywhere."""

from __future__ import annotations

import dataclasses
from typing import Any

import yaml
from omegaconf import DictConfig

from nemo_kd.config import ConfigError
from nemo_kd.config.model import GPTArchitecture, RopeScaling
from nemo_kd.config.typed import typed

FORMAT_VERSION = 1
SIZES = (
    *(
        "vocab_size",
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
    ),
    *("kv_channels", "max_position_embeddings", "num_moe_experts", "window_size"),
)
MAX_DEPTH = 32
MAX_SCALAR_LENGTH = 10_000
MAX_LIST_LENGTH = 10_000


def write_model_config(architecture: GPTArchitecture) -> str:
    """Return the text of model_config.yaml."""
    config = {"format_version": FORMAT_VERSION, **dataclasses.asdict(architecture)}
    return yaml.safe_dump(config, sort_keys=False)


def read_model_config(data: bytes, where: str) -> GPTArchitecture:
    """Parse model_config.yaml; its time and memory are proportional to its length.

    Nothing in it is interpolated: neither environment variables nor other keys.

    Args:
        where: the file, for errors.

    Raises:
        ConfigError: it is not valid, another tool wrote it, or a key is unknown, missing or of the wrong type.
    """
    try:
        config = yaml.load(data.decode("utf-8"), _PlainLoader)
    # A date or a number that Python cannot hold is a ValueError or an OverflowError.
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"{where}: not valid YAML ({' '.join(str(error).split())[:300]})"
        ) from error
    version = config.pop("format_version", None) if isinstance(config, dict) else None
    if not isinstance(version, int) or version != FORMAT_VERSION:
        raise ConfigError(
            f"{where}: format_version is {_shown(version)}, so another tool wrote it (nemo_kd writes {FORMAT_VERSION}); "
            "convert the model to Hugging Face with that tool, then with convert_checkpoint"
        )
    hf_config = config.pop(
        "hf_config", {}
    )  # config.json of another model: it is kept and may hold anything
    if not isinstance(hf_config, dict):
        raise ConfigError(
            f"{where}: hf_config is {_shown(hf_config)}, not a mapping; write the archive again"
        )
    known = [field.name for field in dataclasses.fields(GPTArchitecture)]
    _check_mapping(config, known, where)
    for key in SIZES:
        if isinstance(config.get(key), int) and config[key] < 1:
            raise ConfigError(
                f"{where}: {key} is {config[key]} and must be at least 1; write the archive again"
            )
    try:
        architecture = typed(GPTArchitecture, DictConfig(config))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return dataclasses.replace(architecture, hf_config=hf_config)


def check_size(architecture: GPTArchitecture, num_stored: int, where: str) -> None:
    """Refuse an architecture of more weights than are stored, before memory for them is asked for.

    Args:
        num_stored: weights that the stored bytes can hold.
    """
    heads = architecture.num_attention_heads + architecture.num_query_groups
    attention = 2 * architecture.hidden_size * architecture.kv_channels * heads
    experts = architecture.num_moe_experts or 1
    feed_forward = 3 * architecture.hidden_size * architecture.ffn_hidden_size * experts
    vocabulary = architecture.hidden_size * architecture.vocab_size
    num_weights = architecture.num_layers * (attention + feed_forward) + vocabulary
    if num_weights > num_stored:
        raise ConfigError(
            f"{where}: calls for at least {num_weights:,} weights, but {num_stored:,} are stored at most; copy or write "
            "the model again"
        )


def _check_mapping(config: dict[Any, Any], known: list[str], where: str) -> None:
    """Refuse what OmegaConf would interpolate, convert or take long for; types of known keys are left to it.

    It would resolve `${oc.env:NAME}`, and with it give this machine's variables to the archive's author.
    """
    for key, value in config.items():
        if key not in known:
            raise ConfigError(f"{where}: the key {_shown(key)} is unknown; write the archive again")
        if isinstance(value, dict):
            _check_mapping(value, [field.name for field in dataclasses.fields(RopeScaling)], where)
            continue
        parts = value if isinstance(value, list) else [value]
        if len(parts) > MAX_LIST_LENGTH:
            raise ConfigError(
                f"{where}: {key} has {len(parts):,} entries, more than any model has layers"
            )
        for part in parts:
            is_plain = isinstance(part, str | int | float | None) and not (
                isinstance(part, str) and "${" in part
            )
            if not is_plain:
                raise ConfigError(
                    f"{where}: {key}: {_shown(part)} is not a plain value; write the archive again"
                )


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # a number of more than 4,300 digits
        return "a number that is too long"
    return text if len(text) <= 80 else f"{text[:80]}..."


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader without what lets a small file stand for a large value: aliases, deep nesting, endless numbers."""

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
