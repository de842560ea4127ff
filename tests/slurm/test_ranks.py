"""Steps of a real Slurm as people start them: from salloc, without tasks per node, two in one job, with a container's variables."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.test_templates import _slurm_answers

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300
PROGRAM = """
import os, sys, torch
from nemo_kd.run.launch import needs_launch, launch
from nemo_kd.run.endings import errors_end_the_process
from nemo_kd.config.shared import TrainerConfig
with errors_end_the_process():
    trainer = TrainerConfig(devices=2)
    if needs_launch(trainer):
        sys.exit(launch(2))
    from nemo_kd.run.ranks import join_ranks
    join_ranks(trainer)
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    torch.distributed.barrier()
    os.write(1, f"rank {torch.distributed.get_rank()} of {int(total)}\\n".encode())  # whole, beside the other's
"""

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(not _slurm_answers(), reason="no Slurm answers here (sinfo)"),
]


def in_job(folder: Path, script: str, job: str = "kd") -> str:
    """The output of a shell script in a job of two tasks on one node, which ends with status 0."""
    (folder / "program.py").write_text(PROGRAM)
    run = f'env PYTHONPATH={ROOT} OMP_NUM_THREADS=1 "{sys.executable}" {folder / "program.py"}'
    line = [
        "salloc",
        "--quiet",
        f"--job-name={job}",
        "-N1",
        "-n2",
        "bash",
        "-c",
        script.replace("RUN", run),
    ]
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    }
    result = subprocess.run(
        line,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
        env=environment,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("job", ["interactive", "bash"])
def test_a_step_of_salloc_without_tasks_per_node(tmp_path, job):
    assert sorted(in_job(tmp_path, "srun -n2 RUN", job).splitlines()) == [
        "rank 0 of 2",
        "rank 1 of 2",
    ]


def test_two_steps_of_a_job_at_a_time(tmp_path):
    script = "srun -n2 --overlap RUN & srun -n2 --overlap RUN & wait -n && wait -n"
    assert (
        sorted(in_job(tmp_path, script).splitlines())
        == ["rank 0 of 2"] * 2 + ["rank 1 of 2"] * 2
    )


def test_one_task_in_a_container_starts_its_ranks(tmp_path):
    variables = (
        "RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29531"
    )
    assert sorted(in_job(tmp_path, f"srun -n1 env {variables} RUN").splitlines()) == [
        "rank 0 of 2",
        "rank 1 of 2",
    ]
