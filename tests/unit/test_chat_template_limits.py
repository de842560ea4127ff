"""Chat templates that fail, and tokenizer files that are damaged: one error each."""

from __future__ import annotations

import contextlib
import json

import pytest

from nemo_kd.config import DataError
from nemo_kd.data.records import open_records
from nemo_kd.data.tokenizer import load_tokenizer
from tests.chat_rendering import render
from tests.tiny_tokenizer import train_tokenizer

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ messages[0].content.__class__.__mro__ }}", ""),
        ("{% for", ""),
    ],
)
def test_templates_that_fail(template, message):
    tokenizer = train_tokenizer(300, template)
    expected = f"the chat template cannot render this conversation: .*{message}"
    with pytest.raises(DataError, match=expected):
        render(MESSAGES, tokenizer)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(300).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(saved, tmp_path):
    for name, content in saved.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize("content", ["", "[]", "{", "{}"])
def test_a_damaged_tokenizer_file_is_one_error(folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=f"{folder}: no usable tokenizer") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_code_of_a_tokenizer_folder_does_not_run(folder):
    path = folder / "tokenizer_config.json"
    evil = {
        "auto_map": {"AutoTokenizer": ["evil.py", "Evil"]},
        "tokenizer_class": "Evil",
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), **evil}))
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    with contextlib.suppress(DataError):
        load_tokenizer(folder)


def test_a_dataset_that_is_no_file_of_records_is_refused(folder):
    (folder / "data.jsonl").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
    )
    with pytest.raises(DataError, match="a Git LFS pointer"):
        open_records(str(folder / "data.jsonl"))
    with pytest.raises(
        DataError, match="cannot be read as a folder of `datasets`.*give a pattern"
    ):
        open_records(str(folder))
