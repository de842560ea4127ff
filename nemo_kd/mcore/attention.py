"""Attention over torch's scaled_dot_product_attention, for models built without Transformer Engine.

Shape legend: S positions, B batch rows, h this rank's query heads, g this rank's key/value heads, D size of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention


class SDPACoreAttention(MegatronModule):
    """Causal attention with grouped key/value heads and, in the layers that have one, a sliding window.

    Megatron's own torch attention forks a CUDA random state and knows no memory-saving kernel. Padding lies on the
    right (see `nemo_kd.batch`), so a causal mask is all that is needed.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        assert attention_type == "self"
        assert config.context_parallel_size == 1
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.num_visible: int | None = None
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
            assert config.window_size is not None
            self.num_visible = config.window_size[0] + 1  # Megatron counts the positions before a token's own

    def forward(
        self,
        query_SBhD: torch.Tensor,
        key_SBgD: torch.Tensor,
        value_SBgD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Context of every position, [S, B, h * D]."""
        assert attention_mask is None
        assert attention_bias is None
        assert packed_seq_params is None
        num_positions, num_rows, num_heads, head_size = query_SBhD.shape
        windowed = self.num_visible is not None and self.num_visible < num_positions
        context_BhSD = torch.nn.functional.scaled_dot_product_attention(
            query_SBhD.permute(1, 2, 0, 3),
            key_SBgD.permute(1, 2, 0, 3),
            value_SBgD.permute(1, 2, 0, 3),
            attn_mask=self._window_mask(num_positions, query_SBhD.device) if windowed else None,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=not windowed,
            scale=self.softmax_scale,
            enable_gqa=key_SBgD.shape[2] != num_heads,
        )
        return context_BhSD.permute(2, 0, 1, 3).reshape(num_positions, num_rows, num_heads * head_size)

    def _window_mask(self, num_positions: int, device: torch.device) -> torch.Tensor:
        """[S, S], True where a query (row) sees a key (column)."""
        assert self.num_visible is not None
        causal = torch.ones(num_positions, num_positions, dtype=torch.bool, device=device).tril()
        return causal.triu(1 - self.num_visible)
