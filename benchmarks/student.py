"""What a step of distillation costs beside a step of SFT: the same student, examples and batches, with and without a teacher.

    OMP_NUM_THREADS=2 python -m benchmarks.student [--precision 32 bf16]

A Llama with random weights and a vocabulary of 128,256 trains on chats about the source of Python's standard library. SFT reads
the dataset, KD the packed cache of a teacher with 100 kept logits a position (all of them: `cache.min_probability=0`).
Both are `train_gpt_knowledge_distillation` in a process of its own that holds its student. On a CPU each kind of KD takes turns with
SFT, step by step; ratios are formed within a round, and the first step does not count. Then each trains alone, for the time that it
waits for data.
Memory is the largest that the kernel saw of a process (VmHWM), on a GPU torch's own peak.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import resource
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.teacher import machine, mib, spread
from benchmarks.teacher_inputs import MAX_LENGTH, SHAPES, write_chats, write_teacher
from benchmarks.teacher_variants import status_bytes
from nemo_kd.student.job import train_student
from nemo_kd.student.module import StudentModule
from nemo_kd.teacher.loop import compute_topk_logits
from tests.tiny_data import student_config, teacher_config

TOP_K = 100
VARIANTS: dict[str, dict[str, Any]] = {
    "SFT": {"kd_loss_weight": 0.0},
    "KD, tail": {"kd_loss": "forward_kl", "support": "tail"},
    "KD, renormalize": {"kd_loss": "forward_kl", "support": "renormalize"},
}


@dataclass(frozen=True)
class Setting:
    """What a process needs to know."""

    folder: Path
    student: Path
    dataset: Path
    cache: Path
    precision: str
    batch_size: int
    steps: int

    def config(self, variant: str, log_dir: Path) -> Any:
        source = self.dataset if variant == "SFT" else self.cache
        loss = {
            f"model__knowledge_distillation__{key}": value
            for key, value in VARIANTS[variant].items()
        }
        return student_config(
            self.student,
            source,
            source,
            log_dir,
            **loss,
            model__knowledge_distillation__sft_loss_weight=1.0,
            model__data__data_impl="dataset" if variant == "SFT" else "chunked_jsonl",
            model__max_seq_length=MAX_LENGTH,
            model__optim__name="distributed_fused_adam",
            model__micro_batch_size=self.batch_size,
            model__global_batch_size=self.batch_size,
            trainer__precision=self.precision,
            trainer__knowledge_distillation__max_steps=self.steps,
            trainer__knowledge_distillation__limit_val_batches=0,
            exp_manager__create_checkpoint_callback=False,
        )


@dataclass
class Step:
    seconds: float
    cpu_s: float
    tokens: int
    loss_tokens: int
    peak_bytes: int
    mfu: float | None = None


def train(connection: Any, variant: str, setting: Setting, by_turns: bool) -> None:
    """What a variant's process does: a step whenever it is asked for one, or all of them."""
    original = StudentModule.training_step

    def training_step(module: StudentModule, batch: Any, batch_idx: int) -> None:
        if by_turns:
            connection.recv()
        started, used = time.perf_counter(), cpu_seconds()
        original(module, batch, batch_idx)
        if by_turns:
            on_gpu = torch.cuda.is_available()
            peak_bytes = (
                torch.cuda.max_memory_allocated() if on_gpu else status_bytes("VmHWM")
            )
            tokens = sum(int(part.lengths_B.sum()) for part in batch)
            loss_tokens = sum(int((part.loss_mask_BS > 0).sum()) for part in batch)
            step = Step(
                time.perf_counter() - started,
                cpu_seconds() - used,
                tokens,
                loss_tokens,
                peak_bytes,
            )
            connection.send(step)

    log_dir = Path(tempfile.mkdtemp(dir=setting.folder))
    with (
        mock.patch.object(StudentModule, "training_step", training_step),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        train_student(setting.config(variant, log_dir))
    if not by_turns:
        lines = (log_dir / "metrics" / "metrics.jsonl").read_text().splitlines()
        connection.send(
            [row for row in map(json.loads, lines) if "perf/step_time_s" in row]
        )


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@contextlib.contextmanager
def started(variant: str, setting: Setting, by_turns: bool) -> Iterator[Any]:
    """The connection to a variant's process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=train, args=(theirs, variant, setting, by_turns), name=variant
    )
    process.start()
    theirs.close()
    yield ours
    process.join()


def by_turns(setting: Setting, variants: Sequence[str]) -> dict[str, list[Step]]:
    """The variants' steps but the first, taken in turns, there and back."""
    steps: dict[str, list[Step]] = {variant: [] for variant in variants}
    with contextlib.ExitStack() as stack:
        connections = {
            name: stack.enter_context(started(name, setting, by_turns=True))
            for name in variants
        }
        for number in range(setting.steps):
            for name in variants[:: -1 if number % 2 else 1]:
                connections[name].send(True)
                steps[name].append(connections[name].recv())
    return {name: found[1:] for name, found in steps.items()}


def beside_sft(setting: Setting) -> dict[str, tuple[list[Step], list[Step]]]:
    """Every variant's steps, and those of the SFT that it took turns with; on a GPU one variant after the other."""
    if torch.cuda.is_available():
        found = {name: by_turns(setting, [name])[name] for name in VARIANTS}
        return {name: (mine, found["SFT"]) for name, mine in found.items()}
    pairs: dict[str, tuple[list[Step], list[Step]]] = {}
    for name in list(VARIANTS)[1:]:
        found = by_turns(setting, ["SFT", name])
        pairs.setdefault("SFT", (found["SFT"], found["SFT"]))
        pairs[name] = found[name], found["SFT"]
    return pairs


def print_table(setting: Setting) -> None:
    found = beside_sft(setting)
    alone = {}
    for variant in VARIANTS:
        with started(variant, setting, by_turns=False) as connection:
            alone[variant] = connection.recv()[1:]
    print(
        f"\nprecision {setting.precision}, {setting.steps - 1} steps: median (least, most)\n"
    )
    columns = [
        "variant",
        "seconds",
        "CPU s",
        "tokens/s",
        "/ SFT",
        "CPU / SFT",
        "peak memory",
        "data wait alone",
    ]
    on_gpu = torch.cuda.is_available()
    columns += ["MFU alone"] * on_gpu
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for variant, (mine, base) in found.items():
        assert [step.loss_tokens for step in mine] == [
            step.loss_tokens for step in base
        ], "not the same examples"
        cells = [
            variant,
            spread([step.seconds for step in mine], 2),
            f"{statistics.median(step.cpu_s for step in mine):.1f}",
            f"{statistics.median(step.tokens / step.seconds for step in mine):,.0f}",
            spread(
                [
                    one.seconds / other.seconds
                    for one, other in zip(mine, base, strict=True)
                ],
                3,
            ),
            spread(
                [
                    one.cpu_s / other.cpu_s
                    for one, other in zip(mine, base, strict=True)
                ],
                3,
            ),
            mib(max(step.peak_bytes for step in mine)),
            f"{statistics.median(row['perf/data_wait_percent'] for row in alone[variant]):.2f}%",
        ]
        if on_gpu:
            cells.append(
                f"{statistics.median(row['perf/mfu_percent'] for row in alone[variant]):.1f}%"
            )
        print(f"| {' | '.join(cells)} |", flush=True)
    tokens, loss_tokens = (
        sum(getattr(step, name) for step in found["SFT"][0])
        for name in ("tokens", "loss_tokens")
    )
    print(
        f"\n{tokens:,} tokens, {loss_tokens:,} of them in the loss, {setting.batch_size} examples a step.",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables as Markdown."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=("32", "bf16"),
        default=["bf16"] if on_gpu else ["32", "bf16"],
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama-0.3b")
    parser.add_argument("--batch-size", type=int, default=64 if on_gpu else 4)
    parser.add_argument("--steps", type=int, default=21 if on_gpu else 6)
    parser.add_argument(
        "--students",
        type=Path,
        help="keep the random weights there; default: make them for each run",
    )
    options = parser.parse_args(arguments)
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    command = shlex.join(
        [
            "python",
            "-m",
            "benchmarks.student",
            *(sys.argv[1:] if arguments is None else arguments),
        ]
    )
    print(
        f"    {command}\n\n{date.today()}, {machine()}, torch {torch.__version__}.",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = options.students or folder
        student, teacher = (
            write_teacher(weights / shape, shape)
            for shape in (options.shape, "shallow")
        )
        dataset = write_chats(
            folder / "chats.jsonl", options.batch_size * options.steps
        )
        cache = folder / "cache_CHUNK_ID.jsonl.zst"
        with contextlib.redirect_stdout(io.StringIO()):
            keys = {"cache__min_probability": 0.0, "model__max_seq_length": MAX_LENGTH}
            compute_topk_logits(
                teacher_config(teacher, dataset, cache, top_k=TOP_K, **keys)
            )
        for precision in options.precision:
            print_table(
                Setting(
                    folder,
                    student,
                    dataset,
                    cache,
                    precision,
                    options.batch_size,
                    options.steps,
                )
            )


if __name__ == "__main__":
    main()
