"""What a student minimises on one micro-batch, as `model.knowledge_distillation` says.

Shape legend: B examples, S positions, N positions that count in the loss, H hidden size, v this rank's vocabulary columns,
R sources of the data and all of them together, M sums.
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

from nemo_kd.batch import Batch
from nemo_kd.config import ConfigError
from nemo_kd.config.loss import KEY, LossConfig
from nemo_kd.ops.comparison import COMPARED
from nemo_kd.ops.distillation import DistillationLoss, TokenLosses
from nemo_kd.ops.fused_linear import fused_linear_loss
from nemo_kd.ops.token_losses import Divergence, TeacherRows
from nemo_kd.ops.vocab import VocabShard

log = logging.getLogger(__name__)

REPORTED = ("loss", "kd_loss", "sft_loss")

CustomLoss = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""(logits_BSv, batch, shard, token_sum, **custom_args) -> (loss summed over loss tokens, sums to report by name)."""


class StudentLoss:
    """Weighted sum of cross-entropy and divergence over the loss tokens of a micro-batch.

    Every call also gives sums [R, M] to report: a row for each source if there are several, and one for all of them at the end.
    The columns are `reported`, the number of loss tokens about which the teacher says anything, and that of loss tokens.

    Args:
        num_sources: paths that the data comes from. A custom loss gives sums of all of them together only.
        compares: whether batches hold what a teacher said, which the student is then compared with whatever the loss.

    Attributes:
        reported: names of the sums; `kd_loss` is one of them where the loss has such a term.
        custom: the function of `kd_loss=custom`, which needs logits; everything else works on hidden states.
    """

    def __init__(self, config: LossConfig, num_sources: int = 1, compares: bool = False) -> None:
        self.config, self.compares = config, compares
        self.custom = (
            load_custom_loss(config.custom_loss) if config.custom_loss is not None else None
        )
        self.num_sources = num_sources if num_sources > 1 and self.custom is None else 0
        self.custom_was_called, self.names_are_known = False, self.custom is None
        if self.custom is not None:
            _check_arguments(self.custom, config)
        divergence = None
        if config.kd_loss_weight and self.custom is None:
            student_scale, teacher_scale = config.scales
            divergence = Divergence(
                config.objective,
                config.support,
                student_scale,
                teacher_scale,
                config.factor,
                config.jsd_beta,
                config.skew_lambda,
                config.adaptive_kl_alpha,
            )
        self.has_kd = divergence is not None or self.custom is not None
        terms = [name for name in REPORTED if name != "kd_loss" or self.has_kd]
        self.own_names = [*terms, *COMPARED] if compares else terms
        self.reported = list(self.own_names)
        compile = torch.cuda.is_available() if config.compile == "auto" else config.compile == "on"
        self.losses = DistillationLoss(
            divergence, config.label_smoothing, config.z_loss_weight, compile
        )

    def check(self) -> None:
        """Warns of what is seldom meant; a custom loss that cannot be imported has already been an error."""
        if self.losses.divergence is not None and self.losses.divergence.objective == "k1":
            log.warning(
                "%s.kd_loss=k1: its gradient does not depend on the teacher, it only lowers the labels' probability; k2, k3 or "
                "a divergence pull towards the teacher",
                KEY,
            )

    def agree_on_names(self) -> None:
        """Gives every rank the names of what a custom loss reports, which the ranks that have called it know.

        Nothing once they are known everywhere; until then all ranks have to call it together.

        Raises:
            ConfigError: on every rank, ranks were told different names.
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
            self.reported, self.names_are_known = list(found[0]), True

    def on_hidden(
        self,
        hidden_NH: Tensor,
        weight_vH: Tensor,
        batch: Batch,
        positions_N: Tensor,
        shard: VocabShard,
    ) -> tuple[Tensor, Tensor]:
        """(loss summed over the loss tokens, sums); logits only ever exist for a block of positions.

        Args:
            positions_N: b * S + s of every loss token.
        """
        total, losses = fused_linear_loss(
            self.losses,
            hidden_NH,
            weight_vH,
            batch.labels_BS.flatten()[positions_N],
            shard,
            self._teacher(batch, positions_N),
            self.config.sft_loss_weight,
            self.config.kd_loss_weight,
        )
        return total, self._sums(losses, batch, positions_N)

    def on_logits(
        self, logits_BSv: Tensor, batch: Batch, positions_N: Tensor, shard: VocabShard
    ) -> tuple[Tensor, Tensor | None]:
        """As `on_hidden` for a custom loss; it is not called where nothing counts: filler rows have no teacher."""
        assert self.custom is not None
        if not len(positions_N):
            return logits_BSv[:0].float().sum(), None
        rows_Nv = logits_BSv.flatten(0, 1)[positions_N]  # a copy, whose gradient may take its place
        labels_N = batch.labels_BS.flatten()[positions_N]
        losses = self.losses(rows_Nv, labels_N, shard, self._teacher(batch, positions_N))
        ce_sum = losses.ce_N.sum()

        def token_sum(values_BS: Tensor) -> Tensor:
            if values_BS.shape != batch.labels_BS.shape:
                raise ConfigError(
                    f"{KEY}.custom_loss: {self.config.custom_loss} gave token_sum {list(values_BS.shape)} values; it takes one for "
                    f"each position, {list(batch.labels_BS.shape)}"
                )
            return values_BS.flatten()[positions_N].sum()

        kd_sum, metrics = _checked_result(
            self.custom(logits_BSv, batch, shard, token_sum, **self.config.custom_args),
            self.config.custom_loss,
        )
        if logits_BSv.requires_grad and not kd_sum.requires_grad:
            raise ConfigError(
                f"{KEY}.custom_loss: {self.config.custom_loss} returned a loss that does not depend on the logits"
            )
        total = self.config.sft_loss_weight * ce_sum + self.config.kd_loss_weight * kd_sum
        reported = [*self.own_names, *sorted(metrics)]
        if (self.custom_was_called or self.names_are_known) and self.reported != reported:
            raise self._different_metrics(reported, self.reported)
        self.reported, self.custom_was_called = reported, True
        sums_1M = self._sums(losses, batch, positions_N)
        sums_1M[0, :2] = torch.stack([total.detach(), kd_sum.detach()])
        given = [metrics[name].detach().to(sums_1M) for name in sorted(metrics)]
        return total, torch.cat(
            [sums_1M[0, :-2], *(value[None] for value in given), sums_1M[0, -2:]]
        )[None]

    def zeros(self, device: torch.device) -> Tensor:
        """Sums of nothing; of a custom loss's metrics too, once all ranks know their names (`agree_on_names`)."""
        return torch.zeros(
            self.num_sources + 1, len(self.reported) + 2, dtype=torch.float64, device=device
        )

    def means(self, sums_RM: Tensor) -> list[dict[str, float]]:
        """The mean of everything reported over the tokens that it is known of; nothing in a row without loss tokens."""
        means: list[dict[str, float]] = []
        for *sums, known, tokens in sums_RM.tolist():
            counts = {name: known if name in COMPARED else tokens for name in self.reported}
            named = zip(counts.items(), sums, strict=True)
            means.append({name: value / count for (name, count), value in named if count})
        return means

    def _sums(self, losses: TokenLosses, batch: Batch, positions_N: Tensor) -> Tensor:
        ce_N = losses.ce_N.detach().double()
        kd_N = torch.zeros_like(ce_N) if losses.kd_N is None else losses.kd_N.detach().double()
        weighted_N = self.config.sft_loss_weight * ce_N + self.config.kd_loss_weight * kd_N
        columns = [weighted_N, kd_N, ce_N] if self.has_kd else [weighted_N, ce_N]
        known_N = torch.zeros_like(ce_N)
        if self.compares and losses.compared is None:  # there is nothing but filler
            columns += [known_N] * len(COMPARED)
        elif losses.compared is not None:
            known_N, *compared = losses.compared.double().unbind(dim=-1)
            columns += compared
        values_NM = torch.stack([*columns, known_N, torch.ones_like(ce_N)], dim=-1)
        sums_RM = values_NM.new_zeros(self.num_sources + 1, values_NM.shape[1])
        sums_RM[-1] = values_NM.sum(dim=0)
        if self.num_sources:
            sums_RM[:-1].index_add_(0, batch.sources_of(positions_N), values_NM)
        return sums_RM

    def _different_metrics(self, now: Sequence[str], before: Sequence[str]) -> ConfigError:
        return ConfigError(
            f"{KEY}.custom_loss: {self.config.custom_loss} returned the metrics {', '.join(now[len(self.own_names) :])}, before "
            f"{', '.join(before[len(self.own_names) :])}; return the same in every call"
        )

    def _teacher(self, batch: Batch, positions_N: Tensor) -> TeacherRows | None:
        if not len(positions_N) or (self.losses.divergence is None and not self.compares):
            return None  # filler rows have no teacher

        def rows(field: Tensor | None) -> Tensor | None:
            return None if field is None else field.flatten(0, 1)[positions_N]

        logits_NK, ids_NK = rows(batch.topk_logits_BSK), rows(batch.topk_token_ids_BSK)
        assert logits_NK is not None, "only a cache is compared with, or diverged from"
        assert ids_NK is not None
        column = self.config.temperature_index(batch.temperatures)
        tail_mass = (
            None
            if batch.tail_mass_BST is None or column is None
            else batch.tail_mass_BST[..., column]
        )
        return TeacherRows(
            logits_NK,
            ids_NK,
            rows(tail_mass),
            rows(batch.label_logprobs_BS),
            rows(batch.tail_token_ids_BSM),
            rows(batch.tail_mass_BST[..., 0])
            if self.compares and batch.tail_mass_BST is not None
            else None,
        )


def load_custom_loss(path: str) -> CustomLoss:
    """The function at an import path; the current folder counts as a place to import from.

    Raises:
        ConfigError: there is none.
    """
    module_name, _, name = path.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), name) if module_name else None
    except (ImportError, AttributeError, SyntaxError, TypeError) as error:
        raise ConfigError(f"{KEY}.custom_loss: {path} cannot be imported: {error}") from error
    if not callable(function):
        raise ConfigError(f"{KEY}.custom_loss: {path} is no function; give package.module.function")
    return function


def _check_arguments(function: CustomLoss, config: LossConfig) -> None:
    try:
        inspect.signature(function).bind(None, None, None, None, **config.custom_args)
    except TypeError as error:
        raise ConfigError(
            f"{KEY}.custom_args: {config.custom_loss} cannot be called as function(logits_BSv, batch, shard, token_sum, "
            f"**custom_args) with {config.custom_args}: {error}"
        ) from error


def _checked_result(result: Any, path: str | None) -> tuple[Tensor, dict[str, Tensor]]:
    loss, metrics = result if isinstance(result, tuple) and len(result) == 2 else (None, None)
    if (
        not _is_scalar(loss)
        or not isinstance(metrics, dict)
        or not all(map(_is_scalar, metrics.values()))
    ):
        raise ConfigError(
            f"{KEY}.custom_loss: {path} returned {result!r:.200}; it must return (loss, metrics): a scalar tensor, summed over the "
            "loss tokens, and a dict of such tensors"
        )
    for name in metrics:
        if not isinstance(name, str) or name in (*REPORTED, *COMPARED):
            raise ConfigError(
                f"{KEY}.custom_loss: {path} returned a metric {name!r}; give it another name, a str"
            )
    return loss, metrics


def _is_scalar(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and not value.dim()
