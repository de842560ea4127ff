"""The training step of the student, and what happens between steps."""

from __future__ import annotations

import logging
import math
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nemo_kd.batch import Batch
from nemo_kd.config.student import TrainStudentConfig
from nemo_kd.mcore.checkpoint import PretrainedModel
from nemo_kd.mcore.export import ModelExport
from nemo_kd.mcore.groups import set_random_state, sharded_random_state
from nemo_kd.mcore.model import chunks, hidden_at, output_weight, project
from nemo_kd.mcore.optimizer import ModelOptimizer, gather_weights
from nemo_kd.mcore.schedule import forward_backward
from nemo_kd.ops.vocab import VocabShard
from nemo_kd.run.collective import gather
from nemo_kd.run.interruption import Interruption, Watchdog
from nemo_kd.run.metrics import resolved_config
from nemo_kd.student.checkpoints import Checkpoints
from nemo_kd.student.data import StudentData
from nemo_kd.student.loss import StudentLoss
from nemo_kd.student.model import StudentModel
from nemo_kd.student.reports import RunLog, first_step_report
from nemo_kd.student.run_folder import provenance
from nemo_kd.student.selection import Selector
from nemo_kd.student.steps import (
    Ended,
    NonFiniteSteps,
    StepMeter,
    Stopped,
    learning_rate,
)

if TYPE_CHECKING:
    from nemo_kd.student.evaluate import Evaluation

log = logging.getLogger(__name__)


class StudentModule(StudentModel):
    """The student in training; its hooks decide after every step whether to validate, save or stop.

    Lightning's loop calls, for every step:
        1. `StudentData.loader`: the next global batch;
        2. `training_step`: forward, backward, clip, step, learning rate;
        3. `on_train_batch_end`: log the metrics; stop, if asked; evaluate responses, if that is due;
           save, if no validation comes first;
        4. `validation_step` for every validation batch, if a validation is due;
        5. `on_validation_end`, after callbacks as `EarlyStopping`: rank the checkpoint and save.

    Lightning has no step limit; `trainer.should_stop` ends the run, and Lightning validates once
    more before it stops. All decisions are the same on all ranks.

    Attributes:
        evaluation: of responses; None if the run has none.
        validation_is_due, evaluation_is_due: the current weights have to be measured, and were not
            yet.
        measured: metrics of the current weights by the validation and the evaluation.
        stop_reason: why all ranks stop now; None to continue.
    """

    run_log: RunLog
    watchdog: Watchdog
    checkpoints: Checkpoints | None = None
    evaluation: Evaluation | None = None

    def __init__(
        self,
        config: TrainStudentConfig,
        pretrained: PretrainedModel,
        data: StudentData,
        loss: StudentLoss,
    ) -> None:
        super().__init__(config, pretrained, data.groups)
        # Lightning sends them to all loggers and puts them into every checkpoint.
        self.save_hyperparameters(resolved_config(config))
        self.automatic_optimization = False
        self.data = data
        self.plan = data.plan
        self.loss = loss
        selection = loss.config.selection
        if selection is not None:
            loss.selector = Selector(selection, self.groups)
        self.meter = StepMeter(
            self.architecture, self.groups, config.trainer.precision, self.lora is None
        )
        loop = config.trainer.knowledge_distillation
        self.non_finite = NonFiniteSteps(loop.non_finite)
        self.interruption = Interruption()
        self.validation_is_due = False
        self.evaluation_is_due = False
        self.measured: dict[str, float] = {}
        self.stop_reason: str | None = None
        self._ranks_write = False
        self._stopped_early = False

    def transfer_batch_to_device(self, batch: Any, *_: Any) -> Any:
        """Return the batch as it is: `forward_backward` moves micro-batches one by one."""
        return batch

    def configure_optimizers(self) -> ModelOptimizer:
        clip = self.config.trainer.knowledge_distillation.gradient_clip_val
        return ModelOptimizer(self.model, self.config.model.optim, clip)

    def token_losses(
        self, hidden_SBH: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the loss summed over a micro-batch's loss tokens, and the sums to report."""
        gpt = chunks(self.model)[-1]
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
        self.interruption.take_signals()  # from Lightning's handlers
        trainer = self.trainer
        # On resume Lightning repeats the validation of a step that is a multiple of its interval;
        # the checkpoint records whether that validation took place.
        never = self.plan.max_steps + 1
        trainer.val_check_batch = 1 if self.validation_is_due else never
        stopped = self._stopped_early and trainer.early_stopping_callback is not None
        is_over = self._is_last and not self.validation_is_due
        trainer.should_stop = stopped or is_over
        self.run_log.start(self.global_step, self.meter.peak_flops)
        if self.evaluation_is_due:
            self._evaluate()
        self.meter.wait()

    def training_step(self, batch: list[Batch], batch_idx: int) -> None:
        examples = [part.indices_B.tolist() for part in batch]
        self.watchdog.step(f"step {self.global_step + 1}: examples {examples}")
        self.meter.start()
        self.measured = {}
        optimizer: Any = self.optimizers()
        optim = self.config.model.optim
        lr = learning_rate(self.global_step, optim, self.plan.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        own = torch.cat([self.meter.counts(batch), self._weight_sums(batch)])
        *counts, positions, in_sft, in_kd = self._all_reduce(own).tolist()
        self.loss.set_step(self.global_step, (positions, in_sft, in_kd))
        sums_RM = forward_backward(self.model, batch, self.token_losses)
        sums_RM = self._sum_over_ranks(sums_RM)
        means = self.loss.metrics("train", sums_RM)
        optimizer.step(loss_is_finite=math.isfinite(sums_RM[-1, 0]))
        if optimizer.optimizer.skipped:
            self.non_finite.left_out(self.global_step, self._finite_losses(batch))
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
            **{
                f"train/{key}": value for key, value in self.loss.now.scheduled.items()
            },
            "consumed_samples": float(training.consumed_samples),
            "epoch": self.global_step / training.steps_per_epoch,
            **self.meter.metrics(counts, float(sums_RM[-1, -1])),
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
        self.evaluation_is_due = self.evaluation is not None and (
            self._is_last or self.global_step % self.evaluation.interval == 0
        )
        measures = self.validation_is_due or self.evaluation_is_due
        self._save(self._save_is_due and not measures)
        if measures or not self._is_last:  # else the run is complete
            self._stop_if_asked()
        if self.evaluation_is_due:
            self._evaluate()
        self.watchdog.step(f"after step {self.global_step}: waiting for data")
        self.meter.wait()

    def on_validation_epoch_start(self) -> None:
        self.loss.set_step(self.plan.max_steps)
        self.validation_sums = self.loss.zeros(self.groups.device)
        self._evaluation_started_s = time.monotonic()

    def validation_step(self, batch: list[Batch], batch_idx: int) -> None:
        sums = forward_backward(
            self.model, batch, self.token_losses, forward_only=True
        )
        if sums is not None:
            self.validation_sums += sums
        self._all_reduce(torch.zeros(0, device=self.groups.device))  # for its flags

    def on_validation_batch_end(self, *_: Any) -> None:
        self.watchdog.step(f"validation after step {self.global_step}")
        self._save(is_due=False)
        self._stop_if_asked()

    def on_validation_epoch_end(self) -> None:
        metrics = self._measure("validation")
        # Early stopping and names of checkpoints use these: NaN replaces the value of the validation
        # before.
        names = ["val_loss", *(f"validation/{name}" for name in self.loss.reported)]
        self.measured |= dict.fromkeys(names, math.nan) | metrics
        self.log_dict(self.measured, logger=False)

    def on_validation_end(self) -> None:
        self.validation_is_due = False
        self.trainer.should_stop = self.trainer.should_stop or self._is_last
        if self.evaluation is not None and self.trainer.should_stop:
            # Early stopping ends the run after a step that may have no evaluation.
            self.evaluation_is_due = "eval/response_length" not in self.measured
        if self.evaluation_is_due:
            self._evaluate()
        else:
            self._rank()
        self.meter.wait()

    def on_evaluation_batch_end(self) -> None:
        """Go on, or stop with a checkpoint that repeats the evaluation; every rank calls it."""
        self._all_reduce(torch.zeros(0, device=self.groups.device))  # for its flags
        self.watchdog.step(f"evaluation after step {self.global_step}")
        self._save(is_due=False)
        self._stop_if_asked()

    def _evaluate(self) -> None:
        """Measure responses, and save what no validation will save."""
        assert self.evaluation is not None
        self.measured |= self.evaluation.run(self)
        self.evaluation_is_due = False
        if not self.validation_is_due:
            self._rank()

    def _rank(self) -> None:
        if self.checkpoints is not None and self._save_is_due:
            self.checkpoints.rank(self)

    @torch.no_grad()
    def test(self) -> None:
        """Measure the weights in memory on the test split, after the training."""
        self.on_validation_epoch_start()
        for number, batch in enumerate(self.data.loader("test")):
            self.validation_step(batch, number)
            self.watchdog.step(f"test, batch {number}")
            self._stop_if_asked()
        self._measure("test")

    @property
    def _is_last(self) -> bool:
        return self.global_step >= self.plan.max_steps

    @property
    def _save_is_due(self) -> bool:
        return (
            self.trainer.should_stop or self.global_step % self.plan.save_interval == 0
        )

    def _save(self, is_due: bool) -> None:
        """Save if it is due, or the last chance; the checkpoint before is complete once all ranks
        have written their parts."""
        if self.checkpoints is not None:
            if not self._ranks_write:
                self.checkpoints.finish()
            if is_due or self.stop_reason is not None:
                self.checkpoints.save_latest(self)

    def _stop_if_asked(self) -> None:
        """
        Raises:
            Stopped, Ended: on every rank, if there is a reason to stop.
        """
        if self.stop_reason is None:
            return
        if self.config.exp_manager.resume_if_exists:
            raise Stopped(self.stop_reason)
        log.warning(
            "%s; with exp_manager.resume_if_exists=true the same command resumes its checkpoint",
            self.stop_reason,
        )
        raise Ended(128 + signal.SIGTERM)

    def _measure(self, split: str) -> dict[str, float]:
        """Log the means of an evaluation, and return them."""
        metrics = self.loss.metrics(split, self._sum_over_ranks(self.validation_sums))
        if "validation/loss" in metrics:
            metrics["val_loss"] = metrics["validation/loss"]
        metrics["eval_step"] = float(self.global_step)
        seconds = time.monotonic() - self._evaluation_started_s
        self.run_log.evaluation(split, self.global_step, metrics, seconds)
        return metrics

    def _weight_sums(self, batches: list[Batch]) -> torch.Tensor:
        """Return `weight_sums` of this rank's examples; zeros on all but one rank of a replica."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.groups.device)
        if self.groups.is_writer:
            sums += sums.new_tensor(self.loss.weight_sums(batches))
        return sums

    def _sum_over_ranks(self, sums_RM: torch.Tensor | None) -> torch.Tensor:
        own_RM = self.loss.zeros(self.groups.device)
        if sums_RM is not None and self.groups.tensor_rank == 0:
            own_RM += sums_RM  # other tensor ranks have the same
        return self._all_reduce(own_RM)

    def _all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of `values` over all ranks, and learn from the same all-reduce whether any
        rank wants to stop, or still writes its part of a checkpoint."""
        stops = self.interruption.reason is not None
        writes = self.checkpoints is not None and self.checkpoints.is_writing()
        flags = values.new_tensor([float(stops), float(writes)])
        total = torch.cat([values.flatten(), flags])
        torch.distributed.all_reduce(total)
        any_stops, any_writes = total[-2:].tolist()
        self._ranks_write = any_writes > 0
        if any_stops:
            reasons = gather(lambda: self.interruption.reason)
            self.stop_reason = next(filter(None, reasons))
        return total[:-2].view_as(values)

    def _finite_losses(self, batch: list[Batch]) -> list[tuple[bool, list[int]]]:
        """Compute the micro-batches of all ranks again: is the loss finite, and of which examples?"""
        found = []
        for part in batch:
            sums_RM = forward_backward(
                self.model, [part], self.token_losses, forward_only=True
            )
            is_finite = sums_RM is None or math.isfinite(sums_RM[-1, 0])
            found.append((is_finite, part.indices_B.tolist()))
        self.loss.custom_sums.clear()
        return [part for of_rank in gather(lambda: found) for part in of_rank]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["StudentData"] = self.data.state_dict()
        checkpoint["adapters"] = self.adapters
        steps = self.non_finite
        checkpoint["non_finite"] = dict(skipped=steps.skipped, in_a_row=steps.in_a_row)
        if "optimizer_states" in checkpoint:
            checkpoint["schedule"] = {
                "validation_is_due": self.validation_is_due,
                "evaluation_is_due": self.evaluation_is_due,
                "measured": self.measured,
                "has_stopped": self.trainer.should_stop and not self._is_last,
            }
            checkpoint["random_state"] = sharded_random_state()
            if self.checkpoints is not None:
                checkpoint["ranks"] = self.checkpoints.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.data.load_state_dict(checkpoint["StudentData"])
        self.non_finite = replace(self.non_finite, **checkpoint["non_finite"])
        schedule = checkpoint["schedule"]
        self.validation_is_due = schedule["validation_is_due"]
        if self.evaluation is not None:
            self.evaluation_is_due = schedule.get("evaluation_is_due", False)
        self.measured = schedule.get("measured", {})
        self._stopped_early = schedule.get("has_stopped", False)
        if "random_state" in checkpoint:
            set_random_state(checkpoint["random_state"])
        if self.checkpoints is not None:
            self.checkpoints.load_state_dict(checkpoint["ranks"])

    def save_to(self, path: Path) -> None:
        """Write the .nemo archive and the folders of `export`; every rank calls this."""
        gather_weights(chunks(self.model))
        origin = provenance(self.config, self.pretrained, self.data, self.adapters)
        export = ModelExport(self.gpt, self.pretrained, self.groups, origin)
        export.save(path, self.config.export, self.lora)
