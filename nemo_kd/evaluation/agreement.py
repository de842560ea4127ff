"""How close a student is to its teacher, over whole vocabularies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nemo_kd.batch import Example
from nemo_kd.config import ConfigError
from nemo_kd.config.teacher import ModelConfig
from nemo_kd.data.collate import collate
from nemo_kd.mcore.checkpoint import open_pretrained
from nemo_kd.mcore.groups import initialize_model_parallel
from nemo_kd.mcore.model import build_gpt_model, transformer_config
from nemo_kd.mcore.schedule import forward


@dataclass(frozen=True)
class Agreement:
    """Means over the loss tokens; losses in nats per token.

    Attributes:
        forward_kl: KL(teacher || student) over the whole vocabulary, without temperature.
        top1_agreement: share of tokens where both models rank the same token first.
    """

    num_tokens: int
    student_ce: float
    teacher_ce: float
    forward_kl: float
    top1_agreement: float


@torch.inference_mode()
def compare_with_teacher(
    student_path: str, teacher_path: str, examples: Sequence[Example], micro_batch_size: int = 16
) -> Agreement:
    """Runs both models (float32, whole on this process) over `examples`.

    Needs a process group of one rank.

    Raises:
        ConfigError: the models have different vocabularies.
    """
    student, student_vocab = _load(student_path)
    teacher, teacher_vocab = _load(teacher_path)
    if student_vocab != teacher_vocab:
        raise ConfigError(f"the student has a vocabulary of {student_vocab} tokens, the teacher one of {teacher_vocab}")
    sums = torch.zeros(5, dtype=torch.float64)
    for start in range(0, len(examples), micro_batch_size):
        batch = collate(examples[start : start + micro_batch_size], pad_id=0)
        mask_BS = batch.loss_mask_BS > 0
        labels_N = batch.labels_BS[mask_BS]
        log_q_NV, log_p_NV = (
            forward(model, batch)[mask_BS][:, :student_vocab].float().log_softmax(dim=-1)
            for model in (student, teacher)
        )
        kl_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(dim=-1)
        same_N = log_p_NV.argmax(dim=-1) == log_q_NV.argmax(dim=-1)
        ce = [-log_NV.gather(1, labels_N[:, None]).sum() for log_NV in (log_q_NV, log_p_NV)]
        sums += torch.stack([torch.tensor(len(labels_N)), *ce, kl_N.sum(), same_N.sum()]).double()
    means = (sums[1:] / sums[0]).tolist()
    return Agreement(int(sums[0]), *means)


def _load(path: str) -> tuple[torch.nn.Module, int]:
    layout = ModelConfig(make_vocab_size_divisible_by=1)
    groups = initialize_model_parallel(layout, layout.seed)
    with open_pretrained(path) as source:
        config = transformer_config(source.architecture, layout, torch.float32)
        model = build_gpt_model(source.architecture, config, 1, transformer_engine=False)
        source.load_weights(model, groups)
        return model.eval(), source.architecture.vocab_size
