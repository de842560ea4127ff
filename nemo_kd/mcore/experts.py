"""Mixtures of experts: what Megatron calls them, what Hugging Face calls them, and what Megatron lacks to run them here.

Experts are cut over the tensor-parallel ranks like a dense feed-forward and spread over the expert-parallel ranks,
which are ranks of different data- or context-parallel number: Megatron's default (expert tensor size = tensor size),
which needs no second tensor-parallel layout.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from nemo_kd.config.model import GPTArchitecture


@dataclass(frozen=True)
class ExpertNames:
    """Names inside a layer of a Hugging Face model whose file keeps every expert's weights apart."""

    block: str
    gate: str
    up: str
    down: str

    @property
    def router(self) -> str:
        return f"{self.block}.gate.weight"

    def weight(self, expert: int | str, part: str) -> str:
        return f"{self.block}.experts.{expert}.{part}.weight"


EXPERT_NAMES = {
    "mixtral": ExpertNames("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": ExpertNames("mlp", "gate_proj", "up_proj", "down_proj"),
}

_EXPERT = re.compile(
    r"(?P<layer>.*)\.(?:block_sparse_moe|mlp)\.experts\.(?P<expert>\d+)\.(?P<part>\w+)\.weight"
)
_GATE, _UP, _DOWN = (
    {getattr(names, part) for names in EXPERT_NAMES.values()} for part in ("gate", "up", "down")
)


@dataclass(frozen=True)
class FusedPart:
    """Where a model that was saved as it lies in transformers' memory (version 5) keeps a weight of one expert.

    Attributes:
        name: of the tensor [experts, rows, columns].
        half: 0 or 1: the weight is this half of the rows (gate, up); None: it is all of them.
    """

    name: str
    expert: int
    half: int | None


def fused_part(hf_name: str) -> FusedPart | None:
    """The fused place of an expert's weight; None for other weights."""
    match = _EXPERT.fullmatch(hf_name)
    if match is None:
        return None
    block, part = f"{match['layer']}.mlp.experts", match["part"]
    if part in _DOWN:
        return FusedPart(f"{block}.down_proj", int(match["expert"]), None)
    return FusedPart(f"{block}.gate_up_proj", int(match["expert"]), 0 if part in _GATE else 1)


def fused_router(hf_name: str) -> str:
    """The router's name beside fused experts."""
    return hf_name.replace(".block_sparse_moe.gate.", ".mlp.gate.")


def expert_fields(architecture: GPTArchitecture) -> dict[str, Any]:
    """What Megatron's configuration says about experts; empty for a dense model."""
    if architecture.num_moe_experts is None:
        return {}
    return {
        "num_moe_experts": architecture.num_moe_experts,
        "moe_router_topk": architecture.moe_router_topk,
        "moe_ffn_hidden_size": architecture.ffn_hidden_size,
        # Softmax over all experts leaves weights that do not sum to 1; over the chosen ones it normalises them.
        "moe_router_pre_softmax": not architecture.moe_normalize_topk,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        # Takes different numbers of tokens on the ranks, and moves each token only to the experts it needs.
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": False,
    }
