"""The wheel carries the YAML files and the commands; the README's commands are commands."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.unit.test_cli import compose

ROOT = Path(__file__).resolve().parents[2]


def test_the_wheel_holds_conf_and_commands(tmp_path):
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(source)], check=True)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--wheel-dir",
            str(tmp_path),
            str(source),
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("nemo_kd-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in ("compute_topk_logits", "train_gpt_knowledge_distillation", "convert_checkpoint"):
        assert f"nemo_kd/conf/{name}.yaml" in names
    target = tmp_path / "site"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(target),
            str(wheel),
        ],
        check=True,
    )
    for command in (target / "bin").iterdir():
        arguments = ["--help"] if command.name in ("logit_cache", "plot_runs") else ["--cfg", "job"]
        line = [sys.executable, str(command), *arguments]
        result = subprocess.run(
            line,
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={"PYTHONPATH": str(target)},
        )
        assert result.returncode == 0, result.stderr
    assert len(list((target / "bin").iterdir())) == 5


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [
        line
        for line in lines
        if re.match(r"(compute_topk_logits|train_gpt_knowledge_distillation) ", line)
    ]


def test_the_readme_shows_both_stages():
    assert len(readme_commands()) >= 3


@pytest.mark.parametrize("line", readme_commands())
def test_readme_commands_are_accepted(line):
    command, *arguments = shlex.split(line)
    _, warnings = compose(command, shlex.join(arguments))
    assert not warnings


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 250
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (ROOT / target).exists(), target


@pytest.mark.parametrize(
    "script", sorted((ROOT / "scripts" / "slurm").iterdir()), ids=lambda path: path.name
)
def test_shell_scripts_are_clean(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    result = subprocess.run(
        [str(shellcheck), "-x", str(script)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert result.returncode == 0, result.stdout
    assert not re.search(r"\\[ \t]+#", script.read_text()), (
        "a comment after a line continuation ends the command"
    )
