"""What the teacher's benchmark runs on: a Llama with random weights, and chats of real text.

The output layer is scaled so that the logits spread as those of a trained model: about 50 tokens a position reach the
probability at which stage 1 keeps one. Otherwise none would, and there would be little to encode.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import random
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nemo_kd.mcore.architecture import architecture_from_hf
from nemo_kd.mcore.weights import hf_shapes
from tests.tiny_tokenizer import train_tokenizer

SHAPES: dict[str, dict[str, int]] = {
    "llama-0.3b": {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_key_value_heads": 12},
    "llama-1.5b": {"num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8},
    "llama-3-8b": {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    "tiny": {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 4096},
    "shallow": {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 4},
}  # fmt: skip
VOCAB_SIZE, MAX_LENGTH, TOKENIZER_SIZE = 128_256, 8192, 4096
WEIGHT_STD, LOGIT_STD = 0.02, 6.5
MODULES = ("argparse", "ast", "calendar", "configparser", "csv", "datetime", "difflib", "doctest", "fractions", "heapq", "inspect",
           "ipaddress", "mailbox", "optparse", "pathlib", "pickle", "random", "shutil", "statistics", "subprocess", "tarfile",
           "textwrap", "threading", "turtle", "typing", "uuid", "zipfile")  # fmt: skip
MAX_CHARACTERS = 6000


def write_teacher(folder: Path, shape: str) -> Path:
    """A Hugging Face folder with random bfloat16 weights, unless it is there already."""
    if (folder / "config.json").exists():
        return folder
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": MAX_LENGTH,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **SHAPES[shape],
    }
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    for name, sizes in hf_shapes(architecture_from_hf(config)).items():
        weight = torch.empty(sizes, dtype=torch.bfloat16, device=device)
        weight.fill_(1) if len(sizes) == 1 else weight.normal_(
            0, WEIGHT_STD, generator=generator
        )
        tensors[name] = weight.cpu()
    # Hidden states come out of the last norm with a length of its weight times the root of their size.
    tensors["model.norm.weight"].fill_(
        LOGIT_STD / (WEIGHT_STD * config["hidden_size"] ** 0.5)
    )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    train_tokenizer(TOKENIZER_SIZE).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_chats(path: Path, num_records: int) -> Path:
    """Chats about functions of the standard library: short questions, long ones with the source, and two turns."""
    chats = list(conversations())
    random.Random(0).shuffle(chats)
    lines = [
        json.dumps({"messages": chats[number % len(chats)]})
        for number in range(num_records)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def conversations() -> Iterator[list[dict[str, str]]]:
    specs = map(importlib.util.find_spec, MODULES)
    paths = [Path(spec.origin) for spec in specs if spec and spec.origin]
    found = [item for path in paths for item in functions(path)]
    for number, (name, docstring, source) in enumerate(found):
        ask, show = f"What does `{name}` do?", f"Write `{name}` for me:\n\n{docstring}"
        turns = [
            [ask, docstring],
            [f"{ask} This is its source:\n\n{source}", docstring],
            [show, source],
            [ask, docstring, "How is it written?", source],
        ][number % 4]
        yield [
            {"role": ("user", "assistant")[turn % 2], "content": text}
            for turn, text in enumerate(turns)
        ]


def functions(path: Path) -> Iterator[tuple[str, str, str]]:
    """(name, docstring, source) of a module's documented functions and classes."""
    module = path.parent.name if path.stem == "__init__" else path.stem
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (
            docstring := ast.get_docstring(node)
        ):
            source = textwrap.dedent(
                "\n".join(lines[node.lineno - 1 : node.end_lineno])
            )
            if len(source) <= MAX_CHARACTERS:
                yield f"{module}.{node.name}", docstring, source


def write_one_example(path: Path, num_tokens: int) -> Path:
    """A record of exactly so many tokens, nearly all in the loss."""
    tokenizer, num_words = train_tokenizer(TOKENIZER_SIZE), num_tokens
    for _ in range(2):
        answer = {"role": "assistant", "content": " the" * num_words}
        messages = [{"role": "user", "content": "Go on."}, answer]
        ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))[
            "input_ids"
        ]
        num_words -= len(ids) - 1 - num_tokens
    path.write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    return path
