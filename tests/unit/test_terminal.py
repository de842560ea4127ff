"""Text from files never commands the terminal that shows it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from nemo_kd.files import printable

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "a\x1b]0;title\x07b\x1b[2Jc\rd\x9be\u202ef\udcff"
SHOWN = r"a\x1b]0;title\x07b\x1b[2Jc\rd\x9be\u202ef\udcff"


def test_escape_sequences_become_visible_and_text_in_any_language_stays():
    assert printable(HOSTILE) == SHOWN
    assert printable("données\t模型\n🙂") == "données\t模型\n🙂"
    assert printable("a\rb", keep="\r") == "a\rb"


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
