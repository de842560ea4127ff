"""Stage 2: trains a student from a cache of teacher logits, or on labels alone.

loss = sft_loss_weight * CE + kd_loss_weight * KD, both summed over loss tokens and divided once by the number of loss
tokens in the global batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from nemo_kd import __version__
from nemo_kd.batch import Batch
from nemo_kd.config import ConfigError
from nemo_kd.config.model import PRECISIONS, GPTArchitecture, check_batch_sizes, check_training_layout
from nemo_kd.config.peft import check_lora
from nemo_kd.config.student import TrainStudentConfig
from nemo_kd.data.tokenizer import load_tokenizer, padding_id
from nemo_kd.mcore.checkpoint import PretrainedModel, open_pretrained, save_nemo
from nemo_kd.mcore.groups import ProcessGroups, init_process_group, initialize_model_parallel
from nemo_kd.mcore.hf_export import save_adapter, save_hf
from nemo_kd.mcore.lora import adapter_state, add_adapters, load_adapter_state, merged
from nemo_kd.mcore.model import build_gpt_model, transformer_config, use_transformer_engine
from nemo_kd.mcore.optimizer import ModelOptimizer, sharding_metadata, training_options, wrap_for_training
from nemo_kd.mcore.schedule import forward_backward, hidden_at, output_weight, project
from nemo_kd.ops.vocab import VocabShard
from nemo_kd.student_loss import StudentLoss
from nemo_kd.trainer.data_module import StudentData
from nemo_kd.trainer.experiment import build_trainer
from nemo_kd.trainer.learning_rate import check_schedule, lr_scheduler
from nemo_kd.trainer.plan import plan_training
from nemo_kd.trainer.splits import load_splits

log = logging.getLogger(__name__)


class StudentModule(pl.LightningModule):
    """One optimizer step per `training_step`, run by Megatron's schedule over the rank's micro-batches."""

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
            **training_options(),
        )
        self.gpt = build_gpt_model(
            architecture,
            self.transformer_config,
            model.make_vocab_size_divisible_by,
            use_transformer_engine(model.transformer_engine),
            own_norms=model.peft.lora is not None,
        )
        pretrained.load_weights(self.gpt, groups)
        self.lora = model.peft.lora
        if self.lora is not None:
            add_adapters(self.gpt, self.lora, model.seed, groups)
        self.model = wrap_for_training(self.gpt, self.transformer_config, distributed_optimizer=model.optim.is_sharded)
        self.loss = StudentLoss(model.knowledge_distillation)
        self.validation_sums: torch.Tensor | None = None
        self.step_started_s = math.nan

    def configure_optimizers(self) -> Any:
        optim = self.config.model.optim
        optimizer = ModelOptimizer(self.model, optim, self.config.trainer.knowledge_distillation.gradient_clip_val)
        return [optimizer], [{"scheduler": lr_scheduler(optimizer, optim, self.max_steps), "interval": "step"}]

    def token_losses(self, hidden_SBH: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(weighted loss summed over the micro-batch's loss tokens, sums of what is reported and of loss tokens)."""
        weight_vH = output_weight(self.gpt)
        shard = VocabShard.of(len(weight_vH), self.architecture.vocab_size, self.groups.tensor)
        positions_N = batch.loss_positions_N
        if self.loss.custom is not None:
            return self.loss.on_logits(project(self.gpt, hidden_SBH), batch, positions_N, shard)
        hidden_NH = hidden_at(hidden_SBH, positions_N, len(batch.tokens_BS), self.gpt)
        return self.loss.on_hidden(hidden_NH, weight_vH, batch, positions_N, shard)

    def transfer_batch_to_device(self, batch: list[Batch], device: torch.device, dataloader_idx: int) -> list[Batch]:
        """The batch as it is: micro-batches go to the device one by one, see `forward_backward`."""
        return batch

    def training_step(self, batch: list[Batch], batch_idx: int) -> None:
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        lr = optimizer.param_groups[0]["lr"]
        optimizer.zero_grad()
        sums = self._over_ranks(forward_backward(self.model, batch, self.token_losses))
        optimizer.step()
        scheduler.step()
        data: StudentData = self.trainer.datamodule
        data.training.consumed_samples += self.config.model.global_batch_size
        self._log_step(sums, lr, optimizer.optimizer.grad_norm, data)
        if self.global_step >= self.max_steps:
            self.trainer.should_stop = True  # makes Lightning validate, and so save, after the last step

    def on_train_batch_start(self, batch: list[Batch], batch_idx: int) -> None:
        self.step_started_s = time.perf_counter()

    def on_validation_epoch_start(self) -> None:
        self.validation_sums = None

    def validation_step(self, batch: list[Batch], batch_idx: int) -> None:
        sums = forward_backward(self.model, batch, self.token_losses, forward_only=True)
        if sums is not None:
            self.validation_sums = sums if self.validation_sums is None else self.validation_sums + sums

    def on_validation_epoch_end(self) -> None:
        self.log("val_loss", self._log_evaluation("validation")[0], prog_bar=True)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def sharded_state_dict(self) -> dict[str, Any]:
        """The weights that are trained as Megatron's sharded tensors, for distributed checkpoints."""
        if self.lora is not None:
            return adapter_state(self.gpt)
        return self.gpt.sharded_state_dict(metadata=sharding_metadata())

    def load_sharded_state_dict(self, state: dict[str, Any]) -> None:
        if self.lora is not None:
            load_adapter_state(self.gpt, state)
        else:
            self.gpt.load_state_dict(state)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["adapters"] = self._adapters()

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a training checkpoint of other weights than those that are trained here, by its plain values.

        Raises:
            ConfigError: it has no adapters, others, or those of another model.
        """
        before, now = checkpoint.get("adapters") or {}, self._adapters() or {}
        differences = [
            f"{key}: {before.get(key)} in the checkpoint, {now.get(key)} now"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if differences:
            raise ConfigError(
                f"model.peft: the checkpoint does not fit: {'; '.join(differences)}. Give the settings and the model it was trained "
                "with to go on, or another exp_manager.explicit_log_dir to begin anew"
            )

    def _adapters(self) -> dict[str, Any] | None:
        """What has to agree for a checkpoint of adapters to be loaded; the model under them is not in it."""
        if self.lora is None:
            return None
        return {
            "target_modules": list(self.lora.targets),
            "adapter_dim": self.lora.adapter_dim,
            "scale": self.lora.scale,
            "layer_selection": self.lora.layer_selection,
            "pretrained_checkpoint": self.pretrained.fingerprint()["weights"],
        }

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Empty: weights are saved through `sharded_state_dict`."""
        return {}

    def save_to(self, save_path: str) -> None:
        """Writes the student as a .nemo archive, and beside it what `export` asks for; every rank takes part."""
        export, tokenizer_folder = self.config.export, self.pretrained.tokenizer_folder
        hf_folder = Path(save_path.removesuffix(".nemo") + "-hf")
        provenance = self.provenance()
        with merged(self.gpt):
            save_nemo(save_path, self.gpt, self.architecture, tokenizer_folder, self.groups, provenance)
            if export.hf and export.lora == "merged":
                save_hf(hf_folder, self.gpt, self.architecture, tokenizer_folder, self.groups, provenance)
        if export.lora == "adapter":
            assert self.lora is not None
            base, groups = str(self.pretrained.source.absolute()), self.groups
            save_adapter(hf_folder, self.gpt, self.lora, self.architecture, base, tokenizer_folder, groups, provenance)

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
            provenance["adapters"] = self._adapters()
        if self.pretrained.provenance is not None:
            provenance["student_provenance"] = self.pretrained.provenance
        return provenance

    def _log_evaluation(self, split: str) -> torch.Tensor:
        """Logs the means over all loss tokens of the split, and returns them."""
        sums = self._over_ranks(self.validation_sums)
        means = sums[:-1] / sums[-1].clamp(min=1)
        for name, value in zip(self.loss.reported, means, strict=True):
            self.log(f"{split}/{name}", value)
        self._log_axis()
        return means

    def _log_axis(self) -> None:
        """Completed optimizer steps as the loggers' x-axis; Lightning's own count is one less after a resume."""
        self.log("step", float(self.global_step))

    def _over_ranks(self, sums: torch.Tensor | None) -> torch.Tensor:
        """The sums over all data- and context-parallel ranks, on every rank; only last stages have any."""
        self.loss.agree_on_names()
        total = torch.zeros(len(self.loss.reported) + 1, dtype=torch.float64, device=self.groups.device)
        if sums is not None and self.groups.tensor_rank == 0:  # the others of its tensor-parallel group have the same
            total += sums
        torch.distributed.all_reduce(total)
        return total

    def _log_step(self, sums: torch.Tensor, lr: float, grad_norm: float, data: StudentData) -> None:
        num_tokens = sums[-1].clamp(min=1)
        for name, value in zip(self.loss.reported, sums[:-1] / num_tokens, strict=True):
            self.log(f"train/{name}", value, prog_bar=name == "loss")
        step_time_s = time.perf_counter() - self.step_started_s
        self._log_axis()
        self.log_dict(
            {
                "lr": lr,
                "grad_norm": grad_norm,
                "perf/step_time_s": step_time_s,
                "consumed_samples": float(data.training.consumed_samples),
                "epoch": self.global_step / data.training.steps_per_epoch,
            }
        )
        self.log("perf/loss_tokens_per_second", float(sums[-1]) / step_time_s, prog_bar=True)


def train_student(config: TrainStudentConfig) -> None:
    """Runs stage 2: trains, validates, keeps the best checkpoints and leaves a .nemo archive.

    Raises:
        ConfigError, DataError, CacheError: something the user gave cannot work; before any step is taken.
    """
    StudentLoss(config.model.knowledge_distillation).check()
    with contextlib.ExitStack() as stack:
        pl.seed_everything(config.model.seed)
        init_process_group(config.trainer.num_nodes, config.trainer.devices, config.trainer.accelerator)
        pretrained = stack.enter_context(open_pretrained(config.pretrained_checkpoint.restore_from_path))
        architecture = pretrained.architecture
        check_training_layout(architecture, config.model)
        if config.model.peft.lora is not None:
            check_lora(config.model.peft.lora, architecture, config.model)
        world_size = torch.distributed.get_world_size()
        data_parallel_size = config.model.data_parallel_size(world_size)
        if config.model.data.max_tokens_per_batch is None:
            check_batch_sizes(config.model.micro_batch_size, config.model.global_batch_size, data_parallel_size)
        else:
            check_batch_sizes(1, config.model.global_batch_size, 1)
        tokenizer = load_tokenizer(pretrained.tokenizer_folder)
        splits = load_splits(config.model, architecture, tokenizer)
        plan = plan_training(
            config.trainer.knowledge_distillation, len(splits["train"]), config.model.global_batch_size
        )
        check_schedule(config.model.optim, plan.max_steps)
        groups = initialize_model_parallel(config.model, config.model.seed)
        data = StudentData(
            config, splits, plan.steps_per_epoch, plan.max_steps, padding_id(tokenizer, architecture.vocab_size), groups
        )
        trainer = build_trainer(config, plan, groups)
        module = StudentModule(config, architecture, pretrained, groups, plan.max_steps)
        trainer.fit(module, datamodule=data)
        if "test" in splits:
            trainer.test(module, datamodule=data)
