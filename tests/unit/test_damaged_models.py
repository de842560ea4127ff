"""Model folders that are damaged or hostile: one error that names file and key, within bounds of time and memory."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nemo_kd.config import ConfigError, UserInputError
from nemo_kd.mcore.checkpoint import open_pretrained
from tests.tiny_models import MODELS, build_hf_model

LONG = "9" * 5000
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    for name in ("qwen2_tied", "qwen3_moe"):
        build_hf_model(name).save_pretrained(folder / name)
    return folder


@pytest.fixture
def model(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine / "qwen2_tied", tmp_path / "model"))


@pytest.fixture
def mixture(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine / "qwen3_moe", tmp_path / "mixture"))


def error_of(folder: Path) -> str:
    with pytest.raises(UserInputError) as caught, open_pretrained(str(folder)):
        pass
    assert len(str(caught.value)) < 600
    return str(caught.value).removeprefix("pretrained_checkpoint.restore_from_path: ")


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "content",
    ["[]", "null", "3", "{", DEEP, f'{{"a": {DEEP}}}', f'{{"a": {LONG}}}', "\xff"],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_files_that_are_no_mappings_are_named(model, name, content):
    (model / name).write_bytes(content.encode("latin-1"))
    assert error_of(model).startswith(f"{model / name}: ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            (key, 10**6)
            for key in (
                "num_hidden_layers",
                "hidden_size",
                "vocab_size",
                "intermediate_size",
            )
        ),
        *(
            (key, 2)
            for key in (
                "hidden_size",
                "vocab_size",
                "intermediate_size",
                "num_key_value_heads",
            )
        ),
        *(
            ("num_hidden_layers", value)
            for value in (0, -1, 4000, "2", [2], True, 2.0, float("nan"), {})
        ),
        *(("num_attention_heads", value) for value in (True, "4", [])),
        ("head_dim", True),
        ("num_key_value_heads", "many"),
        ("rms_norm_eps", "small"),
        ("rms_norm_eps", True),
        ("rope_parameters", {"rope_type": "llama3", "factor": "8"}),
        ("tie_word_embeddings", "yes"),
        ("initializer_range", "a"),
        ("model_type", ["qwen2"]),
        ("model_type", {}),
        ("max_position_embeddings", 0),
        ("hidden_act", ["silu"]),
    ],
)
def test_wrong_values_of_config_json_are_named(model, key, value):
    change(model / "config.json", **{key: value})
    message = error_of(model)
    assert "config.json" in message
    assert any(
        name in message
        for name in (
            key,
            "shape",
            "missing",
            "num_layers",
            "kv_channels",
            "ffn_hidden_size",
            "rope_scaling",
        )
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [("sliding_window", "4"), ("layer_types", ["sliding_attention"] * 9)],
)
def test_sliding_windows_are_checked(model, key, value):
    values = {"use_sliding_window": True, "sliding_window": 4, key: value}
    change(model / "config.json", **values)
    assert key in error_of(model)


def test_a_million_experts_that_are_not_stored_are_refused(mixture):
    change(mixture / "config.json", num_experts=16_000, num_local_experts=16_000)
    assert "the weights do not fit config.json: missing: " in error_of(mixture)


@pytest.mark.parametrize("weight_map", [None, [], {}])
def test_an_index_without_a_map_is_named(model, weight_map):
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert error_of(model).startswith(f"{index}: weight_map")


@pytest.mark.parametrize("file", [1, "../config.json", "/etc/passwd", "..", ""])
def test_an_index_names_files_of_its_folder_only(model, file):
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": file}}))
    assert error_of(model).startswith(f"{model}")


def header(content: object, length: int | None = None, data: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        header({}, length=2**63),
        header({}, length=99_000_000),
        header(b"[]"),
        header(DEEP.encode()),
        header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),
        header(
            {"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
            data=b"0" * 16,
        ),
        header(
            {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}},
            data=b"0" * 16,
        ),
        header(
            {
                name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
                for name in "ab"
            },
            data=b"0" * 16,
        ),
        header(
            {"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
            data=b"0" * 16,
        ),
        header(
            {"a": {"dtype": "X", "shape": [4], "data_offsets": [0, 16]}},
            data=b"0" * 16,
        ),
    ],
)
def test_headers_that_lie_are_refused(model, content):
    (model / "model.safetensors").write_bytes(content)
    assert error_of(model).startswith(
        f"{model / 'model.safetensors'}: not a readable safetensors file"
    )


def test_what_is_no_readable_file_is_named(model):
    path = model / "model-1.safetensors"
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": path.name}}))
    os.mkfifo(path)
    assert f"{path}: expected a regular file, found none" in error_of(model)
    path.unlink()
    path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
    )
    assert "a Git LFS pointer, not the file itself; run `git lfs pull`" in error_of(
        model
    )
    if os.geteuid():
        path.chmod(0)
        assert f"{path}: cannot be read (Permission denied)" in error_of(model)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.o_proj.bias",
        "score.weight",
        "lm_head.bias",
        "model.layers.0.extra_norm.weight",
    ],
)
def test_stored_tensors_without_a_place_are_named(model, name):
    weights = load_file(model / "model.safetensors")
    save_file({**weights, name: torch.ones(2)}, model / "model.safetensors")
    assert f"no place for: {name}" in error_of(model)


def test_frequencies_of_old_checkpoints_are_harmless(model):
    weights = load_file(model / "model.safetensors")
    save_file(
        {**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)},
        model / "model.safetensors",
    )
    with open_pretrained(str(model)) as opened:
        assert opened.architecture.share_embeddings_and_output_weights


@pytest.mark.parametrize(
    "name",
    [*(name for name in MODELS if name.endswith("_tied")), "qwen3_moe", "mistral"],
)
def test_a_stored_output_layer_is_used_as_transformers_uses_it(tmp_path, name):
    build_hf_model(name).save_pretrained(tmp_path)
    change(tmp_path / "config.json", tie_word_embeddings=True)
    weights = load_file(tmp_path / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    for head, is_tied in (
        (embedding.clone(), True),
        (embedding + 1, False),
        (None, True),
    ):
        save_file(
            weights | {"lm_head.weight": head}
            if head is not None
            else {**weights, "lm_head.weight": embedding.clone()},
            tmp_path / "model.safetensors",
            metadata={"format": "pt"},
        )
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(theirs.lm_head.weight, embedding) == is_tied
        with open_pretrained(str(tmp_path)) as opened:
            architecture = opened.architecture
        assert architecture.share_embeddings_and_output_weights == is_tied
        assert architecture.hf_config["tie_word_embeddings"] == is_tied


def test_a_stored_output_layer_of_another_shape_is_refused(model):
    weights = load_file(model / "model.safetensors")
    save_file(
        {**weights, "lm_head.weight": torch.ones(3, 64)}, model / "model.safetensors"
    )
    assert "lm_head.weight has the shape (3, 64)" in error_of(model)


def test_an_archive_has_bounds_too():
    from nemo_kd.config.shared import GPTArchitecture

    fine = {
        "family": "llama",
        "vocab_size": 8,
        "num_layers": 1,
        "hidden_size": 8,
        "ffn_hidden_size": 8,
    }
    fine |= {
        "num_attention_heads": 2,
        "num_query_groups": 2,
        "kv_channels": 4,
        "max_position_embeddings": 8,
    }
    fine |= {"layernorm_epsilon": 1e-6, "rotary_base": 1e4}
    GPTArchitecture(**fine)
    for key, value in (
        ("num_layers", 10**9),
        ("num_query_groups", 0),
        ("rotary_base", float("nan")),
    ):
        with pytest.raises(ConfigError, match=f"{key}: .* must be"):
            GPTArchitecture(**{**fine, key: value})
