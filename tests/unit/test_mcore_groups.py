"""Devices that are not there, launchers that disagree with the configuration, and the CPU stand-in for CUDA."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys

import pytest
import torch

from nemo_kd.config import ConfigError
from nemo_kd.config.shared import GPTArchitecture, ModelConfig, TrainerConfig
from nemo_kd.mcore.groups import cuda_methods_on_cpu, install_cpu_support
from nemo_kd.mcore.model import transformer_config
from nemo_kd.run.ranks import join_ranks


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in (
        "TORCHELASTIC_RUN_ID",
        "SLURM_NTASKS",
        "LOCAL_RANK",
        "RANK",
        "WORLD_SIZE",
    ):
        monkeypatch.delenv(name, raising=False)


def gpus(monkeypatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_devices_that_are_not_there_are_refused(monkeypatch):
    gpus(monkeypatch, 0)
    with pytest.raises(
        ConfigError, match=r"trainer.accelerator: gpu, but torch finds no GPU here"
    ):
        join_ranks(TrainerConfig(num_nodes=1, devices=1, accelerator="gpu"))
    gpus(monkeypatch, 2)
    with pytest.raises(
        ConfigError,
        match=r"trainer.devices: 8, but torch finds 2 GPUs .*trainer.devices=2 or fewer",
    ):
        join_ranks(TrainerConfig(num_nodes=1, devices=8, accelerator="auto"))
    with pytest.raises(
        ConfigError,
        match=r"trainer.accelerator: cpu, but torch finds 2 GPUs.*CUDA_VISIBLE_DEVICES=",
    ):
        join_ranks(TrainerConfig(num_nodes=1, devices=1, accelerator="cpu"))


def test_a_launcher_that_disagrees_is_refused(monkeypatch):
    gpus(monkeypatch, 0)
    with pytest.raises(
        ConfigError,
        match=r"2 x 4 processes are asked for, but there are 1, started by no launcher",
    ):
        join_ranks(TrainerConfig(num_nodes=2, devices=4, accelerator="cpu"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(
        ConfigError,
        match=r"1 x 2 processes are asked for, but there are 3, started by torchrun",
    ):
        join_ranks(TrainerConfig(num_nodes=1, devices=2, accelerator="cpu"))


def test_a_tensor_parallel_size_that_does_not_divide_is_refused():
    architecture = GPTArchitecture("llama", 100, 2, 64, 96, 8, 2, 8, 512, 1e-5, 1e4)
    message = r"model.tensor_model_parallel_size: 4 does not divide the model's num_query_groups \(2\)"
    with pytest.raises(ConfigError, match=message):
        transformer_config(
            architecture, ModelConfig(tensor_model_parallel_size=4), torch.float32
        )


def test_the_window_is_counted_megatrons_way():
    architecture = GPTArchitecture(
        "mistral",
        100,
        3,
        64,
        96,
        8,
        2,
        8,
        512,
        1e-5,
        1e4,
        window_size=7,
        window_layers=[1],
    )
    config = transformer_config(architecture, ModelConfig(), torch.float32)
    assert config.window_size == (6, 0)
    assert config.window_attn_skip_freq == [0, 1, 0]


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="stands in for CUDA only where there is none"
)
def test_only_megatron_sees_the_cpu_stand_in():
    real = torch.zeros
    methods = {name: getattr(torch.Tensor, name) for name in dir(torch.Tensor)}
    install_cpu_support()
    install_cpu_support()
    from megatron.core.optimizer import optimizer as in_megatron

    zeros = in_megatron.torch.zeros(1, device="cuda")
    assert zeros.device.type == "cpu"
    assert in_megatron.torch.cuda.current_device() == torch.device("cpu")
    assert in_megatron.torch.Tensor is torch.Tensor
    assert torch.zeros is real
    with cuda_methods_on_cpu():
        assert zeros.type() == "torch.cuda.FloatTensor"
        assert zeros.cuda() is zeros
    assert zeros.type() == "torch.FloatTensor"
    with pytest.raises((RuntimeError, AssertionError)):
        zeros.cuda()
    assert {name: getattr(torch.Tensor, name) for name in dir(torch.Tensor)} == methods


def test_a_taken_port_is_named(monkeypatch):
    gpus(monkeypatch, 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        step = {
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
        }
        for name, value in {
            **step,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(
            ConfigError,
            match=f"MASTER_ADDR, MASTER_PORT: rank 0 cannot meet the others at 127.0.0.1:{port}",
        ):
            join_ranks(TrainerConfig(num_nodes=1, devices=2, accelerator="cpu"))


@pytest.mark.parametrize(
    ("asked", "has_gpu", "used"),
    [
        ("auto", False, "32"),
        ("auto", True, "bf16"),
        ("bf16", False, "bf16"),
        ("32", True, "32"),
    ],
)
def test_the_precision_follows_the_device_unless_it_is_given(
    monkeypatch, asked, has_gpu, used, caplog
):
    caplog.set_level("INFO", logger="nemo_kd")
    monkeypatch.setattr(logging.getLogger("nemo_kd"), "propagate", True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    monkeypatch.setattr("torch.cuda.device_count", lambda: int(has_gpu))
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    trainer = TrainerConfig(precision=asked)
    join_ranks(trainer)
    assert trainer.precision == used
    assert (f"precision: {used}" in caplog.text) == (asked == "auto")
    assert TrainerConfig().precision == "auto"


LENGTHS_IN_BF16 = """
import psutil, torch
from nemo_kd.mcore.groups import install_cpu_support
install_cpu_support()
layer = torch.nn.Linear(256, 256, bias=False).bfloat16()
used = []
with torch.inference_mode():
    for length in range(1, 501):
        layer(torch.zeros(length, 256, dtype=torch.bfloat16))
        used.append(psutil.Process().memory_info().rss)
print((used[499] - used[199]) // 10**6)
"""


def test_memory_does_not_grow_with_the_lengths_that_a_cpu_has_seen_in_bf16():
    """Where the CPU has instructions for bf16: 200 MB instead of 10 for 300 more lengths."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LENGTHS_IN_BF16]
    grown = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert int(grown) < 70
