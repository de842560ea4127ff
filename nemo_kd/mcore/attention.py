"""Attention over torch's scaled_dot_product_attention, for models built without Transformer Engine.

Shape legend: S positions, B batch rows, T positions of a packed row, h this rank's query heads, g its key/value heads,
D size of a head. With context parallelism a small letter s is this rank's part of S.
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
"""Queries that are computed together where a mask has to be written down: so much of [S, S] exists at a time."""


class SDPACoreAttention(MegatronModule):
    """Causal attention with grouped key/value heads and, in the layers that have one, a sliding window.

    Megatron's own torch attention forks a CUDA random state and knows no memory-saving kernel. Padding lies on the
    right (see `nemo_kd.batch`), so a causal mask is all that is needed. Packed sequences are attended to one by one.
    With context parallelism every rank gathers the keys and values of the whole sequence, a layer at a time.
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
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.num_visible: int | None = None
        if is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        ):
            assert config.window_size is not None
            self.num_visible = (
                config.window_size[0] + 1
            )  # Megatron counts the positions before a token's own

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
        """Context of every position: [S, B, h * D] of query [S, B, h, D], [T, h * D] of a packed one [T, h, D]."""
        assert attention_mask is None
        assert attention_bias is None
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params.cu_seqlens_q.tolist())
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
            "packed sequences are not shared among context-parallel ranks"
        )
        sequences = [
            self._causal(
                query_ThD[start:end, None], key_TgD[start:end, None], value_TgD[start:end, None]
            )
            for start, end in itertools.pairwise(bounds)
        ]
        return torch.cat(sequences)[:, 0]

    def _context_parallel(
        self, query_sBhD: torch.Tensor, key_sBgD: torch.Tensor, value_sBgD: torch.Tensor
    ) -> torch.Tensor:
        """This rank's two chunks of queries over all keys that each of them sees: see `schedule.context_positions`."""
        rank, size = self.context_group.rank(), self.context_group.size()
        key_SBgD, value_SBgD = (self._gather(tensor) for tensor in (key_sBgD, value_sBgD))
        chunks, length = query_sBhD.chunk(2), len(query_sBhD) // 2
        starts = (rank * length, (2 * size - 1 - rank) * length)
        return torch.cat(
            [
                self._causal(chunk, key_SBgD, value_SBgD, start)
                for chunk, start in zip(chunks, starts, strict=True)
            ]
        )

    def _gather(self, tensor_sBgD: torch.Tensor) -> torch.Tensor:
        """The whole sequence in its order from the chunks of all ranks: rank r holds chunks r and 2 * size - 1 - r."""
        size = self.context_group.size()
        chunks = gather_from_sequence_parallel_region(tensor_sBgD, group=self.context_group).chunk(
            2 * size
        )
        return torch.cat([*chunks[::2], *reversed(chunks[1::2])])

    def _causal(
        self,
        query_SBhD: torch.Tensor,
        key_SBgD: torch.Tensor,
        value_SBgD: torch.Tensor,
        start: int = 0,
    ) -> torch.Tensor:
        """Context [S, B, h * D] of queries at the positions from `start` on; the keys are those from position 0 on."""
        query, key, value = (
            tensor.permute(1, 2, 0, 3) for tensor in (query_SBhD, key_SBgD, value_SBgD)
        )
        num_positions, end = query.shape[2], start + query.shape[2]
        if start == 0 and (self.num_visible is None or self.num_visible >= end):
            context = self._attend(query, key[:, :, :end], value[:, :, :end], None)
        else:
            blocks = []
            for first in range(0, num_positions, QUERY_BLOCK):
                block = query[:, :, first : first + QUERY_BLOCK]
                last = start + first + block.shape[2]
                oldest = (
                    0 if self.num_visible is None else max(0, start + first + 1 - self.num_visible)
                )
                mask = self._mask(block.shape[2], last - oldest, query.device)
                blocks.append(
                    self._attend(block, key[:, :, oldest:last], value[:, :, oldest:last], mask)
                )
            context = torch.cat(blocks, dim=2)
        return context.permute(2, 0, 1, 3).flatten(2)

    def _mask(self, num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
        """[queries, keys], True where a query (row) sees a key (column); the last query stands at the last key."""
        if self.num_visible is None:
            return causal_lower_right(
                num_queries, num_keys
            )  # a kernel may know it without the matrix
        offset = num_keys - num_queries
        seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(offset)
        return seen.triu(offset + 1 - self.num_visible)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention over [B, heads, S, D]; causal where there is no mask."""
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
