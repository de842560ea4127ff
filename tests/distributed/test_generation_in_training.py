"""Training goes on bit for bit as if nothing had been generated between its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from nemo_kd.answers.responses import respond
from nemo_kd.config.optim import LoraConfig, OptimConfig, PeftConfig
from nemo_kd.config.shared import length_multiple
from nemo_kd.config.student import StudentModelConfig
from nemo_kd.data.batches import collate
from nemo_kd.mcore.checkpoint import open_pretrained
from nemo_kd.mcore.generation import Sampling
from nemo_kd.mcore.groups import initialize_model_parallel
from nemo_kd.mcore.kernels import Kernels, Machine
from nemo_kd.mcore.lora import add_adapters
from nemo_kd.mcore.model import build_gpt_model, chunks, project, transformer_config
from nemo_kd.mcore.optimizer import ModelOptimizer, gather_weights, wrap_for_training
from nemo_kd.mcore.schedule import forward_backward
from tests.golden.record_runs import tensor_sha256
from tests.parity.test_layouts import examples
from tests.tiny_models import build_hf_model

VOCAB_SIZE = 157
TP, PP, EP = (
    {f"{name}_parallel_size": 2}
    for name in ("tensor_model", "pipeline_model", "expert_model")
)
SP = {"sequence_parallel": True}
VPP = PP | {"virtual_pipeline_model_parallel_size": 2}
FULL = {"activations_checkpoint_granularity": "full"}
SELECTIVE = {"activations_checkpoint_granularity": "selective"}
LORA = {"lora": True}
OVERLAP = {"overlap": True}
BF16 = {"precision": "bf16"}
RUNS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "TP SP": (2, "qwen3", TP | SP | SELECTIVE | BF16),
    "TP SP LoRA": (2, "qwen3", TP | SP | LORA | FULL),
    "PP LoRA": (2, "qwen3", PP | LORA | BF16),
    "VPP": (2, "qwen3", VPP),
    "DP overlap": (2, "qwen3", OVERLAP | BF16),
    "EP TP SP overlap": (4, "qwen3_moe", EP | TP | SP | OVERLAP),
}


def states(model: torch.nn.Module) -> dict[str, Any]:
    """Flags, digests of random states, weights and gradient buffers: what the next step depends on."""
    tensors = {"random torch": torch.get_rng_state()}
    for name, state in get_cuda_rng_tracker().get_states().items():
        tensors[f"random {name}"] = state
    for name, parameter in model.named_parameters():
        tensors[f"weight {name}"] = parameter
        if hasattr(parameter, "main_grad"):
            tensors[f"gradient {name}"] = parameter.main_grad
    found: dict[str, Any] = {
        name: tensor_sha256(tensor) for name, tensor in tensors.items()
    }
    for name, module in model.named_modules():
        for owner in (module, getattr(module, "config", None)):
            found[f"flags {name} {type(owner).__name__}"] = {
                key: value
                for key, value in getattr(owner, "__dict__", {}).items()
                if isinstance(value, bool | str)
            }
    return found


def train(path: str, layout: dict[str, Any], generates: bool) -> list[dict[str, Any]]:
    """States after each backward pass and each step."""
    layout = dict(layout)
    machine = Machine(capability=(9, 0) if layout.pop("overlap", False) else (0, 0))
    precision = layout.pop("precision", "32")
    lora = LoraConfig(target_modules=["all"], adapter_dropout=0.3)
    scheme = "lora" if layout.pop("lora", False) else "none"
    peft = PeftConfig(peft_scheme=scheme, lora_tuning=lora)
    config = StudentModelConfig(
        **layout,
        peft=peft,
        make_vocab_size_divisible_by=8,
        optim=OptimConfig(lr=1e-2),
    )
    groups = initialize_model_parallel(config, 1)
    kernels = Kernels(machine, config, precision)
    with open_pretrained(path) as source:
        megatron = transformer_config(
            source.architecture,
            config,
            kernels.dtype,
            recompute_granularity=config.activations_checkpoint_granularity,
            recompute_method=config.activations_checkpoint_method,
            recompute_num_layers=config.activations_checkpoint_num_layers,
        )
        gpt = build_gpt_model(
            source.architecture, megatron, 8, False, own_norms=kernels.own_norms
        )
        source.load_weights(gpt, groups)
    if peft.lora is not None:
        add_adapters(gpt, peft.lora, 1, groups)
    model = wrap_for_training(gpt, megatron, kernels)
    optimizer = ModelOptimizer(model, config.optim, 1.0)

    def loss(hidden_SBH, batch):
        logits = project(chunks(model)[-1], hidden_SBH).flatten(0, 1)
        return logits[batch.loss_positions_N].float().square().sum(), None

    def generate() -> None:
        if not generates:
            return
        prompts = [[3, 4, 5], [6] * 9, [7, 8]]
        sampling = Sampling(5, frozenset({9}), temperature=1.0)
        # One prompt, too: a replica has none then.
        for count in (1, 3):
            responses = respond(
                model,
                groups,
                prompts[:count],
                sampling,
                vocab_size=VOCAB_SIZE,
                max_batch=2,
            )
            assert len(responses) == count

    found = []
    for step in range(3):
        batches = [
            collate(examples((5, 17), 10 * step + number), 0, length_multiple(config))
            for number in range(2)
        ]
        optimizer.zero_grad()
        forward_backward(model, batches, loss)
        generate()
        found.append(states(model))
        optimizer.step()
        generate()
        gather_weights(chunks(model))
        found.append(states(model))
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folders = {}
    for name in ("qwen3", "qwen3_moe"):
        folder: Path = tmp_path_factory.mktemp(name)
        build_hf_model(name, num_hidden_layers=4).save_pretrained(folder)
        folders[name] = str(folder)
    return folders


@pytest.mark.parametrize("name", RUNS)
def test_training_is_the_same_with_and_without(ranks, models, name):
    size, family, layout = RUNS[name]
    without, with_generation = (
        ranks(size).run(train, models[family], layout, generates)
        for generates in (False, True)
    )
    for expected, found in zip(without, with_generation, strict=True):
        for before, after in zip(expected, found, strict=True):
            assert [key for key in before if before[key] != after.get(key)] == []
        first, *_, last = expected
        changed = {key.split()[0] for key in first if first[key] != last[key]}
        assert {"weight", "gradient"} <= changed
