"""Text from files never commands the terminal that shows it."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_kd.terminal import PrintableFormatter, print_text, printable

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "a\x1b]0;title\x07b\x1b[2Jc\rd\x9be\u202ef\udcff"
SHOWN = r"a\x1b]0;title\x07b\x1b[2Jc\rd\x9be\u202ef\udcff"


def test_escape_sequences_become_visible_and_text_in_any_language_stays():
    assert printable(HOSTILE) == SHOWN
    assert printable("données\t模型\n🙂") == "données\t模型\n🙂"
    assert printable("a\rb", keep="\r") == "a\rb"


def test_logged_messages_are_made_safe():
    record = logging.LogRecord(
        "nemo_kd", logging.INFO, "", 0, "example: %s", (HOSTILE,), None
    )
    assert PrintableFormatter("%(message)s").format(record) == f"example: {SHOWN}"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("utf-8", "é模"), ("latin-1", "é\\u6a21"), ("ascii", "\\xe9\\u6a21")],
)
def test_any_terminal_shows_any_language(encoding, shown):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_text("é模", stream)
    assert stream.buffer.getvalue().decode(encoding) == f"{shown}\n"


def test_errors_of_commands_are_made_safe(tmp_path):
    line = [
        sys.executable,
        "-m",
        "nemo_kd.cli.logit_cache",
        "verify",
        f"{HOSTILE[:-1]}.jsonl",
    ]
    result = subprocess.run(
        line, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120
    )
    assert result.returncode == 2
    assert "\x1b" not in result.stderr
    assert r"\x1b]0;title" in result.stderr
