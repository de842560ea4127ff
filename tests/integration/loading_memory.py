"""Run as a program by test_loading_memory.py: loads models on one rank and prints, a line each, what it took.

Arguments: file store, number of tensor-parallel ranks, rank, then model=dtype for each load.
"""

from __future__ import annotations

import gc
import json
import re
import sys
from pathlib import Path

import torch

from nemo_kd.config.shared import ModelConfig
from nemo_kd.mcore.checkpoint import open_pretrained
from nemo_kd.mcore.groups import initialize_model_parallel
from nemo_kd.mcore.model import build_gpt_model, transformer_config


def memory(field: str) -> int:
    """Bytes by the kernel's count, pages of mapped files included."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def load(path: str, dtype: torch.dtype, size: int) -> dict[str, int]:
    """Bytes of this rank's part of the model, and of the most memory beyond what the process had before it was built."""
    layout = ModelConfig(
        tensor_model_parallel_size=size, make_vocab_size_divisible_by=8
    )
    groups = initialize_model_parallel(layout, 1)
    with open_pretrained(path) as source:
        gc.collect()
        Path("/proc/self/clear_refs").write_text(
            "5"
        )  # VmHWM, the peak, starts again from here
        before = memory("VmRSS")
        config = transformer_config(
            source.architecture, layout, dtype, perform_initialization=False
        )
        model = build_gpt_model(
            source.architecture, config, 8, transformer_engine=False
        )
        source.load_weights(model, groups)
        peak = memory("VmHWM") - before
    return {
        "shard": sum(
            tensor.nbytes for tensor in (*model.parameters(), *model.buffers())
        ),
        "peak": peak,
    }


def main(store: str, size: int, rank: int, loads: list[str]) -> None:
    torch.set_num_threads(1)
    file_store = torch.distributed.FileStore(store, size)
    torch.distributed.init_process_group(
        "gloo", store=file_store, rank=rank, world_size=size
    )
    for path, dtype in (argument.split("=") for argument in loads):
        print(json.dumps(load(path, getattr(torch, dtype), size)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
