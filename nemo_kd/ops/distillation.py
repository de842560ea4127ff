"""Cross-entropy and distillation losses of vocabulary-parallel logits, in two passes over the vocabulary.

The student q = softmax(a z) and the teacher p = softmax(b t) are compared on the teacher's kept ids S and, depending on
the support, on what lies outside them:

    renormalize  both renormalised over S; blind to student mass outside
    tail         S and one bucket for all other ids
    truncate     S, where p is not renormalised, and p = 0 for all other ids
    sampled      S, and tail samples that stand for all other ids: forward KL over the whole vocabulary, unbiased

a = `student_scale` and b = `teacher_scale` are inverse temperatures and touch nothing else: cross-entropy runs over the
whole real vocabulary and is never scaled. docs/losses.md has the formulas.

Shape legend: N positions, v this rank's vocabulary columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nemo_kd.ops.comparison import compare
from nemo_kd.ops.student_logits import Slope, StudentLogits, TokenIds, read_logits, write_gradient
from nemo_kd.ops.token_losses import (
    Divergence,
    TeacherRows,
    cross_entropy,
    divergence_on_support,
    label_estimator,
)
from nemo_kd.ops.vocab import VocabShard


class TokenLosses(NamedTuple):
    """Per-position losses in nats, before the mask.

    Attributes:
        kd_N: None without a divergence.
        compared: `ops.comparison.compare` of student and teacher; None where `unscaled_tail_mass_N` was not given.
    """

    ce_N: Tensor
    kd_N: Tensor | None
    compared: Tensor | None


class Slopes(NamedTuple):
    """What the gradient of an evaluated loss needs beside the logits."""

    of_losses: list[Slope]
    student: StudentLogits


class DistillationLoss:
    """Per-position cross-entropy and divergence.

    Args:
        divergence: None: cross-entropy alone.
        label_smoothing: share of the label's mass that is spread over the whole real vocabulary.
        z_loss_weight: adds this times the squared log-sum-exp of the logits to the cross-entropy.
        compile: runs the passes over the vocabulary through torch.compile.
    """

    def __init__(
        self,
        divergence: Divergence | None = None,
        label_smoothing: float = 0.0,
        z_loss_weight: float = 0.0,
        compile: bool = False,
    ) -> None:
        self.divergence = divergence
        self.label_smoothing, self.z_loss_weight, self.compile = (
            label_smoothing,
            z_loss_weight,
            compile,
        )
        self.scales = divergence.scales if divergence is not None else (1.0,)

    def __call__(
        self,
        logits_Nv: Tensor,
        labels_N: Tensor,
        shard: VocabShard,
        teacher: TeacherRows | None = None,
    ) -> TokenLosses:
        """The losses of every position, the same on every rank of the shard's group.

        Two all-reduces forward ([N], and [N, K + 2] or a little more), none backward. Sums run in float32 (float64 for
        float64 logits). The gradient takes the logits' place in memory, unless they are a leaf of autograd's graph; on
        padding columns it is 0.

        Args:
            logits_Nv: this rank's columns of the student's logits.
            labels_N: ids below the real vocabulary.
            teacher: rows without any kept id have divergence 0. None: cross-entropy alone.

        Raises:
            ValueError: an id is no token or kept twice (looked for on CPU only; a cache never has them), the divergence
                needs a field that `teacher` lacks, or numbers of rows differ.
        """
        teacher = self.checked(len(logits_Nv), labels_N, teacher, shard)
        return TokenLosses(*_OnLogits.apply(logits_Nv, labels_N, teacher, shard, self))

    def checked(
        self, num_rows: int, labels_N: Tensor, teacher: TeacherRows | None, shard: VocabShard
    ) -> TeacherRows | None:
        """The teacher's rows, None if nothing needs them.

        Raises:
            ValueError: as `__call__`.
        """
        if labels_N.shape != (num_rows,):
            raise ValueError(
                f"labels_N: shape {list(labels_N.shape)} for {num_rows} rows of logits"
            )
        on_cpu = labels_N.device.type == "cpu"
        if on_cpu:
            _check_ids("labels_N", labels_N, 0, shard.vocab_size)
        if teacher is None or (self.divergence is None and teacher.unscaled_tail_mass_N is None):
            return None
        for name, field in vars(teacher).items():
            if field is not None and len(field) != num_rows:
                raise ValueError(f"{name}: {len(field)} rows for {num_rows} rows of logits")
        if self.divergence is not None:
            for name in self.divergence.needs:
                if getattr(teacher, name) is None:
                    raise ValueError(
                        f"{name}: missing, but {self.divergence.objective} on support {self.divergence.support} needs it"
                    )
        if on_cpu and self._keeps_ids(teacher) and teacher.topk_token_ids_NK.numel():
            # Eight times as fast as torch's sort.
            ids_NK = np.sort(teacher.topk_token_ids_NK.numpy().astype(np.int32), axis=-1)
            _check_ids(
                "topk_token_ids_NK", torch.from_numpy(ids_NK[:, [0, -1]]), -1, shard.vocab_size
            )
            repeated = ids_NK[:, 1:][(ids_NK[:, 1:] == ids_NK[:, :-1]) & (ids_NK[:, 1:] >= 0)]
            if len(repeated):
                raise ValueError(
                    f"topk_token_ids_NK: a row holds id {repeated[0]} twice; merge its entries"
                )
            if self._is_sampled:
                _check_ids("tail_token_ids_NM", teacher.tail_token_ids_NM, -1, shard.vocab_size)
        return teacher

    def evaluate(
        self, logits_Nv: Tensor, labels_N: Tensor, teacher: TeacherRows | None, shard: VocabShard
    ) -> tuple[TokenLosses, Slopes]:
        """Both losses and what `write_gradient` needs, outside autograd; `teacher` is `checked`."""
        divergence, ids, compared = self.divergence, TokenIds(labels_N), None
        if teacher is not None and self._keeps_ids(teacher):
            samples_NM = teacher.tail_token_ids_NM if self._is_sampled else None
            ids = TokenIds(labels_N, teacher.topk_token_ids_NK, samples_NM)
        student = read_logits(
            logits_Nv, ids, self.scales, shard, self.label_smoothing > 0, self.compile
        )
        ce_N, slope = cross_entropy(
            student, self.label_smoothing, self.z_loss_weight, shard.vocab_size
        )
        if teacher is not None and teacher.unscaled_tail_mass_N is not None:
            compared = compare(student, teacher, shard.vocab_size)
        if divergence is None or teacher is None:
            return TokenLosses(ce_N, None, compared), Slopes([slope], student)
        if divergence.on_label:
            kd_N, kd_slope = label_estimator(student, teacher, divergence)
        else:
            kd_N, kd_slope = divergence_on_support(student, teacher, divergence, shard.vocab_size)
        return TokenLosses(ce_N, kd_N, compared), Slopes([slope, kd_slope], student)

    def write_gradient(
        self,
        logits_Nv: Tensor,
        out_Nv: Tensor,
        slopes: Slopes,
        d_losses: Sequence[Tensor],
        shard: VocabShard,
    ) -> None:
        """Fills `out_Nv`, which may be the logits, with the gradient; `d_losses` are derivatives by CE and divergence, [N]."""
        losses = list(zip(d_losses, slopes.of_losses, strict=False))
        write_gradient(logits_Nv, out_Nv, self.scales, slopes.student, losses, shard, self.compile)

    def _keeps_ids(self, teacher: TeacherRows) -> bool:
        """Whether the teacher's kept ids are looked at."""
        on_support = self.divergence is not None and not self.divergence.on_label
        return on_support or teacher.unscaled_tail_mass_N is not None

    @property
    def _is_sampled(self) -> bool:
        return (
            self.divergence is not None
            and not self.divergence.on_label
            and self.divergence.support == "sampled"
        )


def _check_ids(name: str, ids: Tensor | None, smallest: int, vocab_size: int) -> None:
    if ids is None or not ids.numel():
        return
    for found in (ids.amin(), ids.amax()):
        if not smallest <= found < vocab_size:
            raise ValueError(
                f"{name}: id {found} lies outside the vocabulary of {vocab_size} tokens"
            )


class _OnLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_Nv: Tensor,
        labels_N: Tensor,
        teacher: TeacherRows | None,
        shard: VocabShard,
        loss: DistillationLoss,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        losses, slopes = loss.evaluate(logits_Nv, labels_N, teacher, shard)
        if losses.compared is not None:
            ctx.mark_non_differentiable(losses.compared)
        ctx.save_for_backward(logits_Nv)
        ctx.slopes, ctx.loss, ctx.shard = slopes, loss, shard
        base = logits_Nv._base  # noqa: SLF001 - torch has no public name for a view's tensor
        is_parameter = (logits_Nv if base is None else base).is_leaf
        ctx.in_place = logits_Nv.is_contiguous() and not is_parameter
        return losses.ce_N, losses.kd_N, losses.compared

    @staticmethod
    def backward(ctx: Any, *d_losses: Tensor) -> tuple[Tensor | None, ...]:
        # Overwriting the logits makes autograd refuse a second backward pass, as it should.
        (logits_Nv,) = ctx.saved_tensors
        out_Nv = logits_Nv.detach() if ctx.in_place else torch.empty_like(logits_Nv)
        ctx.loss.write_gradient(logits_Nv, out_Nv, ctx.slopes, d_losses[:2], ctx.shard)
        return out_Nv, None, None, None, None
