"""Weights between Hugging Face's layout and Megatron's.

Megatron fuses q, k and v per query group ([q..., k, v] of group 0, then of group 1 ...) and the two halves of the gated
feed-forward ([gate; up], on every tensor-parallel rank its own halves), and pads the vocabulary with zero rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from safetensors import SafetensorError, safe_open

from nemo_kd.config import ConfigError
from nemo_kd.config.model import GPTArchitecture
from nemo_kd.mcore.groups import ProcessGroups

Get = Callable[[str], torch.Tensor]

_NORMS = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
"""Layer weights that are the same tensor in both layouts; Transformer Engine's layers hold two norms in the linear after them."""

_OUTER = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}


class SafetensorsFolder:
    """The tensors of a Hugging Face folder by name, read from memory-mapped safetensors.

    Raises:
        ConfigError: the folder has no safetensors, or one of them is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.exists():
            self.files: dict[str, Path] = {
                name: folder / Path(file).name for name, file in json.loads(index.read_text())["weight_map"].items()
            }
        elif (folder / "model.safetensors").exists():
            path = folder / "model.safetensors"
            self.files = {name: path for name in _open(path).keys()}  # noqa: SIM118 (no mapping)
        else:
            pickled = sorted(path.name for path in folder.glob("*.bin"))
            found = f"only {pickled[0]}, a pickle, which can run code when it is loaded" if pickled else "no weights"
            raise ConfigError(
                f"{folder}: {found}; save the model with save_pretrained(folder, safe_serialization=True)"
            )
        missing = sorted({path for path in self.files.values() if not path.exists()})
        if missing:
            raise ConfigError(f"{missing[0]}: the file is missing, though model.safetensors.index.json lists it")
        self.used: set[str] = set()
        self._handles: dict[Path, safe_open] = {}

    def __call__(self, name: str) -> torch.Tensor:
        if name not in self.files:
            raise ConfigError(f"{self.folder}: the weights lack {name}, which config.json calls for")
        self.used.add(name)
        path = self.files[name]
        if path not in self._handles:
            self._handles[path] = _open(path)
        return self._handles[path].get_tensor(name)

    @property
    def dtype(self) -> torch.dtype:
        """Of the embedding."""
        return self("model.embed_tokens.weight").dtype


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ConfigError(f"{path}: not a readable safetensors file ({error}); copy or download it again") from error


def load_hf_weights(model: GPTModel, folder: Path, architecture: GPTArchitecture, groups: ProcessGroups) -> None:
    """Fills this rank's weights from a Hugging Face folder; every tensor of the folder has to have its place.

    Raises:
        ConfigError: a tensor is missing, left over or of another shape.
    """
    get = SafetensorsFolder(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            full = megatron_tensor(name, get, architecture)
            part = shard(name, full, parameter, groups)
            if part.shape != parameter.shape:
                raise ConfigError(
                    f"{folder}: {name} has the shape {tuple(part.shape)}, config.json calls for {tuple(parameter.shape)}"
                )
            parameter.copy_(part)
    ignored = {"lm_head.weight"} if architecture.share_embeddings_and_output_weights else set()
    left_over = sorted(name for name in set(get.files) - get.used - ignored if not name.endswith("rotary_emb.inv_freq"))
    if left_over:
        raise ConfigError(
            f"{folder}: weights that a {architecture.family} model has no place for: {', '.join(left_over[:5])}"
        )


def megatron_tensor(name: str, get: Get, architecture: GPTArchitecture) -> torch.Tensor:
    """The whole Megatron weight `name` (over all ranks, without vocabulary padding) from Hugging Face tensors."""
    if name in _OUTER:
        tied = name == "output_layer.weight" and architecture.share_embeddings_and_output_weights
        return get(_OUTER["embedding.word_embeddings.weight"] if tied else _OUTER[name])
    _, _, layer, inner = name.split(".", 3)
    prefix = f"model.layers.{layer}."
    if inner in _NORMS:
        return get(prefix + _NORMS[inner])
    if inner == "mlp.linear_fc1.weight":
        return torch.cat([get(prefix + "mlp.gate_proj.weight"), get(prefix + "mlp.up_proj.weight")])
    kind = inner.removeprefix("self_attention.linear_qkv.")
    assert kind in ("weight", "bias"), name
    groups, width = architecture.num_query_groups, architecture.kv_channels
    parts = [get(f"{prefix}self_attn.{part}_proj.{kind}") for part in "qkv"]
    tail = parts[0].shape[1:]
    per_group = [part.reshape(groups, -1, *tail) for part in parts]
    assert per_group[1].shape[1] == width, name
    return torch.cat(per_group, dim=1).reshape(-1, *tail)


def hf_tensors(get: Get, architecture: GPTArchitecture) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the Hugging Face model, from whole Megatron weights (vocabulary padding is cut off)."""
    vocabulary = slice(0, architecture.vocab_size)
    yield "model.embed_tokens.weight", get("embedding.word_embeddings.weight")[vocabulary]
    for layer in range(architecture.num_layers):
        prefix, ours = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        for kind in ("weight", "bias") if architecture.add_qkv_bias else ("weight",):
            fused = get(f"{ours}self_attention.linear_qkv.{kind}")
            width, tail = architecture.kv_channels, fused.shape[1:]
            per_group = fused.reshape(architecture.num_query_groups, -1, *tail)
            query, key, value = per_group.split([per_group.shape[1] - 2 * width, width, width], dim=1)
            for part, tensor in zip("qkv", (query, key, value), strict=True):
                yield f"{prefix}self_attn.{part}_proj.{kind}", tensor.reshape(-1, *tail)
        gate, up = get(f"{ours}mlp.linear_fc1.weight").chunk(2)
        yield f"{prefix}mlp.gate_proj.weight", gate
        yield f"{prefix}mlp.up_proj.weight", up
        for inner, theirs in _NORMS.items():
            if "layer_norm_weight" in inner or ("q_norm" in theirs or "k_norm" in theirs) > architecture.qk_layernorm:
                continue
            yield prefix + theirs, get(ours + inner)
    yield "model.norm.weight", get("decoder.final_layernorm.weight")
    if not architecture.share_embeddings_and_output_weights:
        yield "lm_head.weight", get("output_layer.weight")[vocabulary]


def shard(name: str, full: torch.Tensor, parameter: torch.Tensor, groups: ProcessGroups) -> torch.Tensor:
    """This rank's part of a whole Megatron weight, vocabulary padding added."""
    size, rank = groups.tensor_size, groups.tensor_rank
    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        full = torch.nn.functional.pad(full, (0, 0, 0, parameter.shape[0] * size - full.shape[0]))
    if size == 1 or full.shape == parameter.shape:
        return full
    if name.endswith("mlp.linear_fc1.weight"):
        gate, up = full.chunk(2)
        return torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])
    return full.chunk(size, dim=parameter.partition_dim)[rank]  # type: ignore[attr-defined]


def zero_vocabulary_padding(model: GPTModel, architecture: GPTArchitecture, groups: ProcessGroups) -> None:
    """Clears the rows of embedding and output layer that stand for no token."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                num_real = architecture.vocab_size - groups.tensor_rank * parameter.shape[0]
                parameter[max(0, num_real) :].zero_()
