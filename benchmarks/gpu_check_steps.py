"""The steps of `benchmarks.gpu_check`, each run as `python -m benchmarks.gpu_check_steps STEP RESULT.json`.

A step yields its checks, each a name and a function that returns a Finding; an error in one is reported, and the next
one runs. The speed steps are in `benchmarks.gpu_check_speed`. On a GPU the sizes are those of real models, on a CPU tiny.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

import nemo_kd
from benchmarks.gpu_check import KEPT_LINES, Finding
from benchmarks.gpu_check_speed import (
    DEVICE,
    ON_GPU,
    Check,
    loss_speed,
    student_speed,
    teacher_speed,
)

PACKAGES = (
    "torch", "triton", "megatron-core", "transformer-engine", "apex", "transformers", "numpy", "lightning",
)  # fmt: skip
SMALL: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


def environment() -> Iterator[Check]:
    """List versions, devices and the kernels that a model would use."""
    yield "software", versions
    yield "machine", machine
    yield "GPU", gpu
    yield "driver", driver
    yield "kernels", kernels


def versions() -> Finding:
    found: dict[str, float | str] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["nemo_kd"] = nemo_kd.__version__
    found["CUDA of torch"] = str(torch.version.cuda)
    if ON_GPU:
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["cuDNN"] = str(torch.backends.cudnn.version())
    return Finding(found)


def machine() -> Finding:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Finding(
        {
            "processor": found[1] if found else platform.machine(),
            "system": platform.platform(),
            "cores": len(os.sched_getaffinity(0)),
            "GiB": round(memory_bytes / 2**30),
        }
    )


def gpu() -> Finding:
    from nemo_kd.mcore.architecture import peak_flops

    if not ON_GPU:
        return Finding({"GPU": "none: tiny sizes on the CPU, which show no speed"})
    card = torch.cuda.get_device_properties(0)
    peak = peak_flops(torch.device("cuda"), "bf16")
    return Finding(
        {
            "name": card.name,
            "compute capability": f"{card.major}.{card.minor}",
            "GPUs": torch.cuda.device_count(),
            "GiB": round(card.total_memory / 2**30, 1),
            "multiprocessors": card.multi_processor_count,
            "TFLOP/s in bf16 by its data sheet": peak / 1e12 if peak else "unknown",
        }
    )


def driver() -> Finding:
    """Report the driver's answer; a GPU that only the driver sees is a failure."""
    if shutil.which("nvidia-smi") is None:
        return Finding({"nvidia-smi": "not installed"})
    names = ("driver_version", "power.limit", "clocks.max.sm", "mig.mode.current")
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = told.stdout.splitlines()
    found: dict[str, float | str] = dict(zip(names, lines[0].split(", "), strict=True))
    unseen = "GPUs that torch does not see"
    found[unseen] = len(lines) if not ON_GPU else 0
    return Finding(found, {unseen: 0})


def kernels() -> Finding:
    """Report the kernels of a student in bf16."""
    from nemo_kd.config.student import StudentModelConfig
    from nemo_kd.mcore.kernels import Kernels, Machine

    chosen = Kernels(Machine.here(), StudentModelConfig(), "bf16")
    return Finding(
        {
            "layers": "Transformer Engine" if chosen.transformer_engine else "torch",
            "Adam": chosen.machine.adam,
            **{name: why or "on" for name, why in chosen.reasons.items()},
        }
    )


def model_logits() -> Iterator[Check]:
    """Compare logits of small models with those of transformers in float64."""
    from transformers import AutoModelForCausalLM

    from nemo_kd.config.shared import ModelConfig
    from nemo_kd.mcore.kernels import Kernels, Machine
    from tests.tiny_models import save_hf_model

    ids = torch.randint(3, 500, (2, 200), generator=torch.Generator().manual_seed(0))
    machine = Machine.here()
    has_engine = Kernels(machine, ModelConfig(), "bf16").transformer_engine
    for name in ("qwen3", "llama2"):
        with tempfile.TemporaryDirectory() as folder:
            path = save_hf_model(name, Path(folder), **SMALL)
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            with torch.no_grad():
                expected = model.double().eval()(ids).logits
            for precision, engine in itertools.product(
                ("32", "bf16"), ("off", "on") if has_engine else ("off",)
            ):
                layout = ModelConfig(transformer_engine=engine)
                chosen = Kernels(machine, layout, precision)
                layers = "Transformer Engine" if engine == "on" else "torch layers"
                yield (
                    f"{name}, {precision}, {layers}",
                    partial(logits_error, path, ids, expected, chosen),
                )
    if not has_engine:
        absent = "not used: it or a GPU is missing"
        yield "Transformer Engine", lambda: Finding({"layers": absent})


def logits_error(
    path: Path, ids: torch.Tensor, expected: torch.Tensor, chosen: Any
) -> Finding:
    """Return the relative error of a model built with the chosen kernels."""
    from nemo_kd.mcore.checkpoint import open_pretrained
    from nemo_kd.mcore.model import build_gpt_model, transformer_config

    layout = chosen.model
    groups = one_rank()
    with open_pretrained(str(path)) as source:
        architecture = source.architecture
        model = build_gpt_model(
            architecture,
            transformer_config(architecture, layout, chosen.dtype, **chosen.fields),
            layout.make_vocab_size_divisible_by,
            chosen.transformer_engine,
        )
        source.load_weights(model, groups)
    ids = ids.to(groups.device)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    with torch.no_grad():
        logits = model.eval()(ids, positions, None)[..., : architecture.vocab_size]
    error = float((logits.double().cpu() - expected).norm() / expected.norm())
    limit = 5e-2
    if chosen.dtype == torch.float32:
        # Transformer Engine multiplies float32 as TF32.
        limit = 5e-3 if chosen.transformer_engine else 1e-4
    return Finding({"relative error": error}, {"relative error": limit})


@functools.cache
def one_rank() -> Any:
    """Join a world of this process alone."""
    from nemo_kd.config.shared import ModelConfig, TrainerConfig
    from nemo_kd.mcore.groups import initialize_model_parallel
    from nemo_kd.run.ranks import join_ranks

    join_ranks(TrainerConfig())
    return initialize_model_parallel(ModelConfig(), 1)


def losses() -> Iterator[Check]:
    """Compare losses and cached targets with dense float64 on the CPU; on a GPU also their memory."""
    from tests.gpu import test_losses, test_topk

    vocab_size = 5000 if ON_GPU else 500
    for dtype, definition in itertools.product(
        test_losses.TOLERANCES, test_losses.DEFINITIONS
    ):
        yield (
            f"{definition.objective}, {definition.support}, {_name(dtype)}, eager",
            partial(loss_errors, definition, dtype, False, vocab_size),
        )
    for dtype in test_topk.DTYPES:
        yield f"cached targets, {_name(dtype)}", partial(target_errors, dtype)
    if not ON_GPU:
        return
    yield (
        "memory of cached targets",
        partial(holds, test_topk.test_memory_does_not_grow_with_the_rows),
    )
    yield "memory, eager", partial(holds, test_losses.test_memory, False)
    # Last, because they wait for the compiler.
    yield "compiler", compiler
    for dtype, number in (
        (torch.bfloat16, 0),
        (torch.bfloat16, 2),
        (torch.float32, 0),
    ):
        definition = test_losses.DEFINITIONS[number]
        yield (
            f"{definition.objective}, {definition.support}, {_name(dtype)}, compiled",
            partial(loss_errors, definition, dtype, True, vocab_size),
        )
    yield "memory, compiled", partial(holds, test_losses.test_memory, True)


def compiler() -> Finding:
    """Compile the passes over the vocabulary; without a compiler the loss would run eagerly."""
    from nemo_kd.ops.vocab_pass import compile_passes

    started_s = time.perf_counter()
    size = 131_072
    works = compile_passes(torch.device(DEVICE), torch.bfloat16, size, size, (1.0,))
    seconds = time.perf_counter() - started_s
    return Finding(
        {"s": seconds, "passes that do not compile": int(not works)},
        {"passes that do not compile": 0},
    )


def loss_errors(
    definition: Any, dtype: torch.dtype, compile: bool, vocab_size: int
) -> Finding:
    from tests.gpu.test_losses import TOLERANCES, errors

    found = errors(definition, dtype, compile, DEVICE, vocab_size)
    return with_limits(found, TOLERANCES[dtype])


def target_errors(dtype: torch.dtype) -> Finding:
    from tests.gpu.test_topk import errors, tolerances

    return with_limits(errors(dtype, DEVICE), tolerances(dtype, DEVICE))


def with_limits(errors: Mapping[str, float], limits: Mapping[str, float]) -> Finding:
    figures = {f"{name} error": value for name, value in errors.items()}
    return Finding({**figures}, {f"{name} error": limits[name] for name in errors})


def holds(test: Callable[..., None], *arguments: Any) -> Finding:
    """Run a test that raises an error if it fails."""
    test(*arguments)
    return Finding({"failed assertions": 0}, {"failed assertions": 0})


def cached_rows() -> Iterator[Check]:
    """Compare the rows that stage 1 writes with transformers, and packed batches with padded ones."""
    from transformers import AutoModelForCausalLM

    from nemo_kd import CacheReader
    from nemo_kd.teacher.loop import compute_topk_logits
    from tests.tiny_data import teacher_config, write_chat_dataset
    from tests.tiny_models import save_hf_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = save_hf_model("qwen3", folder / "model", **SMALL)
        dataset = write_chat_dataset(folder / "chats.jsonl", 24)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        model = model.double().eval()

        @functools.cache
        def rows(precision: str, packing: bool) -> list[Any]:
            output = folder / f"{precision}_{packing}_CHUNK_ID.jsonl"
            config = teacher_config(
                path,
                dataset,
                output,
                cache__codec="json",
                data__packing=packing,
                trainer__precision=precision,
                model__transformer_engine="off" if precision == "32" else "auto",
            )
            compute_topk_logits(config)
            reader = CacheReader(str(output))
            return [reader[number] for number in range(len(reader))]

        for precision, limit in (("32", 1e-3), ("bf16", 0.2)):
            yield (
                f"{precision}, log-probabilities against transformers",
                partial(row_errors, rows, precision, model, limit),
            )
            yield (
                f"{precision}, packed batches against padded ones",
                partial(packing_errors, rows, precision, limit),
            )


Rows = Callable[[str, bool], list[Any]]
"""Rows that stage 1 writes in a precision, packed or padded."""


def row_errors(rows: Rows, precision: str, model: Any, limit: float) -> Finding:
    """Return the largest difference between a cached log-probability and the model's."""
    packed = rows(precision, True)
    errors = []
    for row in packed:
        tokens_S = torch.as_tensor(row.example.tokens_S).long()
        with torch.no_grad():
            logprobs_SV = model(tokens_S[None]).logits[0].log_softmax(-1)
        teacher = row.teacher.map(torch.as_tensor)
        logprobs_PV = logprobs_SV[teacher.positions_P]
        expected_PK = logprobs_PV.gather(1, teacher.topk_token_ids_PK.long())
        found_PK = teacher.topk_logits_PK - teacher.log_sum_exp_logits_P[:, None]
        errors.append((found_PK - expected_PK).abs().max())
    # Unlike Python's max, it keeps NaN.
    worst = float(torch.stack(errors).max())
    return Finding({"rows": len(packed), "error": worst}, {"error": limit})


def packing_errors(rows: Rows, precision: str, limit: float) -> Finding:
    """Return the largest difference between the cached logits of packed and padded batches."""
    logits = [
        torch.cat([torch.as_tensor(row.teacher.topk_logits_PK) for row in some])
        for some in (rows(precision, True), rows(precision, False))
    ]
    worst = float((logits[0] - logits[1]).abs().max())
    return Finding({"positions": len(logits[0]), "error": worst}, {"error": limit})


STEPS_COMPARED = 2
COMPARED = ("train/loss", "train/kd_loss", "train/sft_loss", "grad_norm")


def student_steps() -> Iterator[Check]:
    """Compare two steps of training with those that this machine's CPU computes in float32."""
    from nemo_kd.teacher.loop import compute_topk_logits
    from tests.tiny_data import teacher_config, write_chat_dataset
    from tests.tiny_models import save_hf_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape: dict[str, Any] = {
            "hidden_size": 128,
            "intermediate_size": 256,
            "head_dim": 32,
        }
        for role, seed in (("teacher", 0), ("student", 1)):
            save_hf_model("qwen3", folder / role, seed=seed, **shape)
        dataset = write_chat_dataset(folder / "chats.jsonl", 24)
        compute_topk_logits(
            teacher_config(
                folder / "teacher",
                dataset,
                folder / "cache.jsonl.zst",
                model__transformer_engine="off",
            )
        )
        on_cpu = None
        if ON_GPU:
            code = "import sys; from benchmarks.gpu_check_steps import train; train(*sys.argv[1:])"
            command = [sys.executable, "-c", code, name, "on_cpu", "32"]
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
            on_cpu = subprocess.Popen(command, env=environment)

        @functools.cache
        def expected() -> list[dict[str, float]]:
            if on_cpu is None:
                train(name, "on_cpu", "32")
            elif on_cpu.wait():
                raise RuntimeError(
                    f"training on the CPU: exit status {on_cpu.returncode}"
                )
            return logged_steps(folder / "on_cpu")

        for precision, limit in (("32", 1e-3), ("bf16", 2e-2)):
            yield (
                f"{precision} against float32 on the CPU",
                partial(step_errors, name, precision, expected, limit),
            )


def step_errors(
    folder: str,
    precision: str,
    expected: Callable[[], list[dict[str, float]]],
    limit: float,
) -> Finding:
    """Return the relative errors of losses and gradient norms."""
    train(folder, precision, precision)
    found = logged_steps(Path(folder) / precision)
    errors = {
        f"step {number} {key.removeprefix('train/')}": abs(mine[key] / its[key] - 1)
        for number, (mine, its) in enumerate(zip(found, expected(), strict=True), 1)
        for key in COMPARED
    }
    return with_limits(errors, dict.fromkeys(errors, limit))


def train(folder: str, name: str, precision: str) -> None:
    """Run two steps of training into `folder / name`."""
    from nemo_kd.student.job import train_student
    from tests.tiny_data import student_config

    cache = Path(folder) / "cache.jsonl.zst"
    config = student_config(
        Path(folder) / "student",
        cache,
        cache,
        Path(folder) / name,
        trainer__knowledge_distillation__max_steps=STEPS_COMPARED,
        trainer__knowledge_distillation__limit_val_batches=0,
        trainer__precision=precision,
        model__transformer_engine="off" if precision == "32" else "auto",
        exp_manager__create_checkpoint_callback=False,
    )
    train_student(config)


def logged_steps(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "train/loss" in row]
    if len(rows) != STEPS_COMPARED:
        raise RuntimeError(f"{folder}: {len(rows)} steps logged, not {STEPS_COMPARED}")
    return rows


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


STEPS: dict[str, Callable[[], Iterator[Check]]] = {
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
    """Run one step; write the findings after each check, so that a stopped step leaves some."""
    step, result = sys.argv[1:]
    findings = {}
    for name, check in STEPS[step]():
        try:
            finding = check()
        except Exception:  # noqa: BLE001 - reported; the next check may work
            lines = traceback.format_exc().splitlines()
            finding = Finding(problem="\n".join(lines[-KEPT_LINES:]))
        findings[name] = asdict(finding)
        Path(result).write_text(json.dumps(findings))


if __name__ == "__main__":
    main()
