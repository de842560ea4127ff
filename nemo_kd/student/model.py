"""The student's weights on Megatron Core: built, wrapped for the training, saved and loaded."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from nemo_kd.config.student import TrainStudentConfig
from nemo_kd.mcore.checkpoint import PretrainedModel
from nemo_kd.mcore.groups import ProcessGroups
from nemo_kd.mcore.kernels import Kernels, Machine
from nemo_kd.mcore.lora import (
    adapter_identity,
    adapter_state,
    add_adapters,
    load_adapter_state,
)
from nemo_kd.mcore.model import build_gpt_model, chunks, transformer_config
from nemo_kd.mcore.optimizer import sharding_metadata, wrap_for_training


class StudentModel(pl.LightningModule):
    """The pretrained student, with adapters if only those are trained.

    Attributes:
        gpt: this rank's part of the model.
        model: the same with gradient buffers.
        adapters: identity of the adapters; None if all weights are trained.
    """

    def __init__(
        self,
        config: TrainStudentConfig,
        pretrained: PretrainedModel,
        groups: ProcessGroups,
    ) -> None:
        super().__init__()
        self.config = config
        self.pretrained = pretrained
        self.architecture = pretrained.architecture
        self.groups = groups
        self.lora = config.model.peft.lora
        self.adapters: dict[str, Any] | None = None
        self._build_model()

    def _build_model(self) -> None:
        model = self.config.model
        self.kernels = Kernels(Machine.here(), model, self.config.trainer.precision)
        transformer = transformer_config(
            self.architecture,
            model,
            self.kernels.dtype,
            **self.kernels.fields,
            recompute_granularity=model.activations_checkpoint_granularity,
            recompute_method=model.activations_checkpoint_method,
            recompute_num_layers=model.activations_checkpoint_num_layers,
        )
        self.gpt = build_gpt_model(
            self.architecture,
            transformer,
            model.make_vocab_size_divisible_by,
            self.kernels.transformer_engine,
            own_norms=self.kernels.own_norms,
        )
        self.pretrained.load_weights(self.gpt, self.groups)
        if self.lora is not None:
            add_adapters(self.gpt, self.lora, model.seed, self.groups)
            self.adapters = adapter_identity(
                self.lora, self.pretrained.fingerprint()["weights"]
            )
        self.model = wrap_for_training(self.gpt, transformer, self.kernels)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the trained weights as Megatron's sharded tensors, for distributed checkpoints."""
        if self.lora is not None:
            return adapter_state(self.gpt)
        return {
            str(number): chunk.sharded_state_dict(metadata=sharding_metadata())
            for number, chunk in enumerate(chunks(self.gpt))
        }

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> None:
        """Load the content of such tensors."""
        if self.lora is not None:
            load_adapter_state(self.gpt, state_dict)
            return
        for number, chunk in enumerate(chunks(self.gpt)):
            chunk.load_state_dict(state_dict[str(number)])
