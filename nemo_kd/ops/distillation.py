"""Cross-entropy and distillation losses of vocabulary-parallel logits, in two passes over the
vocabulary.

The student q = softmax(a z) and the teacher p = softmax(b t) are compared on the teacher's kept ids
S and, depending on
the support, on what lies outside them:

    renormalize  both renormalised over S; blind to student mass outside
    tail         S and one bucket for all other ids
    truncate     S, where p is not renormalised, and p = 0 for all other ids
    label        as truncate, and the label has the teacher's mass outside S, too
    sampled      S, and tail samples that stand for all other ids: forward KL over the whole
        vocabulary, unbiased

a = `student_scale` and b = `teacher_scale` are inverse temperatures and touch nothing else:
cross-entropy runs over the whole real vocabulary and is never scaled. docs/losses.md has the
formulas.

Shape legend: N positions, v this rank's vocabulary columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_kd.batch import Batch, TeacherRows
from nemo_kd.config.loss import Divergence, LossConfig
from nemo_kd.ops.student_logits import (
    Slope,
    StudentLogits,
    TokenIds,
    entropy,
    read_logits,
    with_label,
    write_gradient,
)
from nemo_kd.ops.token_losses import (
    compare,
    cross_entropy,
    divergence_on_support,
    label_estimator,
)
from nemo_kd.ops.vocab import VocabShard
from nemo_kd.ops.vocab_pass import compile_passes


def distillation_loss(
    logits_BSv: Tensor,
    batch: Batch,
    config: LossConfig | None = None,
    *,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    step: float = math.inf,
) -> Tensor:
    """Return sft_loss_weight * CE + kd_loss_weight * KD over the loss tokens of a batch,
    differentiable in the logits.

    For a training loop of your own on rows of a cache. In one process, from logits [B, S, V] of any
    model:

        reader = CacheReader("cache/train_CHUNK_ID.jsonl.zst")
        batch = collate([reader[0], reader[1]], pad_id=0)
        loss = distillation_loss(model(batch.tokens_BS).logits, batch, LossConfig(temperature=2.0))

    The batch is padded on the right, so causal attention needs no mask. Sums run in float32, or
    float64 for float64 logits. Memory beyond the logits: a copy of the rows in the loss, which
    becomes their gradient.

    Args:
        logits_BSv: the student's logits; with `group` this rank's columns, equally many on every
            rank.
        batch: made by `collate` or `pack`, on the logits' device.
        config: the loss, without a custom function; defaults as in `model.knowledge_distillation`.
        vocab_size: columns that are tokens; the others are padding. None: all of them.
        group: ranks among which the vocabulary is split; None for one process.
        reduction: mean over loss tokens, or sum, to divide once by those of several batches.
        step: completed steps, for weights and a temperature that follow a schedule; by default all
            schedules have ended.

    Raises:
        ValueError: the loss has settings that need the trainer, or the teacher's rows lack a field.
    """
    config = config or LossConfig()
    _check_for_other_trainers(config, batch)
    num_ranks = 1 if group is None else group.size()
    num_columns = logits_BSv.shape[-1]
    positions_N = batch.loss_positions_N
    at_step = config.at(step)
    loss = replace(DistillationLoss.of(config), divergence=at_step.divergence)
    losses = loss(
        logits_BSv.flatten(0, 1)[positions_N],
        batch.labels_BS.flatten()[positions_N],
        VocabShard.of(num_columns, vocab_size or num_columns * num_ranks, group),
        batch.teacher,
    )
    if losses.kd_N is None and config.divergence is not None:
        raise ValueError(
            "batch.teacher: None, but kd_loss_weight is above 0; collate rows of a cache"
        )
    total = at_step.sft_weight * losses.ce_N.sum()
    if losses.kd_N is not None:
        kd = _kd_sum(losses.kd_N, batch, reduction)
        total = total + at_step.kd_weight * kd
    return total / max(len(positions_N), 1) if reduction == "mean" else total


def _kd_sum(kd_N: Tensor, batch: Batch, reduction: str) -> Tensor:
    """Return the mean over the positions that the KD term has, times all loss tokens."""
    if batch.in_kd_N is None:
        return kd_N.sum()
    if reduction == "sum":
        raise ValueError(
            "reduction: sum, but the cache holds selected positions, so that both terms have "
            "different counts; use mean"
        )
    kd_N = kd_N[batch.in_kd_N]
    return kd_N.sum() * len(batch.loss_positions_N) / max(len(kd_N), 1)


def _check_for_other_trainers(config: LossConfig, batch: Batch) -> None:
    if not batch.loss_mask_BS.flatten()[batch.loss_positions_N].all():
        raise ValueError(
            "batch.loss_positions_N: has positions outside the loss mask, which only "
            "train_gpt_knowledge_distillation can train on; collate without distill_on_prompt"
        )
    if config.objective == "custom":
        raise ValueError(
            "kd_loss: custom; call the function itself, or choose another kd_loss"
        )
    for name in ("select", "reduction", "distill_on_prompt"):
        value = getattr(config, name)
        if value != getattr(LossConfig, name):
            raise ValueError(
                f"{name}: {value}; only train_gpt_knowledge_distillation can do that"
            )


class TokenLosses(NamedTuple):
    """Losses of each position in nats, before the mask.

    Attributes:
        kd_N: None without a divergence.
        compared: see `ops.token_losses.compare`; None if not asked for.
        entropy_N: of the student; None if not asked for.
    """

    ce_N: Tensor
    kd_N: Tensor | None
    compared: Tensor | None
    entropy_N: Tensor | None = None


@dataclass(frozen=True)
class DistillationLoss:
    """Cross-entropy and divergence of each position.

    Attributes:
        divergence: None: cross-entropy alone.
        label_smoothing: share of the label's mass that is spread over the whole real vocabulary.
        z_loss_weight: adds this times the squared log-sum-exp of the logits to the cross-entropy.
        compile: run the passes over the vocabulary through torch.compile.
        compares: also measure how near the student is to the teacher.
        measures_entropy: also measure the student's entropy over the whole vocabulary, where the
            logits come block by block; two more all-reduces per block.
    """

    divergence: Divergence | None = None
    label_smoothing: float = 0.0
    z_loss_weight: float = 0.0
    compile: bool = False
    compares: bool = False
    measures_entropy: bool = False

    @classmethod
    def of(cls, config: LossConfig, compares: bool = False) -> DistillationLoss:
        """Build the loss that a configuration describes; without a custom loss's function."""
        auto = config.compile == "auto" and torch.cuda.is_available()
        return cls(
            config.divergence,
            config.label_smoothing,
            config.z_loss_weight,
            auto or config.compile == "on",
            compares,
        )

    @property
    def scales(self) -> tuple[float, ...]:
        return (1.0,) if self.divergence is None else self.divergence.scales

    def __call__(
        self,
        logits_Nv: Tensor,
        labels_N: Tensor,
        shard: VocabShard,
        teacher: TeacherRows[Tensor] | None = None,
    ) -> TokenLosses:
        """Return the losses of every position, the same on every rank of the shard's group.

        Two all-reduces forward ([N], and [N, K + 2] or a little more), none backward. Sums run in
        float32 (float64 for float64 logits). The gradient takes the logits' place in memory, unless
        they are a leaf of autograd's graph; on padding columns it is 0.

        Args:
            logits_Nv: this rank's columns of the student's logits.
            labels_N: ids below the real vocabulary.
            teacher: targets of the same N positions; a row without any kept id has divergence 0.
                None: cross-entropy alone.

        Raises:
            ValueError: an id is not a token (checked on the CPU only), the divergence needs a field
                that `teacher` lacks, or numbers of rows differ.
        """
        teacher = self.checked(len(logits_Nv), labels_N, teacher, shard)
        return TokenLosses(*_OnLogits.apply(logits_Nv, labels_N, teacher, shard, self))

    def checked(
        self,
        num_rows: int,
        labels_N: Tensor,
        teacher: TeacherRows[Tensor] | None,
        shard: VocabShard,
    ) -> TeacherRows[Tensor] | None:
        """Return the teacher's rows, None if nothing needs them.

        Raises:
            ValueError: as `__call__`.
        """
        if self.divergence is None and not self.compares:
            teacher = None
        if teacher is not None and self.divergence is not None:
            for name in self.divergence.missing(teacher):
                raise ValueError(
                    f"{name}: missing at temperature {1 / self.divergence.teacher_scale:g}, but "
                    f"{self.divergence.objective} on support {self.divergence.support} needs it"
                )
        ids = {"labels_N": labels_N}
        if teacher is not None:
            ids["topk_token_ids_PK"] = teacher.topk_token_ids_PK
        for name, values in ids.items():
            if len(values) != num_rows:
                raise ValueError(
                    f"{name}: {len(values)} rows for {num_rows} rows of logits"
                )
            if values.is_cuda or not values.numel():
                continue
            lowest, highest = values.aminmax()
            if lowest < -1 or highest >= shard.vocab_size:
                raise ValueError(
                    f"{name}: ids from {lowest} to {highest} lie outside the vocabulary of "
                    f"{shard.vocab_size} tokens"
                )
        return teacher

    def evaluate(
        self,
        logits_Nv: Tensor,
        labels_N: Tensor,
        teacher: TeacherRows[Tensor] | None,
        shard: VocabShard,
    ) -> tuple[TokenLosses, list[Slope], StudentLogits]:
        """Return the losses and inputs of `write_gradient`, outside autograd, for a `checked`
        teacher."""
        divergence = self.divergence if teacher is not None else None
        on_label = divergence is not None and divergence.on_label
        ids = TokenIds(labels_N)
        if teacher is not None and (self.compares or not on_label):
            is_sampled = divergence is not None and divergence.is_sampled
            samples_NM = teacher.tail_token_ids_PM if is_sampled else None
            kept_NK = teacher.topk_token_ids_PK
            if divergence is not None and divergence.gives_tail_to_label:
                kept_NK = with_label(kept_NK, labels_N)
            ids = TokenIds(labels_N, kept_NK, samples_NM)
        num_columns = logits_Nv.shape[1]
        compiled = self.compile and compile_passes(
            logits_Nv.device,
            logits_Nv.dtype,
            num_columns,
            shard.num_real,
            self.scales,
        )
        student = read_logits(
            logits_Nv, ids, self.scales, shard, self.label_smoothing > 0, compiled
        )
        ce_N, slope = cross_entropy(
            student, self.label_smoothing, self.z_loss_weight, shard.vocab_size
        )
        slopes = [slope]
        kd_N = None
        compared = None
        if teacher is not None and self.compares:
            compared = compare(student, teacher, shard.vocab_size)
        if teacher is not None and divergence is not None:
            function = label_estimator if on_label else divergence_on_support
            kd_N, slope = function(student, teacher, divergence, shard.vocab_size)
            slopes.append(slope)
        entropy_N = entropy(logits_Nv, shard) if self.measures_entropy else None
        return TokenLosses(ce_N, kd_N, compared, entropy_N), slopes, student


class _OnLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_Nv: Tensor,
        labels_N: Tensor,
        teacher: TeacherRows[Tensor] | None,
        shard: VocabShard,
        loss: DistillationLoss,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        losses, ctx.slopes, ctx.student = loss.evaluate(
            logits_Nv, labels_N, teacher, shard
        )
        if losses.compared is not None:
            ctx.mark_non_differentiable(losses.compared)
        ctx.save_for_backward(logits_Nv)
        ctx.loss = loss
        ctx.shard = shard
        base = logits_Nv._base  # noqa: SLF001 - torch has no public name for a view's tensor
        is_parameter = (logits_Nv if base is None else base).is_leaf
        ctx.in_place = logits_Nv.is_contiguous() and not is_parameter
        return losses.ce_N, losses.kd_N, losses.compared

    @staticmethod
    def backward(ctx: Any, *d_losses: Tensor) -> tuple[Tensor | None, ...]:
        # Overwriting the logits makes autograd refuse a second backward pass, as it should.
        (logits_Nv,) = ctx.saved_tensors
        out_Nv = logits_Nv.detach() if ctx.in_place else torch.empty_like(logits_Nv)
        write_gradient(
            logits_Nv,
            out_Nv,
            ctx.loss.scales,
            ctx.student,
            d_losses,
            ctx.slopes,
            ctx.shard,
        )
        return out_Nv, None, None, None, None
