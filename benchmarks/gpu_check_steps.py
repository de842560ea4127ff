"""The steps of `benchmarks.gpu_check`, each run as `python -m benchmarks.gpu_check_steps STEP RESULT.json`.

On a GPU the sizes are those of real models, on a CPU tiny ones.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
MIB = 2**20
PACKAGES = (
    "torch", "megatron-core", "transformer-engine", "apex", "transformers", "triton", "numpy",
)  # fmt: skip


@dataclass
class Finding:
    """One line of a step.

    Attributes:
        passed: None for a figure that nothing is asked of.
        details: further lines, for example kernels.
    """

    name: str
    value: str
    passed: bool | None = None
    details: list[str] = field(default_factory=list)


Step = Callable[[bool], Iterator[Finding]]
"""Takes True if it shall list its longest kernels."""


def environment(profile: bool) -> Iterator[Finding]:
    """List versions, devices and the kernels that a model would use."""
    yield Finding("python", platform.python_version())
    for name in PACKAGES:
        try:
            yield Finding(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "not installed")
    yield Finding("CUDA of torch", str(torch.version.cuda))
    if ON_GPU:
        properties = torch.cuda.get_device_properties(0)
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(command, capture_output=True, text=True).stdout.split(
            "\n"
        )[0]
        yield Finding("driver", driver)
        yield Finding(
            "GPU", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        )
        yield Finding("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield Finding(
            "GPU", "none: tiny sizes on the CPU, which say nothing about a GPU"
        )
    kernels = "Transformer Engine" if _has_transformer_engine() else "torch"
    yield Finding("layers that transformer_engine=auto chooses", kernels)


def _has_transformer_engine() -> bool:
    """Return True if `model.transformer_engine=auto` chooses it here."""
    from nemo_kd.config.shared import ModelConfig
    from nemo_kd.mcore.kernels import Kernels, Machine

    return Kernels(Machine.here(), ModelConfig(), "32").transformer_engine


def model_logits(profile: bool) -> Iterator[Finding]:
    """Compare logits of small models with those of transformers."""
    from transformers import AutoModelForCausalLM

    from tests.tiny_models import save_hf_model

    layers = [False] + [True] * _has_transformer_engine()
    shape = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    ids = torch.randint(3, 500, (2, 200), generator=torch.Generator().manual_seed(0))
    for name in ("qwen3", "llama2"):
        with tempfile.TemporaryDirectory() as folder:
            path = save_hf_model(name, Path(folder), **shape)
            with torch.no_grad():
                hf = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
                expected = hf.double().eval()(ids).logits
            for dtype in (torch.float32, torch.bfloat16):
                for transformer_engine in layers:
                    found = (
                        _logits(path, dtype, transformer_engine, ids).double().cpu()
                    )
                    error = float((found - expected).norm() / expected.norm())
                    limit = 1e-4 if dtype == torch.float32 else 3e-2
                    kind = (
                        "Transformer Engine" if transformer_engine else "torch layers"
                    )
                    yield Finding(
                        f"{name}, {str(dtype).removeprefix('torch.')}, {kind}",
                        f"relative error {error:.1e} (limit {limit:.0e})",
                        error < limit,
                    )


def _logits(
    path: Path, dtype: torch.dtype, transformer_engine: bool, ids: torch.Tensor
) -> torch.Tensor:
    from nemo_kd.config.shared import ModelConfig
    from nemo_kd.mcore.checkpoint import open_pretrained
    from nemo_kd.mcore.groups import initialize_model_parallel
    from nemo_kd.mcore.model import build_gpt_model, transformer_config

    layout = ModelConfig()
    groups = _groups(initialize_model_parallel, layout)
    with open_pretrained(str(path)) as source:
        config = transformer_config(source.architecture, layout, dtype)
        model = build_gpt_model(
            source.architecture,
            config,
            layout.make_vocab_size_divisible_by,
            transformer_engine,
        )
        source.load_weights(model, groups)
        ids = ids.to(groups.device)
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        with torch.no_grad():
            return model.eval()(ids, positions, None)[
                ..., : source.architecture.vocab_size
            ]


_kept_groups: list[Any] = []


def _groups(initialize: Callable[..., Any], layout: Any) -> Any:
    """Join the one rank once in this process."""
    if not _kept_groups:
        from nemo_kd.config.shared import TrainerConfig
        from nemo_kd.run.ranks import join_ranks

        join_ranks(TrainerConfig())
        _kept_groups.append(initialize(layout, 1))
    return _kept_groups[0]


def losses(profile: bool) -> Iterator[Finding]:
    """Compare losses and gradients with dense float64 on the CPU, eager and compiled."""
    from nemo_kd.batch import TeacherRows
    from nemo_kd.ops.distillation import DistillationLoss
    from nemo_kd.ops.vocab import VocabShard
    from tests.gpu.test_losses import DEFINITIONS
    from tests.parity.dense_losses import dense_losses, random_problem
    from tests.parity.test_losses import loss_of, teacher_rows

    def rows_on_device(problem: Any) -> tuple[TeacherRows[torch.Tensor], torch.Tensor]:
        moved = problem.map(lambda tensor: tensor.to(DEVICE))
        return teacher_rows(moved), moved.labels_N

    vocab_size = 5000 if ON_GPU else 500
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        for definition in DEFINITIONS:
            problem = random_problem(
                64, vocab_size, 20, teacher_scale=definition.teacher_scale
            )
            logits_NV = problem.logits_NV.to(dtype)
            ce_N, kd_N, expected_NV = dense_losses(
                problem.map(
                    lambda tensor, exact=problem.logits_NV, rounded=logits_NV: (
                        rounded.double() if tensor is exact else tensor
                    )
                ),
                definition,
            )
            teacher, labels_N = rows_on_device(problem)
            for compile in (False, True) if ON_GPU else (False,):
                loss: DistillationLoss = loss_of(definition, compile)
                leaf_NV = logits_NV.to(DEVICE).requires_grad_()
                found = loss(
                    leaf_NV * 1,
                    labels_N,
                    VocabShard.of(vocab_size, vocab_size),
                    teacher,
                )
                assert found.kd_N is not None
                ce_weight_N = problem.ce_weight_N.to(DEVICE)
                kd_weight_N = problem.kd_weight_N.to(DEVICE)
                (
                    (found.ce_N * ce_weight_N).sum() + (found.kd_N * kd_weight_N).sum()
                ).backward()
                values = max(_error(found.ce_N, ce_N), _error(found.kd_N, kd_N))
                assert leaf_NV.grad is not None
                error = leaf_NV.grad.double().cpu() - expected_NV
                gradient = float(error.norm() / expected_NV.norm())
                yield Finding(
                    f"{definition.objective}, {definition.support}, "
                    f"{str(dtype).removeprefix('torch.')}, {'compiled' if compile else 'eager'}",
                    f"values within {values:.1e}, gradient within {gradient:.1e} (limit {limit:.0e})",
                    values < 1e-4 and gradient < limit,
                )


def _error(found_N: torch.Tensor, expected_N: torch.Tensor) -> float:
    """Return the largest error, relative where a value exceeds 1."""
    error_N = (found_N.double().cpu() - expected_N).abs() / expected_N.abs().clamp(
        min=1
    )
    return float(error_N.max())


def cached_rows(profile: bool) -> Iterator[Finding]:
    """Compare the rows that stage 1 writes with transformers, and packed batches with padded."""
    import numpy as np
    from transformers import AutoModelForCausalLM

    from nemo_kd import CacheReader
    from nemo_kd.teacher.loop import compute_topk_logits
    from tests.tiny_data import teacher_config, write_chat_dataset
    from tests.tiny_models import save_hf_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
        model = save_hf_model("qwen3", folder / "model", **shape)
        dataset = write_chat_dataset(folder / "chats.jsonl", 24)
        rows = {}
        for packing in (True, False):
            output = folder / f"packing_{packing}_CHUNK_ID.jsonl"
            config = teacher_config(
                model,
                dataset,
                output,
                top_k=8,
                cache__codec="json",
                data__packing=packing,
            )
            with contextlib.redirect_stdout(io.StringIO()):
                compute_topk_logits(config)
            reader = CacheReader(str(output))
            rows[packing] = [reader[number] for number in range(len(reader))]
        hf = (
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
            .double()
            .eval()
        )
        worst = 0.0
        for row in rows[True]:
            tokens = torch.from_numpy(np.asarray(row.example.tokens_S)).long()
            with torch.no_grad():
                logits_SV = hf(tokens[None]).logits[0].log_softmax(-1).numpy()
            teacher = row.teacher
            chosen_PV = logits_SV[teacher.positions_P]
            expected_PK = np.take_along_axis(chosen_PV, teacher.topk_token_ids_PK, 1)
            found_PK = teacher.topk_logits_PK - teacher.log_sum_exp_logits_P[:, None]
            worst = max(worst, float(np.abs(found_PK - expected_PK).max()))
        yield Finding(
            f"log-probabilities of {len(rows[True])} rows against transformers",
            f"within {worst:.1e} (limit 1e-03)",
            worst < 1e-3,
        )
        difference = max(
            float(
                np.abs(one.teacher.topk_logits_PK - two.teacher.topk_logits_PK).max()
            )
            for one, two in zip(rows[True], rows[False], strict=True)
        )
        yield Finding(
            "packed batches against padded ones",
            f"logits within {difference:.1e} (limit 1e-03)",
            difference < 1e-3,
        )


STEPS_COMPARED = 2


def student_steps(profile: bool) -> Iterator[Finding]:
    """Compare two steps of training with those that this machine's CPU computes."""
    from nemo_kd.teacher.loop import compute_topk_logits
    from tests.tiny_data import teacher_config, write_chat_dataset
    from tests.tiny_models import save_hf_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
        for role, seed in (("teacher", 0), ("student", 1)):
            save_hf_model("qwen3", folder / role, seed=seed, **shape)
        dataset = write_chat_dataset(folder / "chats.jsonl", 24)
        config = teacher_config(
            folder / "teacher", dataset, folder / "cache.jsonl.zst"
        )
        with contextlib.redirect_stdout(io.StringIO()):
            compute_topk_logits(config)
        found = {}
        for place in ("here", "on the CPU"):
            environment = dict(os.environ)
            if place == "on the CPU":
                environment["CUDA_VISIBLE_DEVICES"] = ""
            command = [
                sys.executable,
                "-m",
                "benchmarks.gpu_check_steps",
                "train",
                name,
                place,
            ]
            subprocess.run(command, env=environment, check=True)
            lines = (
                (folder / place / "metrics" / "metrics.jsonl").read_text().splitlines()
            )
            rows = [row for row in map(json.loads, lines) if "train/loss" in row]
            found[place] = rows[:STEPS_COMPARED]
        for number, (here, there) in enumerate(zip(*found.values(), strict=True), 1):
            for key in (
                "train/loss",
                "train/kd_loss",
                "train/sft_loss",
                "grad_norm",
            ):
                error = abs(here[key] - there[key]) / abs(there[key])
                yield Finding(
                    f"step {number}, {key}",
                    f"{here[key]:.6f}, on the CPU {there[key]:.6f}: {error:.1e} apart (limit 1e-03)",
                    error < 1e-3,
                )


def train(folder: Path, place: str) -> None:
    """Run two steps of training into `folder / place`."""
    from nemo_kd.student.job import train_student
    from tests.tiny_data import student_config

    config = student_config(
        folder / "student",
        folder / "cache.jsonl.zst",
        folder / "cache.jsonl.zst",
        folder / place,
        trainer__knowledge_distillation__max_steps=STEPS_COMPARED,
        trainer__knowledge_distillation__limit_val_batches=0,
        exp_manager__create_checkpoint_callback=False,
    )
    train_student(config)


def loss_speed(profile: bool) -> Iterator[Finding]:
    """Time output projection, cross-entropy and distillation in one pass."""
    from benchmarks.baseline_losses import Setting, random_inputs
    from benchmarks.losses import best, teacher_rows
    from nemo_kd.config.loss import Divergence
    from nemo_kd.ops.distillation import DistillationLoss
    from nemo_kd.ops.fused_linear import fused_linear_loss
    from nemo_kd.ops.vocab import VocabShard

    dtype = "bfloat16" if ON_GPU else "float32"
    num_tokens, vocab_size, hidden_size = (
        (8192, 131_072, 4096) if ON_GPU else (64, 512, 32)
    )
    setting = Setting(num_tokens, vocab_size, dtype, 64, hidden_size, DEVICE)
    inputs = random_inputs(setting)
    options: dict[str, Any] = {"dtype": setting.torch_dtype, "device": DEVICE}
    hidden_NH = torch.randn(num_tokens, hidden_size, **options)
    weight_VH = (
        torch.randn(vocab_size, hidden_size, **options).mul_(0.02).requires_grad_()
    )
    weight_VH.main_grad = torch.zeros_like(weight_VH, dtype=torch.float32)
    divergence = Divergence("forward_kl", "tail")
    rows = teacher_rows(divergence, inputs)
    assert rows is not None
    rows = rows.map(lambda values: values.to(DEVICE))
    shard = VocabShard(0, vocab_size, vocab_size)

    def plain() -> Callable[[], None]:
        weight_VH.grad = None
        hidden = hidden_NH.clone().requires_grad_()

        def work() -> None:
            logits_NV = (hidden @ weight_VH.T).float()
            torch.nn.functional.cross_entropy(
                logits_NV, inputs.labels_N, reduction="sum"
            ).backward()

        return work

    def fused(with_teacher: bool, compile: bool) -> Callable[[], Callable[[], None]]:
        loss = DistillationLoss(divergence if with_teacher else None, compile=compile)
        teacher = rows if with_teacher else None

        def make() -> Callable[[], None]:
            hidden = hidden_NH.clone().requires_grad_()

            def work() -> None:
                fused_linear_loss(
                    loss, hidden, weight_VH, inputs.labels_N, shard, teacher
                )[0].backward()

            return work

        return make

    flops = 6 * num_tokens * hidden_size * vocab_size
    modes = (False, True) if ON_GPU else (False,)
    jobs = {"projection + torch's cross-entropy": plain}
    for compile in modes:
        how = "compiled" if compile else "eager"
        jobs[f"fused, CE alone, {how}"] = fused(False, compile)
        jobs[f"fused, CE + KD, {how}"] = fused(True, compile)
    seconds = dict(zip(jobs, best(list(jobs.values()), 5, DEVICE), strict=True))
    plain_s = seconds["projection + torch's cross-entropy"]
    for name, time_s in seconds.items():
        work = jobs[name]()
        memory = ""
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            work()
            torch.cuda.synchronize()
            memory = f", {(torch.cuda.max_memory_allocated() - before) / MIB:,.0f} MiB beyond inputs"
        value = f"{time_s * 1000:.1f} ms, {flops / time_s / 1e12:.3g} TFLOP/s"
        value += f", {time_s / plain_s:.2f} of projection + torch's CE"
        if "CE + KD" in name:
            value += f", {time_s / seconds[name.replace('CE + KD', 'CE alone')]:.2f} of CE alone"
        yield Finding(name, value + memory)
    if profile:
        yield _kernels(jobs[f"fused, CE + KD, {'compiled' if ON_GPU else 'eager'}"]())


def _kernels(work: Callable[[], None]) -> Finding:
    """Return the 20 kernels that take longest in the work."""
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * ON_GPU
    with torch.profiler.profile(activities=activities) as found:
        work()
        if ON_GPU:
            torch.cuda.synchronize()
    key = "self_device_time_total" if ON_GPU else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, key))[:20]
    total = sum(getattr(event, key) for event in found.key_averages()) or 1
    lines = [
        f"{getattr(event, key) / total:6.1%} {getattr(event, key) / 1000:9.2f} ms "
        f"{event.count:6d} x {event.key[:80]}"
        for event in events
    ]
    return Finding("longest kernels", f"{total / 1000:.1f} ms in all", details=lines)


def compute(teacher: Any, examples: list[Any]) -> None:
    """Compute the rows of some examples."""
    teacher.finish(teacher.start(examples))


def teacher_speed(profile: bool) -> Iterator[Finding]:
    """Time stage 1 beside the bare forward pass of the same batches; verify the cache."""
    from benchmarks.teacher_inputs import write_chats, write_teacher
    from benchmarks.teacher_variants import (
        Bench,
        Clock,
        Setting,
        bare_forward,
        stage_1,
    )
    from nemo_kd.mcore.architecture import forward_flops, peak_flops
    from nemo_kd.teacher.job import open_run
    from nemo_kd.teacher.model import Teacher

    shape, num_records, max_tokens = (
        ("llama-3-8b", 768, 16_384) if ON_GPU else ("tiny", 8, 2048)
    )
    precision = "bf16" if ON_GPU else "32"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = write_chats(folder / "chats.jsonl", num_records)
        model = write_teacher(folder / shape, shape)
        setting = Setting(
            folder, model, dataset, precision, max_tokens, 64 if ON_GPU else 8
        )
        with open_run(setting.config(folder / "unused.jsonl")) as run:
            bench = Bench(setting, run, Teacher(run))
            examples = [one for chosen, _ in bench.batches() for one in chosen]
            bench.teacher.finish(bench.teacher.start(examples[:4]))
            of = forward_flops(run.pretrained.architecture)
            tokens = sum(one.num_tokens for one in examples)
            flops = sum(
                of.example(one.num_tokens, one.num_loss_tokens) for one in examples
            )
            peak = peak_flops(run.groups.device, precision)
            clock = Clock()
            seconds = {}
            for variant, prepare in (
                ("bare forward", bare_forward),
                ("stage 1", stage_1),
            ):
                work = prepare(bench)
                details = work(clock)
                seconds[variant] = clock.wall_s
                rate = flops / clock.wall_s
                speed = (
                    f"{rate / peak:.1%} MFU" if peak else f"{rate / 1e12:.3f} TFLOP/s"
                )
                value = f"{tokens / clock.wall_s:,.0f} tokens/s, {speed}, {clock.cpu_s:.1f} CPU s"
                if variant == "stage 1":
                    value += f", {details['bytes'] / tokens:.1f} bytes a token"
                yield Finding(f"{shape}, {precision}, {variant}", value)
            ratio = seconds["stage 1"] / seconds["bare forward"]
            yield Finding("stage 1 / bare forward", f"{ratio:.3f}")
            if profile:
                yield _kernels(lambda: compute(bench.teacher, examples[:16]))


def student_speed(profile: bool) -> Iterator[Finding]:
    """Time a step of distillation beside one of SFT."""
    from benchmarks.student import Setting, by_turns, started
    from benchmarks.teacher_inputs import MAX_LENGTH, write_chats, write_teacher
    from nemo_kd.teacher.loop import compute_topk_logits
    from tests.tiny_data import teacher_config

    shape, batch_size, steps = ("llama-1.5b", 64, 6) if ON_GPU else ("tiny", 2, 3)
    precision = "bf16" if ON_GPU else "32"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        student = write_teacher(folder / "student", shape)
        teacher_shape = "shallow" if ON_GPU else "tiny"
        teacher = write_teacher(folder / "teacher", teacher_shape)
        dataset = write_chats(folder / "chats.jsonl", batch_size * steps)
        cache = folder / "cache_CHUNK_ID.jsonl.zst"
        keys = {"cache__min_probability": 0.0, "model__max_seq_length": MAX_LENGTH}
        with contextlib.redirect_stdout(io.StringIO()):
            compute_topk_logits(
                teacher_config(teacher, dataset, cache, top_k=64, **keys)
            )
        setting = Setting(
            folder, student, dataset, cache, precision, batch_size, steps
        )
        medians = {}
        for variant in ("SFT", "KD, tail"):
            found = by_turns(setting, [variant])[variant]
            medians[variant] = statistics.median(step.seconds for step in found)
            rate = statistics.median(step.tokens / step.seconds for step in found)
            peak_bytes = max(step.peak_bytes for step in found)
            value = f"{medians[variant] * 1000:,.0f} ms a step, {rate:,.0f} tokens/s"
            value += f", {peak_bytes / MIB:,.0f} MiB"
            with started(variant, setting, by_turns=False) as connection:
                rows = connection.recv()[1:]
            if rows and "perf/mfu_percent" in rows[0]:
                mfu = statistics.median(row["perf/mfu_percent"] for row in rows)
                value += f", {mfu:.1f}% MFU"
            yield Finding(f"{shape}, {precision}, {variant}", value)
        yield Finding("KD / SFT", f"{medians['KD, tail'] / medians['SFT']:.3f}")


STEPS: dict[str, Step] = {
    "environment": environment,
    "model logits": model_logits,
    "losses": losses,
    "cached rows": cached_rows,
    "student steps": student_steps,
    "loss speed": loss_speed,
    "teacher speed": teacher_speed,
    "student speed": student_speed,
}


def main() -> None:
    """Run one step; write what is found after each finding, so that a stopped step leaves some."""
    if sys.argv[1] == "train":
        train(Path(sys.argv[2]), sys.argv[3])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("output", type=Path)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    findings = []
    for finding in STEPS[options.step](options.profile):
        findings.append(asdict(finding))
        options.output.write_text(json.dumps(findings))


if __name__ == "__main__":
    main()
