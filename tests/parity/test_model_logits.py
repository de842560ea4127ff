"""Megatron models against transformers: logits in float32, and weights that come back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nemo_kd.config.convert import ConvertCheckpointConfig
from nemo_kd.config.shared import ModelConfig
from nemo_kd.convert import convert
from nemo_kd.mcore.checkpoint import open_pretrained
from nemo_kd.mcore.export import ModelExport
from nemo_kd.mcore.groups import initialize_model_parallel
from nemo_kd.mcore.model import build_gpt_model, transformer_config
from tests.tiny_models import MODELS, build_hf_model

LENGTH = 300  # beyond the sliding window and the length that Llama 3's rope scaling starts from
TOLERANCE = 1e-4


def load(path: str, tensor_model_parallel_size: int, divisible_by: int = 8):
    layout = ModelConfig(
        tensor_model_parallel_size=tensor_model_parallel_size,
        make_vocab_size_divisible_by=divisible_by,
    )
    groups = initialize_model_parallel(layout, 1)
    with open_pretrained(path) as source:
        config = transformer_config(source.architecture, layout, torch.float32)
        model = build_gpt_model(
            source.architecture, config, divisible_by, transformer_engine=False
        ).eval()
        source.load_weights(model, groups)
        return model, source, groups


def whole_logits(
    path: str, tensor_model_parallel_size: int, ids: torch.Tensor
) -> torch.Tensor:
    """Logits of the real vocabulary, gathered from the tensor-parallel ranks."""
    model, source, groups = load(path, tensor_model_parallel_size)
    with torch.no_grad():
        part = model(ids, torch.arange(ids.shape[1]).expand_as(ids), None)
    parts = [torch.empty_like(part) for _ in range(groups.tensor_size)]
    torch.distributed.all_gather(parts, part.contiguous(), group=groups.tensor)
    return torch.cat(parts, -1)[..., : source.architecture.vocab_size]


def parity(
    paths: dict[str, str], tensor_model_parallel_size: int, ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    return {
        name: whole_logits(path, tensor_model_parallel_size, ids)
        for name, path in paths.items()
    }


def resave(path: str, output: str, tensor_model_parallel_size: int) -> None:
    model, _, groups = load(path, tensor_model_parallel_size)
    with open_pretrained(path) as opened:
        ModelExport(model, opened, groups).save_nemo(output)


def convert_in_rank(source: str, target: str) -> None:
    convert(ConvertCheckpointConfig(input_path=source, output_path=target))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folders = {}
    for name in MODELS:
        folders[name] = tmp_path_factory.mktemp(name.replace(".", "_")) / "hf"
        build_hf_model(name).save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def reference(models) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.randint(
        3, 157, (2, LENGTH), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        return ids, {
            name: AutoModelForCausalLM.from_pretrained(path)(ids).logits
            for name, path in models.items()
        }


@pytest.mark.parametrize("tensor_model_parallel_size", [1, 2])
def test_logits_match_transformers(
    ranks, models, reference, tensor_model_parallel_size
):
    ids, expected = reference
    paths = {name: str(path) for name, path in models.items()}
    for result in ranks(tensor_model_parallel_size).run(
        parity, paths, tensor_model_parallel_size, ids
    ):
        for name, logits in result.items():
            difference = (logits - expected[name]).abs().max().item()
            assert difference < TOLERANCE, (
                f"{name}: {difference} at scale {expected[name].abs().max()}"
            )


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (
            "llama3.1",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        ),
        ("mistral_window", {"sliding_window": 8}),
        ("llama2", {"rms_norm_eps": 1e-2}),
        ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    ],
)
def test_the_comparison_notices_a_wrong_architecture(
    ranks, models, reference, tmp_path, name, change
):
    build_hf_model(name, **change).save_pretrained(tmp_path)
    logits = ranks(1).run(whole_logits, str(tmp_path), 1, reference[0])[0]
    assert (logits - reference[1][name]).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("name", list(MODELS))
def test_weights_come_back_bit_for_bit(ranks, models, tmp_path, name):
    archive, back = tmp_path / "model.nemo", tmp_path / "back"
    ranks(1).run(convert_in_rank, str(models[name]), str(archive))
    ranks(1).run(convert_in_rank, str(archive), str(back))
    before, after = (
        load_file(models[name] / "model.safetensors"),
        load_file(back / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert json.loads((models[name] / "config.json").read_text()) == json.loads(
        (back / "config.json").read_text()
    )


def test_an_archive_written_at_tp_2_loads_at_any_tp(
    ranks, models, reference, tmp_path
):
    ids, expected = reference
    archive, back = tmp_path / "model.nemo", tmp_path / "back"
    ranks(2).run(resave, str(models["qwen2_tied"]), str(archive), 2)
    for size in (1, 2, 4):
        logits = ranks(size).run(whole_logits, str(archive), size, ids)[0]
        assert (logits - expected["qwen2_tied"]).abs().max() < TOLERANCE
    ranks(1).run(convert_in_rank, str(archive), str(back))
    before, after = (
        load_file(models["qwen2_tied"] / "model.safetensors"),
        load_file(back / "model.safetensors"),
    )
    assert all(torch.equal(before[key], after[key]) for key in before)
