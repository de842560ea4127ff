"""Archives from anywhere: what a tar file can ask for, before a byte of it is used."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

from nemo_kd.config import ConfigError
from nemo_kd.config.model import GPTArchitecture
from nemo_kd.mcore.architecture import read_model_config, write_model_config
from nemo_kd.nemo_archive import Archive, ArchiveError, open_tokenizer

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
    with pytest.raises(ArchiveError, match=message), open_tokenizer(path):
        pass


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (member("../outside"), "leads out of it"),
        (member("/tmp/outside"), "leads out of it"),
        (member("tokenizer/../../outside"), "leads out of it"),
        (member("tokenizer//a"), "leads out of it"),
        (member("tokenizer/\x1b[2J"), "leads out of it, or is none"),
        (member("tokenizer/" + "a" * 300), "leads out of it, or is none"),
        (
            member("tokenizer/a", tarfile.SYMTYPE, "/etc/passwd"),
            "neither a regular file nor a folder",
        ),
        (
            member("tokenizer", tarfile.SYMTYPE, "."),
            "neither a regular file nor a folder",
        ),
        (
            member("tokenizer/a", tarfile.LNKTYPE, TOKENIZER),
            "neither a regular file nor a folder",
        ),
        (member("tokenizer/a", tarfile.FIFOTYPE), "neither a regular file nor a folder"),
        (member("tokenizer/a", tarfile.CHRTYPE), "neither a regular file nor a folder"),
        (
            member("tokenizer/a", tarfile.GNUTYPE_SPARSE),
            "neither a regular file nor a folder",
        ),
        (member("tokenizer/a", **{"GNU.sparse.realsize": "1000000000000"}), "sparse"),
        (member("tokenizer/a", **{"GNU.sparse.map": "0,1"}), "sparse"),
        (member("tokenizer/a", size=3, **{"path": "../outside"}), "leads out of it"),
        (member("tokenizer/a", **{"comment": "x" * 100_000}), "is too long"),
        (member("tokenizer/tokenizer.json"), "twice"),
        (member("tokenizer/a/b/c"), "no tokenizer holds 'tokenizer/a/b/c'"),
    ],
)
def test_what_no_archive_holds_is_refused_before_anything_is_written(
    tmp_path, temporary, info, message
):
    refused(pack(tmp_path / "a.nemo", info), message)
    assert not list(temporary.iterdir())


def test_a_chain_of_links_longer_than_a_path_writes_nothing(tmp_path):
    """CVE-2025-4517: realpath gives up behind such a chain, and tarfile's data filter with it."""
    steps: list[tarfile.TarInfo] = []
    folder = "tokenizer"
    for letter in "abcdefghijklmnop":
        steps += [
            member(f"{folder}/{'d' * 247}", tarfile.DIRTYPE),
            member(f"{folder}/{letter}", tarfile.SYMTYPE, "d" * 247),
        ]
        folder = f"{folder}/{'d' * 247}"
    steps.append(member("tokenizer/escape/planted", size=1))
    refused(pack(tmp_path / "a.nemo", *steps), "is no readable .nemo archive")
    assert not list(tmp_path.rglob("planted"))


def test_archives_that_are_compressed_truncated_or_lie_about_sizes(tmp_path):
    refused(pack(tmp_path / "a.tar.gz", mode="w:gz"), "not an uncompressed tar file")
    archive = pack(tmp_path / "a.nemo", member("model_weights/a", size=40_000))
    for num_bytes in (0, 100, 512, 1024, 20_000, 41_000):
        os.truncate(archive, num_bytes)
        refused(archive, "without the mark of its end|tells of more|is empty")
    content = bytearray(pack(tmp_path / "b.nemo").read_bytes())
    info = tarfile.TarInfo.frombuf(bytes(content[:512]), "utf-8", "strict")
    for size in (1 << 40, -1):
        info.size = size
        content[:512] = info.tobuf(tarfile.GNU_FORMAT)
        (tmp_path / "b.nemo").write_bytes(content)
        refused(tmp_path / "b.nemo", "tells of more")
    huge = member("model_weights/a")
    huge.pax_headers = {"size": "9" * 30}
    refused(pack(tmp_path / "c.nemo", huge), "where a number belongs")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "is no readable .nemo archive")


def test_a_tokenizer_of_a_wrong_size_is_refused_without_writing_it(tmp_path, temporary):
    info = member("tokenizer/big", size=1 << 30)
    with (tmp_path / "a.nemo").open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(512 + (1 << 30) + 1024)  # sparse: it takes no room
    refused(tmp_path / "a.nemo", r"the tokenizer has 1,073,741,824 bytes, more than any")
    assert not list(temporary.iterdir())


def test_the_tokenizer_is_unpacked_for_this_process_alone_and_removed(
    tmp_path, temporary
):
    archive = pack(
        tmp_path / "a.nemo",
        member("tokenizer/additional_chat_templates/rag.jinja", size=1),
    )
    with open_tokenizer(archive) as folder:
        assert (folder / "tokenizer.json").read_text() == "{}"
        assert (folder / "additional_chat_templates" / "rag.jinja").exists()
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert not list(temporary.glob("*/.*"))
    with Archive(archive) as opened:
        first = opened.tokenizer_folder()
        (first / "tokenizer.json").unlink()  # as a cleaner of old temporary files does
        assert (opened.tokenizer_folder() / "tokenizer.json").exists()


def test_what_a_killed_process_unpacked_the_next_one_removes(tmp_path, temporary):
    archive = pack(tmp_path / "a.nemo")
    code = (
        "import os, sys, tempfile; from pathlib import Path; from nemo_kd.nemo_archive import Archive;"
        "tempfile.tempdir = sys.argv[2]; Archive(Path(sys.argv[1])).tokenizer_folder(); os._exit(9)"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(archive), str(temporary)], check=False
    )
    (left,) = temporary.glob("*/.*")
    with open_tokenizer(archive):
        assert not left.exists()


def test_an_archive_that_is_replaced_is_read_on(tmp_path):
    archive = pack(tmp_path / "a.nemo", member("model_weights/a", size=5))
    with Archive(archive) as opened:
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
