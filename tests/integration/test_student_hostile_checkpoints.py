"""Somebody's checkpoint through exp_manager.resume_from_checkpoint: it runs no code and deletes nothing of others."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from nemo_kd.mcore.checkpoint_write import file_sum
from nemo_kd.student.checkpoint_folder import CONTENTS, Contents, seal
from tests.forked_runs import StudentRun
from tests.tiny_data import write_chat_dataset
from tests.tiny_models import save_hf_model

SETTINGS = {
    "model__data__data_impl": "dataset",
    "model__knowledge_distillation__kd_loss_weight": 0.0,
    "model__knowledge_distillation__sft_loss_weight": 1.0,
    "model__optim__sched__name": "constant",
    "trainer__knowledge_distillation__max_epochs": 2,  # of one step each
    "trainer__knowledge_distillation__max_steps": 1,
    "trainer__knowledge_distillation__val_check_interval": 1,
    "exp_manager__create_tensorboard_logger": False,
    "exp_manager__checkpoint_callback_params__save_top_k": 1,
    "exp_manager__checkpoint_callback_params__save_nemo_on_train_end": False,
}
FINAL_NORM = "decoder.final_layernorm.weight"


class Attack:
    """A pickle that makes a folder in the folder of whoever loads it."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    student = save_hf_model("llama2", folder / "student", 300, num_hidden_layers=1)
    train = write_chat_dataset(folder / "train.jsonl", 16)
    return student, train, write_chat_dataset(folder / "validation.jsonl", 8, 60)


@pytest.fixture(scope="module")
def trusted(world, tmp_path_factory) -> Path:
    log_dir = tmp_path_factory.mktemp("trusted") / "run"
    run = StudentRun(log_dir, 1, "", *world, **SETTINGS)
    assert run.end() == [0], run.said()
    (folder,) = (log_dir / "checkpoints").glob("*-last")
    return folder


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def change_metadata(folder: Path, change: Callable[[Metadata], None]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def replace_entry(folder: Path, key: str, content: bytes) -> None:
    """Let the entry of .metadata whose name starts with `key` lie in bytes at the end of its file."""

    def change(metadata: Metadata) -> None:
        index = next(
            index for index in metadata.storage_data if index.fqn.startswith(key)
        )
        info = metadata.storage_data[index]
        path = folder / info.relative_path
        info.offset, info.length = path.stat().st_size, len(content)
        with path.open("ab") as file:
            file.write(content)

    change_metadata(folder, change)


def in_metadata(folder: Path, attack: Attack) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(attack))


def in_common(folder: Path, attack: Attack) -> None:
    common = torch.load(folder / "common.pt", weights_only=False)
    (folder / "common.pt").write_bytes(saved({**common, "epoch": attack}))


def in_random_state(folder: Path, attack: Attack) -> None:
    replace_entry(folder, "random_state", saved([attack]))


def in_weights(folder: Path, attack: Attack) -> None:
    replace_entry(folder, FINAL_NORM, saved(attack))


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (
            in_metadata,
            ".metadata: cannot be read (it refers to posix.mkdir",
        ),
        (
            in_common,
            "theirs: cannot be read, or holds more than tensors and plain values",
        ),
        (
            in_random_state,
            "theirs: cannot be read, or holds more than tensors and plain values",
        ),
        (
            in_weights,
            "theirs: cannot be read, or holds more than tensors and plain values",
        ),
    ],
)
def test_planted_pickles_are_refused_in_one_line(
    world, trusted, tmp_path, plant, message
):
    folder = Path(shutil.copytree(trusted, tmp_path / "theirs"))
    attacked = tmp_path / "attacked"
    plant(folder, Attack(attacked))
    reseal(folder)
    more = {**SETTINGS, "trainer__knowledge_distillation__max_steps": 2}
    run = StudentRun(
        tmp_path / "run",
        1,
        "",
        *world,
        exp_manager__resume_from_checkpoint=str(folder),
        **more,
    )
    assert run.end() == [2], run.said()
    assert not attacked.exists()
    assert "Traceback" not in run.said()
    (line,) = [line for line in run.said().splitlines() if line.startswith("error: ")]
    assert message in line, line


def test_a_checkpoint_without_a_schedule_is_refused_in_one_line(
    world, trusted, tmp_path
):
    folder = Path(shutil.copytree(trusted, tmp_path / "theirs"))
    common = torch.load(folder / "common.pt", weights_only=False)
    del common["schedule"]
    torch.save(common, folder / "common.pt")
    reseal(folder)
    source = {"exp_manager__resume_from_checkpoint": str(folder)}
    run = StudentRun(tmp_path / "run", 1, "", *world, **SETTINGS, **source)
    assert run.end() == [2], run.said()
    assert "Traceback" not in run.said()
    text = f"error: {folder} has no schedule, so another version wrote it; "
    assert text in run.said()


def reseal(folder: Path) -> None:
    """List the files as they are now: whoever changes them changes their sums."""
    before = Contents.read(folder)
    (folder / CONTENTS).unlink()
    sums = {path.name: file_sum(path) for path in folder.iterdir()}
    seal(folder, replace(before, files=sums))


def test_paths_in_the_state_delete_nothing(world, trusted, tmp_path):
    """Lightning deletes the checkpoint that a better one replaces, by the path in its state."""
    folder = Path(shutil.copytree(trusted, tmp_path / "theirs"))
    dirpath = tmp_path / "run" / "checkpoints"
    dirpath.mkdir(parents=True)
    precious = [
        tmp_path / "precious",
        dirpath / "precious",
        dirpath / ".." / "precious",
    ]
    for place in precious:
        place.mkdir()
        (place / "thesis.txt").touch()
    common = torch.load(folder / "common.pt", weights_only=False)
    for place in precious:
        state = {
            "monitor": "val_loss",
            "dirpath": str(dirpath),
            "best_model_score": torch.tensor(1e6),
            "best_model_path": str(place),
            "best_k_models": {str(place): torch.tensor(1e6)},
            "kth_best_model_path": str(place),
            "kth_value": torch.tensor(1e6),
            "last_model_path": str(place),
            "current_score": torch.tensor(1e6),
        }
        common |= {"ranks": state, "callbacks": {}}
        if place == precious[0]:  # as earlier versions kept it
            common["callbacks"] = {
                "StudentCheckpoints{'monitor': 'val_loss'}": common.pop("ranks")
            }
        torch.save(common, folder / "common.pt")
        reseal(folder)
        more = {**SETTINGS, "trainer__knowledge_distillation__max_steps": 2}
        run = StudentRun(
            tmp_path / "run",
            1,
            "",
            *world,
            exp_manager__resume_from_checkpoint=str(folder),
            **more,
        )
        assert run.end() == [0], run.said()
        assert all((kept / "thesis.txt").exists() for kept in precious)
        for path in dirpath.glob("*step*"):
            shutil.rmtree(path)
