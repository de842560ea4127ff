"""Floating-point operations of a decoder, and those that a GPU can do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_kd.config.model import GPTArchitecture

PEAK_BF16_FLOPS = {
    r"\bH100 PCIe\b": 756e12,
    r"\bH[12]00 NVL\b": 835e12,
    r"\bH[12]00\b": 989e12,
    r"\bA100\b": 312e12,
    r"\bB200\b": 2250e12,
}
"""Dense bf16 FLOP/s by the name that torch.cuda.get_device_name gives, first match; from NVIDIA's data sheets."""


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s that a GPU can reach in a dense bf16 product; None for unknown GPUs and other precisions."""
    if not precision.startswith("bf16"):
        return None
    return next(
        (peak for name, peak in PEAK_BF16_FLOPS.items() if re.search(name, device_name)), None
    )


@dataclass(frozen=True)
class ForwardFlops:
    """Floating-point operations that a decoder's forward pass needs; a multiplication and an addition are two.

    Only matrix products and attention count, attention only between a token and those it sees, the output layer only at
    positions in the loss, of the experts only those a token goes through. What is computed besides (padding, masked
    scores, recomputation) lowers the utilisation.
    """

    per_token: float
    per_loss_token: float
    per_pair: float
    """A token and one that it sees, itself included, in all layers without a window."""
    per_window_pair: float = 0.0
    window_size: int = 0

    @classmethod
    def of_gpt(
        cls,
        *,
        num_layers: int,
        hidden_size: int,
        ffn_hidden_size: int,
        num_attention_heads: int,
        num_query_groups: int,
        kv_channels: int,
        vocab_size: int,
        window_size: int | None = None,
        num_window_layers: int = 0,
        num_moe_experts: int | None = None,
        moe_router_topk: int = 0,
        moe_ffn_hidden_size: int | None = None,
    ) -> ForwardFlops:
        """For a decoder with gated feed-forward layers, or `moe_router_topk` such experts a token.

        per token and layer: 2 H (2 heads d + 2 groups d) + 2 * 3 H F; with experts 2 * 3 H F k + 2 H E.
        per pair and layer: 4 heads d (scores, weighted sum). per loss token: 2 H V.
        """
        attention = 2 * hidden_size * (2 * num_attention_heads + 2 * num_query_groups) * kv_channels
        if num_moe_experts:
            ffn_size = moe_ffn_hidden_size or ffn_hidden_size
            feed_forward = (
                6 * hidden_size * ffn_size * moe_router_topk + 2 * hidden_size * num_moe_experts
            )
        else:
            feed_forward = 6 * hidden_size * ffn_hidden_size
        pair = 4 * num_attention_heads * kv_channels
        num_window_layers = num_window_layers if window_size else 0
        return cls(
            per_token=num_layers * (attention + feed_forward),
            per_loss_token=2 * hidden_size * vocab_size,
            per_pair=(num_layers - num_window_layers) * pair,
            per_window_pair=num_window_layers * pair,
            window_size=window_size or 0,
        )

    def example(self, num_tokens: int, num_loss_tokens: int) -> float:
        """FLOPs of one example."""
        within = min(num_tokens, self.window_size)
        pairs = num_tokens * (num_tokens + 1) / 2
        window_pairs = within * (within + 1) / 2 + (num_tokens - within) * within
        return (
            self.per_token * num_tokens
            + self.per_loss_token * num_loss_tokens
            + self.per_pair * pairs
            + self.per_window_pair * window_pairs
        )


def forward_flops(architecture: GPTArchitecture) -> ForwardFlops:
    """What a forward pass of this model computes."""
    num_layers, windowed = architecture.num_layers, architecture.window_size is not None
    return ForwardFlops.of_gpt(
        num_layers=num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.kv_channels,
        vocab_size=architecture.vocab_size,
        window_size=architecture.window_size,
        num_window_layers=(len(architecture.window_layers) or num_layers) if windowed else 0,
        num_moe_experts=architecture.num_moe_experts,
        moe_router_topk=architecture.moe_router_topk or 0,
    )
