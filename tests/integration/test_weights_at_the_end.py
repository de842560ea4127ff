"""What a run leaves: archives and Hugging Face folders of the last and of the best weights."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_kd.cache.reader import CacheReader
from nemo_kd.config.convert import ConvertCheckpointConfig
from nemo_kd.convert import convert
from nemo_kd.mcore import export
from tests.integration.test_stage_1 import run_stage_1
from tests.integration.test_stage_2 import metrics, run_stage_2
from tests.tiny_data import write_chat_dataset
from tests.tiny_models import save_hf_model

SETTINGS = {
    "name": "run",
    "export__hf": True,
    "model__optim__sched__name": "constant",
    "model__optim__lr": 1e-2,
    "model__optim__eps": 1e-3,  # so large that rounding of tiny gradients stays tiny
    "trainer__knowledge_distillation__max_steps": 4,
    "trainer__knowledge_distillation__val_check_interval": 2,
    # The loss falls, so that the first validation has the largest.
    "exp_manager__checkpoint_callback_params": {
        "save_top_k": 1,
        "save_nemo_on_train_end": True,
        "mode": "max",
    },
}


@pytest.fixture(scope="module")
def world(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights_at_the_end")
    teacher = save_hf_model("qwen3", folder / "teacher", 300, seed=1)
    students = {
        "tied": save_hf_model("llama3.2_tied", folder / "tied", 300),
        "experts": save_hf_model("qwen3_moe", folder / "experts", 300),
    }
    caches = []
    for split, count, start in (("train", 40, 0), ("validation", 9, 60)):
        dataset = write_chat_dataset(folder / f"{split}.jsonl", count, start)
        caches.append(folder / f"{split}_CHUNK_ID.jsonl")
        assert ranks(1).run(run_stage_1, teacher, dataset, caches[-1], {}) == [""]
    return students, *caches


def run_with_small_files(student, train, validation, log_dir, overrides) -> str:
    before, export.MAX_FILE_BYTES = export.MAX_FILE_BYTES, 60_000
    try:
        return run_stage_2(student, train, validation, log_dir, overrides)
    finally:
        export.MAX_FILE_BYTES = before


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder, each of them in one file."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found


def same_as_archive(ranks, folder: Path, archive: Path, target: Path) -> bool:
    ranks(1).run(
        convert,
        ConvertCheckpointConfig(input_path=str(archive), output_path=str(target)),
    )
    ours, theirs = weights(folder), weights(target)
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


def provenance(archive: Path) -> dict:
    with tarfile.open(archive) as tar:
        return json.load(tar.extractfile("./provenance.json"))


def test_the_last_and_the_best_weights_are_left(ranks, world, tmp_path):
    students, train, validation = world
    layout = {
        "trainer__devices": 4,
        "model__tensor_model_parallel_size": 2,
        "model__pipeline_model_parallel_size": 2,
    }
    test = {"model__data__data_prefix": {split: [str(path)] for split, path in
            (("train", train), ("validation", validation), ("test", validation))}}  # fmt: skip
    args = (
        students["tied"],
        train,
        validation,
        tmp_path / "a",
        {**SETTINGS, **layout, **test},
    )
    assert ranks(4).run(run_with_small_files, *args) == [""] * 4
    left = tmp_path / "a" / "checkpoints"
    last, best = left / "run-hf", left / "run-best-hf"
    assert len(list(last.glob("*.safetensors"))) > 2
    assert same_as_archive(ranks, last, left / "run.nemo", tmp_path / "last")
    assert same_as_archive(ranks, best, left / "run-best.nemo", tmp_path / "best")
    assert (
        provenance(left / "run.nemo")["consumed_samples"],
        provenance(left / "run-best.nemo")["consumed_samples"],
    ) == (32, 16)

    # The best weights are those of a run that ends there; an older run's best ones go where the last are the best.
    short = {**SETTINGS, "trainer__knowledge_distillation__max_steps": 2}
    left = tmp_path / "b" / "checkpoints"
    assert ranks(1).run(
        run_stage_2, students["tied"], train, validation, tmp_path / "b", short
    ) == [""]
    (left / "run.nemo").rename(left / "run-best.nemo")
    (left / "run-hf").rename(left / "run-best-hf")
    assert ranks(1).run(
        run_stage_2, students["tied"], train, validation, tmp_path / "b", short
    ) == [""]
    assert sorted(
        path.name for path in left.glob("run*") if "step" not in path.name
    ) == [
        "run-hf",
        "run.nemo",
    ]
    expected, found, other = weights(left / "run-hf"), weights(best), weights(last)
    assert all((expected[name] - found[name]).abs().max() < 1e-4 for name in expected)
    assert any((expected[name] - other[name]).abs().max() > 1e-3 for name in expected)

    rows = metrics(tmp_path / "a")
    validated = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    tested = next(row["test/loss"] for row in rows if "test/loss" in row)
    assert validated[4] < validated[2]
    assert tested == pytest.approx(validated[2], rel=1e-6)
    example = CacheReader(str(validation))[2].example
    model = AutoModelForCausalLM.from_pretrained(best)
    tokens = torch.tensor(example.tokens_S)[None]
    with torch.no_grad():
        straight = AutoModelForCausalLM.from_pretrained(left / "run-hf")(tokens).logits
        torch.testing.assert_close(model(tokens).logits, straight, rtol=0, atol=1e-4)
    assert AutoTokenizer.from_pretrained(best).chat_template


def test_experts_spread_over_ranks_are_exported(ranks, world, tmp_path):
    students, train, validation = world
    layout = {"trainer__devices": 4, "model__tensor_model_parallel_size": 2, "model__expert_model_parallel_size": 2,
              "model__sequence_parallel": True}  # fmt: skip
    best = {
        "exp_manager__checkpoint_callback_params": {
            "save_top_k": 1,
            "save_best_model": True,
        }
    }
    args = (
        students["experts"],
        train,
        validation,
        tmp_path / "a",
        {**SETTINGS, **layout, **best},
    )
    assert ranks(4).run(run_with_small_files, *args) == [""] * 4
    left = tmp_path / "a" / "checkpoints"
    assert not (left / "run-best.nemo").exists()
    assert same_as_archive(ranks, left / "run-hf", left / "run.nemo", tmp_path / "hf")
    index = json.loads((left / "run-hf" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {
        path.name for path in (left / "run-hf").glob("*.safetensors")
    }
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for tensor in weights(left / "run-hf").values()
    )
    AutoModelForCausalLM.from_pretrained(left / "run-hf")
