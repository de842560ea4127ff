"""Identities of weights and tokenizers: each part that changes is noticed."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import normalizers, pre_tokenizers

from nemo_kd.cache.manifest import Manifest
from nemo_kd.data.tokenizer import (
    describe_tokens,
    load_tokenizer,
    shares_ids,
    tokenizer_parts,
)
from nemo_kd.mcore.checkpoint import open_pretrained, sample_tensors
from nemo_kd.nemo_archive import ModelFiles, SafetensorsFolder
from tests.tiny_models import build_hf_model
from tests.tiny_tokenizer import train_tokenizer


def fingerprint(folder) -> dict[str, str]:
    with open_pretrained(str(folder)) as opened:
        return opened.fingerprint()


def sampled(folder) -> str:
    return sample_tensors(
        ModelFiles(folder), SafetensorsFolder(folder).stored.values()
    )


def test_every_tensor_is_sampled(tmp_path):
    build_hf_model("qwen3_moe").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    before = fingerprint(tmp_path)["tensors"]
    assert fingerprint(tmp_path)["tensors"] == before
    for name, tensor in weights.items():
        for changed in (
            torch.zeros_like(tensor) - 1,
            tensor.flip(0) if tensor.unique().numel() > 1 else tensor + 1,
        ):
            save_file(
                {**weights, name: changed.contiguous()},
                path,
                metadata={"format": "pt"},
            )
            assert sampled(tmp_path) != before, name
    names = sorted(weights)
    halves = [tmp_path / f"model-{number}.safetensors" for number in range(2)]
    for half, path_of_half in zip((names[:9], names[9:]), halves, strict=True):
        save_file({name: weights[name] for name in half}, path_of_half)
    weight_map = {path_of_half.name: path_of_half.name for path_of_half in halves}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert sampled(tmp_path) == before


def test_large_tensors_are_sampled_within_bounds(tmp_path):
    large = torch.arange(5_000_000, dtype=torch.float32)
    save_file({"a": large}, tmp_path / "model.safetensors")
    before = sampled(tmp_path)
    for changed in (large * 0, large.flip(0), large.roll(1)):
        save_file({"a": changed.contiguous()}, tmp_path / "model.safetensors")
        assert sampled(tmp_path) != before


def changed_tokenizer(tmp_path, change):
    train_tokenizer(300).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("merges", lambda content: content["model"]["merges"].reverse()),
        ("model", lambda content: content["model"].update(ignore_merges=True)),
        (
            "normalizer",
            lambda content: content.update(
                normalizer=json.loads(normalizers.NFC().__getstate__())
            ),
        ),
        (
            "pre_tokenizer",
            lambda content: content.update(
                pre_tokenizer=json.loads(
                    pre_tokenizers.ByteLevel(add_prefix_space=True).__getstate__()
                )
            ),
        ),
        (
            "added_tokens",
            lambda content: content["added_tokens"][1].update(lstrip=True),
        ),
    ],
)
def test_every_part_of_a_tokenizer_counts(tmp_path, part, change):
    before = tokenizer_parts(load_saved(tmp_path / "before"))
    after = tokenizer_parts(changed_tokenizer(tmp_path / "after", change))
    assert {name for name in before if before[name] != after[name]} == {part}


def load_saved(folder):
    train_tokenizer(300).save_pretrained(folder)
    return load_tokenizer(folder)


def test_saving_again_changes_no_part(tmp_path):
    first = load_saved(tmp_path / "first")
    first.save_pretrained(tmp_path / "second")
    path = tmp_path / "second" / "tokenizer_config.json"
    path.write_text(
        json.dumps(
            {
                **json.loads(path.read_text()),
                "name_or_path": "x",
                "transformers_version": "4.0",
            }
        )
    )
    assert tokenizer_parts(load_tokenizer(tmp_path / "second")) == tokenizer_parts(
        first
    )


def test_a_tokenizer_config_counts(tmp_path):
    first = load_saved(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "eos_token": "<|endoftext|>"})
    )
    after = tokenizer_parts(load_tokenizer(tmp_path))
    assert after["special_tokens"] != tokenizer_parts(first)["special_tokens"]


def test_tokens_that_both_have_must_be_the_same(tmp_path):
    described = json.loads(json.dumps(describe_tokens(load_saved(tmp_path))))
    assert shares_ids(described, load_tokenizer(tmp_path))
    assert not shares_ids(described, train_tokenizer(512))
    described["added"]["1"] = "<|pad|>"
    assert not shares_ids(described, load_tokenizer(tmp_path))
    described["added"] = {"9999": "<|extra|>"}
    assert shares_ids(described, load_tokenizer(tmp_path))
    described["blocks"][0] = "0" * len(described["blocks"][0])
    assert not shares_ids(described, load_tokenizer(tmp_path))


def test_manifests_of_older_versions_are_compared_by_what_they_have():

    values = {field.name: None for field in dataclasses.fields(Manifest) if field.init}
    values |= {"codec": {}, "teacher": {"weights": "a"}, "dataset": {}, "chunks": {}}
    old = Manifest(**values)
    new = Manifest(
        **{
            **values,
            "teacher": {"weights": "a", "tensors": "b"},
            "tokenizer_parts": {"merges": "m"},
        }
    )
    other = dataclasses.replace(new, tokenizer_parts={"merges": "n"})
    assert old.differences(new) == [] == new.differences(old)
    assert new.differences(other) == [
        "tokenizer_parts.merges: 'm' in the cache, 'n' now"
    ]
