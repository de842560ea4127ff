"""Teacher targets of each position from hidden states; the full logits never exist.

A block of rows at a time is projected onto this rank's part of the vocabulary and reduced to a few
numbers a row:

- The head, the k largest logits. Of groups of columns the k with the largest maxima hold them all;
  these groups are found in the same way among groups of groups. So the vocabulary is read once, and
  sorted never.
- The rest. With -inf in the places of the head, a softmax of some rows, few enough to stay in the
  processor's cache, gives the rest's weights up to a factor. The factor follows from the weight of
  the rest's largest logit.

Head and rest are added up in float64 and never subtracted, so the tail mass is right to float32
however small it is. Ranks exchange heads and sums: for each block two all-reduces and two
all-gathers, and one of each for tail samples.

Shape legend: N positions, H hidden size, K kept logits, T temperatures, M tail samples, U = M + 1,
R ranks, C candidates of all ranks, G groups of columns, v this rank's vocabulary columns, k this
rank's candidates, j = k + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from nemo_kd.batch import TeacherRows, join_rows, to_device
from nemo_kd.ops.tail_sampling import GROUP_COLUMNS, sample_tail
from nemo_kd.ops.vocab import VocabShard, reduction_dtype, row_blocks, scatter

BLOCK_BYTES = {False: 1 << 27, True: 1 << 28}
"""Bytes of a block of logits, on a CPU and on a GPU. Each block reads the whole weight."""
TILE_ELEMENTS = {False: 1 << 20, True: 1 << 24}
"""Elements of one softmax: a CPU's fit into its cache, a GPU's are worth a launch."""
FAN_OUT = 8
"""Columns or groups that share a maximum."""
MINUS_INFINITY = float("-inf")


@torch.no_grad()
def topk_rows(
    hidden_NH: Tensor,
    weight_vH: Tensor,
    labels_N: Tensor,
    shard: VocabShard,
    *,
    top_k: int,
    kept: Callable[[Tensor], Tensor],
    temperatures: Sequence[float] = (1.0,),
    uniforms_NU: Tensor | None = None,
    block_bytes: int | None = None,
) -> TeacherRows[Tensor]:
    """Return the targets of logits = hidden @ weight.T, the same on every rank of the shard's group.

    float32 (float64 from float64 hidden states) and int32. `positions_P` are row numbers. Equal
    logits stand by id; the log-sum-exp is not finite where any logit is NaN or +inf; the
    log-probability of a label that is not a token is -inf.

    Beside the result it takes `block_bytes` for a block of logits (at least one row), an eighth of
    that for maxima, and a few float32 tiles: no more for more rows. Products
    of half precision are float32 logits on a GPU with torch >= 2.8, elsewhere logits of their own
    precision; sums run in float32 or better. Never waits for the GPU.

    Args:
        weight_vH: this rank's rows of the output layer; those past `shard.num_real` are padding and
            never read.
        top_k: at most the real vocabulary.
        kept: which of each row's descending probabilities [N, K] are kept, as a mask that is a
            prefix.
        temperatures: the first is 1.
        uniforms_NU: `tail_uniforms` of the rows; None draws no tail samples.
        block_bytes: None is `BLOCK_BYTES`.
    """
    dtype = hidden_NH.dtype
    product: dict[str, Any] = {}
    can_widen = hidden_NH.is_cuda and "dtype_out" in torch.ops.aten.mm.overloads()
    if can_widen and shard.num_real and dtype in (torch.bfloat16, torch.float16):
        dtype = product["out_dtype"] = torch.float32
    block_bytes = block_bytes or BLOCK_BYTES[hidden_NH.is_cuda]
    blocks = row_blocks(len(hidden_NH), len(weight_vH) * dtype.itemsize, block_bytes)
    buffer_Nv = hidden_NH.new_empty(blocks[0].stop, shard.num_real, dtype=dtype)
    real_Hv = weight_vH[: shard.num_real].T
    parts = []
    for rows in blocks:
        some_NH = hidden_NH[rows]
        logits_Nv = buffer_Nv[: len(some_NH)]
        torch.mm(some_NH, real_Hv, out=logits_Nv, **product)
        uniforms = None if uniforms_NU is None else uniforms_NU[rows]
        parts.append(
            topk_of_logits(
                logits_Nv, labels_N[rows], shard, top_k, kept, temperatures, uniforms
            )
        )
    positions_P = torch.arange(len(hidden_NH), device=hidden_NH.device)
    return replace(join_rows(parts), positions_P=positions_P)


@torch.no_grad()
def topk_of_logits(
    logits_Nv: Tensor,
    labels_N: Tensor,
    shard: VocabShard,
    top_k: int,
    kept: Callable[[Tensor], Tensor],
    temperatures: Sequence[float] = (1.0,),
    uniforms_NU: Tensor | None = None,
) -> TeacherRows[Tensor]:
    """Return `topk_rows` of logits: this rank's real columns. The largest are overwritten."""
    label_logits_N = _at_labels(logits_Nv, labels_N, shard)
    logits_Nj, columns_Nj = _take_head(logits_Nv, top_k, shard)
    sums_NTG = _sum_rest(logits_Nv, logits_Nj, columns_Nj, temperatures)
    scales_T = torch.tensor(temperatures, dtype=torch.float64)
    scales_T = to_device(scales_T, logits_Nv.device)
    maxima_N2 = torch.stack([logits_Nj[:, 0], label_logits_N], dim=1)
    maximum_N, label_logits_N = shard.all_reduce(maxima_N2, ReduceOp.MAX).unbind(dim=1)
    below_N1 = logits_Nj[:, :1] - maximum_N[:, None]
    rest_NT = sums_NTG.sum(dim=-1) * (below_N1.double() / scales_T).exp_()
    shard.all_reduce(rest_NT, ReduceOp.SUM)
    logits_NC = shard.gather(logits_Nj[:, :top_k]) - maximum_N[:, None]
    ids_NC = shard.gather(columns_Nj[:, :top_k] + shard.start)

    # The largest candidates, equal ones by id, whatever the layout.
    by_id_NC = ids_NC.argsort(dim=-1)
    by_logit_NC = logits_NC.gather(1, by_id_NC).argsort(
        dim=-1, descending=True, stable=True
    )
    order_NK = by_id_NC.gather(1, by_logit_NC[:, :top_k])
    topk_logits_NK = logits_NC.gather(1, order_NK)

    weights_NTC = (logits_NC.double()[:, None] / scales_T[:, None]).exp_()
    total_NT = weights_NTC.sum(dim=-1) + rest_NT
    log_sum_exp_N = total_NT[:, 0].log()
    dtype = logits_NC.dtype
    kept_NK = kept((topk_logits_NK - log_sum_exp_N[:, None].to(dtype)).exp_())
    kept_NC = torch.zeros_like(ids_NC, dtype=torch.bool).scatter_(1, order_NK, kept_NK)
    weights_NTC.masked_fill_(kept_NC[:, None], 0)
    tail_mass_NT = (weights_NTC.sum(dim=-1) + rest_NT) / total_NT
    samples_NM = None
    if uniforms_NU is not None:
        kept_Nk = kept_NC[:, shard.rank * top_k :][:, :top_k]
        sums_NG = sums_NTG[:, 0] * below_N1.exp()
        _put_back(logits_Nv, sums_NG, logits_Nj, columns_Nj, kept_Nk, maximum_N)
        samples_NM = sample_tail(
            logits_Nv, maximum_N, sums_NG, tail_mass_NT[:, 0], uniforms_NU, shard
        ).int()
    ids_NK = ids_NC.gather(1, order_NK).masked_fill_(~kept_NK, -1)
    return TeacherRows(
        positions_P=torch.arange(len(logits_Nv), device=logits_Nv.device),
        topk_logits_PK=topk_logits_NK.masked_fill_(~kept_NK, MINUS_INFINITY),
        topk_token_ids_PK=ids_NK.int(),
        log_sum_exp_logits_P=log_sum_exp_N.to(dtype),
        tail_mass_PT=tail_mass_NT.to(dtype),
        temperatures=tuple(temperatures),
        label_logprobs_P=(label_logits_N - maximum_N - log_sum_exp_N).to(dtype),
        tail_token_ids_PM=samples_NM,
    )


def _at_labels(logits_Nv: Tensor, labels_N: Tensor, shard: VocabShard) -> Tensor:
    """Return the logits of the labels, -inf where another rank holds them."""
    dtype = reduction_dtype(logits_Nv)
    nothing_N = logits_Nv.new_full(labels_N.shape, MINUS_INFINITY, dtype=dtype)
    if not shard.num_real:
        return nothing_N
    columns_N, held_N = shard.local(labels_N)
    return torch.where(
        held_N, logits_Nv.gather(1, columns_N[:, None])[:, 0], nothing_N
    )


def _take_head(
    logits_Nv: Tensor, top_k: int, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """Take out the `top_k` largest logits, leaving -inf; return them and the next one.

    Returns:
        (logits, columns) [N, top_k + 1], descending. A rank with fewer columns adds logits of
        -inf, with an id above all others: real logits of -inf stand before it.
    """
    num_columns = logits_Nv.shape[1]
    values, columns = _largest(logits_Nv, min(top_k + 1, num_columns))
    values, order = values.to(reduction_dtype(logits_Nv)).sort(dim=-1, descending=True)
    columns = columns.gather(1, order)
    head = columns[:, :top_k]
    scatter(
        logits_Nv, head, torch.full_like(head, MINUS_INFINITY, dtype=logits_Nv.dtype)
    )
    missing = (0, top_k + 1 - values.shape[1])
    return (
        torch.nn.functional.pad(values, missing, value=MINUS_INFINITY),
        torch.nn.functional.pad(
            columns, missing, value=shard.vocab_size - shard.start
        ),
    )


def _largest(logits_Nv: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return (values, columns) [N, k] of each row's k largest, unordered."""
    num_rows, num_columns = logits_Nv.shape
    if num_columns <= 2 * FAN_OUT * k:
        return logits_Nv.topk(k, dim=-1, sorted=False)
    # A group is every num_groups-th column, so that its maximum is one of whole vectors.
    num_groups = num_columns // FAN_OUT
    whole = FAN_OUT * num_groups
    maxima_NG = logits_Nv[:, :whole].unflatten(1, (FAN_OUT, num_groups)).amax(dim=1)
    groups_Nk = _largest(maxima_NG, k)[1]
    steps = torch.arange(0, whole, num_groups, device=logits_Nv.device)
    left_over = torch.arange(whole, num_columns, device=logits_Nv.device)
    columns = torch.cat(
        [
            (groups_Nk[:, None] + steps[:, None]).flatten(1),
            left_over.expand(num_rows, -1),
        ],
        dim=1,
    )
    values, order = logits_Nv.gather(1, columns).topk(k, dim=-1, sorted=False)
    return values, columns.gather(1, order)


def _sum_rest(
    logits_Nv: Tensor,
    logits_Nj: Tensor,
    columns_Nj: Tensor,
    temperatures: Sequence[float],
) -> Tensor:
    """Sum exp((logit - maximum) / temperature) outside the head by group of columns: [N, T, G]."""
    num_rows, num_columns = logits_Nv.shape
    num_whole = num_columns // GROUP_COLUMNS
    num_groups = max(1, -(-num_columns // GROUP_COLUMNS))
    sums_NTG = logits_Nj.new_zeros(num_rows, len(temperatures), num_groups)
    if num_columns < logits_Nj.shape[1]:
        return sums_NTG
    gap_N1 = logits_Nj[:, -1:] - logits_Nj[:, :1]
    for rows in row_blocks(num_rows, num_columns, TILE_ELEMENTS[logits_Nv.is_cuda]):
        tile_Nv = logits_Nv[rows].to(sums_NTG.dtype)
        for number, temperature in enumerate(temperatures):
            scaled_Nv = tile_Nv if temperature == 1 else tile_Nv / temperature
            weights_Nv = torch.softmax(scaled_Nv, dim=-1)
            scale_N1 = (gap_N1[rows] / temperature).exp_()
            scale_N1 /= weights_Nv.gather(1, columns_Nj[rows, -1:])
            whole_Nv, rest_Nv = weights_Nv.tensor_split(
                [num_whole * GROUP_COLUMNS], dim=1
            )
            whole_NG = whole_Nv.unflatten(1, (num_whole, GROUP_COLUMNS)).sum(dim=-1)
            rest_N1 = rest_Nv.sum(dim=-1, keepdim=True)
            groups_NG = torch.cat([whole_NG, rest_N1], dim=1)[:, :num_groups]
            # A softmax of nothing but -inf is NaN.
            sums_NTG[rows, number] = (groups_NG * scale_N1).masked_fill_(
                logits_Nj[rows, -1:] == MINUS_INFINITY, 0
            )
    return sums_NTG


def _put_back(
    logits_Nv: Tensor,
    sums_NG: Tensor,
    logits_Nj: Tensor,
    columns_Nj: Tensor,
    kept_Nk: Tensor,
    maximum_N: Tensor,
) -> None:
    """Put back the head's logits that are not kept, and add their weights to the groups' sums."""
    num_held = min(kept_Nk.shape[1], logits_Nv.shape[1])
    columns_Nk = columns_Nj[:, :num_held]
    logits_Nk = logits_Nj[:, :num_held].masked_fill(
        kept_Nk[:, :num_held], MINUS_INFINITY
    )
    scatter(logits_Nv, columns_Nk, logits_Nk.to(logits_Nv.dtype))
    weights_Nk = (logits_Nk - maximum_N[:, None]).exp_()
    sums_NG.scatter_add_(1, columns_Nk // GROUP_COLUMNS, weights_Nk)
