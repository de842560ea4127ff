"""Weights between Hugging Face's layout and Megatron's.

Megatron fuses q, k and v per query group ([q..., k, v] of group 0, then of group 1 ...) and the two
halves of the gated feed-forward ([gate; up], on every tensor-parallel rank its halves). It pads the
vocabulary with zero rows. So a Hugging Face weight is a view of a Megatron weight, and both
directions copy through the same views.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from nemo_kd.config.shared import GPTArchitecture
from nemo_kd.mcore.architecture import architecture_from_hf
from nemo_kd.mcore.groups import ProcessGroups
from nemo_kd.mcore.model import named_weights
from nemo_kd.nemo_archive import EXPERT_NAMES, SafetensorsFolder, read_json

log = logging.getLogger(__name__)

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
"""A layer's weights that are one tensor in both layouts.

Transformer Engine's layers hold two norms in the linear layers after them.
"""

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"

_VOCABULARY = {
    "embedding.word_embeddings.weight": EMBEDDING,
    "output_layer.weight": OUTPUT,
}


@dataclass(frozen=True)
class Piece:
    """The part of a Megatron weight that is a Hugging Face weight, or this rank's part of one.

    Attributes:
        view: [groups, rows, ...]: the Hugging Face weight's rows in order, cut into groups.
        cut_dim: dimension of the Hugging Face weight that is cut over tensor-parallel ranks. None:
            every rank has all.
    """

    hf_name: str
    view: torch.Tensor
    cut_dim: int | None


def open_hf_model(folder: Path) -> tuple[GPTArchitecture, SafetensorsFolder]:
    """Read config.json and the headers of the weights, and check that they fit.

    Raises:
        ConfigError: a file is damaged, or the weights are not exactly those that config.json needs.
    """
    path = folder / "config.json"
    architecture = architecture_from_hf(read_json(path), str(path))
    stored = SafetensorsFolder(folder)
    has_both = {EMBEDDING, OUTPUT} <= stored.shapes.keys()
    is_tied = architecture.share_embeddings_and_output_weights
    if is_tied and has_both and not stored.are_equal(EMBEDDING, OUTPUT):
        # transformers 5 uses the stored layer too. All its versions do with an export's
        # config.json.
        log.warning(
            "%s: %s differs from the embedding: it is used, although config.json ties both",
            folder,
            OUTPUT,
        )
        is_tied = False
        architecture = dataclasses.replace(
            architecture,
            share_embeddings_and_output_weights=False,
            hf_config=architecture.hf_config | {"tie_word_embeddings": False},
        )
    stored.check(hf_shapes(architecture), {OUTPUT} if is_tied else set())
    return architecture, stored


def load_hf_weights(
    model: torch.nn.Module,
    stored: SafetensorsFolder,
    architecture: GPTArchitecture,
    groups: ProcessGroups,
) -> None:
    """Fill this rank's weights, one at a time, from a Hugging Face folder; no communication."""
    with torch.no_grad():
        for name, weight in named_weights(model):
            for piece in pieces(name, weight, architecture):
                num_groups, num_rows = piece.view.shape[:2]
                size = num_groups * num_rows
                first = groups.tensor_rank * size if piece.cut_dim == 0 else 0
                # Padding rows of the vocabulary are not stored.
                last = min(first + size, stored.shapes[piece.hf_name][0])
                columns = slice(None)
                if piece.cut_dim == 1:
                    width = piece.view.shape[2]
                    start = groups.tensor_rank * width
                    columns = slice(start, start + width)
                if first < last:
                    block = stored.read(piece.hf_name, slice(first, last), columns)
                    block = block.unflatten(0, (num_groups, -1))
                    piece.view[:, : block.shape[1]].copy_(block)


def whole_tensor(
    piece: Piece, architecture: GPTArchitecture, groups: ProcessGroups
) -> torch.Tensor:
    """Gather the Hugging Face tensor of a piece on its device, without vocabulary padding.

    Every rank of the tensor-parallel group calls it.
    """
    tensor = piece.view.flatten(0, 1).contiguous()
    if piece.cut_dim is not None and groups.tensor_size > 1:
        parts = [torch.empty_like(tensor) for _ in range(groups.tensor_size)]
        torch.distributed.all_gather(parts, tensor, group=groups.tensor)
        tensor = torch.cat(parts, dim=piece.cut_dim)
    if piece.hf_name in _VOCABULARY.values():
        return tensor[: architecture.vocab_size]
    return tensor


def hf_shapes(architecture: GPTArchitecture) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of the Hugging Face model."""
    hidden = architecture.hidden_size
    ffn = architecture.ffn_hidden_size
    width = architecture.kv_channels
    query = architecture.num_attention_heads * width
    fused = query + 2 * architecture.num_query_groups * width
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "pre_mlp_layernorm.weight": (hidden,),
        "self_attention.linear_proj.weight": (hidden, query),
        "self_attention.linear_qkv.weight": (fused, hidden),
    }
    if architecture.add_qkv_bias:
        layer["self_attention.linear_qkv.bias"] = (fused,)
    if architecture.qk_layernorm:
        layer["self_attention.q_layernorm.weight"] = (width,)
        layer["self_attention.k_layernorm.weight"] = (width,)
    feed_forwards = ["mlp"]
    if architecture.num_moe_experts is not None:
        layer["mlp.router.weight"] = (architecture.num_moe_experts, hidden)
        experts = range(architecture.num_moe_experts)
        feed_forwards = [f"mlp.experts.local_experts.{expert}" for expert in experts]
    for name in feed_forwards:
        layer[f"{name}.linear_fc1.weight"] = (2 * ffn, hidden)
        layer[f"{name}.linear_fc2.weight"] = (hidden, ffn)
    vocabulary = (architecture.vocab_size, hidden)
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": vocabulary
    }
    for number in range(architecture.num_layers):
        for name, shape in layer.items():
            shapes[f"decoder.layers.{number}.{name}"] = shape
    shapes["decoder.final_layernorm.weight"] = (hidden,)
    if not architecture.share_embeddings_and_output_weights:
        shapes["output_layer.weight"] = vocabulary
    return {
        piece.hf_name: tuple(piece.view.flatten(0, 1).shape)
        for name, shape in shapes.items()
        for piece in pieces(name, torch.empty(shape, device="meta"), architecture)
    }


def zero_vocabulary_padding(
    model: torch.nn.Module, architecture: GPTArchitecture, groups: ProcessGroups
) -> None:
    """Zero the rows of embedding and output layer that stand for no token."""
    for name, weight in named_weights(model):
        if name in _VOCABULARY:
            num_real = architecture.vocab_size - groups.tensor_rank * weight.shape[0]
            weight[max(0, num_real) :].zero_()


def pieces(
    name: str, weight: torch.Tensor, architecture: GPTArchitecture
) -> list[Piece]:
    """Return the Hugging Face weights that make up the Megatron weight `name`."""
    if name in _VOCABULARY:
        # The last of several pipeline stages has an output layer even where both are tied.
        tied = architecture.share_embeddings_and_output_weights
        hf_name = _VOCABULARY["embedding.word_embeddings.weight" if tied else name]
        return [Piece(hf_name, weight[None], 0)]
    if name == "decoder.final_layernorm.weight":
        return [Piece("model.norm.weight", weight[None], None)]
    _, _, layer, inner = name.split(".", 3)
    prefix = f"model.layers.{layer}."
    if inner in _SAME:
        # Attention output and down projection are cut by input.
        cut_dim = None if "norm" in inner else 1
        return [Piece(prefix + _SAME[inner], weight[None], cut_dim)]
    if inner.startswith("self_attention.linear_qkv."):
        kind = inner.removeprefix("self_attention.linear_qkv.")
        width = architecture.kv_channels
        num_queries = architecture.num_attention_heads // architecture.num_query_groups
        per_group = weight.unflatten(0, (-1, (num_queries + 2) * width))
        parts = per_group.split([num_queries * width, width, width], dim=1)
        return [
            Piece(f"{prefix}self_attn.{q}_proj.{kind}", part, 0)
            for q, part in zip("qkv", parts, strict=True)
        ]
    if inner == "mlp.linear_fc1.weight":
        gate = "mlp.gate_proj.weight"
        up = "mlp.up_proj.weight"
    else:
        names = EXPERT_NAMES[architecture.family]
        if inner == "mlp.router.weight":
            return [Piece(prefix + names.router, weight[None], None)]
        expert, kind = inner.removeprefix("mlp.experts.local_experts.").split(".", 1)
        if kind == "linear_fc2.weight":
            return [Piece(prefix + names.weight(expert, names.down), weight[None], 1)]
        assert kind == "linear_fc1.weight", name
        gate = names.weight(expert, names.gate)
        up = names.weight(expert, names.up)
    gate_rows, up_rows = weight.chunk(2)
    return [
        Piece(prefix + gate, gate_rows[None], 0),
        Piece(prefix + up, up_rows[None], 0),
    ]
