"""The Python interface: its names, what each part needs, and what is told where a package is missing."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import nemo_kd
from nemo_kd.config import ConfigError

ROOT = Path(__file__).resolve().parents[2]
LIGHT = ["torch", "numpy", "orjson", "zstandard"]
"""Packages of requirements-light.txt."""

ONLY_LIGHT = """
import importlib.abc, importlib.metadata, sys

HEAVY = {
    name
    for name, distributions in importlib.metadata.packages_distributions().items()
    if not {one.lower().replace("_", "-") for one in distributions} & NEEDED
} - {"nemo_kd", "tests"}

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
"""
"""Makes all packages impossible to import but those of requirements-light.txt with their own requirements."""


def light_packages() -> set[str]:
    """Return the distributions of requirements-light.txt and all that they require."""
    from importlib.metadata import PackageNotFoundError, requires

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: set[str] = set()
    waiting = list(LIGHT)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        try:
            required = map(Requirement, requires(name) or [])
        except PackageNotFoundError:
            continue
        found.add(name)
        waiting += [
            one.name for one in required if one.marker is None or one.marker.evaluate()
        ]
    return found


def run_with_light_packages(
    code: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    code = ONLY_LIGHT.replace("NEEDED", repr(light_packages())) + code
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


def test_the_names_of_requirements_light_are_those_tested_here():
    lines = (ROOT / "requirements-light.txt").read_text().splitlines()
    assert [line.split(">=")[0] for line in lines if not line.startswith("#")] == LIGHT


def test_importing_the_package_loads_nothing():
    code = "import sys, nemo_kd; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    loaded = set(result.stdout.split())
    assert not {name for name in loaded if name.startswith("nemo_kd.")}
    assert not loaded & {"torch", "numpy", "omegaconf"}


@pytest.mark.parametrize("name", nemo_kd.__all__)
def test_every_name_is_there_and_documented(name):
    assert name in dir(nemo_kd)
    value = getattr(nemo_kd, name)
    assert name == "__version__" or value.__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(
        AttributeError, match="module 'nemo_kd' has no attribute 'CacheRaeder'"
    ):
        nemo_kd.CacheRaeder  # noqa: B018


@pytest.mark.parametrize(
    "command",
    [
        "compute_topk_logits",
        "train_gpt_knowledge_distillation",
        "evaluate_gpt",
        "convert_checkpoint",
    ],
)
def test_a_command_names_the_package_that_it_misses(command):
    result = run_with_light_packages(
        f"from nemo_kd.cli import entry; entry.{command}()", "--help"
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith(f"error: {command} needs the package "), (
        result.stderr
    )
    assert result.stderr.endswith("pip install . in the folder of nemo_kd\n")
    assert "Traceback" not in result.stderr


def test_caches_are_read_and_losses_are_there_with_light_packages_only():
    code = """
import nemo_kd
cache = nemo_kd.CacheReader("tests/golden/loss_CHUNK_ID.jsonl.zst")
print(sum(row.example.num_tokens for row in cache))
for name in nemo_kd.__all__:
    if nemo_kd._MODULES.get(name, "nemo_kd.api") != "nemo_kd.api":
        getattr(nemo_kd, name)
"""
    result = run_with_light_packages(code)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 0


def test_the_python_functions_drop_what_megatron_warns_of():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with pytest.raises(ConfigError, match="output_path"):
            nemo_kd.compute_topk_logits({})
        for module in ("megatron.core.utils", "another"):
            warnings.warn_explicit("Apex is missing", UserWarning, "x.py", 1, module)
    assert len(shown) == 1
