"""Generated responses against transformers' `generate` on the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_kd.answers.responses import respond
from nemo_kd.config.shared import ModelConfig
from nemo_kd.mcore.checkpoint import open_pretrained
from nemo_kd.mcore.generation import Response, Sampling
from nemo_kd.mcore.groups import initialize_model_parallel
from nemo_kd.mcore.model import build_gpt_model, transformer_config
from tests.tiny_models import build_hf_model

FAMILIES = ("llama3.1", "qwen2_tied", "qwen3", "mistral_window", "qwen3_moe")
VOCAB_SIZE = 157
LENGTHS = (5, 9, 1, 150, 9, 160)  # beyond the window and llama 3's original positions


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
        for length in LENGTHS
    ]


def responses(
    paths: dict[str, str], sizes: dict[str, int], sampling: Sampling, max_batch: int
) -> dict[str, list[Response]]:
    layout = ModelConfig(make_vocab_size_divisible_by=8, **sizes)
    groups = initialize_model_parallel(layout, 1)
    found = {}
    for name, path in paths.items():
        with open_pretrained(path) as source:
            config = transformer_config(source.architecture, layout, torch.float32)
            model = build_gpt_model(source.architecture, config, 8, False)
            source.load_weights(model, groups)
        found[name] = respond(
            model,
            groups,
            prompts(),
            sampling,
            vocab_size=VOCAB_SIZE,
            max_batch=max_batch,
        )
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folders = {}
    for name in FAMILIES:
        folder: Path = tmp_path_factory.mktemp(name.replace(".", "_"))
        build_hf_model(name).save_pretrained(folder)
        folders[name] = str(folder)
    return folders


@pytest.fixture(scope="module")
def reference(models) -> dict[str, list[list[int]]]:
    """20 tokens of every prompt, each decoded alone."""
    texts = {}
    for name, folder in models.items():
        model = AutoModelForCausalLM.from_pretrained(folder)
        texts[name] = [
            model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                do_sample=False,
                max_new_tokens=20,
                eos_token_id=None,
                pad_token_id=0,
            )[0, len(prompt) :].tolist()
            for prompt in prompts()
        ]
    return texts


LAYOUTS = {
    "one rank": {},
    "tensor": {"tensor_model_parallel_size": 2},
    "sequence": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "data": {},
    "experts": {"expert_model_parallel_size": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("max_batch", [1, 4])
def test_greedy_tokens_are_those_of_transformers(
    ranks, models, reference, layout, max_batch
):
    if layout == "experts":
        models = {"qwen3_moe": models["qwen3_moe"]}
    size = 1 if layout == "one rank" else 2
    sampling = Sampling(20, frozenset())
    for found in ranks(size).run(
        responses, models, LAYOUTS[layout], sampling, max_batch
    ):
        for name, of_prompts in found.items():
            assert [one.token_ids for one in of_prompts] == reference[name], name
