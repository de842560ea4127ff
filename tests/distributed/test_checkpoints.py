"""Archives across tensor-parallel sizes and vocabulary paddings, and what conversion leaves on disk."""

from __future__ import annotations

import json
import os
import re
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import nemo_kd.convert
import nemo_kd.mcore.export
from nemo_kd.config import ConfigError
from nemo_kd.config.convert import ConvertCheckpointConfig
from nemo_kd.config.shared import ModelConfig
from nemo_kd.mcore.checkpoint import open_pretrained
from nemo_kd.mcore.export import ModelExport
from nemo_kd.mcore.groups import initialize_model_parallel
from nemo_kd.mcore.model import build_gpt_model, transformer_config
from tests.ranks import Ranks
from tests.tiny_models import save_hf_model

VOCABULARY = 517  # odd, and padded to 517, 528, 544, 576 or 640 rows below


def load(
    path: str,
    tensor_model_parallel_size: int,
    divisible_by: int,
    dtype: torch.dtype = torch.float32,
):
    layout = ModelConfig(
        tensor_model_parallel_size=tensor_model_parallel_size,
        make_vocab_size_divisible_by=divisible_by,
    )
    groups = initialize_model_parallel(layout, 1)
    with open_pretrained(path) as source:
        model = build_gpt_model(
            source.architecture,
            transformer_config(source.architecture, layout, dtype),
            divisible_by,
            False,
        )
        source.load_weights(model, groups)
    return model, source, groups


def shards(
    path: str, tensor_model_parallel_size: int, divisible_by: int
) -> dict[str, torch.Tensor]:
    model, _, _ = load(path, tensor_model_parallel_size, divisible_by)
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
    }


def resave(
    path: str, output: str, tensor_model_parallel_size: int, divisible_by: int
) -> None:
    model, _, groups = load(path, tensor_model_parallel_size, divisible_by)
    with (
        torch.no_grad()
    ):  # padding rows may have moved in training; nobody may see them again
        embedding = model.get_parameter("embedding.word_embeddings.weight")
        real = max(0, VOCABULARY - groups.tensor_rank * len(embedding))
        embedding[real:] = 7.0
    with open_pretrained(path) as opened:
        ModelExport(model, opened, groups).save_nemo(output)


def convert(**options) -> None:
    nemo_kd.convert.convert(ConvertCheckpointConfig(**options))


def convert_in_small_files(**options) -> None:
    before = nemo_kd.mcore.export.MAX_FILE_BYTES
    nemo_kd.mcore.export.MAX_FILE_BYTES = 100_000
    try:
        convert(**options)
    finally:
        nemo_kd.mcore.export.MAX_FILE_BYTES = before


def convert_with_umask(**options) -> None:
    before = os.umask(0o027)
    try:
        convert(**options)
    finally:
        os.umask(before)


def fails(path: str, tensor_model_parallel_size: int) -> str:
    with pytest.raises(ConfigError) as error:
        load(path, tensor_model_parallel_size, 8)
    return str(error.value)


class Run:
    """`convert` in the rank of a pool of one."""

    def __init__(self, rank) -> None:
        self.rank = rank

    def __call__(self, function=convert, **options) -> None:
        self.rank.run(
            _call,
            function,
            {
                key: str(value) if isinstance(value, Path) else value
                for key, value in options.items()
            },
        )


def _call(function, options):
    function(**options)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = save_hf_model(
        "qwen3", tmp_path_factory.mktemp("qwen3") / "hf", vocab_size=VOCABULARY
    )
    (folder / "generation_config.json").write_text(
        '{"temperature": 0.6, "do_sample": true}'
    )
    return folder


@pytest.fixture
def run(ranks) -> Run:
    return Run(ranks(1))


def test_an_archive_is_the_same_model_in_every_layout(ranks, source, tmp_path):
    archive = str(tmp_path / "model.nemo")
    ranks(2).run(resave, str(source), archive, 2, 16)
    for size, divisible_by in ((1, 1), (1, 128), (2, 64), (4, 32)):
        expected = ranks(size).run(shards, str(source), size, divisible_by)
        loaded = ranks(size).run(shards, archive, size, divisible_by)
        for ours, theirs in zip(loaded, expected, strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    rows = torch.cat([part["embedding.word_embeddings.weight"] for part in loaded])
    assert torch.equal(
        rows[:VOCABULARY],
        load_file(source / "model.safetensors")["model.embed_tokens.weight"],
    )
    assert len(rows) == 544
    assert not rows[VOCABULARY:].any()


def test_everything_around_the_weights_travels_along(run, source, tmp_path):
    archive, back = tmp_path / "deep" / "model.nemo", tmp_path / "back"
    run(input_path=source, output_path=archive)
    run(input_path=archive, output_path=back)
    weights = {"model.safetensors", "config.json"}
    files = {path.name for path in source.iterdir()}
    assert {path.name for path in back.iterdir()} == files
    assert all(
        (back / name).read_bytes() == (source / name).read_bytes()
        for name in files - weights
    )
    messages = [{"role": "user", "content": "What does len do?"}]
    before, after = (
        AutoTokenizer.from_pretrained(folder) for folder in (source, back)
    )
    assert (
        before.apply_chat_template(messages)["input_ids"]
        == after.apply_chat_template(messages)["input_ids"]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "deep"]
    assert [path.name for path in archive.parent.iterdir()] == ["model.nemo"]


def test_files_have_the_mode_that_the_umask_gives(run, source, tmp_path):
    private = Path(shutil.copytree(source, tmp_path / "private"))
    for path in private.iterdir():
        path.chmod(0o600)
    archive, back = tmp_path / "model.nemo", tmp_path / "back"
    run(convert_with_umask, input_path=private, output_path=archive)
    run(convert_with_umask, input_path=archive, output_path=back)
    modes = {
        path.name: oct(path.stat().st_mode & 0o777)
        for path in (archive, *back.iterdir())
    }
    assert modes == dict.fromkeys(modes, "0o640")
    assert back.stat().st_mode & 0o777 == 0o750
    with tarfile.open(archive) as tar:
        assert {oct(member.mode) for member in tar if member.isfile()} == {"0o640"}


def test_two_processes_that_write_one_archive_leave_a_whole_one(
    ranks, source, tmp_path
):
    archive, other = str(tmp_path / "model.nemo"), Ranks(1)
    try:
        with ThreadPoolExecutor(2) as pool:
            for _ in range(2):
                packed = [
                    pool.submit(one.run, resave, str(source), archive, 1, 16)
                    for one in (ranks(1), other)
                ]
                assert [one.result() for one in packed] == [[None], [None]]
    finally:
        other.stop()
    expected, loaded = (
        ranks(1).run(shards, path, 1, 1)[0] for path in (str(source), archive)
    )
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert os.listdir(tmp_path) == ["model.nemo"]


def test_an_extracted_archive_opens_as_well(run, source, tmp_path):
    archive, folder = tmp_path / "model.nemo", tmp_path / "extracted"
    run(input_path=source, output_path=archive)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    run(input_path=folder, output_path=tmp_path / "back")
    before, after = (
        load_file(path / "model.safetensors") for path in (source, tmp_path / "back")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    with (
        open_pretrained(str(archive)) as packed,
        open_pretrained(str(folder)) as unpacked,
    ):
        assert packed.fingerprint()["weights"] == unpacked.fingerprint()["weights"]
        assert packed.architecture == unpacked.architecture


def test_a_large_model_is_exported_in_several_files(run, source, tmp_path):
    archive, back = tmp_path / "model.nemo", tmp_path / "back"
    run(input_path=source, output_path=archive)
    run(convert_in_small_files, input_path=archive, output_path=back)
    index = json.loads((back / "model.safetensors.index.json").read_text())
    files = sorted(back.glob("model-*.safetensors"))
    assert len(files) == len(set(index["weight_map"].values())) > 3
    after = {
        name: tensor for file in files for name, tensor in load_file(file).items()
    }
    before = load_file(source / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for tensor in before.values()
    )
    largest = max(tensor.nbytes for tensor in before.values())
    assert max(file.stat().st_size for file in files) < max(100_000, largest) + 4096
    assert after.keys() == before.keys() == index["weight_map"].keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    run(input_path=back, output_path=tmp_path / "again.nemo")
    run(input_path=tmp_path / "again.nemo", output_path=tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(before[name], again[name]) for name in before)


def test_precision_rounds_as_torch_does_and_config_json_says_so(run, source, tmp_path):
    archive, back = tmp_path / "model.nemo", tmp_path / "back"
    archive.write_bytes(b"an older one")
    run(input_path=source, output_path=archive, precision="bf16", overwrite=True)
    run(input_path=archive, output_path=back)
    before, after = (load_file(path / "model.safetensors") for path in (source, back))
    assert all(torch.equal(before[name].bfloat16(), after[name]) for name in before)
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(back).dtype == torch.bfloat16


def test_an_archive_whose_parts_disagree_is_refused(run, ranks, source, tmp_path):
    archive, folder = tmp_path / "model.nemo", tmp_path / "extracted"
    run(input_path=source, output_path=archive)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    config = (folder / "model_config.yaml").read_text()
    changed = re.sub(
        "share_embeddings_and_output_weights: false",
        "share_embeddings_and_output_weights: true",
        config,
    )
    (folder / "model_config.yaml").write_text(changed)
    message = ranks(1).run(fails, str(folder), 1)[0]
    assert (
        "model_weights does not fit model_config.yaml: output_layer.weight stands in one of them only"
        in message
    )
    assert (
        "pretrained_checkpoint"
        in ranks(2).run(fails, str(tmp_path / "none.nemo"), 2)[1]
    )


def test_damaged_or_other_weights_are_refused(run, ranks, source, tmp_path):
    archive, folder = tmp_path / "model.nemo", tmp_path / "extracted"
    run(input_path=source, output_path=archive)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    config = (folder / "model_config.yaml").read_text()
    (folder / "model_config.yaml").write_text(
        config.replace("ffn_hidden_size: 96", "ffn_hidden_size: 48")
    )
    message = ranks(1).run(fails, str(folder), 1)[0]
    assert (
        "linear_fc1.weight has the shape (2, 192, 64), model_config.yaml calls for (2, 96, 64)"
        in message
    )
    (folder / "model_config.yaml").write_text(config)
    for file in (folder / "model_weights").glob("*.distcp"):
        os.truncate(file, file.stat().st_size - 100)
    assert re.search(
        r"model_weights: .* cannot be read .*copy or write the model again",
        ranks(1).run(fails, str(folder), 1)[0],
    )
    for file in (folder / "model_weights").glob("*.distcp"):
        file.unlink()
    assert re.search(
        r"distcp: the file is missing", ranks(1).run(fails, str(folder), 1)[0]
    )
