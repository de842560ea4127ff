"""Checkpoints that a forked process writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SAVE_WITH_THREADS = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor

from nemo_kd.mcore.checkpoint_write import CheckpointWrite

dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
buffer = torch.rand(1 << 20)
buffer.exp_()  # starts torch's threads, which a forked process does not have
part = buffer[: 1 << 19]  # a view, which the writer copies
state = {"part": ShardedTensor.from_rank_offsets("part", part)}
write = CheckpointWrite(state, Path(sys.argv[1]))
assert write.finish()
"""


def test_the_forked_writer_does_not_wait_for_threads_of_its_parent(tmp_path):
    command = [sys.executable, "-c", SAVE_WITH_THREADS, str(tmp_path / "checkpoint")]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    subprocess.run(command, check=True, cwd=ROOT, timeout=60, env=environment)
    assert (tmp_path / "checkpoint" / ".metadata").exists()
