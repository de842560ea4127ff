"""`make gpu-check` without a GPU: every step runs on tiny sizes, and what fails is reported while the rest goes on."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import PLAN_S, Finding, run_step

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="takes a GPU's sizes where there is one"
)


def run(tmp_path, *arguments, **environment):
    """(exit status, what it printed, steps by name) of a check."""
    result = tmp_path / "gpu_check.json"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.gpu_check",
            f"--output={result}",
            *arguments,
        ],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    found = json.loads(result.read_text())
    assert found["passed"] == (done.returncode == 0)
    return (
        done.returncode,
        done.stdout + done.stderr,
        {step["step"]: step for step in found["steps"]},
    )


def test_every_step_runs_and_a_gpu_without_a_matching_torch_fails_the_first(tmp_path):
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho '580.159, 700.00 W, 1980 MHz, Disabled'\n")
    driver.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    status, text, steps = run(tmp_path, "--minutes=60", PATH=path)
    assert status == 1
    assert list(steps) == list(PLAN_S)
    assert [name for name, step in steps.items() if not step["passed"]] == [
        "environment"
    ], text
    assert text.endswith("failed: environment\n")
    findings = {name: step["findings"] for name, step in steps.items()}
    assert findings["environment"]["software"]["figures"]["torch"] == version("torch")
    assert findings["environment"]["driver"]["figures"] == {
        "driver_version": "580.159",
        "power.limit": "700.00 W",
        "clocks.max.sm": "1980 MHz",
        "mig.mode.current": "Disabled",
        "GPUs that torch does not see": 1,
    }
    for step in ("model logits", "losses", "cached rows", "student steps"):
        errors = [
            (name, what, value, found["limits"][what])
            for name, found in findings[step].items()
            for what, value in found["figures"].items()
            if "error" in what
        ]
        assert len(errors) >= 4
        for name, what, value, limit in errors:
            in_float32 = name.startswith("32") or "float32," in name
            assert 0 <= value <= limit <= (1e-3 if in_float32 else 0.3), (name, what)
    rounded = [
        found for name, found in findings["model logits"].items() if "bf16" in name
    ]
    assert all(found["figures"]["relative error"] > 1e-4 for found in rounded)
    speeds = findings["loss speed"]
    assert speeds["fused, CE + KD, eager"]["figures"]["of CE alone"] > 0
    stage_1 = findings["teacher speed"]["tiny, 32, stage 1"]["figures"]
    assert stage_1["tokens/s"] == pytest.approx(stage_1["tokens"] / stage_1["s"])
    assert 0 < stage_1["CPU s in workers"] < stage_1["CPU s"]
    assert 0 < stage_1["bytes per token"] < 1000
    *_, kd, profile = findings["student speed"].values()
    assert kd["figures"]["of SFT's step time"] > 0
    assert kd["figures"]["MFU"] == "unknown: no peak of a CPU is known"
    for found in (findings["teacher speed"]["profile"], profile):
        assert len(found["details"]) == 20
        assert any("aten::mm" in line for line in found["details"])


def test_a_wrong_loss_is_found(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import nemo_kd.ops.distillation as module\n"
        "original = module.DistillationLoss.evaluate\n"
        "def evaluate(self, *arguments):\n"
        "    losses, *rest = original(self, *arguments)\n"
        "    losses.ce_N.mul_(1.001)\n"
        "    return losses, *rest\n"
        "module.DistillationLoss.evaluate = evaluate\n"
    )
    places = os.pathsep.join([str(tmp_path), str(ROOT)])
    status, text, steps = run(
        tmp_path, "--steps", "losses", "--minutes=60", PYTHONPATH=places
    )
    assert status == 1
    passed = {
        name: found["passed"] for name, found in steps["losses"]["findings"].items()
    }
    assert {name for name, ok in passed.items() if ok} == {
        "cached targets, float32",
        "cached targets, bfloat16",
    }
    assert "FAIL forward_kl, tail, float32, eager" in text


def test_a_step_that_hangs_ends_with_the_place_where_it_hung(tmp_path):
    outcome = run_step("model logits", 3.0, tmp_path)
    assert not outcome.passed
    assert "Fatal Python error: Aborted" in outcome.problem
    stack = r"\(most recent call first\):\n(  Garbage-collecting\n)?  File "
    assert re.search(stack, outcome.problem)
    assert outcome.problem.endswith("stopped after 3 s")


def test_a_figure_beyond_its_limit_fails():
    assert Finding({"error": 1.0}, {"error": 1.0}).passed
    assert not Finding({"error": 1.1}, {"error": 1.0}).passed
    assert not Finding({"error": math.nan}, {"error": 1.0}).passed
    assert not Finding(problem="RuntimeError").passed
    assert Finding({"tokens/s": 5.0}).passed is None
