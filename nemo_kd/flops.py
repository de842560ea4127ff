"""Floating-point operations of a decoder, and the peak rates of GPUs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from nemo_kd.config.model import GPTArchitecture

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
    import torch

    if device.type != "cuda" or not precision.startswith("bf16"):
        return None
    device_name = torch.cuda.get_device_name(device)
    for pattern, peak in PEAK_BF16_FLOPS.items():
        if re.search(pattern, device_name):
            is_alone = not torch.distributed.is_initialized()
            return peak if is_alone else peak * torch.distributed.get_world_size()
    return None


@dataclass(frozen=True)
class ForwardFlops:
    """Floating-point operations of a decoder's forward pass; a multiply-add counts as two.

    Counts matrix products, and attention between a token and those it sees; the output layer at
    positions in the loss only, and of the experts only those that a token is routed to. Padding,
    masked scores and recomputation count nothing, so they lower the utilisation.
    """

    per_token: float
    per_loss_token: float
    per_pair: float
    """For a token and one that it sees, itself included, in all layers without a window."""
    per_window_pair: float = 0.0
    window_size: int = 0

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


def forward_flops(model: GPTArchitecture) -> ForwardFlops:
    """Return the FLOPs of a decoder with gated feed-forward layers, or of k such experts per token.

    Per token and layer: 2 H (2 heads d + 2 groups d) + 2 * 3 H F; with experts 2 * 3 H F k + 2 H E.
    Per pair and layer: 4 heads d (scores, weighted sum). Per loss token: 2 H V.
    """
    hidden_size = model.hidden_size
    heads = model.num_attention_heads
    attention = 4 * hidden_size * (heads + model.num_query_groups) * model.kv_channels
    feed_forward = 6 * hidden_size * model.ffn_hidden_size
    if model.num_moe_experts:
        feed_forward *= model.moe_router_topk or 0
        feed_forward += 2 * hidden_size * model.num_moe_experts
    num_window_layers = 0
    if model.window_size:
        num_window_layers = len(model.window_layers) or model.num_layers
    pair = 4 * heads * model.kv_channels
    return ForwardFlops(
        per_token=model.num_layers * (attention + feed_forward),
        per_loss_token=2 * hidden_size * model.vocab_size,
        per_pair=(model.num_layers - num_window_layers) * pair,
        per_window_pair=num_window_layers * pair,
        window_size=model.window_size or 0,
    )
