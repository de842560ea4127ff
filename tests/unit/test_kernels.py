"""Choice and description of kernels: pure functions of the machine and the configuration."""

from __future__ import annotations

import logging
import socket
from dataclasses import fields, replace

import pytest

from nemo_kd.config import ConfigError
from nemo_kd.config.optim import LoraConfig, OptimConfig, PeftConfig
from nemo_kd.config.shared import (
    GPTArchitecture,
    ParallelConfig,
    TrainerConfig,
    check_fp8,
)
from nemo_kd.config.student import StudentDataConfig, StudentModelConfig
from nemo_kd.config.teacher import TeacherModelConfig
from nemo_kd.mcore import kernels as kernels_module
from nemo_kd.mcore.groups import ProcessGroups
from nemo_kd.mcore.kernels import Kernels, Machine, startup_facts

CPU = Machine(transformer_engine=True, apex=True)
FULL = replace(CPU, capability=(9, 0), adam="transformer_engine")
BARE = Machine(capability=(8, 0))
OF_LAYERS = ["apply_rope_fusion", "bias_activation_fusion"]
TRAINING = (
    "gradient_accumulation_fusion",
    "overlap_grad_reduce",
    "overlap_param_gather",
)


def student(**settings) -> StudentModelConfig:
    return StudentModelConfig(data=StudentDataConfig(), **settings)


def off(machine: Machine, model, precision: str) -> dict[str, str]:
    reasons = Kernels(machine, model, precision).reasons
    return {name: why for name, why in reasons.items() if why}


def test_all_is_used_where_all_is_installed():
    kernels = Kernels(FULL, student(), "bf16")
    assert kernels.transformer_engine
    assert list(kernels.reasons) == [*OF_LAYERS, *TRAINING]
    assert all(map(kernels.uses, kernels.reasons))
    assert set(kernels.fields.values()) == {True}


def test_nothing_is_used_without_a_gpu():
    kernels = Kernels(CPU, student(), "bf16")
    assert not kernels.transformer_engine
    assert not any(map(kernels.uses, kernels.reasons))
    assert set(kernels.reasons.values()) == {"no GPU"}
    assert set(kernels.fields.values()) == {False}


def test_the_teacher_has_no_fusions_of_training():
    kernels = Kernels(FULL, TeacherModelConfig(), "bf16")
    assert list(kernels.reasons) == list(kernels.fields) == OF_LAYERS
    assert not kernels.uses("overlap_grad_reduce")


@pytest.mark.parametrize(
    ("machine", "settings", "precision", "expected"),
    [
        (BARE, {}, "bf16", {
            "apply_rope_fusion": "no Transformer Engine",
            "gradient_accumulation_fusion": "no Apex",
        }),
        (replace(BARE, apex=True), {}, "bf16", {"apply_rope_fusion": "no Transformer Engine"}),
        (replace(FULL, apex=False), {}, "bf16", {}),
        (FULL, {"transformer_engine": "off"}, "bf16", {"apply_rope_fusion": "model.transformer_engine=off"}),
        (FULL, {}, "32", {"gradient_accumulation_fusion": "float32 weights"}),
        (FULL, {"optim": OptimConfig(name="adamw")}, "bf16", {"overlap_param_gather": "model.optim.name=adamw"}),
        (FULL, {"peft": PeftConfig(peft_scheme="lora", lora_tuning=LoraConfig())}, "bf16",
         {"gradient_accumulation_fusion": "frozen weights"}),
    ],
)  # fmt: skip
def test_what_is_off_has_its_reason(machine, settings, precision, expected):
    assert off(machine, student(**settings), precision) == expected


@pytest.mark.parametrize(
    ("machine", "missing"), [(CPU, "no GPU"), (BARE, "no Transformer Engine")]
)
def test_transformer_engine_is_refused_where_it_cannot_run(machine, missing):
    for choice in ("auto", "off"):
        model = student(transformer_engine=choice)
        assert not Kernels(machine, model, "bf16").transformer_engine
    message = rf"model.transformer_engine: on, but there is {missing} here"
    with pytest.raises(ConfigError, match=message):
        Kernels(machine, student(transformer_engine="on"), "bf16")


def test_megatrons_option_is_for_apex_only():
    """Without Apex its output layer refuses the option; Transformer Engine's layers do not need it."""
    kernels = Kernels(replace(FULL, apex=False), student(), "bf16")
    assert kernels.uses("gradient_accumulation_fusion")
    assert not kernels.fields["gradient_accumulation_fusion"]


def described(machine: Machine, groups, **settings) -> list[str]:
    model = student(**settings)
    text = startup_facts(Kernels(machine, model, "bf16"), groups)
    return text.splitlines()


@pytest.fixture
def groups() -> ProcessGroups:
    names = [one.name for one in fields(ProcessGroups)]
    return ProcessGroups(**dict.fromkeys(names, 0) | {
        "tensor_size": 2, "pipeline_size": 2, "context_size": 1, "data_size": 3, "expert_rank": 1,
    })  # fmt: skip


def test_every_kernel_is_a_line(groups):
    lora = PeftConfig(peft_scheme="lora")
    assert described(
        FULL,
        groups,
        peft=lora,
        sequence_parallel=True,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=4,
        expert_model_parallel_size=3,
    ) == [
        "layout:     tensor 2 (sequence parallel) x pipeline 2 (4 interleaved parts each) x context 1 x data 3, "
        "experts over 3",
        "attention:  Transformer Engine, with the softmax inside",
        "norms:      Transformer Engine, modules",
        "GEMM:       Transformer Engine, torch.bfloat16",
        "fusions:    apply_rope_fusion, bias_activation_fusion, overlap_grad_reduce, overlap_param_gather",
        "unused:     gradient_accumulation_fusion (frozen weights)",
        "Adam:       Transformer Engine's, distributed_fused_adam",
        "ranks:      rank = (tp, pp, cp, ep, dp)",
        f"  0 = (0, 0, 0, 1, 0) on {socket.gethostname()}",
    ]
    lines = described(BARE, groups, transformer_engine="off")
    assert lines[0].endswith(
        "tensor 2 x pipeline 2 x context 1 x data 3, experts over 1"
    )
    assert lines[1:4] == [
        "attention:  torch, with the softmax inside",
        "norms:      torch, modules",
        "GEMM:       torch, torch.bfloat16",
    ]
    assert lines[6] == "Adam:       torch's, distributed_fused_adam"


def test_a_fallback_on_a_gpu_is_one_warning(groups, caplog):
    with caplog.at_level(logging.WARNING):
        described(BARE, groups)
        assert len(caplog.records) == 1
        assert "Transformer Engine is not installed" in caplog.text
        for machine, choice in ((BARE, "off"), (FULL, "auto"), (CPU, "auto")):
            described(machine, groups, transformer_engine=choice)
    assert len(caplog.records) == 1


def test_of_many_ranks_the_first_and_the_last_are_shown(groups, monkeypatch):
    for num_ranks, num_lines in ((64, 64), (65, 3)):
        everywhere = [
            f"(0, 0, 0, 0, {rank}) on node{rank // 8}" for rank in range(num_ranks)
        ]
        monkeypatch.setattr(
            kernels_module, "gather", lambda _, found=everywhere: found
        )
        shown = described(FULL, groups)[8:]
        assert len(shown) == num_lines
        assert shown[0] == "  0 = (0, 0, 0, 0, 0) on node0"
        last = num_ranks - 1
        assert shown[-1] == f"  {last} = (0, 0, 0, 0, {last}) on node{last // 8}"


@pytest.mark.parametrize(
    ("machine", "settings", "found"),
    [
        (CPU, {}, "no GPU"),
        (replace(BARE, capability=(9, 0)), {}, "no Transformer Engine"),
        (FULL, {"transformer_engine": "off"}, "model.transformer_engine=off"),
        (replace(FULL, capability=(8, 6)), {}, r"\(8, 6\)"),
    ],
)
def test_fp8_is_refused_where_it_cannot_run(machine, settings, found):
    model = TeacherModelConfig(fp8="current", **settings)
    message = rf"model.fp8: current, but FP8 needs .* 8.9 or newer \(here: {found}\)"
    with pytest.raises(ConfigError, match=message):
        Kernels(machine, model, "bf16")


@pytest.mark.parametrize(
    ("fp8", "recipe"), [("current", "tensorwise"), ("delayed", "delayed")]
)
def test_fp8_sets_megatrons_fields(fp8, recipe, groups):
    kernels = Kernels(FULL, TeacherModelConfig(fp8=fp8), "bf16")
    assert kernels.fields["fp8"] == "hybrid"
    assert kernels.fields["fp8_recipe"] == recipe
    assert (
        f"GEMM:       Transformer Engine, torch.bfloat16, layers in FP8 with {fp8} scaling"
        in startup_facts(kernels, groups)
    )
    assert "fp8" not in Kernels(FULL, TeacherModelConfig(), "bf16").fields


def test_sizes_of_fp8_products_are_multiples_of_16():
    architecture = GPTArchitecture("llama", 100, 2, 64, 96, 8, 4, 8, 512, 1e-5, 1e4)
    check_fp8(architecture, ParallelConfig(2))
    with pytest.raises(
        ConfigError,
        match="model.fp8: hidden_size 64, and a rank's keys 8 and ffn_hidden_size 24",
    ):
        check_fp8(architecture, ParallelConfig(4))


@pytest.mark.parametrize("precision", ["fp16", "16", "16-mixed", "16-true"])
def test_fp16_is_refused_with_the_reason(precision):
    message = f"trainer.precision: {precision} is not supported: .* float16's range; use bf16"
    with pytest.raises(ConfigError, match=message):
        TrainerConfig(precision=precision)
