"""The distributions install and run anywhere; the README's commands are commands."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.unit.test_cli import compose

ROOT = Path(__file__).resolve().parents[2]


PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


def run_clean(
    line: list[str | Path], folder: Path
) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, without this checkout on any path."""
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONPATH"
    }
    return subprocess.run(
        line, capture_output=True, text=True, check=False, cwd=folder, env=environment
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """A wheel of this commit, and one of its source distribution."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(source)], check=True)
    wheel = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*wheel, str(folder), str(source)], check=True)
    code = "from setuptools.build_meta import build_sdist; build_sdist('..')"
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=source, capture_output=True
    )
    (sdist,) = folder.glob("nemo_kd-*.tar.gz")
    subprocess.run([*wheel, str(folder / "from_sdist"), str(sdist)], check=True)
    (from_checkout,) = folder.glob("nemo_kd-*.whl")
    (from_sdist,) = (folder / "from_sdist").glob("nemo_kd-*.whl")
    return {"checkout": from_checkout, "sdist": from_sdist}


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """Programs of a fresh environment with the wheel; its other packages are those of this one."""
    environment = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", environment], check=True
    )
    python = environment / "bin" / "python"
    install = [*PIP, "--python", python, "install", "--no-deps", built["sdist"]]
    subprocess.run(install, check=True)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    paths = [path for path in sys.path if path.endswith("site-packages")]
    (site_packages / "dependencies.pth").write_text("\n".join(paths))
    return environment / "bin"


def test_wheel_and_source_distribution_hold_the_same(built):
    names = {
        origin: set(zipfile.ZipFile(path).namelist()) for origin, path in built.items()
    }
    assert names["checkout"] == names["sdist"]
    for name in (
        "compute_topk_logits",
        "train_gpt_knowledge_distillation",
        "convert_checkpoint",
    ):
        assert f"nemo_kd/conf/{name}.yaml" in names["sdist"]
    recipes = [
        name for name in names["sdist"] if name.startswith("nemo_kd/conf/recipes/")
    ]
    assert len(recipes) == 4
    assert {"nemo_kd/py.typed", "nemo_kd/tools/inspect_page.html"} <= names["sdist"]


@pytest.mark.parametrize(
    "line",
    [
        "compute_topk_logits --cfg job",
        "train_gpt_knowledge_distillation --cfg job",
        "convert_checkpoint --cfg job",
        "logit_cache inspect CACHE",
        "plot_runs --help",
    ],
)
def test_commands_run_away_from_the_checkout(installed, line, tmp_path):
    shutil.copytree(ROOT / "tests" / "golden", tmp_path / "caches")
    program, *arguments = line.replace(
        "CACHE", "caches/loss_CHUNK_ID.jsonl.zst"
    ).split()
    result = run_clean([installed / program, *arguments], tmp_path)
    assert result.returncode == 0, result.stderr


def test_the_installed_package_reads_a_cache(installed, tmp_path):
    shutil.copytree(ROOT / "tests" / "golden", tmp_path / "caches")
    code = (
        "import nemo_kd; print(nemo_kd.__file__);"
        "print(len(nemo_kd.CacheReader('caches/loss_CHUNK_ID.jsonl.zst')))"
    )
    result = run_clean([installed / "python", "-c", code], tmp_path)
    assert result.returncode == 0, result.stderr
    file, num_rows = result.stdout.split()
    assert Path(file).is_relative_to(installed.parent)
    assert int(num_rows) > 0


def readme_commands() -> list[str]:
    blocks = re.findall(
        r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
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
    "script",
    sorted((ROOT / "scripts" / "slurm").iterdir()),
    ids=lambda path: path.name,
)
def test_shell_scripts_are_clean(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    result = subprocess.run(
        [str(shellcheck), "-x", str(script)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stdout
    assert not re.search(r"\\[ \t]+#", script.read_text()), (
        "a comment after a line continuation ends the command"
    )
