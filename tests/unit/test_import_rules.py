"""Who may import whom: the table of rooms in CONTRIBUTING.md, enforced."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "nemo_kd"

EVERYWHERE = {"batch", "config", "files", "page"}
"""Every room may import these, as far as they do not import it."""

ALLOWED: dict[str, set[str]] = {
    "batch": set(),
    "config": set(),
    "files": set(),
    "page": set(),
    "nemo_archive": set(),
    "sft": set(),
    "run": set(),
    "ops": set(),
    "data": {"nemo_archive"},
    "cache": {"run"},
    "mcore": {"nemo_archive", "run"},
    "teacher": {"ops", "data", "cache", "mcore", "run"},
    "answers": {"data", "mcore", "run"},
    "student": {"ops", "data", "cache", "mcore", "run", "answers"},
    "evaluation": {"ops", "data", "cache", "mcore", "run", "answers", "student"},
    "convert": {"mcore", "run"},
    "tools": {"ops", "data", "cache", "mcore", "run", "answers", "teacher"},
    "api": {"run", "teacher", "student", "evaluation", "convert", "cli"},
    "cli": {
        "data",
        "cache",
        "mcore",
        "run",
        "answers",
        "teacher",
        "student",
        "evaluation",
        "convert",
        "tools",
    },
}

MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Full names of everything a module imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names |= {
                f"{node.module}.{alias.name}"
                for alias in node.names
                if node.module == "nemo_kd"
            }
    return names


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize(
    "path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_rooms_import_only_what_they_may(path):
    room = room_of(path)
    if room == "__init__":  # imports lazily, by name: tests/unit/test_front_door.py
        return
    used = {
        name.split(".")[1] for name in imports(path) if name.startswith("nemo_kd.")
    } - {
        room,
        "__version__",
    }
    allowed = ALLOWED[room] | EVERYWHERE
    assert used <= allowed, f"{room} may not import {sorted(used - allowed)}"


@pytest.mark.parametrize(
    "path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_only_mcore_imports_megatron(path):
    uses_megatron = any(name.split(".")[0] == "megatron" for name in imports(path))
    assert not uses_megatron or room_of(path) == "mcore"


def test_every_room_is_listed():
    assert {room_of(path) for path in MODULES} - {"__init__"} == set(ALLOWED)


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        (
            "nemo_kd.cli.compute_topk_logits",
            ["torch", "megatron", "nemo", "transformers"],
        ),
        (
            "nemo_kd.cli.train_gpt_knowledge_distillation",
            ["torch", "megatron", "nemo", "transformers"],
        ),
        ("nemo_kd.cli.logit_cache", ["torch", "megatron", "nemo", "transformers"]),
        ("nemo_kd.evaluation.filter", ["torch", "transformers", "sympy"]),
        ("nemo_kd.run.interruption", ["torch"]),
        ("nemo_kd.run.ranks", ["torch"]),
        ("nemo_kd.run.metrics", ["torch", "wandb", "tqdm"]),
        ("nemo_kd.config.student", ["torch", "megatron"]),
        ("nemo_kd.sft", ["transformers", "megatron", "omegaconf"]),
        ("nemo_kd.cache.manifest", ["torch", "megatron", "transformers"]),
        ("nemo_kd.data.dataset", ["megatron", "nemo"]),
        (
            "nemo_kd.teacher.loop",
            ["lightning", "scipy", "torchmetrics", "matplotlib", "nemo"],
        ),
    ],
)
def test_light_modules_stay_light(module, unwanted):
    code = f"import sys, {module}; print([name for name in {unwanted!r} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    assert result.stdout.strip() == "[]"
