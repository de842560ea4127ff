"""The speed steps of `benchmarks.gpu_check`: losses, stage 1 and stage 2, each with a profile of its kernels."""

from __future__ import annotations

import functools
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from benchmarks.gpu_check import Finding

if TYPE_CHECKING:
    from benchmarks.losses import Job

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
MIB, GIB = 2**20, 2**30
REPETITIONS = 5
PROFILED_KERNELS = 20

Check = tuple[str, Callable[[], Finding]]
"""Name of a check, and the function that makes it."""

PLAIN = "projection + torch's CE"


def loss_speed() -> Iterator[Check]:
    """Time output projection, cross-entropy and distillation in one pass beside projection and torch's cross-entropy."""
    bench = LossBench(*((8192, 131_072, 4096) if ON_GPU else (64, 512, 32)))
    yield PLAIN, partial(bench.measure, {PLAIN: bench.plain})
    modes = {"eager": False, "compiled": True} if ON_GPU else {"eager": False}
    for mode, compile in modes.items():
        ce = bench.fused(False, compile)
        kd = bench.fused(True, compile)
        jobs = {PLAIN: bench.plain, "CE alone": ce}
        yield f"fused, CE alone, {mode}", partial(bench.measure, jobs)
        yield f"fused, CE + KD, {mode}", partial(bench.measure, {**jobs, "KD": kd})
    returned = bench.fused(True, modes.get("compiled", False), into_main_grad=False)
    yield (
        f"fused, CE + KD, {mode}, weight gradient returned",
        partial(bench.measure, {PLAIN: bench.plain, "KD": returned}),
    )
    yield f"profile of CE + KD, {mode}", lambda: profile(kd())


class LossBench:
    """Hidden states, a projection and a teacher's targets for them."""

    def __init__(self, num_tokens: int, vocab_size: int, hidden_size: int) -> None:
        from benchmarks.baseline_losses import Setting, random_inputs
        from benchmarks.losses import teacher_rows
        from nemo_kd.config.loss import Divergence

        dtype = "bfloat16" if ON_GPU else "float32"
        inputs = random_inputs(
            Setting(num_tokens, vocab_size, dtype, 64, hidden_size, DEVICE)
        )
        self.divergence = Divergence("forward_kl", "tail")
        rows = teacher_rows(self.divergence, inputs)
        assert rows is not None
        self.rows = rows.map(lambda values: values.to(DEVICE))
        self.labels_N = inputs.labels_N
        options: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": DEVICE}
        self.hidden_NH = torch.randn(num_tokens, hidden_size, **options)
        weight_VH = torch.randn(vocab_size, hidden_size, **options)
        self.weight_VH: Any = weight_VH.mul_(0.02).requires_grad_()
        self.main_grad_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        self.flops = 6 * num_tokens * hidden_size * vocab_size

    def plain(self) -> Callable[[], None]:
        hidden_NH = self._fresh_inputs(into_main_grad=False)

        def work() -> None:
            logits_NV = (hidden_NH @ self.weight_VH.T).float()
            torch.nn.functional.cross_entropy(
                logits_NV, self.labels_N, reduction="sum"
            ).backward()

        return work

    def fused(
        self, with_teacher: bool, compile: bool, into_main_grad: bool = True
    ) -> Job:
        from nemo_kd.ops.distillation import DistillationLoss
        from nemo_kd.ops.fused_linear import fused_linear_loss
        from nemo_kd.ops.vocab import VocabShard

        loss = DistillationLoss(
            self.divergence if with_teacher else None, compile=compile
        )
        rows = self.rows if with_teacher else None
        shard = VocabShard(0, len(self.weight_VH), len(self.weight_VH))

        def make() -> Callable[[], None]:
            hidden_NH = self._fresh_inputs(into_main_grad)

            def work() -> None:
                total, _ = fused_linear_loss(
                    loss, hidden_NH, self.weight_VH, self.labels_N, shard, rows
                )
                total.backward()

            return work

        return make

    def _fresh_inputs(self, into_main_grad: bool) -> torch.Tensor:
        self.weight_VH.grad = None
        if into_main_grad:
            self.weight_VH.main_grad = self.main_grad_VH
        elif hasattr(self.weight_VH, "main_grad"):
            del self.weight_VH.main_grad
        return self.hidden_NH.clone().requires_grad_()

    def measure(self, jobs: dict[str, Job]) -> Finding:
        """Time the last job beside those before it."""
        from benchmarks.losses import best

        *others, seconds = best(list(jobs.values()), REPETITIONS, DEVICE)
        figures: dict[str, float | str] = {
            "ms": seconds * 1000,
            "TFLOP/s": self.flops / seconds / 1e12,
        }
        for name, other in zip(jobs, others, strict=False):
            figures[f"of {name}"] = seconds / other
        if ON_GPU:
            work = list(jobs.values())[-1]()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            work()
            extra = torch.cuda.max_memory_allocated() - before
            figures["MiB beyond inputs"] = extra / MIB
        return Finding(figures)


def profile(work: Callable[[], object]) -> Finding:
    """Return the kernels, on a CPU the operators, that take longest in the work."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * ON_GPU
    with torch.profiler.profile(activities=activities) as found:
        work()
        if ON_GPU:
            torch.cuda.synchronize()
    # An operator's entry repeats the time of its kernels.
    device = DeviceType.CUDA if ON_GPU else DeviceType.CPU
    key = "self_device_time_total" if ON_GPU else "self_cpu_time_total"
    events = [event for event in found.key_averages() if event.device_type == device]
    events.sort(key=lambda event: -getattr(event, key))
    total_us = sum(getattr(event, key) for event in events) or 1
    lines = [
        f"{getattr(event, key) / total_us:6.1%} {getattr(event, key) / 1000:9.2f} ms {event.count:6d} x {event.key[:80]}"
        for event in events[:PROFILED_KERNELS]
    ]
    what = "ms of kernels" if ON_GPU else "ms of operators"
    return Finding({what: total_us / 1000}, details=lines)


def utilisation(flops_per_s: float, precision: str) -> dict[str, float | str]:
    """Return FLOP/s, and their share of the GPU's peak."""
    from nemo_kd.mcore.architecture import peak_flops

    peak = peak_flops(torch.device(DEVICE), precision)
    found: dict[str, float | str] = {"TFLOP/s": flops_per_s / 1e12}
    if peak is None:
        return {**found, "MFU": unknown_mfu()}
    return {**found, "% MFU": 100 * flops_per_s / peak}


def unknown_mfu() -> str:
    name = torch.cuda.get_device_name() if ON_GPU else "a CPU"
    return f"unknown: no peak of {name} is known"


def teacher_speed() -> Iterator[Check]:
    """Time stage 1 beside the bare forward pass of the same batches, and verify its cache."""
    from benchmarks.teacher_inputs import write_chats, write_teacher
    from benchmarks.teacher_variants import (
        Bench,
        Setting,
        bare_forward,
        stage_1,
    )
    from nemo_kd.teacher.job import open_run
    from nemo_kd.teacher.model import Teacher

    shape, num_records, segment_examples = (
        ("llama-3-8b", 256, 64) if ON_GPU else ("tiny", 8, 8)
    )
    precision = "bf16" if ON_GPU else "32"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        setting = Setting(
            folder,
            write_teacher(folder / shape, shape),
            write_chats(folder / "chats.jsonl", num_records),
            precision,
            max_tokens=16_384 if ON_GPU else 2048,
            segment_examples=segment_examples,
        )
        with open_run(setting.config(folder / "unused.jsonl")) as run:
            bench = Bench(setting, run, Teacher(run))
            batches = [examples for examples, _ in bench.batches()]

            def compute() -> None:
                bench.teacher.finish(bench.teacher.start(batches[0]))

            compute()  # a first batch is slow
            speeds: dict[str, float] = {}
            for variant, prepare in (
                ("bare forward", bare_forward),
                ("stage 1", stage_1),
            ):
                work = prepare(bench)
                yield (
                    f"{shape}, {precision}, {variant}",
                    partial(pass_speed, work, variant, batches, bench, speeds),
                )
            yield "profile", lambda: profile(compute)


def pass_speed(
    work: Callable[[Any], dict[str, float]],
    variant: str,
    batches: list[Any],
    bench: Any,
    speeds: dict[str, float],
) -> Finding:
    """Time one way through all batches; `speeds` holds tokens/s by variant."""
    from benchmarks.teacher_variants import Clock

    clock = Clock()
    details = work(clock)
    examples = [example for batch in batches for example in batch]
    tokens = sum(example.num_tokens for example in examples)
    flops = bench.teacher.flops
    total_flops = sum(
        flops.example(one.num_tokens, one.num_loss_tokens) for one in examples
    )
    speeds[variant] = tokens / clock.wall_s
    figures: dict[str, float | str] = {
        "tokens": tokens,
        "batches": len(batches),
        "s": clock.wall_s,
        "tokens/s": speeds[variant],
        **utilisation(total_flops / clock.wall_s, bench.setting.precision),
        "CPU s": clock.cpu_s,
        "CPU s in workers": clock.workers_cpu_s,
    }
    if ON_GPU:
        figures["GiB"] = torch.cuda.max_memory_allocated() / GIB
    if "bytes" not in details:
        return Finding(figures)
    figures["bytes per token"] = details["bytes"] / tokens
    if "bare forward" in speeds:
        figures["of the time of the bare forward pass"] = (
            speeds["bare forward"] / speeds[variant]
        )
    figures["lost examples"] = len(examples) - details["examples"]
    figures["problems that verify finds"] = details["problems"]
    return Finding(figures, {"lost examples": 0, "problems that verify finds": 0})


@dataclass(frozen=True)
class StudentSizes:
    """What the student step trains; the first `skipped` steps and the last one, which is profiled, are not timed."""

    shape: str
    teacher: str
    precision: str
    batch_size: int
    max_tokens: int
    steps: int
    skipped: int


def student_sizes() -> StudentSizes:
    if not ON_GPU:
        return StudentSizes("tiny", "tiny", "32", 2, 4096, 4, 1)
    is_large = torch.cuda.get_device_properties(0).total_memory > 100 * GIB
    max_tokens = 16_384 if is_large else 8192
    return StudentSizes("llama-1.5b", "shallow", "bf16", 64, max_tokens, 8, 2)


def student_speed() -> Iterator[Check]:
    """Time a step of distillation beside one of SFT on the same examples."""
    from benchmarks.student import Setting
    from benchmarks.teacher_inputs import MAX_LENGTH, write_chats, write_teacher
    from nemo_kd.teacher.loop import compute_topk_logits
    from tests.tiny_data import teacher_config

    sizes = student_sizes()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        student = write_teacher(folder / sizes.shape, sizes.shape)
        teacher = write_teacher(folder / sizes.teacher, sizes.teacher)
        dataset = write_chats(folder / "chats.jsonl", sizes.batch_size * sizes.steps)
        cache = folder / "cache_CHUNK_ID.jsonl.zst"
        keys: dict[str, Any] = {
            "cache__min_probability": 0.0,
            "model__max_seq_length": MAX_LENGTH,
            # As all float32 of the check.
            "model__transformer_engine": "off",
        }
        compute_topk_logits(teacher_config(teacher, dataset, cache, top_k=64, **keys))
        setting = Setting(
            folder,
            student,
            dataset,
            cache,
            sizes.precision,
            sizes.batch_size,
            sizes.steps,
        )
        profiles: dict[str, Finding] = {}
        steps: dict[str, list[dict[str, float]]] = {}
        for variant in ("SFT", "KD, tail"):
            yield (
                f"{sizes.shape}, {sizes.precision}, micro-batches of {sizes.max_tokens:,} tokens, {variant}",
                partial(step_speed, setting, sizes, variant, steps, profiles),
            )
        yield "profile of a KD step", lambda: profiles["KD, tail"]


def step_speed(
    setting: Any,
    sizes: StudentSizes,
    variant: str,
    steps: dict[str, list[dict[str, float]]],
    profiles: dict[str, Finding],
) -> Finding:
    """Train, and add the metrics of the timed steps to `steps`, the profile of the last one to `profiles`."""
    from nemo_kd.student.job import train_student
    from nemo_kd.student.module import StudentModule

    config = setting.config(variant, setting.folder / variant)
    config.model.data.max_tokens_per_batch = sizes.max_tokens
    config.model.data.num_workers = 2 if ON_GPU else 0
    original = StudentModule.training_step

    def training_step(module: Any, batch: Any, batch_idx: int) -> None:
        work = functools.partial(original, module, batch, batch_idx)
        if module.global_step < sizes.steps - 1:
            work()
        else:
            profiles[variant] = profile(work)

    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with mock.patch.object(StudentModule, "training_step", training_step):
        run = train_student(config)
    lines = (run.folder / "metrics" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "perf/step_time_s" in row]
    rows = steps[variant] = rows[sizes.skipped : -1]

    def median(name: str) -> float:
        return statistics.median(row[name] for row in rows)

    figures: dict[str, float | str] = {
        "ms a step": 1000 * median("perf/step_time_s"),
        "tokens/s": median("perf/tokens_per_s"),
        "% data wait": median("perf/data_wait_percent"),
        "GiB": rows[-1]["perf/peak_memory_gib"],
    }
    if "perf/mfu_percent" in rows[0]:
        figures["% MFU"] = median("perf/mfu_percent")
    else:
        figures["MFU"] = unknown_mfu()
    if variant != "SFT" and "SFT" in steps:
        figures["of SFT's step time"] = statistics.median(
            mine["perf/step_time_s"] / its["perf/step_time_s"]
            for mine, its in zip(rows, steps["SFT"], strict=True)
        )
    return Finding(figures)
