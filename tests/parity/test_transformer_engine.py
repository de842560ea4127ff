"""Models of every family built from Transformer Engine's spec: names, weights and checkpoints.

They are built on the CPU, where they cannot run. The recorded names stand for Transformer Engine
where it is not installed; `python -m tests.parity.test_transformer_engine` records them again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE
from safetensors.torch import load_file

from nemo_kd.config.optim import OptimConfig
from nemo_kd.config.shared import ModelConfig
from nemo_kd.config.student import StudentModelConfig
from nemo_kd.mcore.architecture import architecture_from_hf
from nemo_kd.mcore.checkpoint import open_pretrained
from nemo_kd.mcore.export import ModelExport
from nemo_kd.mcore.groups import initialize_model_parallel
from nemo_kd.mcore.kernels import Kernels, Machine
from nemo_kd.mcore.model import (
    build_gpt_model,
    named_weights,
    sharded_weights,
    transformer_config,
)
from nemo_kd.mcore.optimizer import wrap_for_training
from nemo_kd.mcore.weights import hf_shapes, pieces
from tests.distributed.test_optimizers import REFERENCES, differences
from tests.ranks import Ranks
from tests.tiny_models import build_hf_model, save_hf_model

NAMES = Path(__file__).with_name("transformer_engine_names.json")
FAMILIES = ("llama2", "mistral", "qwen2_tied", "qwen3", "mixtral", "qwen3_moe")
VOCABULARY = 157

needs_transformer_engine = pytest.mark.skipif(
    not HAVE_TE, reason="Transformer Engine is not installed"
)


def build(source, engine: bool, own_norms: bool = False, **fields: Any):
    """Build a model on the CPU; Transformer Engine's modules only ask whether there is a GPU."""
    config = transformer_config(
        source.architecture, ModelConfig(), torch.float32, **fields
    )
    if not engine:
        return build_gpt_model(source.architecture, config, 8, False)
    with mock.patch("torch.cuda.is_available", return_value=True):
        return build_gpt_model(source.architecture, config, 8, True, own_norms)


def keys(model: torch.nn.Module) -> dict[str, tuple]:
    """Return key, shape and place of every tensor in an archive."""
    return {
        part.key: (part.global_shape, part.local_shape, part.global_offset)
        for part in nested_values(sharded_weights(model))
        if hasattr(part, "global_shape")
    }


def roundtrip(folder: Path, own_norms: bool) -> None:
    """Import and export Hugging Face weights, and compare with the torch spec's keys."""
    groups = initialize_model_parallel(ModelConfig(), 1)
    with open_pretrained(str(folder)) as source:
        model = build(source, True, own_norms)
        assert any("transformer_engine" in type(m).__module__ for m in model.modules())
        source.load_weights(model, groups)
        ModelExport(model, source, groups).save_hf(folder / "exported")
        assert keys(model) == keys(build(source, False))
    exported = load_file(folder / "exported" / "model.safetensors")
    stored = load_file(folder / "model.safetensors")
    assert exported.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(exported[name], tensor), name


@needs_transformer_engine
@pytest.mark.parametrize("own_norms", [False, True], ids=["fused norms", "own norms"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_pass_through_bit_for_bit(ranks, tmp_path, family, own_norms):
    save_hf_model(family, tmp_path, VOCABULARY)
    ranks(1).run(roundtrip, tmp_path, own_norms)


def fuses_sums(folder: Path) -> bool:
    """Wrap a model for training; return True if all of its layers add up gradients themselves."""
    initialize_model_parallel(ModelConfig(), 1)
    machine = Machine(capability=(9, 0), transformer_engine=True)
    optim = OptimConfig(name="adamw")
    kernels = Kernels(machine, StudentModelConfig(optim=optim), "bf16")
    with open_pretrained(str(folder)) as source:
        model = build(source, True, **kernels.fields)
        config = model.config
        wrap_for_training(model, config, kernels)
    fused = [
        module.fuse_wgrad_accumulation
        for module in model.modules()
        if hasattr(module, "fuse_wgrad_accumulation")
    ]
    return len(fused) == 4 * 2 and all(fused)


@needs_transformer_engine
def test_gradients_are_added_up_in_the_layers(ranks, tmp_path):
    save_hf_model("llama2", tmp_path, VOCABULARY)
    assert ranks(1).run(fuses_sums, tmp_path) == [True]


@needs_transformer_engine
@pytest.mark.parametrize(
    ("fp8", "recipe"),
    [("current", "Float8CurrentScaling"), ("delayed", "TEDelayedScaling")],
)
def test_fp8_selects_the_recipe(fp8, recipe):
    from megatron.core.fp8_utils import get_fp8_recipe

    from nemo_kd.config.teacher import TeacherModelConfig

    machine = Machine(capability=(9, 0), transformer_engine=True)
    kernels = Kernels(machine, TeacherModelConfig(fp8=fp8), "bf16")
    architecture = architecture_from_hf(
        build_hf_model("llama2", VOCABULARY).config.to_dict()
    )
    config = transformer_config(
        architecture, ModelConfig(), torch.bfloat16, **kernels.fields
    )
    found = get_fp8_recipe(config)
    assert type(found).__name__ == recipe
    assert found.fp8_format.name == "HYBRID"


@needs_transformer_engine
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", list(REFERENCES))
def test_a_cpu_steps_with_torchs_adam(ranks, tmp_path, name):
    save_hf_model("qwen2_tied", tmp_path, 300, num_hidden_layers=1)
    assert max(ranks(1).run(differences, tmp_path, name)[0]) < 1e-6


def recorded(folder: Path) -> dict[str, dict[str, list[int]]]:
    """Return names and shapes of the weights with fused and with own norms."""
    initialize_model_parallel(ModelConfig(), 1)
    with open_pretrained(str(folder)) as source:
        models = {
            norms: build(source, True, own_norms)
            for norms, own_norms in (("fused", False), ("own", True))
        }
    return {
        norms: {name: list(weight.shape) for name, weight in named_weights(model)}
        for norms, model in models.items()
    }


@needs_transformer_engine
@pytest.mark.parametrize("family", FAMILIES)
def test_the_recorded_names_are_current(ranks, tmp_path, family):
    save_hf_model(family, tmp_path, VOCABULARY)
    expected = json.loads(NAMES.read_text())[family]
    assert ranks(1).run(recorded, tmp_path) == [expected]


@pytest.mark.parametrize("norms", ["fused", "own"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_recorded_name_has_its_hugging_face_weights(family, norms):
    names = json.loads(NAMES.read_text())[family][norms]
    hf = build_hf_model(family, VOCABULARY)
    architecture = architecture_from_hf(hf.config.to_dict())
    found = {}
    for name, shape in names.items():
        for piece in pieces(name, torch.empty(shape), architecture):
            rows, *rest = piece.view.flatten(0, 1).shape
            is_vocabulary = piece.hf_name in (
                "model.embed_tokens.weight",
                "lm_head.weight",
            )
            found[piece.hf_name] = (VOCABULARY if is_vocabulary else rows, *rest)
    assert found == hf_shapes(architecture)


def main() -> None:
    """Record the names of the Transformer Engine that is installed."""
    import tempfile

    pool = Ranks(1)
    found = {}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            save_hf_model(family, Path(folder), VOCABULARY)
            found[family] = pool.run(recorded, Path(folder))[0]
    pool.stop()
    text = json.dumps(found, separators=(",", ":"))
    NAMES.write_text(text.replace('},"', '},\n"') + "\n")


if __name__ == "__main__":
    main()
