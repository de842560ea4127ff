"""Loss of a model on examples, by the code of stage 2's validation.

Shape legend: S positions, B examples, H hidden size, R sources of the data and all of them
together, M sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from nemo_kd.batch import Batch
from nemo_kd.config import UserInputError
from nemo_kd.config.shared import length_multiple
from nemo_kd.data.batches import MicroBatches
from nemo_kd.data.tokenizer import padding_id
from nemo_kd.evaluation.inputs import Inputs, measured_settings
from nemo_kd.mcore.groups import ProcessGroups
from nemo_kd.mcore.model import hidden_at, output_weight
from nemo_kd.mcore.schedule import forward_backward
from nemo_kd.ops.vocab import VocabShard
from nemo_kd.student.loss import StudentLoss

EXAMPLES_PER_PASS = 64
"""Examples of a replica between two steps of progress."""

NAMES = {
    "sft_loss": "ce",
    "teacher_kl": "kl",
    "top1_agreement": "agreement",
    "teacher_mass": "teacher_mass",
    "student_mass": "student_mass",
    "teacher_entropy": "teacher_entropy",
    "student_entropy": "student_entropy",
}
"""Name in stage 2 -> name in an evaluation."""


@torch.no_grad()
def measure_loss(
    model: torch.nn.Module,
    groups: ProcessGroups,
    inputs: Inputs,
    on_pass: Callable[[range], None],
) -> dict[str, float]:
    """Return means per token in the loss; every rank calls it.

    Args:
        on_pass: called after every pass with the positions of its examples.

    Raises:
        UserInputError: the model's logits are not finite.
    """
    settings = measured_settings(inputs.config.evaluate.cache)
    loss = StudentLoss(settings.knowledge_distillation, settings.data)

    def token_losses(
        hidden_SBH: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weight_vH = output_weight(model)
        shard = VocabShard.of(len(weight_vH), inputs.vocab_size, groups.tensor)
        hidden_NH = hidden_at(
            hidden_SBH, batch.loss_positions_N, len(batch.tokens_BS), model
        )
        return loss.on_hidden(hidden_NH, weight_vH, batch, shard)

    batches = _micro_batches(inputs, groups)
    sums_RM = loss.zeros(groups.device)
    size = EXAMPLES_PER_PASS * groups.data_size
    for start in range(0, inputs.num_examples, size):
        positions = range(start, min(start + size, inputs.num_examples))
        micro_batches = batches.__getitems__(list(positions))
        found_RM = forward_backward(
            model, micro_batches, token_losses, forward_only=True
        )
        if found_RM is not None and groups.tensor_rank == 0:
            sums_RM += found_RM  # other tensor ranks have the same
        on_pass(positions)
    dist.all_reduce(sums_RM)
    metrics = loss.metrics("validation", sums_RM)
    scores = {
        name: metrics[f"validation/{stage_2}"]
        for stage_2, name in NAMES.items()
        if f"validation/{stage_2}" in metrics
    }
    if not math.isfinite(scores["ce"]):
        raise UserInputError(
            "pretrained_checkpoint.restore_from_path: the model's logits are not finite; try "
            "trainer.precision=32, and check the checkpoint"
        )
    return {**scores, "num_loss_tokens": int(sums_RM[-1, -1])}


def perplexity(ce: float) -> float:
    """Return e^ce, or infinity beyond float64's range."""
    return math.exp(ce) if ce < 700 else math.inf


def _micro_batches(inputs: Inputs, groups: ProcessGroups) -> Any:
    data = inputs.config.data
    multiple_of = length_multiple(inputs.config.model)
    return MicroBatches(
        inputs.rows,
        data_rank=groups.data_rank,
        data_size=groups.data_size,
        micro_batch_size=1,  # max_tokens decides
        max_tokens=data.max_tokens_per_batch,
        packed=data.packing and groups.context_size == 1,
        multiple_of=multiple_of,
        pad_id=padding_id(inputs.tokenizer, inputs.vocab_size),
        context_rank=groups.context_rank,
        context_size=groups.context_size,
    )
