"""Generated responses against transformers on the same weights."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessorList
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

from nemo_kd.answers.responses import respond
from nemo_kd.config import ConfigError, UserInputError
from nemo_kd.config.shared import ModelConfig, check_generation_layout
from nemo_kd.config.student import StudentModelConfig
from nemo_kd.mcore import generation
from nemo_kd.mcore.checkpoint import open_pretrained
from nemo_kd.mcore.generation import Response, Sampling, choose_tokens
from nemo_kd.mcore.groups import initialize_model_parallel
from nemo_kd.mcore.model import build_gpt_model, transformer_config
from tests.tiny_models import build_hf_model

VOCAB_SIZE = 157
NEW_TOKENS = 20
FAMILIES = {
    "llama3.1": {},
    "qwen2_tied": {},
    "qwen3": {"num_hidden_layers": 4},
    "mistral_window": {},
    "qwen3_moe": {},
}
LENGTHS = (5, 9, 1, 150, 9, 160)
"""Two batches; beyond the window and the original length of Llama 3's rope."""

Layout = dict[str, int | bool]
TP, PP, VPP, EP = (
    {f"{name}_parallel_size": 2}
    for name in (
        "tensor_model",
        "pipeline_model",
        "virtual_pipeline_model",
        "expert_model",
    )
)
SP = {"sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, Layout]] = {
    "one rank": (1, {}),
    "TP": (2, TP),
    "TP SP": (2, TP | SP),
    "PP": (2, PP),
    "DP": (2, {}),
    "PP TP SP": (4, PP | TP | SP),
}


def prompts_of(lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
        for length in lengths
    ]


PROMPTS = prompts_of(LENGTHS)


def load(path: str, layout: Layout, transformer_engine: bool = False):
    config = StudentModelConfig(**layout, make_vocab_size_divisible_by=8)  # type: ignore[arg-type]
    groups = initialize_model_parallel(config, 1)
    with open_pretrained(path) as source:
        megatron = transformer_config(source.architecture, config, torch.float32)
        model = build_gpt_model(source.architecture, megatron, 8, transformer_engine)
        source.load_weights(model, groups)
    return model, groups


def run(
    path: str,
    layout: Layout,
    sampling: Sampling,
    max_batch: int = 4,
    prompts: list[list[int]] = PROMPTS,
    numbers: list[int] | None = None,
) -> list[Response]:
    model, groups = load(path, layout)
    return respond(
        model,
        groups,
        prompts,
        sampling,
        vocab_size=VOCAB_SIZE,
        max_batch=max_batch,
        numbers=numbers,
    )


def run_all(
    paths: dict[str, str], layout: Layout, sampling: Sampling
) -> dict[str, list[Response]]:
    return {name: run(path, layout, sampling) for name, path in paths.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folders = {}
    for name, changes in FAMILIES.items():
        folder: Path = tmp_path_factory.mktemp(name.replace(".", "_"))
        build_hf_model(name, **changes).save_pretrained(folder)
        folders[name] = str(folder)
    return folders


@pytest.fixture(scope="module")
def reference(models) -> dict[str, list[tuple[list[int], torch.Tensor]]]:
    """(tokens, logits) of greedy decoding by transformers; each prompt alone, without a cache."""
    found = {}
    for name, folder in models.items():
        model = AutoModelForCausalLM.from_pretrained(folder)
        found[name] = []
        for prompt in PROMPTS:
            output = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                eos_token_id=None,
                pad_token_id=0,
                use_cache=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            tokens = output.sequences[0, len(prompt) :].tolist()
            found[name].append((tokens, torch.cat(output.logits)))
    return found


def check(found: list[Response], expected: list[tuple[list[int], torch.Tensor]]):
    for response, (tokens, logits) in zip(found, expected, strict=True):
        assert response.token_ids == tokens
        assert not response.stopped
        entropy = torch.distributions.Categorical(logits=logits.double()).entropy()
        assert response.entropy_nats == pytest.approx(entropy.tolist(), abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_responses_are_those_of_transformers(ranks, models, reference, layout):
    size, sizes = LAYOUTS[layout]
    greedy = Sampling(NEW_TOKENS, frozenset())
    for found in ranks(size).run(run_all, models, sizes, greedy):
        for name in FAMILIES:
            check(found[name], reference[name])


@pytest.mark.parametrize(
    ("name", "size", "layout"),
    [
        ("qwen3", 2, PP | VPP),
        ("qwen3_moe", 2, EP),
        ("qwen3_moe", 4, EP | TP | SP),
        ("qwen3_moe", 4, EP | PP),
    ],
)
def test_interleaved_stages_and_shared_experts(
    ranks, models, reference, name, size, layout
):
    greedy = Sampling(NEW_TOKENS, frozenset())
    for found in ranks(size).run(run, models[name], layout, greedy):
        check(found, reference[name])


def test_a_replica_without_prompts_serves_the_experts_of_others(
    ranks, models, reference
):
    greedy = Sampling(NEW_TOKENS, frozenset())
    for found in ranks(2).run(run, models["qwen3_moe"], EP, greedy, 4, PROMPTS[:1]):
        check(found, reference["qwen3_moe"][:1])


def recorded_logits(path: str) -> list[torch.Tensor]:
    """Logits of every step of a batch of one prompt."""
    found = []

    def record(logits_BV, *args):
        found.append(logits_BV[0])
        return choose_tokens(logits_BV, *args)

    with mock.patch.object(generation, "choose_tokens", record):
        run(path, {}, Sampling(NEW_TOKENS, frozenset()), 1, PROMPTS[3:4])
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_from_cached_keys_are_those_of_a_full_pass(
    ranks, models, reference, name
):
    found = ranks(1).run(recorded_logits, models[name])[0]
    expected = reference[name][3][1]
    assert (torch.stack(found) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("max_batch", [1, 6])
def test_stop_tokens_end_a_response(ranks, models, reference, max_batch):
    """One response ends with its first token, others later, some never."""
    texts = [tokens for tokens, _ in reference["qwen3"]]
    stops = frozenset({texts[0][0], texts[1][7]})
    sampling = Sampling(NEW_TOKENS, stops)
    found = ranks(1).run(run, models["qwen3"], {}, sampling, max_batch)[0]
    for response, text in zip(found, texts, strict=True):
        ends = [step for step, token in enumerate(text) if token in stops]
        assert response.stopped == bool(ends)
        assert response.token_ids == (text[: ends[0]] if ends else text)
        assert len(response.entropy_nats) == (ends[0] + 1 if ends else NEW_TOKENS)
    assert found[0].token_ids == []
    assert {response.stopped for response in found} == {True, False}


def reported_steps(path: str) -> list[int]:
    """Numbers of the steps of one response; a watchdog takes them for progress."""
    model, groups = load(path, {})
    steps: list[int] = []
    respond(
        model,
        groups,
        PROMPTS[:1],
        Sampling(NEW_TOKENS, frozenset()),
        vocab_size=VOCAB_SIZE,
        max_batch=1,
        on_step=lambda: steps.append(len(steps)),
    )
    return steps


def test_every_step_is_reported(ranks, models):
    found = ranks(1).run(reported_steps, models["qwen3"])[0]
    assert found == list(range(NEW_TOKENS))


def test_sampled_responses_depend_on_seed_and_number_only(ranks, models):
    path = models["qwen3"]
    sampling = Sampling(
        NEW_TOKENS, frozenset({7}), temperature=1.5, top_p=0.95, seed=3
    )
    expected = ranks(1).run(run, path, {}, sampling)[0]
    assert len({tuple(response.token_ids) for response in expected}) == len(PROMPTS)

    def tokens(responses: list[Response]) -> list[list[int]]:
        return [response.token_ids for response in responses]

    assert tokens(ranks(1).run(run, path, {}, sampling, 1)[0]) == tokens(expected)
    for layout in (TP, PP, {}):
        for found in ranks(2).run(run, path, layout, sampling):
            assert tokens(found) == tokens(expected)
    some = ranks(1).run(run, path, {}, sampling, 4, PROMPTS[2:4], [2, 3])[0]
    assert tokens(some) == tokens(expected[2:4])
    other = Sampling(NEW_TOKENS, frozenset({7}), temperature=1.5, top_p=0.95, seed=4)
    assert tokens(ranks(1).run(run, path, {}, other)[0]) != tokens(expected)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_samples_follow_the_distribution_of_transformers(temperature, top_p):
    logits = 2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    expected = warpers(None, logits.double())[0].softmax(-1)
    count = 20_000
    # Evenly spaced numbers: frequencies are exact but for one draw at either end.
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    ids, _ = choose_tokens(
        logits.expand(count, -1),
        Sampling(1, frozenset(), temperature, top_p),
        uniforms,
    )
    frequencies = torch.bincount(ids, minlength=40) / count
    assert (frequencies - expected).abs().max() <= 1.01 / count
    assert not frequencies[expected == 0].any()


def test_the_largest_random_number_chooses_a_token_that_is_kept():
    logits = torch.tensor([[0.0, -200.0, 0.0, -900.0]])
    largest = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    sampling = Sampling(1, frozenset(), temperature=1.0)
    assert choose_tokens(logits, sampling, largest)[0].tolist() == [2]


def nan_refused(path: str, layout: Layout, temperature: float) -> str:
    """Sample from a model whose last weights are NaN."""
    model, groups = load(path, layout)
    if groups.data_rank == 0:
        list(model.parameters())[-1].data.fill_(torch.nan)
    sampling = Sampling(3, frozenset(), temperature)
    with pytest.raises(UserInputError) as error:
        respond(
            model, groups, PROMPTS[:2], sampling, vocab_size=VOCAB_SIZE, max_batch=2
        )
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "layout", "temperature"),
    [("qwen3", PP, 1.0), ("qwen3", {}, 0.0), ("qwen3_moe", EP, 1.0)],
)
def test_logits_that_are_not_finite_are_refused_on_every_rank(
    ranks, models, name, layout, temperature
):
    for message in ranks(2).run(nan_refused, models[name], layout, temperature):
        assert "the model's logits are not finite; try trainer.precision=32" in message


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_that_are_not_finite_have_no_entropy(temperature):
    logits = torch.tensor([[0.0, torch.nan], [torch.inf, 0.0], [-torch.inf, 1.0]])
    uniforms = torch.full((3,), 0.9, dtype=torch.float64)
    sampling = Sampling(1, frozenset(), temperature)
    ids, entropy = choose_tokens(logits, sampling, uniforms)
    assert entropy.isnan().tolist() == [True, True, False]
    assert max(ids.tolist()) < 2


def refused(path: str, prompts: list[list[int]]) -> str:
    model, groups = load(path, {})
    greedy = Sampling(1, frozenset())
    numbers = [40 + place for place in range(len(prompts))]
    with pytest.raises(UserInputError) as error:
        respond(
            model,
            groups,
            prompts,
            greedy,
            vocab_size=VOCAB_SIZE,
            max_batch=2,
            numbers=numbers,
        )
    return str(error.value)


@pytest.mark.parametrize("length", [0, 512])
def test_a_prompt_without_room_is_refused_on_every_rank(ranks, models, length):
    """The models have 512 positions."""
    message = f"prompt 41: {length} tokens, but a prompt of this model has 1 to 511"
    found = ranks(2).run(refused, models["qwen3"], [[5], [5] * length, [5]])
    assert all(message in error for error in found)


def test_a_response_ends_at_the_last_position_of_the_model(ranks, models):
    greedy = Sampling(NEW_TOKENS, frozenset())
    long, short = ranks(1).run(
        run, models["qwen3"], {}, greedy, 4, prompts_of((509, 500))
    )[0]
    assert len(long.token_ids) == 3
    assert len(short.token_ids) == 12
    assert not long.stopped


def test_context_parallelism_is_refused_before_work_starts():
    layout = ModelConfig(context_parallel_size=2)
    with pytest.raises(
        ConfigError,
        match=r"model.context_parallel_size: 2, but eval.interval generates",
    ):
        check_generation_layout(layout, "eval.interval")
    check_generation_layout(ModelConfig(), "eval.interval")
