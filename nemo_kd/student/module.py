"""The student on Megatron Core, its training step, and what happens between steps."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from nemo_kd.batch import Batch
from nemo_kd.config.model import PRECISIONS
from nemo_kd.config.student import SPLITS, TrainStudentConfig
from nemo_kd.mcore.checkpoint import PretrainedModel
from nemo_kd.mcore.export import save_model
from nemo_kd.mcore.groups import set_random_state, sharded_random_state
from nemo_kd.mcore.lora import (
    adapter_identity,
    adapter_state,
    add_adapters,
    load_adapter_state,
)
from nemo_kd.mcore.model import (
    build_gpt_model,
    chunks,
    hidden_at,
    output_weight,
    project,
    transformer_config,
    use_transformer_engine,
)
from nemo_kd.mcore.optimizer import (
    ModelOptimizer,
    sharding_metadata,
    wrap_for_training,
)
from nemo_kd.mcore.schedule import forward_backward
from nemo_kd.ops.vocab import VocabShard
from nemo_kd.run.collective import gather
from nemo_kd.run.interruption import Interruption, Watchdog
from nemo_kd.run.resolved_config import resolved_config
from nemo_kd.student.checkpoints import Checkpoints
from nemo_kd.student.data import StudentData, source_names
from nemo_kd.student.loss import StudentLoss
from nemo_kd.student.progress import RunLog
from nemo_kd.student.report import first_step_report
from nemo_kd.student.run_folder import provenance
from nemo_kd.student.schedule import learning_rate
from nemo_kd.student.steps import NonFiniteSteps, StepMeter, stop

log = logging.getLogger(__name__)

FILLER = -1
"""Index of a row of a batch that stands for no example."""


class StudentModule(pl.LightningModule):
    """The student; its hooks decide after every step whether to validate, save or stop.

    Lightning's loop calls, for every step:
        1. `StudentData.train_dataloader`: the next global batch;
        2. `training_step`: forward, backward, clip, step, learning rate;
        3. `on_train_batch_end`: log the metrics; save, if no validation comes first; stop, if asked;
        4. `validation_step` for every validation batch, if a validation is due;
        5. `on_validation_end`, after callbacks as `EarlyStopping`: rank the checkpoint and save.

    Lightning has no step limit; `trainer.should_stop` ends the run, and Lightning validates once
    more before it stops. All decisions are the same on all ranks.

    Attributes:
        validation_is_due: the current weights have to be validated, and were not yet.
        stop_reason: why all ranks stop now; None to continue.
    """

    run_log: RunLog
    watchdog: Watchdog
    interruption: Interruption | None = None
    checkpoints: Checkpoints | None = None

    def __init__(
        self,
        config: TrainStudentConfig,
        pretrained: PretrainedModel,
        data: StudentData,
        loss: StudentLoss,
    ) -> None:
        super().__init__()
        # Lightning sends them to all loggers and puts them into every checkpoint.
        self.save_hyperparameters(resolved_config(config))
        self.automatic_optimization = False
        self.config = config
        self.pretrained = pretrained
        self.architecture = pretrained.architecture
        self.data = data
        self.groups = data.groups
        self.plan = data.plan
        self.loss = loss
        self.lora = config.model.peft.lora
        self.adapters: dict[str, Any] | None = None
        self._build_model()
        self.sources = {
            split: source_names(config.model.data.paths(split)) for split in SPLITS
        }
        self.meter = StepMeter(
            self.architecture, self.groups, config.trainer.precision, self.lora is None
        )
        self.non_finite = NonFiniteSteps(config.trainer.knowledge_distillation.non_finite)
        self.validation_sums: torch.Tensor | None = None
        self.validation_is_due = False
        self.stop_reason: str | None = None
        self._ranks_write = False
        self._stopped_early = False
        self._random_state: dict[str, Any] | None = None

    def _build_model(self) -> None:
        model = self.config.model
        transformer = transformer_config(
            self.architecture,
            model,
            getattr(torch, PRECISIONS[self.config.trainer.precision]),
            recompute_granularity=model.activations_checkpoint_granularity,
            recompute_method=model.activations_checkpoint_method,
            recompute_num_layers=model.activations_checkpoint_num_layers,
        )
        self.gpt = build_gpt_model(
            self.architecture,
            transformer,
            model.make_vocab_size_divisible_by,
            use_transformer_engine(model.transformer_engine),
            own_norms=self.lora is not None,
        )
        self.pretrained.load_weights(self.gpt, self.groups)
        if self.lora is not None:
            add_adapters(self.gpt, self.lora, model.seed, self.groups)
            self.adapters = adapter_identity(
                self.lora, self.pretrained.fingerprint()["weights"]
            )
        self.model = wrap_for_training(
            self.gpt, transformer, distributed_optimizer=model.optim.is_sharded
        )

    def configure_optimizers(self) -> ModelOptimizer:
        clip = self.config.trainer.knowledge_distillation.gradient_clip_val
        return ModelOptimizer(self.model, self.config.model.optim, clip)

    def token_losses(
        self, hidden_SBH: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the loss summed over a micro-batch's loss tokens, and the sums to report."""
        gpt = chunks(self.gpt)[-1]
        weight_vH = output_weight(gpt)
        shard = VocabShard.of(
            len(weight_vH), self.architecture.vocab_size, self.groups.tensor
        )
        if self.loss.custom is not None:
            return self.loss.on_logits(project(gpt, hidden_SBH), batch, shard)
        hidden_NH = hidden_at(
            hidden_SBH, batch.loss_positions_N, len(batch.tokens_BS), gpt
        )
        return self.loss.on_hidden(hidden_NH, weight_vH, batch, shard)

    def on_train_start(self) -> None:
        if self.interruption is not None:
            self.interruption.take_signals()  # from Lightning's handlers
        trainer = self.trainer
        # On resume Lightning repeats the validation of a step that is a multiple of its interval;
        # the checkpoint records whether that validation took place.
        trainer.val_check_batch = 1 if self.validation_is_due else self.plan.max_steps + 1
        if self._stopped_early and trainer.early_stopping_callback is not None:
            log.warning(
                "the run that this one resumes was stopped early; to train on set "
                "exp_manager.create_early_stopping_callback=false"
            )
            trainer.should_stop = True
        elif self._is_last and not self.validation_is_due:
            trainer.should_stop = True
        if self._random_state is not None:
            set_random_state(self._random_state)
            self._random_state = None
        self.run_log.start(self.global_step, self.meter.peak_flops)
        self.meter.wait()

    def training_step(self, batch: list[Batch], batch_idx: int) -> None:
        self._watch(f"step {self.global_step + 1}", batch)
        self.meter.start()
        optimizer: Any = self.optimizers()
        lr = learning_rate(self.global_step, self.config.model.optim, self.plan.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        self.loss.custom_sums.clear()
        own_RM = self._own_sums(forward_backward(self.model, batch, self.token_losses))
        counts = self.meter.counts(batch)
        values = self._all_reduce(torch.cat([own_RM.flatten(), counts]))
        sums_RM = values[: -len(counts)].view_as(own_RM)
        means = self._means("train", sums_RM)
        optimizer.step(loss_is_finite=_is_finite(sums_RM))
        if optimizer.optimizer.skipped:
            self.non_finite.left_out(self.global_step, *self._find_non_finite(batch))
        else:
            self.non_finite.in_a_row = 0
        training = self.data.training
        training.consumed_samples += self.config.model.global_batch_size
        if self.global_step == 1 and "train/sft_loss" in means:
            first_step_report(means, self.architecture.vocab_size)
        self.step_metrics = {
            **means,
            "train_step": float(self.global_step),
            "lr": lr,
            "grad_norm": optimizer.optimizer.grad_norm,
            "train/skipped_steps": float(self.non_finite.skipped),
            "consumed_samples": float(training.consumed_samples),
            "epoch": self.global_step / training.steps_per_epoch,
            **self.meter.metrics(values[-len(counts) :].tolist(), float(sums_RM[-1, -1])),
        }
        # File names of checkpoints may use them.
        self.log_dict(self.step_metrics, logger=False)

    def on_train_batch_end(self, *_: Any) -> None:
        trainer = self.trainer
        self.run_log.step(self.global_step, self.step_metrics, self.meter.counted)
        trainer.val_check_batch = self.plan.val_check_interval
        trainer.should_stop = trainer.should_stop or self._is_last
        self.validation_is_due = trainer.enable_validation and (
            self._is_last or self.global_step % self.plan.val_check_interval == 0
        )
        self._finish_checkpoint()
        if self.checkpoints is not None and (
            self.stop_reason or (self._save_is_due and not self.validation_is_due)
        ):
            self.checkpoints.save_latest(trainer)
        if self.validation_is_due or not self._is_last:  # else the run is complete
            self._stop_if_asked()
        self.watchdog.step(f"after step {self.global_step}: waiting for data")
        self.meter.wait()

    def on_validation_epoch_start(self) -> None:
        self.validation_sums = None
        self.loss.custom_sums.clear()
        self._evaluation_started_s = time.monotonic()

    def on_validation_batch_start(self, batch: list[Batch], *_: Any) -> None:
        self._watch(f"validation or test after step {self.global_step}", batch)

    def validation_step(self, batch: list[Batch], batch_idx: int) -> None:
        sums = forward_backward(self.model, batch, self.token_losses, forward_only=True)
        if self.validation_sums is None:
            self.validation_sums = sums
        elif sums is not None:
            self.validation_sums += sums

    def on_validation_batch_end(self, *_: Any) -> None:
        self._share_flags()
        self._finish_checkpoint()
        if self.checkpoints is not None and self.stop_reason:
            self.checkpoints.save_latest(self.trainer)
        self._stop_if_asked()

    def on_validation_epoch_end(self) -> None:
        metrics = self._measure("validation")
        if "validation/loss" in metrics:
            metrics["val_loss"] = metrics["validation/loss"]
        # Checkpoints are ranked by these: NaN replaces the value of the validation before.
        names = ["val_loss", *(f"validation/{name}" for name in self.loss.reported)]
        self.log_dict(dict.fromkeys(names, math.nan) | metrics, logger=False)
        self._log_evaluation("validation", metrics)

    def on_validation_end(self) -> None:
        self.validation_is_due = False
        self.trainer.should_stop = self.trainer.should_stop or self._is_last
        if self.checkpoints is not None and self._save_is_due:
            self.checkpoints.rank(self.trainer)
        self.meter.wait()

    def on_train_end(self) -> None:
        self.run_log.end()
        if self.checkpoints is not None:
            self.checkpoints.finish()

    @torch.no_grad()
    def test(self) -> None:
        """Measure the weights in memory on the test split, after the training."""
        self.on_validation_epoch_start()
        for number, batch in enumerate(self.data.loader("test")):
            self.on_validation_batch_start(batch)
            self.validation_step(batch, number)
            self._share_flags()
            self._stop_if_asked()
        self._log_evaluation("test", self._measure("test"))

    def _log_evaluation(self, split: str, metrics: dict[str, float]) -> None:
        seconds = time.monotonic() - self._evaluation_started_s
        self.run_log.evaluation(split, self.global_step, metrics, seconds)

    @property
    def _is_last(self) -> bool:
        return self.global_step >= self.plan.max_steps

    @property
    def _save_is_due(self) -> bool:
        return self.trainer.should_stop or self.global_step % self.plan.save_interval == 0

    def _finish_checkpoint(self) -> None:
        """Complete the checkpoint in progress once all ranks have written their parts."""
        if self.checkpoints is not None and not self._ranks_write:
            self.checkpoints.finish()

    def _stop_if_asked(self) -> None:
        if self.stop_reason is not None:
            stop(self.stop_reason, self.config.exp_manager.resume_if_exists)

    def _watch(self, what: str, micro_batches: list[Batch]) -> None:
        indices = [batch.indices_B.tolist() for batch in micro_batches]
        self.watchdog.step(f"{what}: examples {indices}")

    def _measure(self, split: str) -> dict[str, float]:
        means = self._means(split, self._sum_over_ranks(self.validation_sums))
        return {**means, "eval_step": float(self.global_step)}

    def _means(self, split: str, sums_RM: torch.Tensor) -> dict[str, float]:
        """Return means per loss token as metrics, over all sources and per source."""
        *of_sources, of_all = self.loss.means(sums_RM)
        of_all = self._custom_means(float(sums_RM[-1, -1])) | of_all
        named = {f"{split}/{name}": value for name, value in of_all.items()}
        if len(self.sources[split]) > 1:
            for source, means in zip(self.sources[split], of_sources, strict=False):
                named |= {
                    f"{split}/{name}/{source}": value for name, value in means.items()
                }
        return named

    def _custom_means(self, num_loss_tokens: float) -> dict[str, float]:
        """Return the means of a custom loss's own metrics over all ranks."""
        if self.loss.custom is None or not num_loss_tokens:
            return {}
        is_first = self.groups.tensor_rank == 0  # other tensor ranks have the same
        own = {name: float(value) for name, value in self.loss.custom_sums.items()}
        total: dict[str, float] = {}
        for sums in gather(lambda: own if is_first else {}):
            for name, value in sums.items():
                total[name] = total.get(name, 0.0) + value
        return {name: value / num_loss_tokens for name, value in total.items()}

    def _own_sums(self, sums_RM: torch.Tensor | None) -> torch.Tensor:
        own_RM = self.loss.zeros(self.groups.device)
        if sums_RM is not None and self.groups.tensor_rank == 0:
            own_RM += sums_RM  # other tensor ranks have the same
        return own_RM

    def _sum_over_ranks(self, sums_RM: torch.Tensor | None) -> torch.Tensor:
        return self._all_reduce(self._own_sums(sums_RM))

    def _all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of `values` over all ranks, and learn from the same all-reduce whether any
        rank wants to stop, or still writes its part of a checkpoint."""
        stops = self.interruption is not None and self.interruption.reason is not None
        writes = self.checkpoints is not None and self.checkpoints.is_writing()
        flags = values.new_tensor([float(stops), float(writes)])
        total = torch.cat([values.flatten(), flags])
        torch.distributed.all_reduce(total)
        any_stops, any_writes = total[-2:].tolist()
        self._ranks_write = any_writes > 0
        if any_stops and self.interruption is not None:
            interruption = self.interruption
            reasons = gather(lambda: interruption.reason)
            self.stop_reason = next(reason for reason in reasons if reason)
        return total[:-2].view_as(values)

    def _share_flags(self) -> None:
        nothing = torch.zeros(0, dtype=torch.float64, device=self.groups.device)
        self._all_reduce(nothing)

    def _find_non_finite(self, batch: list[Batch]) -> tuple[list[int], list[int]]:
        """Return the examples of micro-batches without a finite loss, and all examples."""
        culprits: set[int] = set()
        examples: set[int] = set()
        for part in batch:
            indices = set(part.indices_B.tolist()) - {FILLER}
            examples |= indices
            sums = forward_backward(
                self.model, [part], self.token_losses, forward_only=True
            )
            if sums is not None and not _is_finite(sums):
                culprits |= indices
        found = gather(lambda: (culprits, examples))
        culprits = set[int]().union(*(part for part, _ in found))
        examples = set[int]().union(*(part for _, part in found))
        return sorted(culprits), sorted(examples)

    def sharded_state_dict(self) -> dict[str, Any]:
        """Return the trained weights as Megatron's sharded tensors, for distributed checkpoints."""
        if self.lora is not None:
            return adapter_state(self.gpt)
        return {
            str(number): chunk.sharded_state_dict(metadata=sharding_metadata())
            for number, chunk in enumerate(chunks(self.gpt))
        }

    def load_sharded_state_dict(self, state: dict[str, Any]) -> None:
        if self.lora is not None:
            load_adapter_state(self.gpt, state)
            return
        for number, chunk in enumerate(chunks(self.gpt)):
            chunk.load_state_dict(state[str(number)])

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return nothing: weights are saved through `sharded_state_dict`."""
        return {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["adapters"] = self.adapters
        checkpoint["non_finite"] = self.non_finite.state_dict()
        if "optimizer_states" in checkpoint:
            checkpoint["schedule"] = {
                "validation_is_due": self.validation_is_due,
                "has_stopped": self.trainer.should_stop and not self._is_last,
            }
            checkpoint["random_state"] = sharded_random_state()
            if self.checkpoints is not None:
                checkpoint["ranks"] = self.checkpoints.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.non_finite.load_state_dict(checkpoint["non_finite"])
        self.validation_is_due = checkpoint["schedule"]["validation_is_due"]
        self._stopped_early = checkpoint["schedule"].get("has_stopped", False)
        self._random_state = checkpoint.get("random_state")
        if self.checkpoints is not None:
            self.checkpoints.load_state_dict(checkpoint["ranks"])

    def save_to(self, save_path: str) -> None:
        """Write the .nemo archive and the folders of `export`; every rank calls this."""
        save_model(
            Path(save_path),
            self.gpt,
            self.pretrained,
            self.groups,
            provenance(self.config, self.pretrained, self.data, self.adapters),
            self.config.export,
            self.lora,
        )


def _is_finite(sums_RM: torch.Tensor) -> bool:
    """Return True if the losses, the first column, are finite."""
    return bool(sums_RM[:, 0].isfinite().all())
