"""Weights between Hugging Face's layout and Megatron's.

Megatron fuses q, k and v per query group ([q..., k, v] of group 0, then of group 1 ...) and the two halves of the gated
feed-forward ([gate; up], on every tensor-parallel rank its own halves), and pads the vocabulary with zero rows.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from safetensors import SafetensorError, safe_open

from nemo_kd.config import ConfigError
from nemo_kd.config.model import GPTArchitecture
from nemo_kd.mcore.groups import ProcessGroups

Get = Callable[[str], torch.Tensor]

_SAME = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
"""A layer's weights that are one tensor in both layouts; Transformer Engine's layers hold two norms in the linear after them."""

_VOCABULARY = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
}

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class SafetensorsFolder:
    """The tensors of a Hugging Face folder by name: views of memory-mapped files, read when they are used.

    Raises:
        ConfigError: the folder has no safetensors, or one of them is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.exists():
            # Only names of files in this folder: an index cannot lead elsewhere.
            self.files = {name: folder / Path(file).name for name, file in _weight_map(index).items()}
        elif single.exists():
            self.files = dict.fromkeys(_open(single).keys(), single)
        else:
            pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
            found = f"only {pickled[0]}, a pickle, which can run code when it is loaded" if pickled else "no weights"
            raise ConfigError(
                f"{folder}: {found}, and no model.safetensors; load the model with transformers and save it with "
                "save_pretrained, which writes safetensors"
            )
        missing = sorted({path for path in self.files.values() if not path.exists()})
        if missing:
            raise ConfigError(f"{missing[0]}: the file is missing, though {index.name} lists it")
        self._handle = functools.lru_cache(maxsize=None)(_open)

    def __call__(self, name: str) -> torch.Tensor:
        return self._handle(self.files[name]).get_tensor(name)

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest that holds all the tensors without loss."""
        names = {name: self._slice(name).get_dtype() for name in self.files}
        for name, dtype in names.items():
            if dtype not in _DTYPES:
                raise ConfigError(f"{self.files[name]}: {name} has the dtype {dtype}; supported: {', '.join(_DTYPES)}")
        return functools.reduce(torch.promote_types, {_DTYPES[dtype] for dtype in names.values()})

    def check(self, architecture: GPTArchitecture) -> None:
        """Refuses a folder whose tensors are not exactly those of the architecture; reads the files' headers only.

        Raises:
            ConfigError: lists what is missing, left over or of another shape.
        """
        expected = hf_shapes(architecture)
        optional = {"lm_head.weight"} if architecture.share_embeddings_and_output_weights else set()
        left_over = {name for name in set(self.files) - set(expected) - optional if "rotary_emb" not in name}
        problems = [f"missing: {_some(set(expected) - set(self.files))}"] if set(expected) - set(self.files) else []
        problems += [f"no place for: {_some(left_over)}"] if left_over else []
        for name in expected.keys() & self.files.keys():
            if (found := self._shape(name)) != expected[name]:
                problems.append(f"{name} has the shape {found}, config.json calls for {expected[name]}")
        if problems:
            raise ConfigError(
                f"{self.folder}: the weights do not fit config.json ({architecture.family}): {'; '.join(problems[:5])}"
            )

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def _slice(self, name: str) -> Any:
        try:
            return self._handle(self.files[name]).get_slice(name)
        except SafetensorError as error:
            raise ConfigError(f"{self.files[name]}: {name} is missing, though the index lists it there") from error


def load_hf_weights(model: GPTModel, folder: Path, architecture: GPTArchitecture, groups: ProcessGroups) -> None:
    """Fills this rank's weights from a Hugging Face folder; vocabulary padding becomes zero. No communication.

    Raises:
        ConfigError: the tensors of the folder are not exactly those of the architecture.
    """
    get = SafetensorsFolder(folder)
    get.check(architecture)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in _VOCABULARY:
                # Where both are tied, the last of several pipeline stages has a copy of the embedding.
                tied = architecture.share_embeddings_and_output_weights
                hf_name = _VOCABULARY["embedding.word_embeddings.weight" if tied else name]
                first = groups.tensor_rank * parameter.shape[0]
                rows = get(hf_name)[first : first + parameter.shape[0]]
                parameter[: len(rows)].copy_(rows)
            else:
                parameter.copy_(
                    megatron_tensor(
                        _global_name(name, model), lambda hf_name: shard(hf_name, get(hf_name), groups), architecture
                    )
                )
    zero_vocabulary_padding(model, architecture, groups)


def _global_name(name: str, model: GPTModel) -> str:
    """The name with the number of its layer in the whole model instead of in this pipeline stage."""
    if not name.startswith("decoder.layers."):
        return name
    decoder, layers, number, inner = name.split(".", 3)
    return f"{decoder}.{layers}.{model.decoder.layers[int(number)].layer_number - 1}.{inner}"


def shard(hf_name: str, tensor: torch.Tensor, groups: ProcessGroups) -> torch.Tensor:
    """A view of this rank's part of one of a layer's Hugging Face tensors."""
    if "norm" in hf_name:
        return tensor
    # Attention output and down projection are cut by input, all else by output.
    dim = 1 if hf_name.endswith(("o_proj.weight", "down_proj.weight")) else 0
    return tensor.chunk(groups.tensor_size, dim)[groups.tensor_rank]


def megatron_tensor(name: str, get: Get, architecture: GPTArchitecture) -> torch.Tensor:
    """The Megatron weight `name`, vocabulary apart, from Hugging Face tensors: a rank's part if `get` gives the rank's parts."""
    if name == "decoder.final_layernorm.weight":
        return get("model.norm.weight")
    _, _, layer, inner = name.split(".", 3)
    prefix = f"model.layers.{layer}."
    if inner in _SAME:
        return get(prefix + _SAME[inner])
    if inner == "mlp.linear_fc1.weight":
        return torch.cat([get(prefix + "mlp.gate_proj.weight"), get(prefix + "mlp.up_proj.weight")])
    kind = inner.removeprefix("self_attention.linear_qkv.")
    assert kind in ("weight", "bias"), name
    query, key, value = (get(f"{prefix}self_attn.{part}_proj.{kind}") for part in "qkv")
    groups, tail = key.shape[0] // architecture.kv_channels, key.shape[1:]
    fused = torch.cat([part.reshape(groups, -1, *tail) for part in (query, key, value)], dim=1)
    return fused.reshape(-1, *tail)


def hf_tensors(get: Get, architecture: GPTArchitecture) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the Hugging Face model, from whole Megatron weights; vocabulary padding is cut off."""
    for ours, theirs in _VOCABULARY.items():
        if ours != "output_layer.weight" or not architecture.share_embeddings_and_output_weights:
            yield theirs, get(ours)[: architecture.vocab_size]
    yield "model.norm.weight", get("decoder.final_layernorm.weight")
    for layer in range(architecture.num_layers):
        prefix, ours = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        for kind in ("weight", "bias") if architecture.add_qkv_bias else ("weight",):
            fused = get(f"{ours}self_attention.linear_qkv.{kind}")
            width, tail = architecture.kv_channels, fused.shape[1:]
            per_group = fused.reshape(architecture.num_query_groups, -1, *tail)
            parts = per_group.split([per_group.shape[1] - 2 * width, width, width], dim=1)
            for part, tensor in zip("qkv", parts, strict=True):
                yield f"{prefix}self_attn.{part}_proj.{kind}", tensor.reshape(-1, *tail)
        gate, up = get(f"{ours}mlp.linear_fc1.weight").chunk(2)
        yield f"{prefix}mlp.gate_proj.weight", gate
        yield f"{prefix}mlp.up_proj.weight", up
        for inner, theirs in _SAME.items():
            is_qk_norm = theirs.startswith(("self_attn.q_norm", "self_attn.k_norm"))
            if "layer_norm_weight" not in inner and (architecture.qk_layernorm or not is_qk_norm):
                yield prefix + theirs, get(ours + inner)


def hf_shapes(architecture: GPTArchitecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the Hugging Face model."""
    hidden, ffn, width = architecture.hidden_size, architecture.ffn_hidden_size, architecture.kv_channels
    query, key = architecture.num_attention_heads * width, architecture.num_query_groups * width
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key, hidden),
        "self_attn.v_proj.weight": (key, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    if architecture.add_qkv_bias:
        layer |= {f"self_attn.{part}_proj.bias": (query if part == "q" else key,) for part in "qkv"}
    if architecture.qk_layernorm:
        layer |= {"self_attn.q_norm.weight": (width,), "self_attn.k_norm.weight": (width,)}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (architecture.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not architecture.share_embeddings_and_output_weights:
        shapes["lm_head.weight"] = (architecture.vocab_size, hidden)
    for index in range(architecture.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def zero_vocabulary_padding(model: GPTModel, architecture: GPTArchitecture, groups: ProcessGroups) -> None:
    """Clears the rows of embedding and output layer that stand for no token."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in _VOCABULARY:
                num_real = architecture.vocab_size - groups.tensor_rank * parameter.shape[0]
                parameter[max(0, num_real) :].zero_()


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{index}: not a readable index of safetensors files ({error!r})") from error


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ConfigError(f"{path}: not a readable safetensors file ({error}); copy or download it again") from error


def _some(names: set[str]) -> str:
    shown = sorted(names)[:4]
    return ", ".join(shown) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
