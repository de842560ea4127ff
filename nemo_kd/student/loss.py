"""Loss of the student on one micro-batch, with sums to report.

Shape legend: B examples, S positions, N positions in the loss, H hidden size, v this rank's
vocabulary columns, R sources of the data and all of them together, M sums.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
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
from nemo_kd.student.selection import Selector

log = logging.getLogger(__name__)

WORTH_COMPILING = 1 << 36
"""Logits of a run on a CPU from which compiling, 10 to 30 s, pays: it saves about 1 ns per logit."""

COUNTS = {"kd_loss": -3} | dict.fromkeys(COMPARED, -2)
"""Columns of the sums with the tokens of a mean; -1 for others."""

CustomLoss = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""(logits_BSv, batch, shard, token_sum, **custom_args) -> (loss summed over loss tokens, sums to
report by name)."""


class StudentLoss:
    """Weighted sum of cross-entropy and divergence over the loss tokens of a micro-batch.

    Every call also returns sums [R, M] to report: a row per source if there are several, then one
    for all sources. Its columns are `reported`, the tokens of the KD term, the tokens in the loss
    with teacher targets, and all tokens in the loss.

    Args:
        data: where the batches come from. There are sums for each path, but not of a custom
            loss; with a cache the student is compared with the teacher, whatever the loss.

    Attributes:
        now: weights and divergence of the current step.
        selector: of the positions of the KD term, for `select`.
        kd_weight: of a token in the KD term; more than `now`'s where the term has fewer tokens.
        reported: names of the sums; `kd_loss` is 0, and no metric, without such a term.
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
        compares = data is not None and data.uses_cache
        self.losses = DistillationLoss.of(config, compares)
        self.has_kd = config.divergence is not None or self.custom is not None
        self.reported = ["loss", "kd_loss", "sft_loss", *COMPARED]
        self.selector: Selector | None = None
        self.set_step(math.inf)
        for text in config.warnings():
            log.warning("warning: %s", text)

    def set_step(self, step: float, num_tokens: tuple[float, float] = (0, 0)) -> None:
        """Take the weights and the temperature of a training step from 0.

        `math.inf` stands for the end of all schedules. Validations use those after the last step of
        the run, so that their losses compare.

        Args:
            num_tokens: loss tokens of the global batch, and those that the selector selects. The
                sum of all losses is divided by the first of them, the KD term's by the second. The
                KD term has all tokens if there are none.
        """
        self.now = self.config.at(step)
        num_all, num_selected = num_tokens
        self._selects = num_selected > 0
        self.kd_weight = self.now.kd_weight
        if self._selects:
            self.kd_weight *= num_all / num_selected
        self.losses = replace(self.losses, divergence=self.now.divergence)

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
        if not self._selects:
            return self._on_part(hidden_NH, weight_vH, batch, shard)
        assert self.selector is not None
        teacher = self._teacher(batch)
        selected_N = self.selector.select(hidden_NH, weight_vH, batch, teacher, shard)
        total, sums_RM = self._on_part(
            hidden_NH[selected_N], weight_vH, narrowed(batch, selected_N), shard
        )
        others_N = ~selected_N
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

    def _on_part(
        self,
        hidden_NH: Tensor,
        weight_vH: Tensor,
        batch: Batch,
        shard: VocabShard,
        in_kd: bool = True,
    ) -> tuple[Tensor, Tensor]:
        terms = self.losses if in_kd else replace(self.losses, divergence=None)
        total, losses = fused_linear_loss(
            terms,
            hidden_NH,
            weight_vH,
            batch.labels_BS.flatten()[batch.loss_positions_N],
            shard,
            self._teacher(batch),
            self.now.sft_weight,
            self.kd_weight,
        )
        return total, self._sums(losses, batch, in_kd)

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

        def token_sum(values_BS: Tensor) -> Tensor:
            if values_BS.shape != batch.labels_BS.shape:
                raise ConfigError(
                    f"{KEY}.custom_loss: {self.config.custom_loss} gave token_sum "
                    f"{list(values_BS.shape)} values; it takes one for each position, "
                    f"{list(batch.labels_BS.shape)}"
                )
            return values_BS.flatten()[positions_N].sum()

        kd_sum, metrics = self.custom(
            logits_BSv, batch, shard, token_sum, **self.config.custom_args
        )
        if kd_sum.dim() or logits_BSv.requires_grad > kd_sum.requires_grad:
            raise ConfigError(
                f"{KEY}.custom_loss: {self.config.custom_loss} returned the loss {kd_sum!r:.200}; it "
                "must be a scalar tensor that depends on the logits, summed over the loss tokens"
            )
        total = self.now.sft_weight * losses.ce_N.sum() + self.now.kd_weight * kd_sum
        if shard.rank == 0:  # the other ranks of the shard have the same
            for name, value in metrics.items():
                before = self.custom_sums.get(name, 0.0)
                self.custom_sums[name] = before + value.detach().double()
        sums_RM = self._sums(losses, batch)
        sums_RM[-1, 0] = total.detach()
        sums_RM[-1, 1] = kd_sum.detach()
        return total, sums_RM

    def zeros(self, device: torch.device) -> Tensor:
        """Return zero sums."""
        shape = self.num_sources + 1, len(self.reported) + 3
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
        metrics = {
            f"{split}/{name}": value / of_all[-1] for name, value in custom.items()
        }
        for suffix, row in zip(
            [*suffixes, ""], [*of_sources[: len(suffixes)], of_all], strict=True
        ):
            for name, value in zip(self.reported, row, strict=False):
                num_tokens = row[COUNTS.get(name, -1)]
                if num_tokens and (self.has_kd or name != "kd_loss"):
                    metrics[f"{split}/{name}{suffix}"] = value / num_tokens
        return metrics

    def _sums(self, losses: TokenLosses, batch: Batch, in_kd: bool = True) -> Tensor:
        ce_N = losses.ce_N.detach().double()
        kd_N = (
            torch.zeros_like(ce_N)
            if losses.kd_N is None
            else losses.kd_N.detach().double()
        )
        weighted_N = self.now.sft_weight * ce_N + self.kd_weight * kd_N
        compared_NC = losses.compared
        if compared_NC is None:  # without a cache, or nothing but filler
            compared_NC = ce_N.new_zeros(len(ce_N), 1 + len(COMPARED))
        terms_N3 = torch.stack([weighted_N, kd_N, ce_N], dim=-1)
        ones_N1 = torch.ones_like(ce_N)[:, None]
        parts = [terms_N3, compared_NC[:, 1:], ones_N1 * in_kd, compared_NC[:, :1]]
        parts.append(ones_N1)
        values_NM = torch.cat([part.double() for part in parts], dim=-1)
        sums_RM = values_NM.new_zeros(self.num_sources + 1, values_NM.shape[1])
        sums_RM[-1] = values_NM.sum(dim=0)
        if self.num_sources:
            sources_N = batch.sources_of(batch.loss_positions_N)
            sums_RM[:-1].index_add_(0, sources_N, values_NM)
        return sums_RM

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
    return replace(batch, loss_positions_N=positions, teacher=teacher)


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
