"""Stage 2: trains a student from a cache of teacher logits, or on labels alone.

loss = sft_loss_weight * CE + kd_loss_weight * KD, both summed over loss tokens and divided once by the number of loss
tokens in the global batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from nemo_kd import __version__
from nemo_kd.batch import Batch
from nemo_kd.config.model import (
    PRECISIONS,
    GPTArchitecture,
    check_batch_sizes,
    check_training_layout,
)
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
from nemo_kd.mcore.model import build_chunks, chunks, transformer_config, use_transformer_engine
from nemo_kd.mcore.optimizer import (
    ModelOptimizer,
    release,
    sharding_metadata,
    training_options,
    wrap_for_training,
)
from nemo_kd.mcore.schedule import forward_backward, hidden_at, output_weight, project
from nemo_kd.mcore.weights import hf_shapes
from nemo_kd.ops.vocab import VocabShard
from nemo_kd.run.collective import on_rank_zero
from nemo_kd.run.interruption import explained_ctrl_c
from nemo_kd.run.process_group import join_ranks
from nemo_kd.student.data_module import StudentData
from nemo_kd.student.ending import Ending
from nemo_kd.student.lifetime import Lifetime, NonFiniteSteps, StopFlags
from nemo_kd.student.logging import quiet_tensorboard_thread, source_names
from nemo_kd.student.loss import LOSS_TOKENS, StudentLoss
from nemo_kd.student.report import Parameters, first_step_report, startup_report
from nemo_kd.student.run_folder import experiment_record, own_run_folder
from nemo_kd.student.schedule import check_schedule, learning_rate, plan_training
from nemo_kd.student.splits import load_splits
from nemo_kd.student.throughput import StepMeter
from nemo_kd.student.trainer import build_trainer, experiment_settings

log = logging.getLogger(__name__)

FILLER = -1
"""In a batch's indices a row that stands for no example."""


class StudentModule(pl.LightningModule):
    """One optimizer step per `training_step`, run by Megatron's schedule over the rank's micro-batches.

    Attributes:
        step_metrics, evaluation_metrics: figures of the last step, and of the last validation or test; what is unknown of
            it (a mean over no tokens) is not among them.
    """

    def __init__(
        self,
        config: TrainStudentConfig,
        architecture: GPTArchitecture,
        pretrained: PretrainedModel,
        groups: ProcessGroups,
        max_steps: int,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config, self.architecture, self.pretrained = config, architecture, pretrained
        self.groups, self.max_steps = groups, max_steps
        model = config.model
        self.transformer_config = transformer_config(
            architecture,
            model,
            getattr(torch, PRECISIONS[config.trainer.precision]),
            recompute_granularity=model.activations_checkpoint_granularity,
            recompute_method=model.activations_checkpoint_method,
            recompute_num_layers=model.activations_checkpoint_num_layers,
            **training_options(model.chunks_per_stage),
        )
        self.gpt = build_chunks(
            architecture,
            self.transformer_config,
            model.make_vocab_size_divisible_by,
            use_transformer_engine(model.transformer_engine),
            own_norms=model.peft.lora is not None,
        )
        pretrained.load_weights(self.gpt, groups)
        self.lora = model.peft.lora
        self.adapters: dict[str, Any] | None = None
        if self.lora is not None:
            add_adapters(self.gpt, self.lora, model.seed, groups)
            self.adapters = adapter_identity(self.lora, pretrained.fingerprint()["weights"])
        self.model = wrap_for_training(
            self.gpt, self.transformer_config, distributed_optimizer=model.optim.is_sharded
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
            forward_flops(architecture),
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
        """(weighted loss summed over the micro-batch's loss tokens, sums of what is reported and of loss tokens)."""
        gpt = chunks(self.gpt)[-1]
        weight_vH = output_weight(gpt)
        shard = VocabShard.of(len(weight_vH), self.architecture.vocab_size, self.groups.tensor)
        if self.loss.custom is not None:
            return self.loss.on_logits(project(gpt, hidden_SBH), batch, shard)
        hidden_NH = hidden_at(hidden_SBH, batch.loss_positions_N, len(batch.tokens_BS), gpt)
        return self.loss.on_hidden(hidden_NH, weight_vH, batch, shard)

    def training_step(self, batch: list[Batch], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        lr = learning_rate(self.global_step, self.config.model.optim, self.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        counts = self._counts_over_ranks(batch)
        sums = self._over_ranks(forward_backward(self.model, batch, self.token_losses))
        optimizer.step(loss_is_finite=self._is_finite(sums))
        if optimizer.optimizer.skipped:
            self.non_finite.left_out(self.global_step, *self._non_finite_examples(batch))
        else:
            self.non_finite.taken()
        data: StudentData = self.trainer.datamodule
        data.training.consumed_samples += self.config.model.global_batch_size
        self._measure_step(sums, counts, lr, optimizer.optimizer.grad_norm, data)

    def on_train_batch_start(self, batch: list[Batch], batch_idx: int) -> None:
        self.meter.start(self.trainer.datamodule.watched.waited_s)

    def on_validation_epoch_start(self) -> None:
        self.validation_sums = None

    def validation_step(self, batch: list[Batch], batch_idx: int) -> None:
        sums = forward_backward(self.model, batch, self.token_losses, forward_only=True)
        if sums is not None:
            self.validation_sums = (
                sums if self.validation_sums is None else self.validation_sums + sums
            )

    def on_validation_epoch_end(self) -> None:
        self._measure_evaluation("validation")
        if "validation/loss" in self.evaluation_metrics:
            self.evaluation_metrics["val_loss"] = self.evaluation_metrics["validation/loss"]
        # Checkpoints are ranked by these; those of the validation before must not stay where this one has none.
        known = {f"validation/{name}": math.nan for name in self.loss.reported} | {
            "val_loss": math.nan
        }
        self.log_dict(known | self.evaluation_metrics, logger=False)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step

    def on_test_epoch_end(self) -> None:
        self._measure_evaluation("test")

    def sharded_state_dict(self) -> dict[str, Any]:
        """The weights that are trained as Megatron's sharded tensors, for distributed checkpoints."""
        if self.lora is not None:
            return adapter_state(self.gpt)
        parts = enumerate(chunks(self.gpt))
        return {
            str(number): chunk.sharded_state_dict(metadata=sharding_metadata())
            for number, chunk in parts
        }

    def load_sharded_state_dict(self, state: dict[str, Any]) -> None:
        if self.lora is not None:
            load_adapter_state(self.gpt, state)
        else:
            for number, chunk in enumerate(chunks(self.gpt)):
                chunk.load_state_dict(state[str(number)])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["adapters"] = self.adapters
        checkpoint["non_finite"] = self.non_finite.state_dict()

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a training checkpoint with other adapters, by its plain values, before its weights are read.

        Raises:
            ConfigError: names what differs.
        """
        check_same_adapters(checkpoint.get("adapters"), self.adapters)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Empty: weights are saved through `sharded_state_dict`."""
        return {}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.non_finite.load_state_dict(checkpoint["non_finite"])

    def save_to(self, save_path: str) -> None:
        """Writes the student as a .nemo archive, and beside it what `export` asks for; every rank takes part."""
        save_model(
            Path(save_path),
            self.gpt,
            self.pretrained,
            self.groups,
            self.provenance(),
            self.config.export,
            self.lora,
        )

    def parameter_counts(self) -> Parameters:
        """Numbers of weights; all ranks take part."""
        sizes = [
            (parameter.numel(), parameter.requires_grad) for parameter in self.gpt.parameters()
        ]
        own = [
            sum(size for size, _ in sizes),
            sum(size for size, is_trained in sizes if is_trained),
        ]
        counts = torch.tensor([*own, *(-count for count in own)], device=self.groups.device)
        torch.distributed.all_reduce(counts, torch.distributed.ReduceOp.MAX)
        most_held, most_trained, least_held, least_trained = map(abs, counts.tolist())
        total = sum(math.prod(shape) for shape in hf_shapes(self.architecture).values())
        return Parameters(total, (least_held, most_held), (least_trained, most_trained))

    def provenance(self) -> dict[str, Any]:
        """What the student was made from; names and hashes, no paths."""
        data: StudentData = self.trainer.datamodule
        splits = {
            split: {key: value for key, value in description.items() if key != "paths"}
            for split, description in data.descriptions.items()
        }
        provenance: dict[str, Any] = {
            "nemo_kd": __version__,
            "student": self.pretrained.fingerprint(),
            "data": splits,
            "data_weights": data.training.order.weights,
            "consumed_samples": data.training.consumed_samples,
            "knowledge_distillation": dataclasses.asdict(self.config.model.knowledge_distillation),
        }
        if self.lora is not None:
            provenance["adapters"] = self.adapters
        if self.pretrained.provenance is not None:
            provenance["student_provenance"] = self.pretrained.provenance
        return provenance

    def _measure_evaluation(self, split: str) -> None:
        """Takes the means over all loss tokens of the split."""
        means = self._means(split, self._over_ranks(self.validation_sums))
        self.evaluation_metrics = {**means, "eval_step": float(self.global_step)}

    def _means(self, split: str, sums_RM: torch.Tensor) -> dict[str, float]:
        """The means of everything, and of every source where there are several, by the names of metrics."""
        *of_sources, of_all = self.loss.means(sums_RM)
        named = {f"{split}/{name}": value for name, value in of_all.items()}
        sources = self.sources[split] if len(self.sources[split]) > 1 else []
        for source, means in zip(sources, of_sources, strict=False):
            named |= {f"{split}/{name}/{source}": value for name, value in means.items()}
        return named

    def _over_ranks(self, sums: torch.Tensor | None) -> torch.Tensor:
        """The sums over all data- and context-parallel ranks, on every rank; only last stages have any."""
        self.loss.agree_on_names()
        total = self.loss.zeros(self.groups.device)
        if (
            sums is not None and self.groups.tensor_rank == 0
        ):  # the others of its tensor-parallel group have the same
            total += sums
        return self.flags.sum(total)

    def _counts_over_ranks(self, batch: list[Batch]) -> list[float]:
        counts = self.meter.counts(batch).to(self.groups.device)
        if not self.groups.is_writer:  # one rank counts for the whole replica
            counts.zero_()
        torch.distributed.all_reduce(counts)
        return counts.tolist()

    def _is_finite(self, sums_RM: torch.Tensor) -> bool:
        return bool(self.loss.column(sums_RM, "loss").isfinite().all())

    def _non_finite_examples(self, batch: list[Batch]) -> tuple[list[int], list[int]]:
        """(examples of the micro-batches whose loss is not finite, all examples) of a global batch; on every rank."""
        found: list[int] = []
        for part in batch:
            sums = forward_backward(self.model, [part], self.token_losses, forward_only=True)
            if sums is not None and not self._is_finite(sums):
                found += part.indices_B.tolist()
        everything: list[Any] = [None] * torch.distributed.get_world_size()
        mine = (found, [index for part in batch for index in part.indices_B.tolist()])
        torch.distributed.all_gather_object(everything, mine)
        culprits, examples = (
            {index for part in parts for index in part} for parts in zip(*everything, strict=True)
        )
        return sorted(culprits - {FILLER}), sorted(examples - {FILLER})

    def _measure_step(
        self,
        sums_RM: torch.Tensor,
        counts: list[float],
        lr: float,
        grad_norm: float,
        data: StudentData,
    ) -> None:
        means = self._means("train", sums_RM)
        if self.global_step == 1:
            self._judge_first_step(means)
        self.step_metrics = {
            **means,
            "train_step": float(self.global_step),
            "lr": lr,
            "grad_norm": grad_norm,
            "train/skipped_steps": float(self.non_finite.skipped),
            "consumed_samples": float(data.training.consumed_samples),
            "epoch": self.global_step / data.training.steps_per_epoch,
            **self.meter.metrics(counts, float(self.loss.column(sums_RM, LOSS_TOKENS)[-1])),
        }
        self.log_dict(self.step_metrics, logger=False)  # names of checkpoints may contain them

    def _judge_first_step(self, means: dict[str, float]) -> None:
        if "train/sft_loss" in means:
            own = {name.removeprefix("train/"): value for name, value in means.items()}
            text, doubt = first_step_report(own, self.architecture.vocab_size)
            log.info(text)
            if doubt:
                log.warning(doubt)


def train_student(config: TrainStudentConfig) -> None:
    """Runs stage 2: trains, validates, keeps the best checkpoints and leaves a .nemo archive.

    Raises:
        ConfigError, DataError, CacheError, CheckpointError: something the user gave cannot work; before any step is
            taken.
        NonFiniteError: a step's loss or gradient is not finite, and it is not to be skipped.
        Requeue: it was told to stop, or its time is over; the same call goes on from the checkpoint that it left.
    """
    loss = StudentLoss(config.model.knowledge_distillation, compares=config.model.data.uses_cache)
    loss.check()
    settings = experiment_settings(config, loss.own_names if loss.custom is None else None)
    ending = Ending(settings)
    with explained_ctrl_c(ending.where_stopped), contextlib.ExitStack() as stack:
        stack.enter_context(quiet_tensorboard_thread())
        pl.seed_everything(config.model.seed)
        timeout_minutes = config.trainer.distributed_timeout_minutes
        join_ranks(config.trainer)
        stack.enter_context(own_run_folder(settings))
        pretrained = stack.enter_context(
            open_pretrained(config.pretrained_checkpoint.restore_from_path)
        )
        architecture = pretrained.architecture
        if config.export.lora == "adapter" and pretrained.kind != "hf":
            log.warning(
                "export.lora=adapter: peft loads adapters onto Hugging Face models, and %s is none; convert it "
                "(convert_checkpoint) and put its folder into the adapter's base_model_name_or_path",
                config.pretrained_checkpoint.restore_from_path,
            )
        check_training_layout(architecture, config.model)
        check_lora(config.model.peft, architecture, config.model)
        world_size = torch.distributed.get_world_size()
        data_parallel_size = config.model.data_parallel_size(world_size)
        if config.model.data.max_tokens_per_batch is None:
            check_batch_sizes(
                config.model.micro_batch_size, config.model.global_batch_size, data_parallel_size
            )
        else:
            check_batch_sizes(1, config.model.global_batch_size, 1)
        tokenizer = load_tokenizer(pretrained.tokenizer_folder)
        splits = load_splits(config.model, architecture, tokenizer)
        plan = plan_training(
            config.trainer.knowledge_distillation,
            len(splits["train"]),
            config.model.global_batch_size,
        )
        check_schedule(config.model.optim, plan.max_steps)
        groups = initialize_model_parallel(config.model, config.model.seed)
        data = StudentData(
            config,
            splits,
            plan.steps_per_epoch,
            plan.max_steps,
            padding_id(tokenizer, architecture.vocab_size),
            groups,
        )
        stack.callback(data.close)
        lifetime = stack.enter_context(Lifetime.begin(settings, 60 * timeout_minutes))
        record = experiment_record(
            config,
            architecture,
            on_rank_zero(pretrained.fingerprint),
            data.descriptions,
            plan.steps_per_epoch,
        )
        trainer, checkpoints = build_trainer(config, settings, plan, groups, lifetime, record)
        ending.trainer = trainer
        ending.checkpoints = checkpoints
        ending.max_steps = plan.max_steps
        module = StudentModule(config, architecture, pretrained, groups, plan.max_steps)
        stack.callback(release, module.model)
        parameters, steps = module.parameter_counts(), plan.described()
        log.info(
            startup_report(config, architecture, parameters, world_size, steps, splits, tokenizer)
        )
        trainer.fit(module, datamodule=data)
        if checkpoints is not None:
            with lifetime.watchdog.pause("writing the .nemo archives"):
                checkpoints.write_archives(trainer, module)
        if "test" in splits:
            trainer.ckpt_path = None  # test the weights in memory, not those of the checkpoint
            trainer.test(module, datamodule=data)
        ending.show_summary(module.meter.totals)
