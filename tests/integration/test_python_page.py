"""docs/python.md runs from top to bottom, and README's Python on the cache that it leaves."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.tiny_data import write_chat_dataset
from tests.tiny_models import save_hf_model

ROOT = Path(__file__).resolve().parents[2]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_the_page_on_python_and_the_readme_run(tmp_path):
    """One process, because a script may compute a cache and train on it."""
    save_hf_model("qwen3", tmp_path / "teacher")
    save_hf_model("llama3.1", tmp_path / "student")
    (tmp_path / "data").mkdir()
    write_chat_dataset(tmp_path / "data" / "train.jsonl", 16)
    files = [block for block in blocks("docs/python.md") if block.startswith("# ")]
    for block in files:
        (tmp_path / block.split()[1]).write_text(block)
    code = [block for block in blocks("docs/python.md") if block not in files]
    code += blocks("README.md")
    assert len(files) == 1
    assert len(code) == 7
    (tmp_path / "page.py").write_text("\n".join(code))
    result = subprocess.run(
        [sys.executable, "page.py"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "16 examples" not in result.stdout  # record 5 has no answer
    assert "15 examples" in result.stdout
    losses = re.findall(r"step \d: loss (\d+\.\d+)", result.stdout)
    assert len(losses) == 4
    assert re.search(r"{'response_length': \d\.0, 'token_entropy': \d", result.stdout)
    assert list((tmp_path / "results" / "custom" / "checkpoints").glob("*.nemo"))
