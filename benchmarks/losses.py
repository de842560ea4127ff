"""Speed and memory of the losses: forward and backward, cross-entropy included, beside what else could be used.

    python -m benchmarks.losses [--only SUBSTRING ...] [--device cuda]

Every repetition gets fresh logits that are no leaf of autograd's graph, as a model's are, and making them is not timed.
A method is timed in turn with torch's cross-entropy and with ours alone, in one process and on one thread; the best
repetition of each counts (CUDA events on a GPU). CPU time includes what the kernel takes to hand out fresh memory: most
of the time of a method that makes copies of the logits, and very different between machines. With

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=34359738368

in the environment the allocator keeps its memory and it is left out (the processes that measure memory run without).

Memory is measured in a process of its own per method, on its second run: the largest resident size the kernel saw (VmHWM
of /proc/self/status, reset through /proc/self/clear_refs) less the one before; on a GPU torch's own peak. The gradient of
the logits counts, unless it overwrites them.

Shape legend: N positions, V vocabulary, K kept teacher logits, H hidden size.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import baseline_losses
from benchmarks.baseline_losses import Inputs, Method, Setting, random_inputs
from nemo_kd.batch import TeacherRows
from nemo_kd.config.loss import Divergence
from nemo_kd.ops.distillation import DistillationLoss
from nemo_kd.ops.fused_linear import fused_linear_loss
from nemo_kd.ops.selection import largest, student_entropy, teacher_entropy
from nemo_kd.ops.vocab import VocabShard

Job = Callable[[], Callable[[], None]]
"""Makes fresh inputs and returns the work to be measured."""
Jobs = Callable[[Setting], dict[str, Job]]


TORCH_CE, MEGATRON_CE, OUR_CE = (
    "torch `cross_entropy(logits.float())`",
    "Megatron's cross-entropy",
    "cross-entropy alone",
)
PROJECTION = "projection + Megatron's cross-entropy"
ALLOCATOR_KEYS = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
SUPPORTS = ("renormalize", "tail", "truncate", "label")
OBJECTIVES = {
    "forward_kl": (*SUPPORTS, "sampled"),
    "reverse_kl": SUPPORTS[:2],
    "jsd": SUPPORTS,
    "skewed_forward_kl": SUPPORTS,
    "skewed_reverse_kl": SUPPORTS,
    "adaptive_kl": SUPPORTS[:2],
    "tvd": SUPPORTS,
}
SELECTIONS = {
    "all positions": None,
    "top 25% by teacher_entropy": "teacher",
    "top 25% by student_entropy": "student",
}
LABEL_OBJECTIVES = ("k1", "k2", "k3", "low_var_kl")
COMPILED = (("forward_kl", "tail"), ("reverse_kl", "renormalize"), ("jsd", "tail"))


class _Produced(torch.autograd.Function):
    """Tensors that a model made: not a leaf, and what becomes of the gradient is not our business."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


def produced(values: Tensor) -> Tensor:
    return _Produced.apply(torch.zeros((), requires_grad=True), values)


def ours(divergence: Divergence | None, compile: bool = False) -> Method:
    """Our loss as a method."""
    loss = DistillationLoss(divergence, compile=compile)

    def summed(logits_NV: Tensor, inputs: Inputs) -> Tensor:
        vocab_size = logits_NV.shape[1]
        losses = loss(
            logits_NV,
            inputs.labels_N,
            VocabShard(0, vocab_size, vocab_size),
            teacher_rows(divergence, inputs),
        )
        return (
            losses.ce_N.sum()
            if losses.kd_N is None
            else losses.ce_N.sum() + losses.kd_N.sum()
        )

    return summed


def teacher_rows(
    divergence: Divergence | None, inputs: Inputs
) -> TeacherRows[Tensor] | None:
    if divergence is None:
        return None
    temperature = 1 / divergence.teacher_scale
    tail_mass_N = inputs.tail_mass_of[temperature]
    return TeacherRows(
        positions_P=torch.arange(len(tail_mass_N)),
        topk_logits_PK=inputs.topk_logits_NK,
        topk_token_ids_PK=inputs.topk_token_ids_NK,
        log_sum_exp_logits_P=torch.zeros_like(tail_mass_N),
        tail_mass_PT=tail_mass_N[:, None],
        temperatures=(temperature,),
        label_logprobs_P=inputs.label_logprobs_N,
        tail_token_ids_PM=inputs.tail_token_ids_NM,
    )


def methods(dtype: str) -> dict[str, Method]:
    """The rows of the first table."""
    table: dict[str, Method] = {
        TORCH_CE: baseline_losses.torch_cross_entropy,
        f"{TORCH_CE}, compiled": baseline_losses.compiled(
            baseline_losses.torch_cross_entropy
        ),
        MEGATRON_CE: baseline_losses.megatron_cross_entropy,
        "`log_softmax`, `gather`, `F.kl_div` + cross-entropy": baseline_losses.gather_and_kl_div,
        "dense `F.kl_div` of all teacher logits + cross-entropy": baseline_losses.dense_kl_div,
        "tail bucket by autograd": baseline_losses.autograd_tail_kl,
        "tail bucket by autograd, compiled": baseline_losses.compiled(
            baseline_losses.autograd_tail_kl
        ),
    }
    if dtype == "bfloat16":
        table["Megatron's fused cross-entropy"] = (
            baseline_losses.megatron_fused_cross_entropy
        )
    table[OUR_CE] = ours(None)
    for objective, supports in OBJECTIVES.items():
        for support in supports:
            table[f"`{objective}`, {support}"] = ours(Divergence(objective, support))
    table["`forward_kl`, tail, T = 2"] = ours(
        Divergence(
            "forward_kl", "tail", student_scale=0.5, teacher_scale=0.5, factor=4.0
        )
    )
    for objective in LABEL_OBJECTIVES:
        table[f"`{objective}`"] = ours(Divergence(objective))
    table[f"{OUR_CE}, compiled"] = ours(None, compile=True)
    for objective, support in COMPILED:
        table[f"`{objective}`, {support}, compiled"] = ours(
            Divergence(objective, support), compile=True
        )
    return table


def logits_jobs(setting: Setting) -> dict[str, Job]:
    """Losses of given logits."""
    dense: list[Inputs] = []  # its inputs are large: made when the method is reached
    inputs = random_inputs(setting)

    def job(name: str, method: Method) -> Job:
        def make() -> Callable[[], None]:
            mine = inputs
            if method is baseline_losses.dense_kl_div:
                dense[:] = dense or [random_inputs(setting, dense=True)]
                mine = dense[0]
            logits_NV = produced(mine.logits_NV)
            return lambda: method(logits_NV, mine).backward()

        return make

    return {name: job(name, method) for name, method in methods(setting.dtype).items()}


def fused_jobs(setting: Setting) -> dict[str, Job]:
    """Losses of given hidden states, the output projection included; the loss is forward KL with a tail and CE."""
    inputs = random_inputs(setting)
    options = {"dtype": setting.torch_dtype, "device": setting.device}
    hidden_NH = torch.randn(setting.num_tokens, setting.hidden_size, **options)
    weight_VH = (
        torch.randn(setting.vocab_size, setting.hidden_size, **options) * 0.05
    ).requires_grad_()
    main_grad_VH = torch.zeros_like(weight_VH, dtype=torch.float32).fill_(
        0
    )  # filled, so that its pages exist
    loss, divergence = (
        ours(Divergence("forward_kl", "tail")),
        Divergence("forward_kl", "tail"),
    )
    shard = VocabShard(0, setting.vocab_size, setting.vocab_size)

    def job(work: Callable[[Tensor], Tensor], into_main_grad: bool = False) -> Job:
        def make() -> Callable[[], None]:
            weight_VH.grad = None
            hidden = hidden_NH.clone().requires_grad_()
            if hasattr(weight_VH, "main_grad"):
                del weight_VH.main_grad
            if into_main_grad:
                weight_VH.main_grad = main_grad_VH
            return lambda: work(hidden).backward()

        return make

    def fused(block_rows: int) -> Callable[[Tensor], Tensor]:
        rows = teacher_rows(divergence, inputs)
        return lambda hidden: fused_linear_loss(
            DistillationLoss(divergence),
            hidden,
            weight_VH,
            inputs.labels_N,
            shard,
            rows,
            block_rows=block_rows,
        )[0]

    def alone(by: str | None) -> Callable[[Tensor], Tensor]:
        """KD without cross-entropy, on a quarter of the positions if they are selected by something."""
        rows = teacher_rows(divergence, inputs)

        def on(hidden: Tensor, places: Tensor | slice) -> Tensor:
            some = (hidden[places], weight_VH, inputs.labels_N[places], shard)
            return fused_linear_loss(
                DistillationLoss(divergence), *some, rows.at(places), ce_weight=0.0
            )[0]

        def work(hidden: Tensor) -> Tensor:
            if by is None:
                return on(hidden, slice(None))
            scores_N = (
                student_entropy(hidden, weight_VH, shard)
                if by == "student"
                else teacher_entropy(rows)
            )
            count = torch.tensor([setting.num_tokens // 4], device=setting.device)
            selected_N = largest(scores_N, torch.zeros_like(inputs.labels_N), count)
            with torch.no_grad():
                on(hidden, ~selected_N)
            return on(hidden, selected_N)

        return work

    return {
        PROJECTION: job(
            lambda hidden: baseline_losses.megatron_cross_entropy(
                hidden @ weight_VH.T, inputs
            )
        ),
        "projection + our loss of the logits": job(
            lambda hidden: loss(hidden @ weight_VH.T, inputs)
        ),
        **{
            f"fused, {rows} rows a block, weight gradient into main_grad": job(
                fused(rows), into_main_grad=True
            )
            for rows in (256, 512)
        },
        "fused, 512 rows a block, weight gradient returned": job(fused(512)),
        **{
            f"fused, KD alone, {name}": job(alone(by), into_main_grad=True)
            for name, by in SELECTIONS.items()
        },
    }


def seconds(work: Callable[[], None], device: str) -> float:
    """CPU time of the work, on a GPU the time between two of its events."""
    if device == "cpu":
        started = time.process_time()
        work()
        return time.process_time() - started
    start, end = (
        torch.cuda.Event(enable_timing=True),
        torch.cuda.Event(enable_timing=True),
    )
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def best(jobs: Sequence[Job], repetitions: int, device: str) -> list[float]:
    """The least time of each job, taken in turns; a first round is not counted."""
    rounds = [
        [seconds(job(), device) for job in jobs] for _ in range(repetitions + 1)
    ][1:]
    return [min(times) for times in zip(*rounds, strict=True)]


def peak_bytes(jobs_of: Jobs, setting: Setting, name: str) -> int:
    """Most memory a method takes beyond its inputs, in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_bytes_here, jobs_of, setting, name).result()


def _peak_bytes_here(jobs_of: Jobs, setting: Setting, name: str) -> int:
    torch.set_num_threads(1)
    job = jobs_of(setting)[name]
    job()()  # loads code, compiles, fills the allocators' pools
    work = job()
    gc.collect()
    if setting.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    work()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field + ":")
    )
    return int(line.split()[1]) * 1024


def print_logits_table(setting: Setting, repetitions: int, only: list[str]) -> None:
    on_gpu, jobs = setting.device == "cuda", logits_jobs(setting)
    (reference,) = best([jobs[TORCH_CE]], repetitions, setting.device)
    print(f"\n{_sizes(setting)}. Torch's cross-entropy takes {reference:.3g} s.\n")
    columns = [
        "method",
        "time / torch CE",
        "time / our CE alone",
        "peak extra / logits",
    ]
    columns += ["bandwidth / copy's"] if on_gpu else []
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    copy_rate = copy_bytes_per_second(setting) if on_gpu else 0.0
    for name, job in jobs.items():
        if not _wanted(name, only):
            continue
        torch_ce, our_ce, mine = best(
            [jobs[TORCH_CE], jobs[OUR_CE], job], repetitions, setting.device
        )
        extra = peak_bytes(logits_jobs, setting, name) / setting.logits_bytes
        cells = [
            name,
            f"{mine / torch_ce:.2f}",
            f"{mine / our_ce:.2f}",
            f"{extra:.3f}",
        ]
        # A pass that reads the logits, and one that reads them and writes the gradient, are the least there can be.
        cells += (
            [f"{3 * setting.logits_bytes / mine / copy_rate:.2f}"] if on_gpu else []
        )
        print(f"| {' | '.join(cells)} |", flush=True)


def copy_bytes_per_second(setting: Setting) -> float:
    """Read and written bytes per second of the GPU copying tensors of the logits' size."""
    source = torch.zeros(
        setting.logits_bytes, dtype=torch.uint8, device=setting.device
    )
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    return 2 * setting.logits_bytes / best([lambda: copy], 10, setting.device)[0]


def print_fused_table(
    settings: Sequence[Setting], repetitions: int, only: list[str]
) -> None:
    """Times at the first setting only; memory at each, which differ in the number of tokens."""
    jobs = fused_jobs(settings[0])
    (reference,) = best([jobs[PROJECTION]], 1, settings[0].device)
    print(
        f"\n{_sizes(settings[0])}, hidden size {settings[0].hidden_size}. {PROJECTION} takes {reference:.3g} s.\n"
    )
    print(
        "| method | N | time | peak extra / logits | beyond the gradient of the hidden states |"
    )
    print("|---|---|---|---|---|")
    for name, job in jobs.items():
        for setting in settings if _wanted(name, only) else ():
            ratio = ""
            if setting is settings[0]:
                reference, mine = best(
                    [jobs[PROJECTION], job], repetitions, setting.device
                )
                ratio = f"{mine / reference:.2f}"
            extra = peak_bytes(fused_jobs, setting, name)
            hidden = (
                setting.num_tokens * setting.hidden_size * setting.torch_dtype.itemsize
            )
            print(
                f"| {name} | {setting.num_tokens:,} | {ratio} | {extra / setting.logits_bytes:.3f} "
                f"| {(extra - hidden) / 2**20:,.0f} MiB |",
                flush=True,
            )


def _wanted(name: str, only: list[str]) -> bool:
    return not only or any(part in name for part in only)


def _sizes(setting: Setting) -> str:
    return f"N = {setting.num_tokens:,}, V = {setting.vocab_size:,}, {setting.dtype}, K = {setting.top_k}"


def _machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    return (
        next(
            (
                line.split(":", 1)[1].strip()
                for line in cpus
                if line.startswith("model name")
            ),
            "CPU",
        )
        + ", one thread"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--num-tokens", type=int, help="2,048, or 8,192 on a GPU")
    parser.add_argument(
        "--vocab",
        nargs="+",
        help="SIZE:DTYPE; 32000:float32 128256:bfloat16, on a GPU the last alone",
    )
    parser.add_argument("--top-k", type=int, default=100)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument(
        "--tables", nargs="+", choices=("logits", "fused"), default=["logits", "fused"]
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="SUBSTRING",
        help="rows whose name has one of these",
    )
    parser.add_argument("--repetitions", type=int, default=7)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    kept = {
        name: os.environ.pop(name) for name in ALLOCATOR_KEYS if name in os.environ
    }  # not for memory's processes
    on_gpu = options.device == "cuda"
    num_tokens = options.num_tokens or (8192 if on_gpu else 2048)
    words = [f"{name}={value}" for name, value in kept.items()] + [
        "python -m benchmarks.losses"
    ]
    command = " ".join(
        [*words, *map(shlex.quote, sys.argv[1:] if arguments is None else arguments)]
    )
    print(
        f"    {command}\n\n{date.today()}, {_machine(options.device)}, torch {torch.__version__}."
    )
    for vocab in options.vocab or (
        ["128256:bfloat16"] if on_gpu else ["32000:float32", "128256:bfloat16"]
    ):
        size, dtype = vocab.split(":")
        setting = Setting(
            num_tokens,
            int(size),
            dtype,
            options.top_k,
            options.hidden_size,
            options.device,
        )
        if "logits" in options.tables:
            print_logits_table(setting, options.repetitions, options.only)
        if "fused" in options.tables:
            larger = replace(setting, num_tokens=2 * num_tokens)
            print_fused_table(
                (setting, larger), max(2, options.repetitions // 2), options.only
            )


if __name__ == "__main__":
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # for the processes that measure memory
    main()
