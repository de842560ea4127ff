"""What it costs to reduce a teacher's hidden states to top-k rows, beside the projection alone and the obvious way.

    python -m benchmarks.topk [--num-rows N] [--dtypes float32 bfloat16] [--device cuda]

Hidden states and weight are random and made before. Every method runs in a process of its own, in turn with the projection;
the best of some repetitions counts, in CPU time of all threads (on a GPU in real time). It runs with the allocator's
defaults and again with settings that let it keep its memory (`KEEPING`): what the kernel takes to hand out fresh memory is
much of the time of methods that make large tensors. Memory is the largest resident size the kernel saw in a run after the
first, less the one before; on a GPU torch's own peak.

Shape legend: N positions, V vocabulary, v the same on the only rank, H hidden size.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch

from nemo_kd.ops.tail_sampling import tail_uniforms
from nemo_kd.ops.topk import topk_rows
from nemo_kd.ops.vocab import VocabShard

KEEPING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "34359738368"}
PROJECTION = "projection, all logits at once"
OBVIOUS = "all logits, `.float()`, `logsumexp`, `torch.topk`"
TOPK_ROWS = "`topk_rows`"
MORE_ROWS = "`topk_rows`, four times the rows"
METHODS = (
    PROJECTION,
    OBVIOUS,
    TOPK_ROWS,
    MORE_ROWS,
    "`topk_rows`, also at temperature 2",
    "`topk_rows`, 4 tail samples",
)


def obvious(
    hidden_NH: torch.Tensor,
    weight_vH: torch.Tensor,
    labels_N: torch.Tensor,
    top_k: int,
) -> tuple[torch.Tensor, ...]:
    """(log-probabilities and ids of the largest, the labels' log-probabilities) from whole logits."""
    logits_NV = torch.mm(hidden_NH, weight_vH.T).float()
    log_sum_exp_N = logits_NV.logsumexp(dim=-1)
    values_NK, ids_NK = logits_NV.topk(top_k, dim=-1)
    labels = logits_NV.gather(1, labels_N[:, None])[:, 0] - log_sum_exp_N
    return values_NK - log_sum_exp_N[:, None], ids_NK, labels


def method_of(
    name: str, options: argparse.Namespace
) -> tuple[int, Callable[[], object]]:
    """(its rows, the work to be measured)."""
    device, dtype = options.device, getattr(torch, options.dtypes[0])
    num_rows = options.num_rows * (4 if name == MORE_ROWS else 1)
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(num_rows, options.hidden_size, generator=generator).to(
        device, dtype
    )
    weight_vH = (
        torch.randn(options.vocab_size, options.hidden_size, generator=generator)
        .mul_(0.1)
        .to(device, dtype)
    )
    labels_N = torch.randint(
        0, options.vocab_size, (num_rows,), generator=generator
    ).to(device)
    if name == PROJECTION:
        return num_rows, partial(torch.mm, hidden_NH, weight_vH.T)
    if name == OBVIOUS:
        return num_rows, partial(
            obvious, hidden_NH, weight_vH, labels_N, options.top_k
        )
    shard = VocabShard(0, options.vocab_size, options.vocab_size)
    work = partial(
        topk_rows,
        hidden_NH,
        weight_vH,
        labels_N,
        shard,
        top_k=options.top_k,
        kept=lambda p: p >= 0,
    )
    if "temperature" in name:
        work = partial(work, temperatures=(1.0, 2.0))
    if "samples" in name:
        work = partial(
            work,
            uniforms_NU=torch.from_numpy(tail_uniforms(0, 0, num_rows, 4)).to(device),
        )
    return num_rows, work


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Microseconds a row, also of the projection, and peak bytes beyond the inputs, of this process."""
    num_rows, work = method_of(name, options)
    work()  # loads code and fills the allocators' pools
    on_gpu = options.device == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
    work()
    peak = torch.cuda.max_memory_allocated() if on_gpu else _status_bytes("VmHWM")
    reference_rows, reference = method_of(PROJECTION, options)
    best = {"us": float("inf"), "projection_us": float("inf")}
    for _ in range(
        options.repetitions
    ):  # in turn: what else the machine does slows both
        best["projection_us"] = min(
            best["projection_us"], _seconds(reference, on_gpu) * 1e6 / reference_rows
        )
        best["us"] = min(best["us"], _seconds(work, on_gpu) * 1e6 / num_rows)
    return best | {"bytes": peak - before}


def _seconds(work: Callable[[], object], on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    clock = time.perf_counter if on_gpu else time.process_time
    start = clock()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - start


def _status_bytes(field: str) -> int:
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field + ":")
    )
    return int(line.split()[1]) * 1024


def measured_elsewhere(
    name: str, dtype: str, options: argparse.Namespace, keeping: bool
) -> dict[str, float]:
    """`measure` in a new process."""
    environment = {
        key: value for key, value in os.environ.items() if key not in KEEPING
    } | (KEEPING if keeping else {})
    command = [
        sys.executable,
        "-m",
        "benchmarks.topk",
        "--measure",
        name,
        "--dtypes",
        dtype,
        "--device",
        options.device,
    ]
    for key in ("num_rows", "vocab_size", "hidden_size", "top_k", "repetitions"):
        command += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    result = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=environment
    )
    found: dict[str, float] = json.loads(result.stdout)
    return found


def print_table(dtype: str, options: argparse.Namespace) -> None:
    print(
        f"\nN = {options.num_rows:,}, V = {options.vocab_size:,}, H = {options.hidden_size:,}, {dtype}, "
        f"top {options.top_k}. Microseconds a row.\n"
    )
    print(
        "| method | time | / projection | time, memory kept | / projection | peak memory |\n|---|---|---|---|---|---|"
    )
    for name in METHODS:
        both = [
            measured_elsewhere(name, dtype, options, keeping)
            for keeping in (False, True)
        ]
        times = [
            f"{found['us']:,.0f} | {found['us'] / found['projection_us']:.3f}"
            for found in both
        ]
        print(
            f"| {name} | {' | '.join(times)} | {both[0]['bytes'] / 2**20:,.0f} MiB |",
            flush=True,
        )


def _machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(
        (
            line.split(":", 1)[1].strip()
            for line in cpus
            if line.startswith("model name")
        ),
        "CPU",
    )
    return f"{name}, {torch.get_num_threads()} threads"


def main() -> None:
    """Prints the tables as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=("float32", "bfloat16"),
        default=["float32", "bfloat16"],
    )
    parser.add_argument("--num-rows", type=int, default=2048)
    parser.add_argument("--vocab-size", type=int, default=128_256)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--top-k", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--measure", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options)))
        return
    print(f"    {' '.join(['python -m benchmarks.topk', *sys.argv[1:]])}\n")
    print(f"{date.today()}, {_machine(options.device)}, torch {torch.__version__}.")
    for dtype in options.dtypes:
        print_table(dtype, options)


if __name__ == "__main__":
    main()
