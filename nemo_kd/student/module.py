"""Stage 2: train a student from a cache of teacher logits, or on labels alone.

loss = sft_loss_weight * CE + kd_loss_weight * KD, both summed over loss tokens and divided once by
the number of loss tokens in the global batch. `train_student` is the run, `StudentModule` a step.
"""

from __future__ import annotations

import contextlib
import logging
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from nemo_kd.batch import Batch
from nemo_kd.config.model import PRECISIONS, check_training_layout
from nemo_kd.config.peft import check_lora
from nemo_kd.config.student import SPLITS, TrainStudentConfig
from nemo_kd.data.tokenizer import load_tokenizer, padding_id
from nemo_kd.flops import forward_flops
from nemo_kd.mcore.checkpoint import PretrainedModel, open_pretrained
from nemo_kd.mcore.export import save_model
from nemo_kd.mcore.groups import ProcessGroups, initialize_model_parallel
from nemo_kd.mcore.lora import (
    adapter_identity,
    adapter_state,
    add_adapters,
    check_same_adapters,
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
    release,
    sharding_metadata,
    training_options,
    wrap_for_training,
)
from nemo_kd.mcore.schedule import forward_backward
from nemo_kd.ops.vocab import VocabShard
from nemo_kd.run.collective import on_rank_zero
from nemo_kd.run.interruption import explained_ctrl_c
from nemo_kd.run.ranks import join_ranks
from nemo_kd.run.resolved_config import resolved_config
from nemo_kd.student.data import StudentData, load_splits, source_names
from nemo_kd.student.lifetime import Lifetime, NonFiniteSteps, StopFlags
from nemo_kd.student.loss import LOSS_TOKENS, StudentLoss
from nemo_kd.student.progress import finish_wandb, quiet_tensorboard_thread
from nemo_kd.student.report import (
    StudentRun,
    end_report,
    first_step_report,
    setup_report,
    stop_report,
)
from nemo_kd.student.run_folder import experiment_record, own_run_folder, provenance
from nemo_kd.student.schedule import check_schedule, learning_rate, plan_training
from nemo_kd.student.throughput import StepMeter
from nemo_kd.student.trainer import build_trainer, experiment_settings

log = logging.getLogger(__name__)

FILLER = -1
"""Index of a row of a batch that stands for no example."""


def train_student(config: TrainStudentConfig) -> StudentRun:
    """Run stage 2: train, validate, keep the best checkpoints and write a .nemo archive.

    Every rank calls this; a process may call it several times, also after an error.

    Raises:
        ConfigError, DataError, CacheError, CheckpointError: the input is refused; before any step.
        NonFiniteError: a loss or gradient is not finite, and such steps are not skipped.
        Requeue: the run was told to stop, or its time is over; the same call resumes it.
    """
    model = config.model
    minutes = config.trainer.distributed_timeout_minutes
    loss = StudentLoss(model.knowledge_distillation, compares=model.data.uses_cache)
    loss.check()
    settings = experiment_settings(
        config, loss.own_names if loss.custom is None else None
    )
    trainer: pl.Trainer | None = None
    with (
        explained_ctrl_c(lambda: stop_report(settings, trainer)),
        quiet_tensorboard_thread(),
        contextlib.ExitStack() as stack,
    ):
        pl.seed_everything(model.seed)
        join_ranks(config.trainer)
        stack.enter_context(own_run_folder(settings))
        pretrained = stack.enter_context(
            open_pretrained(config.pretrained_checkpoint.restore_from_path)
        )
        architecture = pretrained.architecture
        _check_student(config, pretrained)
        tokenizer = load_tokenizer(pretrained.tokenizer_folder)
        splits = load_splits(model, architecture, tokenizer)
        plan = plan_training(
            config.trainer.knowledge_distillation,
            len(splits["train"]),
            model.global_batch_size,
        )
        check_schedule(model.optim, plan.max_steps)
        groups = initialize_model_parallel(model, model.seed)
        pad_id = padding_id(tokenizer, architecture.vocab_size)
        data = StudentData(config, splits, plan, pad_id, groups)
        stack.callback(data.close)
        lifetime = stack.enter_context(Lifetime.begin(settings, 60 * minutes))
        fingerprint = on_rank_zero(pretrained.fingerprint)
        record = experiment_record(
            config, architecture, fingerprint, data.descriptions, plan.steps_per_epoch
        )
        trainer, checkpoints = build_trainer(
            config, settings, plan, groups, lifetime, record
        )
        module = StudentModule(config, pretrained, groups, plan.max_steps)
        stack.callback(release, module.model)
        log.info(setup_report(config, module, plan, splits, tokenizer))
        trainer.fit(module, datamodule=data)
        if checkpoints is not None:
            with lifetime.watchdog.pause("writing the .nemo archives"):
                checkpoints.write_archives(trainer, module)
        if "test" in splits:
            trainer.ckpt_path = (
                None  # test the weights in memory, not those of the checkpoint
            )
            trainer.test(module, datamodule=data)
        finish_wandb()
        return end_report(trainer, checkpoints, module.meter.totals)


def _check_student(config: TrainStudentConfig, pretrained: PretrainedModel) -> None:
    """
    Raises:
        ConfigError: the layout or the adapters do not suit the model.
    """
    if config.export.lora == "adapter" and pretrained.kind != "hf":
        log.warning(
            "export.lora=adapter: peft loads adapters onto Hugging Face models, and %s is not one; "
            "convert it (convert_checkpoint) and put its folder into the adapter's "
            "base_model_name_or_path",
            config.pretrained_checkpoint.restore_from_path,
        )
    check_training_layout(pretrained.architecture, config.model)
    check_lora(config.model.peft, pretrained.architecture, config.model)


class StudentModule(pl.LightningModule):
    """The student on Megatron Core; `training_step` is one optimizer step over all micro-batches.

    Attributes:
        step_metrics: of the last step; a mean over no tokens is left out.
        evaluation_metrics: of the last validation or test, likewise.
    """

    def __init__(
        self,
        config: TrainStudentConfig,
        pretrained: PretrainedModel,
        groups: ProcessGroups,
        max_steps: int,
    ) -> None:
        super().__init__()
        # Lightning sends them to all loggers and puts them into every checkpoint.
        self.save_hyperparameters(resolved_config(config))
        model = config.model
        self.automatic_optimization = False
        self.config = config
        self.pretrained = pretrained
        self.architecture = pretrained.architecture
        self.groups = groups
        self.max_steps = max_steps
        self.transformer_config = transformer_config(
            self.architecture,
            model,
            getattr(torch, PRECISIONS[config.trainer.precision]),
            recompute_granularity=model.activations_checkpoint_granularity,
            recompute_method=model.activations_checkpoint_method,
            recompute_num_layers=model.activations_checkpoint_num_layers,
            **training_options(model.chunks_per_stage),
        )
        self.lora = model.peft.lora
        self.gpt = build_gpt_model(
            self.architecture,
            self.transformer_config,
            model.make_vocab_size_divisible_by,
            use_transformer_engine(model.transformer_engine),
            own_norms=self.lora is not None,
        )
        pretrained.load_weights(self.gpt, groups)
        self.adapters: dict[str, Any] | None = None
        if self.lora is not None:
            add_adapters(self.gpt, self.lora, model.seed, groups)
            self.adapters = adapter_identity(
                self.lora, pretrained.fingerprint()["weights"]
            )
        self.model = wrap_for_training(
            self.gpt,
            self.transformer_config,
            distributed_optimizer=model.optim.is_sharded,
        )
        self.sources = {split: source_names(model.data.paths(split)) for split in SPLITS}
        self.loss = StudentLoss(
            model.knowledge_distillation,
            max(map(len, self.sources.values())),
            compares=model.data.uses_cache,
        )
        self.validation_sums: torch.Tensor | None = None
        self.step_metrics: dict[str, float] = {}
        self.evaluation_metrics: dict[str, float] = {}
        self.meter = StepMeter(
            forward_flops(self.architecture),
            groups.device,
            groups.context_size,
            config.trainer.precision,
            self.lora is None,
        )
        self.flags = StopFlags()
        self.non_finite = NonFiniteSteps(config.trainer.knowledge_distillation.non_finite)

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

    def on_train_batch_start(self, batch: list[Batch], batch_idx: int) -> None:
        self.meter.start(self.trainer.datamodule.watched.waited_s)

    def training_step(self, batch: list[Batch], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        lr = learning_rate(self.global_step, self.config.model.optim, self.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        counts = self._count_over_ranks(batch)
        sums = self._sum_over_ranks(
            forward_backward(self.model, batch, self.token_losses)
        )
        optimizer.step(loss_is_finite=self._is_finite(sums))
        grad_norm = optimizer.optimizer.grad_norm
        if optimizer.optimizer.skipped:
            self.non_finite.left_out(self.global_step, *self._find_non_finite(batch))
        else:
            self.non_finite.taken()
        training = self.trainer.datamodule.training
        training.consumed_samples += self.config.model.global_batch_size
        means = self._means("train", sums)
        if self.global_step == 1 and "train/sft_loss" in means:
            text, warning = first_step_report(means, self.architecture.vocab_size)
            log.info(text)
            if warning:
                log.warning(warning)
        self.step_metrics = {
            **means,
            "train_step": float(self.global_step),
            "lr": lr,
            "grad_norm": grad_norm,
            "train/skipped_steps": float(self.non_finite.skipped),
            "consumed_samples": float(training.consumed_samples),
            "epoch": self.global_step / training.steps_per_epoch,
            **self.meter.metrics(counts, float(self.loss.column(sums, LOSS_TOKENS)[-1])),
        }
        self.log_dict(
            self.step_metrics, logger=False
        )  # file names of checkpoints may use them

    def on_validation_epoch_start(self) -> None:
        self.validation_sums = None

    def validation_step(self, batch: list[Batch], batch_idx: int) -> None:
        sums = forward_backward(self.model, batch, self.token_losses, forward_only=True)
        if self.validation_sums is None:
            self.validation_sums = sums
        elif sums is not None:
            self.validation_sums += sums

    def on_validation_epoch_end(self) -> None:
        self._measure_evaluation("validation")
        if "validation/loss" in self.evaluation_metrics:
            self.evaluation_metrics["val_loss"] = self.evaluation_metrics[
                "validation/loss"
            ]
        # Checkpoints are ranked by these: NaN replaces the value of the validation before.
        names = ["val_loss", *(f"validation/{name}" for name in self.loss.reported)]
        self.log_dict(
            dict.fromkeys(names, math.nan) | self.evaluation_metrics, logger=False
        )

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step

    def on_test_epoch_end(self) -> None:
        self._measure_evaluation("test")

    def _measure_evaluation(self, split: str) -> None:
        means = self._means(split, self._sum_over_ranks(self.validation_sums))
        self.evaluation_metrics = {**means, "eval_step": float(self.global_step)}

    def _means(self, split: str, sums_RM: torch.Tensor) -> dict[str, float]:
        """Return means per loss token as metrics, over all sources and per source."""
        *of_sources, of_all = self.loss.means(sums_RM)
        named = {f"{split}/{name}": value for name, value in of_all.items()}
        if len(self.sources[split]) > 1:
            for source, means in zip(self.sources[split], of_sources, strict=False):
                named |= {
                    f"{split}/{name}/{source}": value for name, value in means.items()
                }
        return named

    def _sum_over_ranks(self, sums: torch.Tensor | None) -> torch.Tensor:
        """Add up the sums of data- and context-parallel ranks; only last stages have any."""
        self.loss.agree_on_names()
        total = self.loss.zeros(self.groups.device)
        if (
            sums is not None and self.groups.tensor_rank == 0
        ):  # other tensor ranks have the same
            total += sums
        return self.flags.sum(total)

    def _count_over_ranks(self, batch: list[Batch]) -> list[float]:
        counts = self.meter.counts(batch).to(self.groups.device)
        if not self.groups.is_writer:  # one rank counts for the whole replica
            counts.zero_()
        torch.distributed.all_reduce(counts)
        return counts.tolist()

    def _is_finite(self, sums_RM: torch.Tensor) -> bool:
        return bool(self.loss.column(sums_RM, "loss").isfinite().all())

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
            if sums is not None and not self._is_finite(sums):
                culprits |= indices
        everything: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everything, (culprits, examples))
        culprits, examples = (
            set[int]().union(*parts) for parts in zip(*everything, strict=True)
        )
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

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint with other adapters by its plain values, before its weights are read.

        Raises:
            ConfigError: names the difference.
        """
        check_same_adapters(checkpoint.get("adapters"), self.adapters)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.non_finite.load_state_dict(checkpoint["non_finite"])

    def save_to(self, save_path: str) -> None:
        """Write the .nemo archive and the folders of `export`; every rank calls this."""
        save_model(
            Path(save_path),
            self.gpt,
            self.pretrained,
            self.groups,
            provenance(
                self.config, self.pretrained, self.trainer.datamodule, self.adapters
            ),
            self.config.export,
            self.lora,
        )
