"""Chat templates that loop, explode or fail, and tokenizer files that are damaged: one error each, in bounded time."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import time

import pytest

from nemo_kd.data import chat
from nemo_kd.data.chat import render_messages
from nemo_kd.data.records import DataError, JsonlRecords
from nemo_kd.data.tokenizer import load_tokenizer
from tests.tiny_tokenizer import train_tokenizer

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
LOOP = "{% for i in range(99999) %}"


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(chat, "TIME_LIMIT_S", 0.3)
    monkeypatch.setattr(chat, "_TICK_S", 0.05)
    monkeypatch.setattr(chat, "MEMORY_LIMIT_BYTES", 256 << 20)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOP * 4 + "x" + "{% endfor %}" * 4, "did not end within"),
        (LOOP * 3 + "{{ 'a' | int }}" + "{% endfor %}" * 3, "did not end within"),
        ("{{ (messages | length + 8) ** (10 ** 9) > 5 }}", "did not end within|memory"),
        ("{{ 10 ** (10 ** 8) > 5 }}", "did not end within|memory"),
        ("{{ 'x' * 10 ** 10 }}", "memory"),
        ("{{ '%10000000000d' % 1 }}", "memory|cannot render"),
        (
            "{% set n = namespace(s='xx') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
            "memory",
        ),
        ("{{ 1 / 0 }}", "cannot render this conversation: division by zero"),
        (
            "{{ range(10 ** 9) | length }}",
            "cannot render this conversation: Range too big",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recurses without end"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recurses|cannot render"),
        ("{% if 1 %}" * 300 + "{% endif %}" * 300, "cannot render|recurses"),
        ("{{ messages[0].content.__class__.__mro__ }}", "cannot render"),
        ("{% for", "cannot render"),
    ],
)
def test_templates_that_do_not_end_well(short, template, message):
    tokenizer = train_tokenizer(300, template)
    before = (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM))
    started_s = time.perf_counter()
    with pytest.raises(DataError, match=f"the chat template.*({message})"):
        render_messages(MESSAGES, tokenizer)
    assert time.perf_counter() - started_s < 30
    assert (
        resource.getrlimit(resource.RLIMIT_AS),
        signal.getsignal(signal.SIGALRM),
    ) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_an_earlier_alarm_stays(short):
    signal.setitimer(signal.ITIMER_REAL, 1000)
    render_messages(MESSAGES, train_tokenizer())
    assert 900 < signal.setitimer(signal.ITIMER_REAL, 0)[0] <= 1000


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


@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", "{", "[" * 10**5, '{"a": ' * 500 + "1" + "}" * 500, "{}"],
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_tokenizer_files_are_named(folder, name, content):
    (folder / name).write_text(content)
    if name == "tokenizer_config.json" and content == "{}":
        return
    with pytest.raises(DataError, match=str(folder)) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    assert content == "{}" or f"{folder / name}: " in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"chat_template": 3},
        {"chat_template": [1]},
        {"chat_template": [{"name": "default", "template": 3}]},
        {"tokenizer_class": ["a"]},
        {"tokenizer_class": {}},
        {"added_tokens_decoder": []},
        {"added_tokens_decoder": {"x": 1}},
        {"extra_special_tokens": 3},
        {"eos_token": 5},
        {"auto_map": {"AutoTokenizer": ["evil.py", "Evil"]}, "tokenizer_class": "Evil"},
    ],
)
def test_tokenizer_config_of_wrong_types(folder, change):
    """Loads, or ends in one error of ours."""
    path = folder / "tokenizer_config.json"
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with contextlib.suppress(DataError):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "change",
    [{"model": []}, {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": [["a"]]}}],
)
def test_tokenizer_json_of_wrong_types(folder, change):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match="no usable tokenizer"):
        load_tokenizer(folder)


def test_a_configuration_of_a_billion_layers_is_refused(folder):
    (folder / "config.json").write_text(
        json.dumps({"model_type": "qwen2", "num_hidden_layers": 10**9})
    )
    with pytest.raises(
        DataError, match="config.json: num_hidden_layers: found 1000000000"
    ):
        load_tokenizer(folder)


def test_what_is_no_readable_file_is_named(folder):
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(DataError, match=r"tokenizer.json: found a pipe or device"):
        load_tokenizer(folder)
    with pytest.raises(DataError, match=r"tokenizer.json: found a pipe or device"):
        JsonlRecords(folder / "tokenizer.json")
    (folder / "data.jsonl").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
    )
    with pytest.raises(DataError, match="a Git LFS pointer"):
        JsonlRecords(folder / "data.jsonl")
    with pytest.raises(DataError, match="found a folder, expected a regular file"):
        JsonlRecords(folder)
