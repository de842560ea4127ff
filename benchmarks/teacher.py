"""What stage 1 costs beside the teacher's forward pass, in time and in memory.

    OMP_NUM_THREADS=2 python -m benchmarks.teacher [--precision 32 bf16] [--tables speed memory]

A Llama with random weights reads chats about the source of Python's standard library, on one rank, in the batches that
stage 1 forms of them:

- forward: the model's ordinary forward pass to the logits of all positions, which are dropped
- projection: a forward pass to the hidden states, which are projected block by block where the label is in the loss; the
  logits are dropped. Nothing that gives a teacher's logits does less
- stage 1: `compute_topk_logits` from the moment when the teacher is loaded until it returns: tokenization, batches, teacher,
  rows, encoding, publishing, putting the chunk together
- obvious: tokenization, the logits of all positions, float(), logsumexp, torch.topk, tolist() and json.dumps in one process

Each is a process of its own that keeps its teacher; on a CPU they take turns, round by round, on a GPU they run one after
the other, for its memory's sake. Ratios are formed within a round. Memory is the largest resident size that the kernel saw
in a run (VmHWM of /proc/self/status, reset through /proc/self/clear_refs), without what the processes beside the teacher
hold for themselves, which is sampled in the first round; on a GPU also torch's own peak.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import psutil
import torch

from benchmarks.teacher_inputs import (
    MAX_LENGTH,
    SHAPES,
    write_chats,
    write_one_example,
    write_teacher,
)
from benchmarks.teacher_variants import VARIANTS, Figures, Setting, serve
from nemo_kd.cache.segment import segments
from nemo_kd.data.batches import form_batches
from nemo_kd.mcore.architecture import peak_flops

MEMORY_LENGTHS = (2048, 8192)
SAMPLING_S = 0.2


class Worker:
    """A variant's process, to be used in a with block; `lengths`: (tokens, tokens in the loss) of every example."""

    def __init__(self, variant: str, setting: Setting) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=serve, args=(theirs, variant, setting), name=variant
        )
        self._process.start()
        theirs.close()
        self.lengths: list[tuple[int, int]] = self._connection.recv()

    def run(self, sample_memory: bool) -> Figures:
        """One run; the memory of the processes beside the teacher's is looked at only if asked for."""
        self._connection.send(True)
        beside_bytes = 0
        while sample_memory and not self._connection.poll(SAMPLING_S):
            beside_bytes = max(beside_bytes, self._beside_bytes())
        return replace(self._connection.recv(), beside_bytes=beside_bytes)

    def _beside_bytes(self) -> int:
        total = 0
        for process in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it may have ended
                total += process.memory_full_info().uss
        return total

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):
            self._connection.send(False)
        self._process.join()


def measure(
    setting: Setting, rounds: int
) -> tuple[list[tuple[int, int]], dict[str, list[Figures]]]:
    """The lengths of the examples and `rounds` runs of every variant; in turns, there and back, on a CPU."""
    runs: dict[str, list[Figures]] = {variant: [] for variant in VARIANTS}
    if torch.cuda.is_available():
        for variant in VARIANTS:
            with Worker(variant, setting) as worker:
                runs[variant] = [worker.run(not number) for number in range(rounds)]
                lengths = worker.lengths
        return lengths, runs
    with contextlib.ExitStack() as stack:
        workers = {
            variant: stack.enter_context(Worker(variant, setting))
            for variant in VARIANTS
        }
        for number in range(rounds):
            for variant in list(workers)[:: -1 if number % 2 else 1]:
                runs[variant].append(workers[variant].run(not number))
        return workers["forward"].lengths, runs


def print_speed(setting: Setting, rounds: int) -> None:
    """Every variant's time and memory, and what stage 1 tells about its run."""
    lengths, runs = measure(setting, rounds)
    tokens, loss_tokens = (sum(column) for column in zip(*lengths, strict=True))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = peak_flops(device, setting.precision)
    speed = "MFU" if peak else "TFLOP/s"
    columns = [
        "variant",
        "seconds",
        "tokens/s",
        speed,
        "CPU s",
        "/ forward",
        "/ projection",
        "memory",
        "beside",
        "GPU",
    ]
    print(f"\nprecision {setting.precision}, {rounds} rounds: median (least, most)\n")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for variant, mine in runs.items():
        seconds = statistics.median(run.seconds for run in mine)
        rate = mine[0].flops / seconds
        cells = [
            variant,
            spread([run.seconds for run in mine], 1),
            f"{tokens / seconds:,.0f}",
            f"{rate / peak:.1%}" if peak else f"{rate / 1e12:.3f}",
            f"{statistics.median(run.cpu_s for run in mine):.1f}",
            *(
                spread(ratios(mine, runs[base]), 3)
                for base in ("forward", "projection")
            ),
            *(
                mib(max(size))
                for size in zip(
                    *((r.host_bytes, r.beside_bytes, r.device_bytes) for r in mine),
                    strict=True,
                )
            ),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    print(
        f"\n{tokens:,} tokens, {loss_tokens:,} of them in the loss, in {len(lengths)} examples of {quantiles(lengths)} tokens."
    )
    told = runs["stage 1"][-1].details
    assert told["progress/tokens"] == tokens
    print(
        f"Stage 1: padding {told['perf/padding_percent']:.1f}% (padded instead of packed: {padding(lengths, setting):.1%}), "
        f"data wait {told['perf/data_wait_percent']:.1f}%, {told['kept_tokens'] / loss_tokens:.1f} kept a loss token, "
        f"{told['bytes'] / tokens:.1f} bytes a token; it took {told['before_s']:.1f} s before the teacher would be loaded. "
        f"Obvious: {runs['obvious'][-1].details['bytes'] / tokens:,.0f} bytes a token.",
        flush=True,
    )


def print_memory(setting: Setting) -> None:
    """Peak memory of one long example, each in a process of its own."""
    print(
        "\n| variant | tokens | loaded | peak | beyond loaded | beside | GPU |\n|---|---|---|---|---|---|---|"
    )
    for variant in ("stage 1", "obvious"):
        for num_tokens in MEMORY_LENGTHS:
            dataset = write_one_example(
                setting.folder / f"{num_tokens}.jsonl", num_tokens
            )
            with Worker(variant, replace(setting, dataset=dataset)) as worker:
                found = worker.run(sample_memory=True)
                assert worker.lengths[0][0] == num_tokens
            sizes = (
                found.before_bytes,
                found.host_bytes,
                found.host_bytes - found.before_bytes,
            )
            cells = map(mib, (*sizes, found.beside_bytes, found.device_bytes))
            print(f"| {variant} | {num_tokens:,} | {' | '.join(cells)} |", flush=True)


def ratios(mine: Sequence[Figures], base: Sequence[Figures]) -> list[float]:
    return [one.seconds / other.seconds for one, other in zip(mine, base, strict=True)]


def spread(values: Sequence[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}, {max(values):.{digits}f})"


def quantiles(lengths: Sequence[tuple[int, int]]) -> str:
    cuts = np.quantile([tokens for tokens, _ in lengths], [0, 0.1, 0.5, 0.9, 1])
    return (
        f"{' / '.join(f'{cut:,.0f}' for cut in cuts)} (least, 10%, median, 90%, most)"
    )


def padding(lengths: Sequence[tuple[int, int]], setting: Setting) -> float:
    """The share of padding that stage 1 would compute with data.packing=false."""
    computed = 0
    for part in segments(range(len(lengths)), setting.segment_examples):
        tokens = [lengths[number][0] for number in part]
        batches = form_batches(tokens, None, setting.max_tokens, packed=False)
        computed += sum(len(batch) * tokens[batch[0]] for batch in batches)
    return 1 - sum(tokens for tokens, _ in lengths) / computed


def mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(
        (
            line.split(":", 1)[1].strip()
            for line in lines
            if line.startswith("model name")
        ),
        "CPU",
    )
    return f"{name}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables as Markdown."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tables", nargs="+", choices=("speed", "memory"), default=["speed", "memory"]
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=("32", "bf16"),
        default=["bf16"] if on_gpu else ["32", "bf16"],
    )
    parser.add_argument(
        "--shape", choices=SHAPES, default="llama-3-8b" if on_gpu else "llama-0.3b"
    )
    parser.add_argument("--num-records", type=int, default=2048 if on_gpu else 64)
    parser.add_argument("--segment-examples", type=int, default=64 if on_gpu else 16)
    parser.add_argument(
        "--max-tokens", type=int, default=8192 if on_gpu else 4096, help="a batch"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--teachers",
        type=Path,
        help="keep the random teachers there; default: make them for each run",
    )
    options = parser.parse_args(arguments)
    os.environ.setdefault(
        "PYTHONWARNINGS", "ignore"
    )  # of the processes: Megatron's, on what is not installed
    command = shlex.join(
        [
            "python",
            "-m",
            "benchmarks.teacher",
            *(sys.argv[1:] if arguments is None else arguments),
        ]
    )
    print(
        f"    {command}\n\n{date.today()}, {machine()}, torch {torch.__version__}.",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teachers, dataset = (
            options.teachers or folder,
            write_chats(folder / "chats.jsonl", options.num_records),
        )
        for precision in options.precision if "speed" in options.tables else ():
            teacher = write_teacher(teachers / options.shape, options.shape)
            limits = options.max_tokens, options.segment_examples
            print_speed(
                Setting(folder, teacher, dataset, precision, *limits), options.rounds
            )
        if "memory" in options.tables:
            teacher = write_teacher(teachers / "shallow", "shallow")
            print_memory(Setting(folder, teacher, dataset, "32", MAX_LENGTH, 1))


if __name__ == "__main__":
    main()
