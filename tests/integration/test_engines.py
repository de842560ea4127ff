"""Checkpoints and archives of one Megatron Core in another: OTHER_PYTHON=/path/to/python names an interpreter with it.

    OTHER_PYTHON=/path/to/python3.12 python -m pytest tests/integration/test_engines.py

The other interpreter needs all that the tests need but this package, which it takes from here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from nemo_kd.api import convert_checkpoint
from tests.integration.test_stage_2 import metrics, run_stage_2
from tests.ranks import Ranks
from tests.tiny_data import write_chat_dataset
from tests.tiny_models import save_hf_model

ROOT = Path(__file__).resolve().parents[2]
OTHER = os.environ.get("OTHER_PYTHON", "")
STEPS = 4
SETTINGS = {
    "trainer__devices": 2,
    "trainer__precision": "bf16",
    "trainer__knowledge_distillation__max_epochs": 1,
    "trainer__knowledge_distillation__val_check_interval": STEPS // 2,
    "model__tensor_model_parallel_size": 2,
    "model__optim__name": "distributed_fused_adam",
    "model__knowledge_distillation__kd_loss_weight": 0.0,
    "model__data__data_impl": "dataset",
}
"""Sharded optimizer, random states of two ranks and master weights beside bf16 ones."""

pytestmark = pytest.mark.skipif(
    not OTHER, reason="OTHER_PYTHON names no interpreter with another Megatron Core"
)


def train(folder: Path, log_dir: Path) -> None:
    """Train until the last step, from the checkpoint in `log_dir` if there is one."""
    data = folder / "train.jsonl"
    pool = Ranks(2)
    try:
        results = pool.run(
            run_stage_2, folder / "student", data, data, log_dir, SETTINGS
        )
    finally:
        pool.stop()
    assert results == ["", ""]


def export(archive: Path, output: Path) -> None:
    """Convert an archive to a Hugging Face folder."""
    convert_checkpoint({"input_path": str(archive), "output_path": str(output)})


def call(python: str, function: str, *paths: Path) -> None:
    """Call a function of this file in an interpreter."""
    code = (
        "import sys; from pathlib import Path; from tests.integration import test_engines;"
        f"test_engines.{function}(*map(Path, sys.argv[1:]))"
    )
    subprocess.run(
        [python, "-c", code, *paths],
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[Path]:
    """Folder with an uninterrupted run of each engine, and of each one that resumes the other's."""
    folder = tmp_path_factory.mktemp("engines")
    save_hf_model("qwen3", folder / "student", 300, num_hidden_layers=2)
    write_chat_dataset(folder / "train.jsonl", STEPS * 8 + 1)
    engines = {"this": sys.executable, "other": OTHER}
    for name, python in engines.items():
        call(python, "train", folder, folder / name)
    for name, python in engines.items():
        (source,) = set(engines) - {name}
        halfway = (folder / source / "checkpoints").glob(f"*-step={STEPS // 2}-*")
        checkpoint = min(halfway, key=lambda path: len(path.name))
        resumed = folder / f"{source} resumed by {name}"
        shutil.copytree(
            checkpoint, resumed / "checkpoints" / f"{checkpoint.name}-last"
        )
        call(python, "train", folder, resumed)
    return folder


def training_rows(log_dir: Path) -> dict[int, list[float]]:
    """Step -> its loss, gradient norm and learning rate."""
    return {
        row["step"]: [row["train/loss"], row["grad_norm"], row["lr"]]
        for row in metrics(log_dir)
        if "train/loss" in row
    }


def archive(log_dir: Path) -> Path:
    (found,) = (log_dir / "checkpoints").glob("*.nemo")
    return found


def test_the_interpreters_have_different_engines():
    code = "import megatron.core; print(megatron.core.__version__)"
    versions = {
        subprocess.check_output([python, "-c", code], text=True)
        for python in (sys.executable, OTHER)
    }
    assert len(versions) == 2, versions


@pytest.mark.parametrize(("source", "name"), [("this", "other"), ("other", "this")])
def test_an_engine_resumes_the_others_checkpoint_to_the_last_bit(runs, source, name):
    straight = training_rows(runs / source)
    resumed = training_rows(runs / f"{source} resumed by {name}")
    assert list(straight) == list(range(1, STEPS + 1))
    assert list(resumed) == list(range(STEPS // 2 + 1, STEPS + 1))
    assert all(row == straight[step] for step, row in resumed.items())


@pytest.mark.parametrize("writer", ["this", "other"])
def test_an_archive_has_the_same_weights_in_both_engines(runs, tmp_path, writer):
    for name, python in (("this", sys.executable), ("other", OTHER)):
        call(python, "export", archive(runs / writer), tmp_path / name)
    ours = load_file(tmp_path / "this" / "model.safetensors")
    theirs = load_file(tmp_path / "other" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(weight.equal(theirs[name]) for name, weight in ours.items())


@pytest.mark.parametrize(("source", "name"), [("this", "other"), ("other", "this")])
def test_the_weights_after_a_resume_are_those_of_the_straight_run(
    runs, tmp_path, source, name
):
    export(archive(runs / source), tmp_path / "straight")
    export(archive(runs / f"{source} resumed by {name}"), tmp_path / "resumed")
    straight = load_file(tmp_path / "straight" / "model.safetensors")
    resumed = load_file(tmp_path / "resumed" / "model.safetensors")
    assert all(weight.equal(resumed[key]) for key, weight in straight.items())
