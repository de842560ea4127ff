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
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right


class SDPACoreAttention(MegatronModule):
    """Causal attention over torch's scaled_dot_product_attention, with grouped heads and windows.

    Megatron's torch attention forks a CUDA random state and has no memory-saving kernel. Padding
    lies on the right (see `nemo_kd.batch`), so a causal mask suffices. Packed sequences are
    attended to one by one. With context parallelism every rank gathers the keys and values of the
    whole sequence, one layer at a time. There is no dropout.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.context_group = pg_collection.cp
        window = config.window_size
        self.num_visible: int | None = None
        if is_layer_window_attention(
            window, config.window_attn_skip_freq, layer_number
        ):
            assert window is not None
            self.num_visible = (
                window[0] + 1
            )  # Megatron does not count the token itself

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *_: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **__: Any,
    ) -> Tensor:
        """Return the context [S, B, h * D] of [S, B, h, D]; [T, h * D] of a packed [T, h, D]."""
        if packed_seq_params is not None:
            bounds = packed_seq_params.cu_seqlens_q.tolist()
            sequences = [
                self._causal(query[rows, None], key[rows, None], value[rows, None])
                for rows in itertools.starmap(slice, itertools.pairwise(bounds))
            ]
            return torch.cat(sequences)[:, 0]
        if self.context_group.size() > 1:
            return self._context_parallel(
                query, self._gather(key), self._gather(value)
            )
        # Cached keys of earlier positions come first.
        return self._causal(query, key, value, len(key) - len(query))

    def _context_parallel(
        self, query_sBhD: Tensor, key_SBgD: Tensor, value_SBgD: Tensor
    ) -> Tensor:
        """Attend from this rank's two chunks of queries to the keys before them.

        `batch.context_positions` gives the positions of the chunks.
        """
        length = len(query_sBhD) // 2
        early_start = self.context_group.rank() * length
        late_start = len(key_SBgD) - early_start - length
        parts = zip(query_sBhD.chunk(2), (early_start, late_start), strict=True)
        return torch.cat(
            [
                self._causal(query, key_SBgD, value_SBgD, start)
                for query, start in parts
            ]
        )

    def _gather(self, tensor_sBgD: Tensor) -> Tensor:
        """Gather the sequence in its order: rank r holds the chunks r and 2 * size - 1 - r."""
        gathered = gather_from_sequence_parallel_region(
            tensor_sBgD, group=self.context_group
        )
        chunks = gathered.chunk(2 * self.context_group.size())
        return torch.cat([*chunks[::2], *reversed(chunks[1::2])])

    def _causal(
        self, query_SBhD: Tensor, key_SBgD: Tensor, value_SBgD: Tensor, start: int = 0
    ) -> Tensor:
        """Return the context [S, B, h * D] of queries from position `start` on; keys begin at 0."""
        num_queries = len(query_SBhD)
        end = start + num_queries
        mask = None
        if self.num_visible is not None and self.num_visible < end:
            mask = torch.ones(
                num_queries, end, dtype=torch.bool, device=query_SBhD.device
            )
            mask = mask.tril(start).triu(start + 1 - self.num_visible)
        elif start and num_queries > 1:
            mask = causal_lower_right(
                num_queries, end
            )  # kernels need no matrix for it
        context_BhSD = torch.nn.functional.scaled_dot_product_attention(
            query_SBhD.permute(1, 2, 0, 3),
            key_SBgD[:end].permute(1, 2, 0, 3),
            value_SBgD[:end].permute(1, 2, 0, 3),
            attn_mask=mask,
            is_causal=mask is None and not start,
            enable_gqa=key_SBgD.shape[2] != query_SBhD.shape[2],
        )
        return context_BhSD.permute(2, 0, 1, 3).flatten(2)


class RMSNorm(torch.nn.RMSNorm):
    """x / rms(x) * weight over the last dimension, in float32, as in Hugging Face's Llama.

    Megatron's torch norm refuses sequence parallelism. The weight carries the attribute
    `sequence_parallel`, by which Megatron sums its gradient over the tensor-parallel ranks.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps, device=device, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        normed = torch.nn.functional.rms_norm(
            x.float(), self.normalized_shape, eps=self.eps
        )
        return self.weight * normed.type_as(x)
