"""Greedy responses on a GPU, with and without Transformer Engine, against transformers on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE
from transformers import AutoModelForCausalLM

from nemo_kd.answers.responses import respond
from nemo_kd.mcore.generation import Sampling
from tests.parity.test_generation import NEW_TOKENS, PROMPTS, VOCAB_SIZE, load
from tests.tiny_models import build_hf_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(scope="module")
def one_rank():
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "transformer_engine",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(not HAVE_TE, reason="needs Transformer Engine"),
        ),
    ],
)
@pytest.mark.parametrize("name", ["llama3.1", "qwen3", "mistral_window", "qwen3_moe"])
def test_greedy_responses_are_those_of_transformers(
    one_rank, tmp_path, name, transformer_engine
):
    build_hf_model(name).save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    model, groups = load(str(tmp_path), {}, transformer_engine)
    greedy = Sampling(NEW_TOKENS, frozenset())
    found = respond(model, groups, PROMPTS, greedy, vocab_size=VOCAB_SIZE, max_batch=4)
    for prompt, response in zip(PROMPTS, found, strict=True):
        text = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert response.token_ids == text[0, len(prompt) :].tolist()
