"""Archives from anywhere: only regular files are read, and only the tokenizer is unpacked."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from pathlib import Path

import pytest

from nemo_kd.config import ConfigError
from nemo_kd.config.shared import GPTArchitecture
from nemo_kd.mcore.architecture import read_model_config, write_model_config
from nemo_kd.nemo_archive import ModelFiles

TOKENIZER = "./tokenizer/tokenizer.json"


def member(
    name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0, **pax: str
) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = link
    info.size = size
    info.pax_headers = pax
    return info


def pack(path: Path, *members: tarfile.TarInfo, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        tar.addfile(member(TOKENIZER, size=2), io.BytesIO(b"{}"))
        for info in members:
            tar.addfile(info, io.BytesIO(b"x" * info.size))
    return path


def refused(path: Path, message: str) -> None:
    with pytest.raises(ConfigError, match=message), ModelFiles(path) as files:
        files.tokenizer_folder()


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize(
    "info",
    [
        member("tokenizer/a", tarfile.SYMTYPE, "/etc/passwd"),
        member("tokenizer", tarfile.SYMTYPE, "."),
        member("tokenizer/a", tarfile.LNKTYPE, TOKENIZER),
        member("tokenizer/a", tarfile.FIFOTYPE),
        member("tokenizer/a", tarfile.CHRTYPE),
        member("tokenizer/a", tarfile.GNUTYPE_SPARSE),
    ],
)
def test_other_than_regular_files_are_refused_before_anything_is_written(
    tmp_path, temporary, info
):
    refused(pack(tmp_path / "a.nemo", info), "is not a regular file")
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("name", ["tokenizer/../../outside", "tokenizer/../../../etc"])
def test_nothing_is_unpacked_outside_of_the_temporary_folder(
    tmp_path, temporary, name
):
    archive = pack(tmp_path / "a.nemo", member(name, size=3))
    refused(archive, "is no readable .nemo archive .*outside")
    assert not list(tmp_path.rglob("outside"))


def test_archives_that_are_compressed_or_truncated(tmp_path):
    refused(pack(tmp_path / "a.tar.gz", mode="w:gz"), "is no readable .nemo archive")
    archive = pack(tmp_path / "a.nemo", member("model_weights/a", size=40_000))
    for num_bytes in (20_000, 512, 100, 0):
        os.truncate(archive, num_bytes)
        refused(archive, "is no readable .nemo archive")


def test_an_archive_cut_between_two_members(tmp_path):
    archive = pack(tmp_path / "a.nemo", member("model_weights/a", size=512))
    for num_bytes in (1024, 2048, 2048 + 512):
        cut = tmp_path / f"{num_bytes}.nemo"
        cut.write_bytes(archive.read_bytes()[:num_bytes])
        refused(cut, "is no readable .nemo archive .its end is missing")


def test_a_pipe_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "a.nemo")
    refused(tmp_path / "a.nemo", "expected a regular file, found none")


def test_the_tokenizer_is_unpacked_and_removed(tmp_path, temporary):
    archive = pack(
        tmp_path / "a.nemo",
        member("tokenizer/additional_chat_templates/rag.jinja", size=1),
    )
    with ModelFiles(archive) as opened:
        first = opened.tokenizer_folder()
        assert (first / "additional_chat_templates" / "rag.jinja").exists()
        (first / "tokenizer.json").unlink()  # as a cleaner of old temporary files does
        assert (opened.tokenizer_folder() / "tokenizer.json").read_text() == "{}"
    assert not list(temporary.iterdir())


def test_an_archive_that_is_replaced_is_read_on(tmp_path):
    archive = pack(tmp_path / "a.nemo", member("model_weights/a", size=5))
    with ModelFiles(archive) as opened:
        os.replace(
            pack(tmp_path / "b.nemo", member("model_weights/other", size=7)), archive
        )
        with opened.open("model_weights/a") as file:
            assert file.read() == b"xxxxx"


SMALL = GPTArchitecture(
    family="llama",
    vocab_size=157,
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=8,
    max_position_embeddings=128,
    layernorm_epsilon=1e-5,
    rotary_base=10000.0,
    hf_config={"model_type": "llama", "prompt": "${oc.env:HOME}"},
)
BASE = write_model_config(SMALL)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            BASE.replace("llama", "${oc.env:HOME}", 1),
            r"family: '\$\{oc.env:HOME\}' is not",
        ),
        (BASE + "unknown: 2\n", "unexpected keyword argument 'unknown'"),
        (BASE + "a: !!python/object/apply:os.system [x]\n", "could not determine"),
        (
            BASE.replace("num_layers: 2", "num_layers: -2"),
            "num_layers: -2 must be at least 1",
        ),
        ("a: 1", "format_version is None, so another tool wrote it"),
        ("\0", "special characters are not allowed"),
    ],
)
def test_a_wrong_model_config_is_one_error(text, message):
    assert read_model_config(BASE.encode(), "FILE") == SMALL
    with pytest.raises(ConfigError, match=f"^FILE: (?s:.*){message}"):
        read_model_config(text.encode(), "FILE")
