"""Loss of the student on one micro-batch, with sums to report.

Shape legend: B examples, S positions, N positions in the loss, H hidden size, v this rank's
vocabulary columns, R sources of the data and all of them together, M sums.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nemo_kd.batch import Batch, TeacherRows
from nemo_kd.config import ConfigError
from nemo_kd.config.loss import KEY, LossConfig
from nemo_kd.config.student import SPLITS, StudentDataConfig
from nemo_kd.config.user_function import import_function
from nemo_kd.ops.distillation import DistillationLoss, TokenLosses
from nemo_kd.ops.fused_linear import fused_linear_loss
from nemo_kd.ops.token_losses import COMPARED
from nemo_kd.ops.vocab import VocabShard
from nemo_kd.run.collective import gather
from nemo_kd.student.data import source_names
from nemo_kd.student.loss_sums import COLUMNS, REPORTED, means_of, sums_of
from nemo_kd.student.selection import Selector
from nemo_kd.student.token_weights import token_weights, weight_sum

log = logging.getLogger(__name__)

WORTH_COMPILING = 1 << 36
"""Logits of a run on a CPU from which compiling, 10 to 30 s, pays: it saves about 1 ns per logit."""

CustomLoss = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""(logits_BSv, batch, shard, token_sum, **custom_args) -> (loss summed over loss tokens, sums to
report by name)."""


class StudentLoss:
    """Weighted sum of cross-entropy and divergence over the loss tokens of a micro-batch.

    Every call also returns sums [R, M] to report, with the columns `COLUMNS`: a row per source if
    there are several, then one for all sources.

    Args:
        data: where the batches come from. There are sums for each path, but not of a custom
            loss; with a cache the student is compared with the teacher, whatever the loss.

    Attributes:
        now: weights and divergence of the current step.
        selector: selects the positions of the KD term, for `select`.
        reported: names of the metrics that the run has.
        custom: the function of `kd_loss=custom`, which needs logits; all other losses take hidden
            states.
        custom_sums: the custom loss's own metrics, summed over this rank's calls since
            `metrics`.

    Raises:
        ConfigError: the custom loss cannot be imported or called.
    """

    def __init__(
        self, config: LossConfig, data: StudentDataConfig | None = None
    ) -> None:
        self.config = config
        self.custom: CustomLoss | None = None
        self.custom_sums: dict[str, Any] = {}
        if config.custom_loss is not None:
            self.custom = load_custom_loss(config.custom_loss, config.custom_args)
        self.sources: dict[str, list[str]] = {}
        if data is not None and self.custom is None:
            self.sources = {split: source_names(data.paths(split)) for split in SPLITS}
        self.num_sources = max(map(len, self.sources.values()), default=0)
        self.path_weights = None if data is None else data.loss_weights("train")
        compares = data is not None and data.uses_cache
        self.losses = replace(
            DistillationLoss.of(config, compares), measures_entropy=not compares
        )
        absent = {"entropy"} if compares else set(COMPARED)
        if config.divergence is None and self.custom is None:
            absent.add("kd_loss")
        self.reported = [name for name in REPORTED if name not in absent]
        self.selector: Selector | None = None
        self.set_step(math.inf)
        for text in config.warnings():
            log.warning("warning: %s", text)

    def set_step(self, step: float, sums: Sequence[float] | None = None) -> None:
        """Take the weights and the temperature of a training step from 0.

        `math.inf` stands for the end of all schedules. Validations use those after the last step of
        the run, so that their losses compare.

        Args:
            sums: `weight_sums` of the step's global batch. None: an evaluation, where the KD term
                has all positions, and all paths weigh alike.
        """
        self.now = self.config.at(step)
        self._trains = sums is not None
        # Megatron divides the sum of both terms by the positions.
        num_positions, *of_terms = sums or (0, 0, 0)
        self._sft_scale, self._kd_scale = (
            num_positions / divisor if divisor else 1.0 for divisor in of_terms
        )
        self.losses = replace(self.losses, divergence=self.now.divergence)

    def weight_sums(self, batches: Sequence[Batch]) -> list[int]:
        """Return the positions that the loss has in whole examples, and the sums of their token
        weights in both terms; before any forward pass."""
        reduction = self.config.reduction
        sums = [0, 0, 0]
        for batch in batches:
            # One of them holds the other.
            lengths_B = batch.loss_lengths_B.maximum(batch.kd_lengths_B)
            kd_counts_B = self._kd_counts(batch, self.selector is not None)
            sums[0] += int(lengths_B.sum())
            sums[1] += weight_sum(batch.loss_lengths_B, reduction)
            sums[2] += weight_sum(kd_counts_B, reduction)
        return sums

    def compile_if_worthwhile(self, num_logits: float) -> None:
        """With `compile: auto`, compile the loss if a rank of the run computes many logits."""
        if self.config.compile == "auto" and num_logits >= WORTH_COMPILING:
            self.losses = replace(self.losses, compile=True)

    def on_hidden(
        self, hidden_NH: Tensor, weight_vH: Tensor, batch: Batch, shard: VocabShard
    ) -> tuple[Tensor, Tensor]:
        """Return (loss summed over the loss tokens, sums); logits only ever exist for a block of
        positions.

        Args:
            hidden_NH: at `batch.loss_positions_N`.
        """
        in_kd_N = self._in_kd(hidden_NH, weight_vH, batch, shard)
        if in_kd_N is None:
            return self._on_part(hidden_NH, weight_vH, batch, shard)
        total, sums_RM = self._on_part(
            hidden_NH[in_kd_N], weight_vH, narrowed(batch, in_kd_N), shard
        )
        others_N = ~in_kd_N
        # Without a cross-entropy the other positions have no gradient.
        trains = torch.is_grad_enabled() and self.now.sft_weight > 0
        with torch.set_grad_enabled(trains):
            rest, rest_RM = self._on_part(
                hidden_NH[others_N],
                weight_vH,
                narrowed(batch, others_N),
                shard,
                in_kd=False,
            )
        return total + rest, sums_RM + rest_RM

    def _in_kd(
        self, hidden_NH: Tensor, weight_vH: Tensor, batch: Batch, shard: VocabShard
    ) -> Tensor | None:
        """Return True at the positions that the KD term has; None for all of them."""
        if self.losses.divergence is None:
            return None
        if not self._selects:
            return batch.in_kd_N
        assert self.selector is not None
        teacher = self._teacher(batch)
        return self.selector.select(hidden_NH, weight_vH, batch, teacher, shard)

    def _on_part(
        self,
        hidden_NH: Tensor,
        weight_vH: Tensor,
        batch: Batch,
        shard: VocabShard,
        in_kd: bool = True,
    ) -> tuple[Tensor, Tensor]:
        terms = self.losses if in_kd else replace(self.losses, divergence=None)
        weights = self._weights(batch, in_kd)
        sft_N, kd_N = self._objective(weights, batch)
        total, losses = fused_linear_loss(
            terms,
            hidden_NH,
            weight_vH,
            batch.labels_BS.flatten()[batch.loss_positions_N],
            shard,
            self._teacher(batch),
            sft_N * self._sft_scale,
            kd_N * self._kd_scale,
        )
        return total, self._sums(losses, batch, weights)

    @property
    def _selects(self) -> bool:
        return self._trains and self.selector is not None

    def _kd_counts(self, batch: Batch, selects: bool) -> Tensor:
        if not selects:
            return batch.kd_lengths_B
        assert self.selector is not None
        return self.selector.counts(batch)

    def _weights(self, batch: Batch, in_kd: bool = True) -> tuple[Tensor, Tensor]:
        """Return the token weights of the cross-entropy and of the KD term, which has all positions
        of the batch or none."""
        reduction = self.config.reduction
        kd_counts_B = self._kd_counts(batch, self._selects)
        in_sft_N = batch.loss_mask_BS.flatten()[batch.loss_positions_N]
        sft_N = token_weights(batch, batch.loss_lengths_B, reduction)
        kd_N = token_weights(batch, kd_counts_B, reduction)
        return sft_N * in_sft_N, kd_N * in_kd

    def _objective(
        self, weights: tuple[Tensor, Tensor], batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Return the weights of both terms' losses in the objective."""
        sft_N = weights[0] * self.now.sft_weight
        kd_N = weights[1] * self.now.kd_weight
        if self._trains and self.path_weights is not None:
            of_paths = sft_N.new_tensor(self.path_weights)
            of_path = of_paths[batch.sources_of(batch.loss_positions_N)]
            return sft_N * of_path[:, 0], kd_N * of_path[:, 1]
        return sft_N, kd_N

    def _sums(
        self, losses: TokenLosses, batch: Batch, weights: tuple[Tensor, Tensor]
    ) -> Tensor:
        objective = self._objective(weights, batch)
        return sums_of(losses, batch, weights, objective, self.num_sources)

    def on_logits(
        self, logits_BSv: Tensor, batch: Batch, shard: VocabShard
    ) -> tuple[Tensor, Tensor | None]:
        """Return the same for a custom loss, which is not called without loss tokens.

        Raises:
            ConfigError: the function's loss is not a sum over tokens that depends on the logits.
        """
        assert self.custom is not None
        positions_N = batch.loss_positions_N
        if not len(positions_N):
            return logits_BSv[:0].float().sum(), None
        # A copy, whose gradient may take its place.
        rows_Nv = logits_BSv.flatten(0, 1)[positions_N]
        labels_N = batch.labels_BS.flatten()[positions_N]
        losses = self.losses(rows_Nv, labels_N, shard, self._teacher(batch))
        weights = self._weights(batch)
        sft_N, kd_N = (weights_N.to(losses.ce_N) for weights_N in weights)

        def token_sum(values_BS: Tensor) -> Tensor:
            if values_BS.shape != batch.labels_BS.shape:
                raise ConfigError(
                    f"{KEY}.custom_loss: {self.config.custom_loss} gave token_sum "
                    f"{list(values_BS.shape)} values; it takes one for each position, "
                    f"{list(batch.labels_BS.shape)}"
                )
            return (values_BS.flatten()[positions_N] * kd_N).sum()

        kd_sum, metrics = self.custom(
            logits_BSv, batch, shard, token_sum, **self.config.custom_args
        )
        if kd_sum.dim() or logits_BSv.requires_grad > kd_sum.requires_grad:
            raise ConfigError(
                f"{KEY}.custom_loss: {self.config.custom_loss} returned the loss {kd_sum!r:.200}; it "
                "must be a scalar tensor that depends on the logits, summed over the loss tokens"
            )
        total = self.now.sft_weight * (sft_N * losses.ce_N).sum()
        total = total + self.now.kd_weight * kd_sum
        if shard.rank == 0:  # the other ranks of the shard have the same
            for name, value in metrics.items():
                before = self.custom_sums.get(name, 0.0)
                self.custom_sums[name] = before + value.detach().double()
        sums_RM = self._sums(losses, batch, weights)
        sums_RM[-1, 0] = total.detach()
        sums_RM[-1, 1] = kd_sum.detach()
        return total * self._kd_scale, sums_RM

    def zeros(self, device: torch.device) -> Tensor:
        """Return zero sums."""
        shape = self.num_sources + 1, len(COLUMNS)
        return torch.zeros(shape, dtype=torch.float64, device=device)

    def metrics(self, split: str, sums_RM: Tensor) -> dict[str, float]:
        """Return means per token that counts, over all sources and per source if there are several;
        none over no tokens.

        With a custom loss every rank calls this; its own metrics start over.
        """
        *of_sources, of_all = sums_RM.tolist()
        sources = self.sources.get(split, [])
        suffixes = [f"/{name}" for name in sources if len(sources) > 1]
        custom: Counter[str] = Counter()
        if self.custom is not None:
            own = {name: float(value) for name, value in self.custom_sums.items()}
            self.custom_sums.clear()
            for sums in gather(lambda: own):
                custom.update(sums)
        num_kd = of_all[COLUMNS.index("in_kd")]
        metrics = {f"{split}/{name}": value / num_kd for name, value in custom.items()}
        for suffix, row in zip(
            [*suffixes, ""], [*of_sources[: len(suffixes)], of_all], strict=True
        ):
            for name, mean in means_of(row).items():
                if name in self.reported:
                    metrics[f"{split}/{name}{suffix}"] = mean
        return metrics

    def _teacher(self, batch: Batch) -> TeacherRows[Tensor] | None:
        """Return the targets at `batch.loss_positions_N`, None if nothing needs them."""
        unused = self.losses.divergence is None and not self.losses.compares
        if unused or not len(batch.loss_positions_N):
            return None  # filler rows have no teacher
        teacher = batch.teacher
        assert teacher is not None, (
            "only a cache can be compared with, or diverged from"
        )
        if self.custom is not None:  # its batches hold all targets
            teacher = teacher.at(
                torch.searchsorted(teacher.positions_P, batch.loss_positions_N)
            )
        return teacher


def narrowed(batch: Batch, is_in_N: Tensor) -> Batch:
    """Return the batch with some of its loss positions."""
    positions = batch.loss_positions_N[is_in_N]
    teacher = None if batch.teacher is None else batch.teacher.at(is_in_N)
    return replace(batch, loss_positions_N=positions, teacher=teacher, in_kd_N=None)


def load_custom_loss(path: str, arguments: Mapping[str, Any]) -> CustomLoss:
    """Import the function at a path; modules in the current folder count.

    Raises:
        ConfigError: there is none, or it does not take the arguments.
    """
    try:
        return import_function(path, None, None, None, None, **arguments)
    except ValueError as error:
        raise ConfigError(
            f"{KEY}.custom_loss: {path} cannot be called as function(logits_BSv, batch, shard, "
            f"token_sum, **custom_args) with custom_args={arguments}: {error}"
        ) from error
