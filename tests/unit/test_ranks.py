"""Which launcher started this process: the variables of torchrun, Slurm, containers and MPI."""

from __future__ import annotations

import socket
from datetime import timedelta

import psutil
import pytest

from nemo_kd.config import ConfigError
from nemo_kd.config.shared import TrainerConfig
from nemo_kd.run.launch import needs_launch
from nemo_kd.run.ranks import Ranks, find_ranks, listen_on_loopback

STEP = {
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NAME": "interactive",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
}
ENROOT = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29531",
}


def test_a_step_counts_whatever_the_job_is_called_and_without_tasks_per_node():
    ranks = find_ranks(STEP)
    assert (ranks.launcher, ranks.rank, ranks.size, ranks.local_rank) == (
        "srun",
        1,
        2,
        1,
    )
    assert ranks.is_one_machine
    assert ranks.main_address == "127.0.0.1"


def test_steps_of_one_job_meet_at_different_ports():
    ports = {
        find_ranks({**STEP, "SLURM_STEP_ID": str(step)}).main_port
        for step in range(20)
    }
    assert len(ports) == 20
    assert all(1024 < port < 32768 for port in ports)
    assert find_ranks({**STEP, "MASTER_PORT": "29500"}).main_port == 29500


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("gpu[03-05,9],login", "gpu03"),
        ("rack[2,4]-node[1-3]", "rack2-node1"),
        ("a,b", "a"),
    ],
)
def test_ranks_on_several_machines_meet_on_the_first(nodes, first):
    ranks = find_ranks(
        {**STEP, "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": nodes}
    )
    assert (ranks.main_address, ranks.is_one_machine) == (first, False)


def test_a_batch_script_an_interactive_shell_and_a_containers_variables_start_nothing():
    assert find_ranks({**STEP, "SLURM_STEP_NUM_TASKS": "1"}) == Ranks()
    assert (
        find_ranks(
            {
                key: value
                for key, value in STEP.items()
                if not key.startswith("SLURM_STEP")
            }
        )
        == Ranks()
    )
    assert find_ranks({**STEP, "SLURM_STEP_NUM_TASKS": "1", **ENROOT}) == Ranks()
    assert find_ranks({**STEP, **ENROOT, "WORLD_SIZE": "2"}).launcher == "srun"


def test_torchrun_goes_before_slurm():
    ranks = find_ranks(
        {
            **STEP,
            **ENROOT,
            "TORCHELASTIC_RUN_ID": "x",
            "RANK": "5",
            "WORLD_SIZE": "6",
            "LOCAL_RANK": "1",
        }
    )
    assert (ranks.launcher, ranks.rank, ranks.size, ranks.main_port) == (
        "torchrun",
        5,
        6,
        29531,
    )


def test_launchers_that_do_not_tell_enough_are_named():
    with pytest.raises(
        ConfigError,
        match="OMPI_COMM_WORLD_SIZE: each of 4 MPI processes",
    ):
        find_ranks({"OMPI_COMM_WORLD_SIZE": "4"})
    with pytest.raises(ConfigError, match="RANK: 'None' is not a number"):
        find_ranks({"WORLD_SIZE": "2"})
    with pytest.raises(ConfigError, match="WORLD_SIZE: 'two' is not a number"):
        find_ranks({"WORLD_SIZE": "two"})


def test_auto_and_minus_one_are_all_gpus_or_one_process_on_the_cpu(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for devices in ("auto", -1, "-1"):
        trainer = TrainerConfig(devices=devices)
        assert not needs_launch(trainer)
        assert trainer.num_devices == 1
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    trainer = TrainerConfig(devices="auto")
    assert not needs_launch(trainer)
    assert trainer.num_devices == 2
    for wrong in ("many", 0, -2):
        with pytest.raises(
            ConfigError, match=r"trainer\.devices: .* must be at least 1, or auto"
        ):
            TrainerConfig(devices=wrong)


def test_the_store_of_one_machine_listens_on_loopback_only():
    store = listen_on_loopback(0, None, timedelta(seconds=20))
    store.set("key", "value")
    listening = [
        found
        for found in psutil.Process().net_connections("inet")
        if found.status == "LISTEN"
    ]
    assert {
        found.laddr.ip for found in listening if found.laddr.port == store.port
    } == {"127.0.0.1"}
    with pytest.raises(OSError, match="in use"):
        listen_on_loopback(store.port, None, timedelta(seconds=20))
    with socket.create_connection(("127.0.0.1", store.port), timeout=20):
        pass
