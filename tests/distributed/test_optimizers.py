"""What the optimizers' names mean, against torch's own, and which kernel is taken."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import megatron.core.optimizer
import pytest
import torch

from nemo_kd.config.optim import OptimConfig
from nemo_kd.config.shared import ModelConfig
from nemo_kd.config.student import StudentModelConfig
from nemo_kd.mcore.checkpoint import open_pretrained
from nemo_kd.mcore.groups import initialize_model_parallel
from nemo_kd.mcore.kernels import Kernels, Machine
from nemo_kd.mcore.model import (
    build_gpt_model,
    output_weight,
    transformer_config,
    unwrapped,
)
from nemo_kd.mcore.optimizer import (
    ModelOptimizer,
    gather_weights,
    wrap_for_training,
)
from tests.tiny_models import save_hf_model

LR, BETAS, EPS, WEIGHT_DECAY, CLIP = 1e-2, [0.8, 0.9], 1e-6, 0.3, 0.5
REFERENCES = {
    "distributed_fused_adam": torch.optim.AdamW,
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return save_hf_model(
        "qwen2_tied", tmp_path_factory.mktemp("optimizers"), 300, num_hidden_layers=1
    )


def wrapped(student: Path, name: str, overlap: bool = False, frozen: bool = False):
    groups = initialize_model_parallel(ModelConfig(), 1)
    with open_pretrained(str(student)) as source:
        config = transformer_config(source.architecture, ModelConfig(), torch.float32)
        model = build_gpt_model(source.architecture, config, 8, False)
        source.load_weights(model, groups)
    if frozen:
        output_weight(model).requires_grad_(False)
    optim = OptimConfig(
        name=name, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY
    )
    machine = Machine(capability=(9, 0) if overlap else (0, 0))
    kernels = Kernels(machine, StudentModelConfig(optim=optim), "32")
    return wrap_for_training(model, config, kernels), optim


def differences(student: Path, name: str, overlap: bool = False) -> list[float]:
    """Three steps of random gradients beside torch's optimizer: what the weights differ by at most after each."""
    model, optim = wrapped(student, name, overlap)
    optimizer = ModelOptimizer(model, optim, CLIP)
    copies = {
        name: torch.nn.Parameter(parameter.detach().clone())
        for name, parameter in model.named_parameters()
    }
    groups = [
        {
            "params": [copy for copy in copies.values() if copy.dim() > 1],
            "weight_decay": WEIGHT_DECAY,
        },
        {
            "params": [copy for copy in copies.values() if copy.dim() == 1],
            "weight_decay": 0.0,
        },
    ]
    reference = REFERENCES[name](groups, lr=LR, betas=BETAS, eps=EPS)
    found = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for weight, parameter in model.named_parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.main_grad.copy_(gradient)
            copies[weight].grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(copies.values(), CLIP)
        optimizer.step()
        if overlap:
            gather_weights([model])
        reference.step()
        assert optimizer.grad_norm == pytest.approx(float(norm), rel=1e-5)
        found.append(
            max(
                float((copies[n] - p).abs().max()) for n, p in model.named_parameters()
            )
        )
    return found


@pytest.mark.parametrize("name", list(REFERENCES))
def test_steps_are_those_of_torch(ranks, student, name):
    assert max(ranks(1).run(differences, student, name)[0]) < 1e-6


def test_weights_are_gathered_for_readers_outside_a_forward_pass(ranks, student):
    found = ranks(2).run(differences, student, "distributed_fused_adam", True)
    assert max(map(max, found)) < 1e-6


def stale_and_waited(student: Path) -> tuple[float, float]:
    """Difference of the output weight from the whole step's, before and after waiting for it."""
    model, optim = wrapped(student, "distributed_fused_adam", overlap=True)
    weight = output_weight(unwrapped(model))  # which knows of no gathering
    optimizer = ModelOptimizer(model, optim, None)
    for parameter in model.parameters():
        parameter.main_grad.fill_(1.0)
    optimizer.step()
    before = weight.detach().clone()
    waited = output_weight(model).detach().clone()
    gather_weights([model])
    return tuple(float((one - weight).abs().max()) for one in (before, waited))


def test_the_loss_waits_for_the_weight_that_it_reads(ranks, student):
    found = ranks(2).run(stale_and_waited, student)
    assert max(stale for stale, _ in found) > LR / 2
    assert [waited for _, waited in found] == [0.0, 0.0]


def frozen_weight(student: Path) -> bool:
    model, _ = wrapped(student, "distributed_fused_adam", overlap=True, frozen=True)
    return output_weight(model) is output_weight(unwrapped(model))


def test_a_frozen_output_weight_is_read_without_waiting(ranks, student):
    """As in a LoRA run: Megatron gathers trained weights only."""
    assert ranks(1).run(frozen_weight, student) == [True]


def saved_before_the_first_step(student: Path) -> set[str]:
    model, optim = wrapped(student, "distributed_fused_adam")
    with with_kernel(True):
        optimizer = ModelOptimizer(model, optim, None)
    states = optimizer.parts[0].optimizer.state.values()
    return set().union(*states)


def test_a_fused_adam_can_be_saved_before_its_first_step(ranks, student):
    found = ranks(1).run(saved_before_the_first_step, student)[0]
    assert {"exp_avg", "exp_avg_sq"} <= found


class FusedAdam(torch.optim.AdamW):
    """Stands in for the one of Transformer Engine or Apex, which takes `adam_w_mode`."""

    def __init__(self, params, adam_w_mode=None, **kwargs):
        super().__init__(params, **kwargs)
        self.adam_w_mode = adam_w_mode


def kernels(student: Path, installed: bool) -> dict[str, tuple[str, bool | None]]:
    found = {}
    for name in REFERENCES:
        model, optim = wrapped(student, name)
        with with_kernel(installed):
            inner = (
                ModelOptimizer(model, optim, None)
                .megatron.chained_optimizers[0]
                .optimizer
            )
        found[name] = (type(inner).__name__, getattr(inner, "adam_w_mode", None))
    return found


def with_kernel(installed: bool):
    return mock.patch.multiple(
        megatron.core.optimizer,
        USING_PYTORCH_OPTIMIZER=not installed,
        Adam=FusedAdam if installed else torch.optim.AdamW,
    )


def test_the_fused_kernel_is_taken_where_there_is_one(ranks, student):
    assert ranks(1).run(kernels, student, False)[0] == {
        "distributed_fused_adam": ("AdamW", None),
        "adamw": ("AdamW", None),
        "adam": ("Adam", None),
    }
    assert ranks(1).run(kernels, student, True)[0] == {
        "distributed_fused_adam": ("FusedAdam", True),
        "adamw": ("FusedAdam", True),
        "adam": ("FusedAdam", False),
    }
