"""Loss of the student on one micro-batch, with sums to report.

Shape legend: B examples, S positions, N positions in the loss, H hidden size, v this rank's
vocabulary columns, R sources of the data and all of them together, M sums.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from nemo_kd.batch import Batch, TeacherRows
from nemo_kd.config import ConfigError
from nemo_kd.config.loss import KEY, LossConfig
from nemo_kd.ops.comparison import COMPARED
from nemo_kd.ops.distillation import DistillationLoss, TokenLosses
from nemo_kd.ops.fused_linear import fused_linear_loss
from nemo_kd.ops.vocab import VocabShard

log = logging.getLogger(__name__)

REPORTED = ("loss", "kd_loss", "sft_loss")
TARGET_TOKENS = "target_tokens"
LOSS_TOKENS = "loss_tokens"
"""Names of the counts: tokens in the loss with teacher targets, and all in the loss."""

CustomLoss = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""(logits_BSv, batch, shard, token_sum, **custom_args) -> (loss summed over loss tokens, sums to
report by name)."""


class StudentLoss:
    """Weighted sum of cross-entropy and divergence over the loss tokens of a micro-batch.

    Every call also returns sums [R, M] to report: a row per source if there are several, then one
    for all sources. `column` finds a sum by its name: one of `reported`, `TARGET_TOKENS` or
    `LOSS_TOKENS`.

    Args:
        num_sources: paths that the data comes from. A custom loss reports sums over all of them
            only.
        compares: batches hold teacher targets, with which the student is compared whatever the
            loss.

    Attributes:
        reported: names of the sums; `kd_loss` is among them if the loss has such a term.
        custom: the function of `kd_loss=custom`, which needs logits; all other losses take hidden
            states.
    """

    def __init__(
        self, config: LossConfig, num_sources: int = 1, compares: bool = False
    ) -> None:
        self.config = config
        self.custom: CustomLoss | None = None
        if config.custom_loss is not None:
            self.custom = load_custom_loss(config.custom_loss)
            _check_arguments(self.custom, config)
        self.num_sources = num_sources if num_sources > 1 and self.custom is None else 0
        self.custom_was_called = False
        self.names_are_known = self.custom is None
        self.losses = DistillationLoss.of(config, compares)
        self.has_kd = config.divergence is not None or self.custom is not None
        terms = [name for name in REPORTED if name != "kd_loss" or self.has_kd]
        self.own_names = [*terms, *COMPARED] if compares else terms
        self.reported = list(self.own_names)

    def check(self) -> None:
        """Warn of settings that are seldom meant."""
        if self.config.divergence is not None and self.config.objective == "k1":
            log.warning(
                "%s.kd_loss=k1: its gradient does not depend on the teacher, it only lowers the "
                "labels' probability; k2, k3 or a divergence pull towards the teacher",
                KEY,
            )

    def agree_on_names(self) -> None:
        """Share the names of a custom loss's metrics: the ranks that have called it know them.

        Does nothing once all ranks know them; until then all ranks must call it together.

        Raises:
            ConfigError: on every rank, if names differ between ranks.
        """
        if self.names_are_known:
            return
        named: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(
            named, self.reported if self.custom_was_called else None
        )
        found = sorted({tuple(names) for names in named if names is not None})
        if len(found) > 1:
            raise self._different_metrics(found[1], found[0])
        if found:
            self.reported = list(found[0])
            self.names_are_known = True

    def on_hidden(
        self, hidden_NH: Tensor, weight_vH: Tensor, batch: Batch, shard: VocabShard
    ) -> tuple[Tensor, Tensor]:
        """Return (loss summed over the loss tokens, sums); logits only ever exist for a block of
        positions.

        Args:
            hidden_NH: at `batch.loss_positions_N`.
        """
        total, losses = fused_linear_loss(
            self.losses,
            hidden_NH,
            weight_vH,
            batch.labels_BS.flatten()[batch.loss_positions_N],
            shard,
            self._teacher(batch),
            self.config.sft_loss_weight,
            self.config.kd_loss_weight,
        )
        return total, self._sums(losses, batch)

    def on_logits(
        self, logits_BSv: Tensor, batch: Batch, shard: VocabShard
    ) -> tuple[Tensor, Tensor | None]:
        """Return the same for a custom loss, which is not called without loss tokens."""
        assert self.custom is not None
        positions_N = batch.loss_positions_N
        if not len(positions_N):
            return logits_BSv[:0].float().sum(), None
        rows_Nv = logits_BSv.flatten(0, 1)[
            positions_N
        ]  # a copy, whose gradient may take its place
        labels_N = batch.labels_BS.flatten()[positions_N]
        losses = self.losses(rows_Nv, labels_N, shard, self._teacher(batch))
        ce_sum = losses.ce_N.sum()

        def token_sum(values_BS: Tensor) -> Tensor:
            if values_BS.shape != batch.labels_BS.shape:
                raise ConfigError(
                    f"{KEY}.custom_loss: {self.config.custom_loss} gave token_sum "
                    f"{list(values_BS.shape)} values; it takes one for each position, "
                    f"{list(batch.labels_BS.shape)}"
                )
            return values_BS.flatten()[positions_N].sum()

        kd_sum, metrics = _checked_result(
            self.custom(logits_BSv, batch, shard, token_sum, **self.config.custom_args),
            self.config.custom_loss,
        )
        if logits_BSv.requires_grad and not kd_sum.requires_grad:
            raise ConfigError(
                f"{KEY}.custom_loss: {self.config.custom_loss} returned a loss that does not "
                "depend on the logits"
            )
        total = self.config.sft_loss_weight * ce_sum + self.config.kd_loss_weight * kd_sum
        reported = [*self.own_names, *sorted(metrics)]
        if (self.custom_was_called or self.names_are_known) and self.reported != reported:
            raise self._different_metrics(reported, self.reported)
        self.reported = reported
        self.custom_was_called = True
        *sums, target_tokens, loss_tokens = self._sums(losses, batch)[-1]
        sums[:2] = [total, kd_sum]
        sums += [metrics[name] for name in sorted(metrics)]
        everything = [*sums, target_tokens, loss_tokens]
        return total, torch.stack(
            [value.detach().to(loss_tokens) for value in everything]
        )[None]

    def zeros(self, device: torch.device) -> Tensor:
        """Return zero sums, with a custom loss's metrics once all ranks know their names."""
        shape = self.num_sources + 1, len(self.reported) + 2
        return torch.zeros(shape, dtype=torch.float64, device=device)

    def column(self, sums_RM: Tensor, name: str) -> Tensor:
        """Return the sums of this name, [R]."""
        return sums_RM[:, [*self.reported, TARGET_TOKENS, LOSS_TOKENS].index(name)]

    def means(self, sums_RM: Tensor) -> list[dict[str, float]]:
        """Return means over the tokens that each sum covers; none over no tokens."""
        counts = {
            name: self.column(
                sums_RM, TARGET_TOKENS if name in COMPARED else LOSS_TOKENS
            ).tolist()
            for name in self.reported
        }
        sums = {name: self.column(sums_RM, name).tolist() for name in self.reported}
        return [
            {
                name: sums[name][r] / counts[name][r]
                for name in self.reported
                if counts[name][r]
            }
            for r in range(len(sums_RM))
        ]

    def _sums(self, losses: TokenLosses, batch: Batch) -> Tensor:
        ce_N = losses.ce_N.detach().double()
        zeros_N = torch.zeros_like(ce_N)
        kd_N = zeros_N if losses.kd_N is None else losses.kd_N.detach().double()
        weighted_N = (
            self.config.sft_loss_weight * ce_N + self.config.kd_loss_weight * kd_N
        )
        has_target_N = zeros_N
        compared: Sequence[Tensor] = ()
        if losses.compared is not None:
            has_target_N, *compared = losses.compared.double().unbind(dim=-1)
        elif self.losses.compares:  # there is nothing but filler
            compared = [zeros_N] * len(COMPARED)
        terms = [weighted_N, kd_N, ce_N] if self.has_kd else [weighted_N, ce_N]
        columns = [*terms, *compared, has_target_N, torch.ones_like(ce_N)]
        values_NM = torch.stack(columns, dim=-1)
        sums_RM = values_NM.new_zeros(self.num_sources + 1, values_NM.shape[1])
        sums_RM[-1] = values_NM.sum(dim=0)
        if self.num_sources:
            sums_RM[:-1].index_add_(
                0, batch.sources_of(batch.loss_positions_N), values_NM
            )
        return sums_RM

    def _different_metrics(
        self, now: Sequence[str], before: Sequence[str]
    ) -> ConfigError:
        own = len(self.own_names)
        return ConfigError(
            f"{KEY}.custom_loss: {self.config.custom_loss} returned the metrics "
            f"{', '.join(now[own:])}, before {', '.join(before[own:])}; return the same in every "
            "call"
        )

    def _teacher(self, batch: Batch) -> TeacherRows[Tensor] | None:
        """Return the targets at `batch.loss_positions_N`, None if nothing needs them."""
        unused = self.losses.divergence is None and not self.losses.compares
        if unused or not len(batch.loss_positions_N):
            return None  # filler rows have no teacher
        teacher = batch.teacher
        assert teacher is not None, "only a cache can be compared with, or diverged from"
        if self.custom is not None:  # its batches hold all targets
            teacher = teacher.at(
                torch.searchsorted(teacher.positions_P, batch.loss_positions_N)
            )
        return teacher


def load_custom_loss(path: str) -> CustomLoss:
    """Import the function at a path; modules in the current folder count.

    Raises:
        ConfigError: there is none.
    """
    module_name, _, name = path.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = (
            getattr(importlib.import_module(module_name), name) if module_name else None
        )
    except (ImportError, AttributeError, SyntaxError, TypeError) as error:
        raise ConfigError(
            f"{KEY}.custom_loss: {path} cannot be imported: {error}"
        ) from error
    if not callable(function):
        raise ConfigError(
            f"{KEY}.custom_loss: {path} is no function; give package.module.function"
        )
    return function


def _check_arguments(function: CustomLoss, config: LossConfig) -> None:
    try:
        inspect.signature(function).bind(None, None, None, None, **config.custom_args)
    except TypeError as error:
        raise ConfigError(
            f"{KEY}.custom_args: {config.custom_loss} cannot be called as function(logits_BSv, "
            f"batch, shard, token_sum, **custom_args) with {config.custom_args}: {error}"
        ) from error


def _checked_result(result: Any, path: str | None) -> tuple[Tensor, dict[str, Tensor]]:
    loss, metrics = (
        result if isinstance(result, tuple) and len(result) == 2 else (None, None)
    )
    if (
        not _is_scalar(loss)
        or not isinstance(metrics, dict)
        or not all(map(_is_scalar, metrics.values()))
    ):
        raise ConfigError(
            f"{KEY}.custom_loss: {path} returned {result!r:.200}; it must return (loss, metrics): "
            "a scalar tensor, summed over the loss tokens, and a dict of such tensors"
        )
    for name in metrics:
        if not isinstance(name, str) or name in (
            *REPORTED,
            *COMPARED,
            TARGET_TOKENS,
            LOSS_TOKENS,
        ):
            raise ConfigError(
                f"{KEY}.custom_loss: {path} returned a metric {name!r}; give it another name, a str"
            )
    return loss, metrics


def _is_scalar(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and not value.dim()
