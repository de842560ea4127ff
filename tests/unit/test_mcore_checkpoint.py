"""Opening models on disk: every way in which a path can be wrong, before any weight is read."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from nemo_kd.config import ConfigError
from nemo_kd.config.convert import ConvertCheckpointConfig
from nemo_kd.convert import convert
from nemo_kd.mcore.checkpoint import open_pretrained
from nemo_kd.mcore.distributed_checkpoint import ShardedFolder
from nemo_kd.nemo_archive import ModelFiles
from tests.tiny_models import build_hf_model


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_hf_model("llama2").save_pretrained(folder)
    return folder


@pytest.fixture
def model(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def refused(path: Path, message: str) -> None:
    with pytest.raises(ConfigError, match=message), open_pretrained(str(path)):
        pass


def pack(path: Path, files: dict[str, bytes]) -> Path:
    folder = path.with_suffix(".content")
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    with tarfile.open(path, "w") as tar:
        tar.add(folder, arcname=".")
    return path


def test_a_folder_says_what_it_is_without_loading(model):
    with open_pretrained(str(model)) as opened:
        assert (opened.kind, opened.dtype, opened.tokenizer_folder) == (
            "hf",
            torch.float32,
            model,
        )
        assert opened.architecture.num_query_groups == 4


@pytest.mark.parametrize(
    ("ids", "more", "expected"),
    [(0, None, {0}), (2, [5, 6], {2, 5, 6}), (None, 7, {7}), ([3, 4], 3, {3, 4})],
)
def test_end_of_sequence_ids_are_those_of_both_configurations(
    model, ids, more, expected
):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": ids}))
    (model / "generation_config.json").unlink(missing_ok=True)
    if more is not None:
        generation = json.dumps({"eos_token_id": more})
        (model / "generation_config.json").write_text(generation)
    with open_pretrained(str(model)) as source:
        assert source.eos_token_ids() == expected


def test_wrong_paths_are_refused_by_key(tmp_path):
    key = "pretrained_checkpoint.restore_from_path"
    refused(tmp_path / "none", f"{key}: .*none: expected a regular file, found none")
    refused(tmp_path, f"{key}: .* is neither a Hugging Face folder")
    (tmp_path / "run-last").mkdir()
    (tmp_path / "run-last" / ".metadata").touch()
    refused(
        tmp_path / "run-last",
        f"{key}: .*run-last is neither .* Of a training checkpoint .* give the .nemo archive",
    )
    (tmp_path / "text.nemo").write_text("not a tar file")
    refused(tmp_path / "text.nemo", f"{key}: .* is no readable .nemo archive")
    refused(
        pack(tmp_path / "other.nemo", {"a.txt": b"x"}),
        f"{key}: .*other.nemo is neither",
    )
    archive = pack(
        tmp_path / "old.nemo",
        {"model_config.yaml": b"a: 1\n", "model_weights.ckpt": b"x"},
    )
    refused(
        archive,
        "is neither .*model_weights/.metadata.*export an older NeMo model to Hugging Face",
    )
    foreign = {
        "model_config.yaml": b"hidden_size: 8\n",
        "model_weights/.metadata": b"x",
    }
    refused(
        pack(tmp_path / "foreign.nemo", foreign),
        "format_version is None, so another tool wrote it",
    )
    assert not [path for path in tmp_path.iterdir() if ".extracted" in path.name]


def test_a_truncated_archive_is_refused(tmp_path):
    archive = pack(
        tmp_path / "cut.nemo",
        {"model_config.yaml": b"a: 1\n", "model_weights/.metadata": b"x" * 50_000},
    )
    os.truncate(archive, 20_000)
    refused(archive, "is no readable .nemo archive")


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


def test_metadata_that_would_run_code_is_not_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dotted = b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x08os.mkdir\x93\x8c\x08attacked\x85R."
    for content, message in (
        (pickle.dumps(Attack()), "refers to posix.mkdir, which no checkpoint needs"),
        (dotted, "refers to torch.distributed.checkpoint.filesystem.os.mkdir"),
        (
            pickle.dumps(torch.Size([1])),
            ".metadata: cannot be read",
        ),
        (b"", ".metadata: cannot be read"),
    ):
        (tmp_path / ".metadata").write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            ShardedFolder(ModelFiles(tmp_path))
    assert not (tmp_path / "attacked").exists()


class Part:
    """A sharded tensor of the model as `ShardedFolder.load` reads it: the whole one."""

    def __init__(self, data: torch.Tensor) -> None:
        self.key = "a"
        self.data = data
        self.global_shape = data.shape
        self.global_offset = (0, 0)
        self.allow_shape_mismatch = True
        self.prepend_axis_num = 0


def stored(folder: Path) -> Metadata:
    """Store a tensor of two parts in a distributed checkpoint and return its metadata."""
    chunks, places = [], {}
    for start in (0, 4):
        offsets, sizes = torch.Size([start, 0]), torch.Size([4, 2])
        torch.save(torch.full(sizes, start + 1.0), folder / f"{start}.distcp")
        chunks.append(ChunkStorageMetadata(offsets, sizes))
        length = (folder / f"{start}.distcp").stat().st_size
        place = _StorageInfo(f"{start}.distcp", 0, length)
        places[MetadataIndex("a", offsets)] = place
    properties = TensorProperties(torch.float32)
    tensor = TensorStorageMetadata(properties, torch.Size([8, 2]), chunks)
    return Metadata({"a": tensor}, storage_data=places)


def load(folder: Path, metadata: Metadata) -> torch.Tensor:
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    part = Part(torch.zeros(8, 2))
    ShardedFolder(ModelFiles(folder)).load({"a": part})
    return part.data


@pytest.mark.parametrize(
    ("offset", "size"), [(4, 2), (4, 0), (4, 5), (0, 4), (2, 4), (6, 4), (-4, 4)]
)
def test_stored_parts_that_do_not_cover_their_tensor(tmp_path, offset, size):
    metadata = stored(tmp_path)
    assert load(tmp_path, metadata).sum() == 48
    chunk = metadata.state_dict_metadata["a"].chunks[1]
    chunk.offsets, chunk.sizes = torch.Size([offset, 0]), torch.Size([size, 2])
    metadata.storage_data = {
        MetadataIndex("a", one.offsets): place
        for one, place in zip(
            metadata.state_dict_metadata["a"].chunks,
            metadata.storage_data.values(),
            strict=True,
        )
    }
    with pytest.raises(ConfigError, match="the parts of a do not cover it"):
        load(tmp_path, metadata)


def test_a_stored_part_of_another_size_than_listed(tmp_path):
    metadata = stored(tmp_path)
    tensor = metadata.state_dict_metadata["a"]
    tensor.size = torch.Size([6, 2])
    tensor.chunks[1].sizes = torch.Size([2, 2])
    with pytest.raises(ConfigError, match=": a: cannot be read"):
        load(tmp_path, metadata)


@pytest.mark.parametrize("offset", [2**70, "x", -1])
def test_a_place_that_no_file_has(tmp_path, offset):
    metadata = stored(tmp_path)
    for place in metadata.storage_data.values():
        place.offset = offset
    with pytest.raises(ConfigError, match=": a: cannot be read"):
        load(tmp_path, metadata)


@pytest.mark.parametrize(
    "change",
    [{"state_dict_metadata": 1}, {"storage_data": 1}, {"storage_data": {1: 2}}],
)
def test_metadata_of_wrong_types(tmp_path, change):
    metadata = stored(tmp_path)
    vars(metadata).update(change)
    with pytest.raises(ConfigError, match="metadata: cannot be read"):
        load(tmp_path, metadata)


def test_memory_that_runs_out_is_a_damaged_file(tmp_path, monkeypatch):
    metadata = stored(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(ConfigError, match=": a: cannot be read"):
        load(tmp_path, metadata)


def test_weights_that_are_not_safetensors_are_refused(model):
    (model / "model.safetensors").unlink()
    refused(
        model, "no model.safetensors; .* save_pretrained, which writes safetensors"
    )
    (model / "model.safetensors").write_bytes(b"garbage")
    refused(model, "not a readable safetensors file")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(
        model,
        r"model/model-00001-of-00002.safetensors: expected a regular file, found none",
    )
    (model / "model.safetensors.index.json").write_text("{")
    refused(model, "index.json: not valid JSON")
    (model / "config.json").write_text("{")
    refused(model, "config.json: not valid JSON")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("model.layers.1.mlp.up_proj.weight"),
            r"missing: model.layers.1.mlp.up_proj.weight",
        ),
        (lambda w: w.update(extra=torch.ones(1)), "no place for: extra"),
        (
            lambda w: w.update({"lm_head.weight": torch.ones(160, 64)}),
            r"lm_head.weight has the shape \(160, 64\), config.json calls for \(157, 64\)",
        ),
        (
            lambda w: w.update(
                {"model.layers.0.self_attn.k_proj.weight": torch.ones(16, 64)}
            ),
            r"k_proj.weight has the shape \(16, 64\), config.json calls for \(32, 64\)",
        ),
    ],
)
def test_weights_that_do_not_fit_config_json_are_refused(model, change, message):
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, model / "model.safetensors")
    refused(model, message)


def test_the_dtype_holds_every_tensor_and_unknown_ones_are_refused(model):
    weights = {
        name: tensor.bfloat16()
        for name, tensor in load_file(model / "model.safetensors").items()
    }
    save_file(weights, model / "model.safetensors")
    with open_pretrained(str(model)) as opened:
        assert opened.dtype == torch.bfloat16
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    save_file(weights, model / "model.safetensors")
    with open_pretrained(str(model)) as opened:
        assert opened.dtype == torch.float32
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(weights, model / "model.safetensors")
    refused(
        model,
        r"model.norm.weight has the dtype F8_E4M3; supported: F64, F32, F16, BF16",
    )


def test_the_fingerprint_tells_models_apart(model):
    with open_pretrained(str(model)) as opened:
        before = opened.fingerprint()
        assert before == opened.fingerprint()
        assert before["name"] == "model"
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][3] += 1
    save_file(weights, model / "model.safetensors")
    with open_pretrained(str(model)) as opened:
        assert opened.fingerprint() != before
    save_file(load_file(model / "model.safetensors"), model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with open_pretrained(str(model)) as opened:
        assert opened.fingerprint() != before


def test_conversion_refuses_outputs_before_it_reads_weights(
    model, tmp_path, monkeypatch
):
    monkeypatch.setenv(
        "CUDA_VISIBLE_DEVICES", ""
    )  # conversion sets it: undone with the test

    def refuse(message: str, output: Path, **options) -> None:
        with pytest.raises(ConfigError, match=message):
            convert(
                ConvertCheckpointConfig(
                    input_path=str(model), output_path=str(output), **options
                )
            )

    (tmp_path / "there.nemo").mkdir()
    refuse(
        "output_path: .* exists; give another path or overwrite=true",
        tmp_path / "there.nemo",
    )
    refuse("exists and is not such a model", tmp_path / "there.nemo", overwrite=True)
    refuse(
        "folder with config.json that does not hold the input",
        tmp_path,
        overwrite=True,
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "keep.txt").write_text("precious")
    refuse(
        "replaces only a .nemo archive by another, or a folder with config.json",
        tmp_path / "data",
        overwrite=True,
    )
    assert (tmp_path / "data" / "keep.txt").exists()
    refuse(
        "would be of the same kind as the input; end it in .nemo", tmp_path / "copy"
    )
    with pytest.raises(
        ConfigError, match=r"input_path: .*none: expected a regular file, found none"
    ):
        convert(
            ConvertCheckpointConfig(
                input_path=str(tmp_path / "none"), output_path=str(tmp_path / "a.nemo")
            )
        )
    with pytest.raises(ConfigError, match="precision: 'int8' is not one of"):
        ConvertCheckpointConfig(input_path="a", output_path="b", precision="int8")
