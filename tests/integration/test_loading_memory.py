"""Loading takes little more memory than the rank's part of the model and its largest weight."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nemo_kd.config.convert import ConvertCheckpointConfig
from nemo_kd.convert import convert
from nemo_kd.mcore.architecture import architecture_from_hf
from nemo_kd.mcore.weights import hf_shapes

MODEL = {
    "model_type": "llama",
    "vocab_size": 32_001,
    "hidden_size": 768,
    "intermediate_size": 2560,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}
LARGEST_BYTES = 4 * 32_001 * 768
LIMIT = 1.2
ROOT = Path(__file__).parents[2]


def write(folder: Path, dtype: torch.dtype) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL))
    torch.manual_seed(0)
    shapes = hf_shapes(architecture_from_hf(MODEL))
    save_file(
        {name: torch.rand(shape).to(dtype) for name, shape in shapes.items()},
        folder / "model.safetensors",
    )
    return folder


@pytest.fixture(scope="module")
def checkpoints(ranks, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    paths = {
        "float32": write(folder / "float32", torch.float32),
        "bfloat16": write(folder / "bfloat16", torch.bfloat16),
    }
    paths["nemo"] = folder / "model.nemo"
    ranks(1).run(
        convert,
        ConvertCheckpointConfig(
            input_path=str(paths["float32"]), output_path=str(paths["nemo"])
        ),
    )
    return paths


def load(
    loads: list[tuple[Path, str]], size: int, store: Path
) -> list[list[dict[str, int]]]:
    """Of every rank and load: bytes of the rank's part of the model, and of the most memory that loading took."""
    arguments = [f"{path}={dtype}" for path, dtype in loads]
    # What the process frees goes back to the system at once, so that each load begins from the same memory.
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "PYTHONWARNINGS": "ignore",
    }
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.integration.loading_memory",
                str(store),
                str(size),
                str(rank),
                *arguments,
            ],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environment,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * size
    return [
        [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        for output in outputs
    ]


@pytest.mark.parametrize("size", [1, 2])
def test_loading_takes_little_more_than_the_shard_and_a_weight(
    checkpoints, tmp_path, size
):
    loads = [
        (checkpoints["bfloat16"], "bfloat16"),
        (checkpoints["float32"], "bfloat16"),
        (checkpoints["float32"], "float32"),
        (checkpoints["nemo"], "bfloat16"),
        (checkpoints["nemo"], "float32"),
    ]
    for rank in load(loads, size, tmp_path / "store"):
        assert len(rank) == len(loads)
        for (path, dtype), found in zip(loads, rank, strict=True):
            # A stored weight of an archive is read, then unpacked.
            most = LIMIT * found["shard"] + 2 * LARGEST_BYTES
            assert 0.95 * found["shard"] < found["peak"] < most, (path, dtype, found)
