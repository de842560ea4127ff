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
however small it is. Ranks exchange heads and sums: an all-gather of numbers and one of ids for each
block, and two more for tail samples.

Shape legend: N positions, H hidden size, K kept logits, T temperatures, M tail samples, U = M + 1,
R ranks, C candidates of all ranks, G groups of columns, v this rank's vocabulary columns, k this
rank's candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from nemo_kd.batch import TeacherRows, join_rows
from nemo_kd.ops.tail_sampling import GROUP_COLUMNS, sample_tail
from nemo_kd.ops.vocab import VocabShard, reduction_dtype, row_blocks

BLOCK_BYTES = {False: 1 << 27, True: 1 << 28}
"""Bytes of a block of logits, on a CPU and on a GPU. Each block reads the whole weight."""
TILE_ELEMENTS = {False: 1 << 20, True: 1 << 24}
"""Elements of one softmax: a CPU's fit into its cache, a GPU's are worth a launch."""
SEARCHED_ELEMENTS = {False: 1 << 22, True: 1 << 27}
"""Elements of one search for the largest."""
CANDIDATE_BYTES = 64
"""Working memory of a candidate while ranks exchange theirs."""
FAN_OUT = 8
"""Columns or groups that share a maximum."""


@torch.no_grad()
def topk_rows(
    hidden_NH: torch.Tensor,
    weight_vH: torch.Tensor,
    labels_N: torch.Tensor,
    shard: VocabShard,
    *,
    top_k: int,
    kept: Callable[[torch.Tensor], torch.Tensor],
    temperatures: Sequence[float] = (1.0,),
    uniforms_NU: torch.Tensor | None = None,
    block_bytes: int | None = None,
) -> TeacherRows[torch.Tensor]:
    """Return the targets of logits = hidden @ weight.T, the same on every rank of the shard's group.

    float32 (float64 from float64 hidden states) and int32. `positions_P` are row numbers. Equal
    logits stand by id; the log-sum-exp is not finite where any logit is NaN or +inf; the
    log-probability of a label that is not a token is -inf.

    Beside the result it takes `block_bytes` for a block of logits and what ranks exchange (at least
    one row), an eighth of that for maxima, and two float32 tiles: no more for more rows. Products
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

    Raises:
        ValueError: top_k exceeds the vocabulary.
    """
    if top_k > shard.vocab_size:
        raise ValueError(
            f"top_k: {top_k} exceeds the vocabulary of {shard.vocab_size} tokens"
        )
    num_rows = len(hidden_NH)
    dtype = _logits_dtype(hidden_NH)
    row_bytes = (
        len(weight_vH) * dtype.itemsize + CANDIDATE_BYTES * top_k * shard.num_ranks
    )
    num_blocks = -(
        -num_rows // max(1, (block_bytes or BLOCK_BYTES[hidden_NH.is_cuda]) // row_bytes)
    )
    # Of equal size, as a small block is slow; and as many on every rank, whatever its padding.
    blocks = (
        row_blocks(num_rows, 1, -(-num_rows // num_blocks)) if num_rows else [slice(0, 0)]
    )
    buffer_Nv = hidden_NH.new_empty(blocks[0].stop, shard.num_real, dtype=dtype)
    parts = []
    for rows in blocks:
        logits_Nv = buffer_Nv[: rows.stop - rows.start]
        _project(hidden_NH[rows], weight_vH[: shard.num_real], logits_Nv)
        uniforms = None if uniforms_NU is None else uniforms_NU[rows]
        parts.append(
            topk_of_logits(
                logits_Nv, labels_N[rows], shard, top_k, kept, temperatures, uniforms
            )
        )
    positions_P = torch.arange(num_rows, device=hidden_NH.device)
    return replace(join_rows(parts), positions_P=positions_P)


@torch.no_grad()
def topk_of_logits(
    logits_Nv: torch.Tensor,
    labels_N: torch.Tensor,
    shard: VocabShard,
    top_k: int,
    kept: Callable[[torch.Tensor], torch.Tensor],
    temperatures: Sequence[float] = (1.0,),
    uniforms_NU: torch.Tensor | None = None,
) -> TeacherRows[torch.Tensor]:
    """Return `topk_rows` of logits: this rank's real columns. The largest are overwritten."""
    label_logits_N = logits_Nv.new_full(
        (len(logits_Nv),), float("-inf"), dtype=reduction_dtype(logits_Nv)
    )
    if shard.num_real:
        columns_N, held_N = shard.local(labels_N)
        label_logits_N = torch.where(
            held_N, logits_Nv.gather(1, columns_N[:, None])[:, 0], label_logits_N
        )
    head = _take_head(logits_Nv, top_k)
    rest_NT, sums_NG = _sum_rest(logits_Nv, head, temperatures)
    found = _gather(head, rest_NT, label_logits_N, shard, top_k, temperatures)

    order_NK = _ordered(found, top_k)
    dtype = found.logits_NC.dtype
    log_sum_exp_N = (
        found.logits_NC.double().exp().sum(dim=-1) + found.rest_NT[:, 0]
    ).log_()
    topk_logits_NK = found.logits_NC.gather(1, order_NK)
    kept_NK = kept((topk_logits_NK - log_sum_exp_N[:, None].to(dtype)).exp_())
    kept_NC = torch.zeros_like(found.ids_NC, dtype=torch.bool).scatter_(
        1, order_NK, kept_NK
    )
    tail_mass_NT = torch.empty_like(found.rest_NT)
    for number, temperature in enumerate(temperatures):
        weights_NC = (found.logits_NC.double() / temperature).exp_()
        total_N = weights_NC.sum(dim=-1) + found.rest_NT[:, number]
        tail_mass_NT[:, number] = (
            weights_NC.masked_fill_(kept_NC, 0).sum(dim=-1) + found.rest_NT[:, number]
        )
        tail_mass_NT[:, number] /= total_N
    samples_NM = None
    if uniforms_NU is not None:
        kept_Nk = kept_NC[:, shard.rank * top_k :][:, : head.columns_Nk.shape[1]]
        _put_back(logits_Nv, sums_NG, head, kept_Nk, found.maximum_N)
        samples_NM = sample_tail(
            logits_Nv, found.maximum_N, sums_NG, tail_mass_NT[:, 0], uniforms_NU, shard
        ).int()
    return TeacherRows(
        positions_P=torch.arange(len(logits_Nv), device=logits_Nv.device),
        topk_logits_PK=topk_logits_NK.masked_fill_(~kept_NK, float("-inf")),
        topk_token_ids_PK=found.ids_NC.gather(1, order_NK)
        .masked_fill_(~kept_NK, -1)
        .int(),
        log_sum_exp_logits_P=log_sum_exp_N.to(dtype),
        tail_mass_PT=tail_mass_NT.to(dtype),
        temperatures=tuple(temperatures),
        label_logprobs_P=(found.label_logits_N - found.maximum_N - log_sum_exp_N).to(
            dtype
        ),
        tail_token_ids_PM=samples_NM,
    )


def _logits_dtype(hidden_NH: torch.Tensor) -> torch.dtype:
    half = hidden_NH.dtype in (torch.bfloat16, torch.float16)
    widens = hidden_NH.is_cuda and "dtype_out" in torch.ops.aten.mm.overloads()
    return torch.float32 if half and widens else hidden_NH.dtype


def _project(
    hidden_NH: torch.Tensor, weight_vH: torch.Tensor, logits_Nv: torch.Tensor
) -> None:
    if logits_Nv.dtype == hidden_NH.dtype:
        torch.mm(hidden_NH, weight_vH.T, out=logits_Nv)
    elif logits_Nv.numel():
        torch.mm(hidden_NH, weight_vH.T, out_dtype=logits_Nv.dtype, out=logits_Nv)


class _Head(NamedTuple):
    """A rank's k largest logits, fewer if it has fewer columns, and the next one."""

    logits_Nk: torch.Tensor
    columns_Nk: torch.Tensor
    next_logit_N: torch.Tensor
    next_column_N: torch.Tensor
    maximum_N: torch.Tensor


def _take_head(logits_Nv: torch.Tensor, top_k: int) -> _Head:
    """Take out the `top_k` largest logits, leaving -inf. Without others the next one is -inf."""
    num_rows, num_columns = logits_Nv.shape
    dtype = reduction_dtype(logits_Nv)
    # In tiles, as fresh memory for the maxima and ids of a whole block costs more on a CPU than the
    # search.
    tiles = row_blocks(num_rows, num_columns, SEARCHED_ELEMENTS[logits_Nv.is_cuda]) or [
        slice(0, 0)
    ]
    found = [_largest(logits_Nv[rows], min(top_k + 1, num_columns)) for rows in tiles]
    values, columns = (torch.cat(parts) for parts in zip(*found, strict=True))
    values, order = values.to(dtype).sort(dim=-1, descending=True)
    columns = columns.gather(1, order)
    nothing_N1 = values.new_full((num_rows, 1), float("-inf"))
    values = torch.cat([values, nothing_N1], dim=1)
    next_column_N = (
        columns[:, top_k] if num_columns > top_k else columns.new_zeros(num_rows)
    )
    next_logit_N = values[:, min(top_k, num_columns)]
    columns_Nk = columns[:, :top_k]
    _assign(logits_Nv, columns_Nk, values.new_full((), float("-inf")))
    return _Head(
        values[:, : columns_Nk.shape[1]],
        columns_Nk,
        next_logit_N,
        next_column_N,
        values[:, 0],
    )


def _assign(
    logits_Nv: torch.Tensor, columns_Nk: torch.Tensor, values: torch.Tensor
) -> None:
    # Not scatter_, which copies all of a bfloat16 tensor on a CPU.
    rows_N1 = torch.arange(len(logits_Nv), device=logits_Nv.device)[:, None]
    logits_Nv.index_put_((rows_N1, columns_Nk), values.to(logits_Nv.dtype))


def _largest(logits_Nv: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
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
    columns = (groups_Nk[:, None] + steps[:, None]).flatten(1)
    if whole < num_columns:
        left_over = torch.arange(whole, num_columns, device=logits_Nv.device).expand(
            num_rows, -1
        )
        columns = torch.cat([columns, left_over], dim=1)
    values, order = logits_Nv.gather(1, columns).topk(k, dim=-1, sorted=False)
    return values, columns.gather(1, order)


def _sum_rest(
    logits_Nv: torch.Tensor, head: _Head, temperatures: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum exp((logit - maximum) / temperature) outside the head: [N, T], and by group [N, G] at
    1."""
    num_rows, num_columns = logits_Nv.shape
    dtype = reduction_dtype(logits_Nv)
    rest_NT = logits_Nv.new_zeros(num_rows, len(temperatures), dtype=dtype)
    sums_NG = logits_Nv.new_zeros(
        num_rows, max(1, -(-num_columns // GROUP_COLUMNS)), dtype=dtype
    )
    if num_columns == head.columns_Nk.shape[1]:
        return rest_NT, sums_NG
    tiles = row_blocks(num_rows, num_columns, TILE_ELEMENTS[logits_Nv.is_cuda])
    scratch = logits_Nv.new_empty(
        2, tiles[0].stop if tiles else 0, num_columns, dtype=dtype
    )
    for rows in tiles:
        scaled_Nv, weights_Nv = scratch[:, : rows.stop - rows.start]
        next_column_N1 = head.next_column_N[rows, None]
        next_logit_N1 = head.next_logit_N[rows, None]
        for number, temperature in enumerate(temperatures):
            tile_Nv = logits_Nv[rows]
            if temperature != 1:
                tile_Nv = scaled_Nv.copy_(tile_Nv).div_(temperature)
            elif tile_Nv.dtype != dtype:
                tile_Nv = scaled_Nv.copy_(tile_Nv)
            torch.softmax(tile_Nv, dim=-1, out=weights_Nv)
            scale_N1 = ((next_logit_N1 - head.maximum_N[rows, None]) / temperature).exp_()
            scale_N1 /= weights_Nv.gather(1, next_column_N1)
            # A softmax of nothing but -inf is NaN.
            groups_NG = (_group_sums(weights_Nv) * scale_N1).masked_fill_(
                next_logit_N1 == float("-inf"), 0
            )
            rest_NT[rows, number] = groups_NG.sum(dim=-1)
            if number == 0:
                sums_NG[rows] = groups_NG
    return rest_NT, sums_NG


def _group_sums(weights_Nv: torch.Tensor) -> torch.Tensor:
    num_whole, left_over = divmod(weights_Nv.shape[1], GROUP_COLUMNS)
    sums_NG = (
        weights_Nv[:, : num_whole * GROUP_COLUMNS]
        .unflatten(1, (num_whole, GROUP_COLUMNS))
        .sum(dim=-1)
    )
    if left_over:
        sums_NG = torch.cat(
            [sums_NG, weights_Nv[:, -left_over:].sum(dim=-1, keepdim=True)], dim=1
        )
    return sums_NG


class _Gathered(NamedTuple):
    """Each rank's `top_k` candidates and the sums over ranks; logits relative to the largest."""

    logits_NC: torch.Tensor
    ids_NC: torch.Tensor
    maximum_N: torch.Tensor
    rest_NT: torch.Tensor
    label_logits_N: torch.Tensor


def _gather(
    head: _Head,
    rest_NT: torch.Tensor,
    label_logits_N: torch.Tensor,
    shard: VocabShard,
    top_k: int,
    temperatures: Sequence[float],
) -> _Gathered:
    """Exchange candidates in two all-gathers; a rank with too few columns adds -inf."""
    missing = (0, top_k - head.logits_Nk.shape[1])
    logits_Nk = torch.nn.functional.pad(head.logits_Nk, missing, value=float("-inf"))
    # Filled up with an id above all others: real logits of -inf stand before it.
    ids_Nk = torch.nn.functional.pad(
        head.columns_Nk + shard.start, missing, value=shard.vocab_size
    )
    numbers_NX = torch.cat([logits_Nk, rest_NT, label_logits_N[:, None]], dim=1)
    numbers_NRX = shard.gather(numbers_NX).unflatten(1, (-1, numbers_NX.shape[1]))
    logits_NRk, rest_NRT, label_logits_NR1 = numbers_NRX.split(
        [top_k, len(temperatures), 1], dim=-1
    )
    maximum_NR = logits_NRk.amax(dim=-1)
    maximum_N = maximum_NR.amax(dim=-1)
    scales_NR = (maximum_NR - maximum_N[:, None]).double()
    sums = [
        (rest_NRT[..., number] * (scales_NR / temperature).exp_()).sum(dim=-1)
        for number, temperature in enumerate(temperatures)
    ]
    return _Gathered(
        (logits_NRk - maximum_N[:, None, None]).flatten(1),
        shard.gather(ids_Nk),
        maximum_N,
        torch.stack(sums, dim=1),
        label_logits_NR1.amax(dim=(1, 2)),
    )


def _ordered(found: _Gathered, top_k: int) -> torch.Tensor:
    """Return places [N, K] of the largest candidates, equal ones by id, whatever the layout."""
    by_id_NC = found.ids_NC.argsort(dim=-1)
    by_logit_NC = found.logits_NC.gather(1, by_id_NC).argsort(
        dim=-1, descending=True, stable=True
    )
    return by_id_NC.gather(1, by_logit_NC[:, :top_k])


def _put_back(
    logits_Nv: torch.Tensor,
    sums_NG: torch.Tensor,
    head: _Head,
    kept_Nk: torch.Tensor,
    maximum_N: torch.Tensor,
) -> None:
    """Put back the head's logits that are not kept, and add their weights to the groups' sums."""
    logits_Nk = head.logits_Nk.masked_fill(kept_Nk, float("-inf"))
    _assign(logits_Nv, head.columns_Nk, logits_Nk)
    sums_NG *= (head.maximum_N - maximum_N).exp_()[:, None]
    sums_NG.scatter_add_(
        1, head.columns_Nk // GROUP_COLUMNS, (logits_Nk - maximum_N[:, None]).exp_()
    )
