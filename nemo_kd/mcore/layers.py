"""Attention and norm for models built without Transformer Engine.

Shape legend: S positions, B batch rows, T positions of a packed row, h this rank's query heads,
g its key/value heads, D size of a head. With context parallelism a small letter s is this rank's
part of S.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from torch.nn.attention.bias import causal_lower_right

QUERY_BLOCK = 512
"""Queries per block of a written mask; bounds the part of [S, S] that exists at a time."""


class SDPACoreAttention(MegatronModule):
    """Causal attention over torch's scaled_dot_product_attention, with grouped heads and windows.

    Megatron's torch attention forks a CUDA random state and has no memory-saving kernel. Padding
    lies on the right (see `nemo_kd.batch`), so a causal mask suffices. Packed sequences are
    attended to one by one. With context parallelism every rank gathers the keys and values of the
    whole sequence, one layer at a time.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        assert attention_type == "self"
        assert pg_collection is not None
        self.context_group = pg_collection.cp
        self.softmax_scale = softmax_scale
        self.dropout = (
            config.attention_dropout if attention_dropout is None else attention_dropout
        )
        window = config.window_size
        self.num_visible: int | None = None
        if is_layer_window_attention(window, config.window_attn_skip_freq, layer_number):
            assert window is not None
            self.num_visible = window[0] + 1  # Megatron does not count the token itself

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Return the context [S, B, h * D] of [S, B, h, D]; [T, h * D] of a packed [T, h, D]."""
        assert attention_mask is None
        assert attention_bias is None
        if packed_seq_params is not None:
            return self._packed(
                query, key, value, packed_seq_params.cu_seqlens_q.tolist()
            )
        if self.context_group.size() > 1:
            return self._context_parallel(query, key, value)
        return self._causal(query, key, value)

    def _packed(
        self,
        query_ThD: torch.Tensor,
        key_TgD: torch.Tensor,
        value_TgD: torch.Tensor,
        bounds: list[int],
    ) -> torch.Tensor:
        assert self.context_group.size() == 1, (
            "context parallelism does not split packed sequences"
        )
        sequences = []
        for start, end in itertools.pairwise(bounds):
            query, key, value = (
                part[start:end, None] for part in (query_ThD, key_TgD, value_TgD)
            )
            sequences.append(self._causal(query, key, value))
        return torch.cat(sequences)[:, 0]

    def _context_parallel(
        self, query_sBhD: torch.Tensor, key_sBgD: torch.Tensor, value_sBgD: torch.Tensor
    ) -> torch.Tensor:
        """Attend from this rank's two chunks of queries to the keys before them.

        `schedule.context_positions` gives the positions of the chunks.
        """
        rank = self.context_group.rank()
        size = self.context_group.size()
        key_SBgD = self._gather(key_sBgD)
        value_SBgD = self._gather(value_sBgD)
        early, late = query_sBhD.chunk(2)
        length = len(early)
        return torch.cat(
            [
                self._causal(early, key_SBgD, value_SBgD, rank * length),
                self._causal(late, key_SBgD, value_SBgD, (2 * size - 1 - rank) * length),
            ]
        )

    def _gather(self, tensor_sBgD: torch.Tensor) -> torch.Tensor:
        """Gather the sequence in its order: rank r holds the chunks r and 2 * size - 1 - r."""
        gathered = gather_from_sequence_parallel_region(
            tensor_sBgD, group=self.context_group
        )
        chunks = gathered.chunk(2 * self.context_group.size())
        return torch.cat([*chunks[::2], *reversed(chunks[1::2])])

    def _causal(
        self,
        query_SBhD: torch.Tensor,
        key_SBgD: torch.Tensor,
        value_SBgD: torch.Tensor,
        start: int = 0,
    ) -> torch.Tensor:
        """Return the context [S, B, h * D] of queries from position `start` on; keys begin at 0."""
        query = query_SBhD.permute(1, 2, 0, 3)
        key = key_SBgD.permute(1, 2, 0, 3)
        value = value_SBgD.permute(1, 2, 0, 3)
        num_positions = query.shape[2]
        end = start + num_positions
        if start == 0 and (self.num_visible is None or self.num_visible >= end):
            context = self._attend(query, key[:, :, :end], value[:, :, :end], None)
            return context.permute(2, 0, 1, 3).flatten(2)
        blocks = []
        for first in range(0, num_positions, QUERY_BLOCK):
            block = query[:, :, first : first + QUERY_BLOCK]
            last = start + first + block.shape[2]
            oldest = 0
            if self.num_visible is not None:
                oldest = max(0, start + first + 1 - self.num_visible)
            seen = slice(oldest, last)
            mask = self._mask(block.shape[2], last - oldest, query.device)
            blocks.append(self._attend(block, key[:, :, seen], value[:, :, seen], mask))
        return torch.cat(blocks, dim=2).permute(2, 0, 1, 3).flatten(2)

    def _mask(
        self, num_queries: int, num_keys: int, device: torch.device
    ) -> torch.Tensor:
        """Return [queries, keys], True where a query sees a key; both end at one position."""
        if self.num_visible is None:
            return causal_lower_right(
                num_queries, num_keys
            )  # kernels need no matrix for this one
        offset = num_keys - num_queries
        seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(
            offset
        )
        return seen.triu(offset + 1 - self.num_visible)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend over [B, heads, S, D]; causal without a mask."""
        return torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last dimension, in float32, as in Hugging Face's Llama.

    Megatron's torch norm refuses sequence parallelism. The weight carries the attribute
    `sequence_parallel`, by which Megatron sums its gradient over the tensor-parallel ranks.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        weight = torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        self.eps = eps
        self.weight = torch.nn.Parameter(weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_float = x.float()
        normed = x_float * torch.rsqrt(x_float.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.type_as(x)
