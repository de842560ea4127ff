"""What benchmarks.losses compares with: its random inputs, torch's and Megatron's cross-entropy, and what a user would write.

A method takes (logits [N, V], inputs) and returns the sum of cross-entropy and divergence, ready for backward.

Shape legend: N positions, V vocabulary, K kept teacher logits, M tail samples, H hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_kd.batch import SMALLEST_SAMPLED_TAIL

TAIL_SAMPLES = 4


@dataclass(frozen=True)
class Setting:
    """What one table is measured on; `dtype` is a name so that a setting can be sent to another process."""

    num_tokens: int
    vocab_size: int
    dtype: str
    top_k: int
    hidden_size: int
    device: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def logits_bytes(self) -> int:
        return self.num_tokens * self.vocab_size * self.torch_dtype.itemsize


@dataclass(frozen=True)
class Inputs:
    """Student's logits, labels, and a teacher whose logits are the student's and noise.

    Attributes:
        tail_mass_of: temperature -> probability [N] outside the kept ids.
        dense_teacher_NV: in the logits' dtype; None where nobody asked for it.
    """

    logits_NV: Tensor
    labels_N: Tensor
    topk_logits_NK: Tensor
    topk_token_ids_NK: Tensor
    tail_mass_of: dict[float, Tensor]
    label_logprobs_N: Tensor
    tail_token_ids_NM: Tensor
    dense_teacher_NV: Tensor | None


Method = Callable[[Tensor, Inputs], Tensor]


def random_inputs(setting: Setting, dense: bool = False) -> Inputs:
    """The same for the same setting. Made in blocks of rows, so that the largest tensors are the logits themselves."""
    generator = torch.Generator(setting.device).manual_seed(1234)
    shape, device = (setting.num_tokens, setting.vocab_size), setting.device
    logits_NV = torch.empty(shape, dtype=setting.torch_dtype, device=device)
    dense_NV = torch.empty_like(logits_NV) if dense else None
    blocks = []
    for start in range(0, setting.num_tokens, 64):
        rows = slice(start, min(start + 64, setting.num_tokens))
        student_BV = (
            torch.randn(logits_NV[rows].shape, generator=generator, device=device) * 3
        )
        teacher_BV = (
            student_BV + student_BV.flip(-1) / 3
        )  # of unit variance, and made quickly
        logits_NV[rows] = student_BV
        if dense_NV is not None:
            dense_NV[rows] = teacher_BV
        blocks.append(_teacher_rows(teacher_BV, setting.top_k, generator))
    labels, topk, ids, tail_1, tail_2, logprobs, samples = (
        torch.cat(parts) for parts in zip(*blocks, strict=True)
    )
    return Inputs(
        logits_NV,
        labels,
        topk,
        ids,
        {1.0: tail_1, 2.0: tail_2},
        logprobs,
        samples,
        dense_NV,
    )


def _teacher_rows(
    teacher_BV: Tensor, top_k: int, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """What stage 1 keeps of these positions, and a label drawn from the teacher."""
    topk_BK, ids_BK = teacher_BV.topk(top_k)
    logprobs_BV = teacher_BV.log_softmax(-1)
    labels_B = torch.multinomial(
        logprobs_BV.exp(), 1, replacement=True, generator=generator
    )[:, 0]
    tails = [(teacher_BV / t).softmax(-1).scatter_(1, ids_BK, 0) for t in (1.0, 2.0)]
    samples_BM = torch.multinomial(
        tails[0], TAIL_SAMPLES, replacement=True, generator=generator
    )
    samples_BM[tails[0].sum(-1) < SMALLEST_SAMPLED_TAIL] = -1
    label_logprobs_B = logprobs_BV.gather(1, labels_B[:, None])[:, 0]
    return (
        labels_B,
        topk_BK - topk_BK[:, :1],
        ids_BK,
        tails[0].sum(-1),
        tails[1].sum(-1),
        label_logprobs_B,
        samples_BM,
    )


def torch_cross_entropy(logits_NV: Tensor, inputs: Inputs) -> Tensor:
    return F.cross_entropy(logits_NV.float(), inputs.labels_N, reduction="sum")


def megatron_cross_entropy(logits_NV: Tensor, inputs: Inputs) -> Tensor:
    _join_a_world_of_one(logits_NV.device.type)
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    return vocab_parallel_cross_entropy(logits_NV, inputs.labels_N).sum()


def megatron_fused_cross_entropy(logits_NV: Tensor, inputs: Inputs) -> Tensor:
    """Megatron's compiled form. It returns the gradient in bfloat16, so it is for such logits only."""
    _join_a_world_of_one(logits_NV.device.type)
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_cross_entropy import (
        fused_vocab_parallel_cross_entropy,
    )

    group = parallel_state.get_tensor_model_parallel_group()
    return fused_vocab_parallel_cross_entropy(logits_NV, inputs.labels_N, group).sum()


@functools.cache
def _join_a_world_of_one(device: str) -> None:
    from megatron.core import parallel_state

    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(
        backend, store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()


def gather_and_kl_div(logits_NV: Tensor, inputs: Inputs) -> Tensor:
    """Forward KL over the kept ids: log_softmax, gather, F.kl_div, and the cross-entropy beside it."""
    log_q_NK = logits_NV.float().log_softmax(-1).gather(1, inputs.topk_token_ids_NK)
    log_p_NK = (
        inputs.topk_logits_NK.log_softmax(-1)
        + torch.log1p(-inputs.tail_mass_of[1.0])[:, None]
    )
    kd = F.kl_div(log_q_NK, log_p_NK, reduction="sum", log_target=True)
    return kd + torch_cross_entropy(logits_NV, inputs)


def dense_kl_div(logits_NV: Tensor, inputs: Inputs) -> Tensor:
    """Forward KL over the whole vocabulary, from all of the teacher's logits, and the cross-entropy beside it."""
    assert inputs.dense_teacher_NV is not None
    log_p_NV = inputs.dense_teacher_NV.float().log_softmax(-1)
    kd = F.kl_div(
        logits_NV.float().log_softmax(-1), log_p_NV, reduction="sum", log_target=True
    )
    return kd + torch_cross_entropy(logits_NV, inputs)


def autograd_tail_kl(logits_NV: Tensor, inputs: Inputs) -> Tensor:
    """Forward KL over the kept ids and one bucket for the rest, and the cross-entropy, from one log_softmax."""
    log_q_NV = logits_NV.float().log_softmax(-1)
    log_q_NK, tail_N = (
        log_q_NV.gather(1, inputs.topk_token_ids_NK),
        inputs.tail_mass_of[1.0],
    )
    log_p_NK = inputs.topk_logits_NK.log_softmax(-1) + torch.log1p(-tail_N)[:, None]
    log_q_tail_N = torch.log1p(-log_q_NK.exp().sum(-1).clamp(max=1 - 1e-6))
    kd_N = (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum(-1) + tail_N * (
        tail_N.log() - log_q_tail_N
    )
    return kd_N.sum() + F.nll_loss(log_q_NV, inputs.labels_N, reduction="sum")


@functools.cache
def compiled(method: Method) -> Method:
    return torch.compile(method)
