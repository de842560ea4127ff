"""The functions of `nemo_kd.sft` against float64, full batches and Hugging Face's own generation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_kd import sft
from tests.tiny_tokenizer import train_sentencepiece_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        attention_dropout=0.2,
    )
    return LlamaForCausalLM(config)


def test_prompts_and_outputs_are_joined_shifted_and_masked():
    tokenizer = train_tokenizer()
    prompts = ["What is 2 + 2?\n", "Hi", ""]
    outputs = ["It is 4.<|im_end|>", "", "no prompt"]
    found = sft.tokenize_prompt_and_output(prompts, outputs, tokenizer)
    width = found["input_ids"].shape[1]
    for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        prompt_ids = tokenizer.encode(prompt)
        output_ids = tokenizer.encode(output)
        whole = prompt_ids + output_ids
        padded = whole + [tokenizer.pad_token_id] * (width + 1 - len(whole))
        assert found["input_ids"][number].tolist() == padded[:-1]
        assert found["labels"][number].tolist() == padded[1:]
        trained = found["labels"][number][found["response_mask"][number]].tolist()
        # Nothing predicts the first token of a text without a prompt.
        assert trained == (output_ids if prompt_ids else output_ids[1:])
    assert found["labels"].dtype == torch.long
    assert found["response_mask"].dtype == torch.bool


def test_special_tokens_stand_before_the_prompt_only():
    tokenizer = train_sentencepiece_tokenizer()
    tokenizer = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token="<s>",
        add_bos_token=True,
    )
    prompt_ids = tokenizer("one").input_ids
    output_ids = tokenizer("two", add_special_tokens=False).input_ids
    found = sft.tokenize_prompt_and_output(["one"], ["two"], tokenizer)
    assert found["input_ids"][0, 0] == prompt_ids[0] == tokenizer.bos_token_id
    assert found["labels"][found["response_mask"]].tolist() == output_ids


def test_prompts_and_outputs_of_different_number_are_refused():
    with pytest.raises(ValueError, match="zip"):
        sft.tokenize_prompt_and_output(["a"], [], train_tokenizer())


@pytest.mark.parametrize("scale", [0.1, 5.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entropy_equals_that_of_float64_at_any_scale(scale, dtype):
    logits = (scale * torch.randn(2, 3, 4096)).to(dtype)
    expected = torch.distributions.Categorical(logits=logits.double()).entropy()
    found = sft.compute_entropy(logits)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_entropy_of_masked_logits_is_that_of_the_others_with_its_gradient():
    kept = torch.randn(5, dtype=torch.float64, requires_grad=True)
    logits = torch.cat([kept, torch.full((3,), -torch.inf, dtype=torch.float64)])
    entropy = sft.compute_entropy(logits)
    torch.testing.assert_close(
        entropy, torch.distributions.Categorical(logits=kept).entropy()
    )
    assert torch.autograd.gradcheck(
        lambda kept: sft.compute_entropy(torch.cat([kept, logits[5:]])), kept
    )


def test_log_probs_are_those_of_a_float64_copy_with_its_gradients(model):
    ids = torch.randint(0, 512, (3, 9))
    labels = torch.randint(0, 512, (3, 9))
    reference = LlamaForCausalLM(model.config).double()
    reference.load_state_dict(model.state_dict())
    found = sft.get_response_log_probs(model.eval(), ids, labels, True)
    logits = reference.eval()(ids).logits
    expected = -torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), labels, reduction="none"
    )
    torch.testing.assert_close(
        found["log_probs"].double(), expected, rtol=1e-4, atol=1e-4
    )
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(
        found["token_entropy"].double(), entropy, rtol=1e-4, atol=1e-4
    )
    found["log_probs"].sum().backward()
    expected.sum().backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-3
        )
    model.zero_grad()
    assert [*sft.get_response_log_probs(model, ids, labels)] == ["log_probs"]


def test_log_probs_of_a_bfloat16_model_are_rounded_once():
    logits = (8 * torch.randn(2, 3, 5000)).bfloat16()
    labels = torch.randint(0, 5000, (2, 3))
    found = sft.get_response_log_probs(
        lambda ids: SimpleNamespace(logits=logits), labels, labels
    )["log_probs"]
    expected = logits.double().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dim", [None, 0, 1, -1])
def test_masked_normalize_sums_what_the_mask_keeps(dim):
    tensor = torch.randn(3, 5, dtype=torch.float64)
    mask = torch.rand(3, 5) < 0.5
    expected = (tensor * mask).sum() if dim is None else (tensor * mask).sum(dim)
    hidden = tensor.masked_fill(~mask, torch.nan)
    for given in (mask, mask.int(), mask.double()):
        found = sft.masked_normalize(hidden, given, 7.0, dim)
        torch.testing.assert_close(found, expected / 7)
    weights = torch.rand(3, 5, dtype=torch.float64)
    whole = (weights * tensor).sum() / 7
    torch.testing.assert_close(sft.masked_normalize(tensor, weights, 7.0), whole)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 6])
def test_accumulated_gradients_are_those_of_the_whole_batch(micro_batch_size):
    whole = -2 * torch.rand(6, 8, dtype=torch.float64)
    whole.requires_grad_()
    mask = torch.rand(6, 8) < 0.6
    expected = (-whole * mask).sum() / (6 * 4.0)
    (gradient,) = torch.autograd.grad(expected, whole)
    parts = mask.split(micro_batch_size)
    total = 0.0
    for log_probs, part in zip(whole.split(micro_batch_size), parts, strict=True):
        loss, metadata = sft.sft_microbatch_train_step(
            log_probs, part, len(parts), 4.0
        )
        assert not loss.requires_grad
        assert metadata["response_tokens"] == part.sum()
        total += loss
    torch.testing.assert_close(total, expected.detach())
    torch.testing.assert_close(whole.grad, gradient)


def test_metadata_has_the_mean_over_tokens():
    log_probs = torch.tensor([[-1.0, -2.0, -9.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0]])
    _, metadata = sft.sft_microbatch_train_step(log_probs, mask, 2, 10.0)
    assert metadata["nll"] == 1.5
    _, metadata = sft.sft_microbatch_train_step(log_probs, 0 * mask, 2)
    assert metadata["nll"] == 0


def test_generations_are_hugging_faces_with_their_entropy(model):
    tokenizer = train_tokenizer()
    prompts = ["What is a list?", "Say", "Return the sum", "never asked"]
    model.train()
    rewards = iter([1.0, 0.0, 1])
    asked = []

    def reward_fn(response, truth):
        asked.append((response, truth))
        return next(rewards)

    found = sft.log_generations(
        model, tokenizer, prompts, [1, 2, 3, 4], reward_fn, 3, max_new_tokens=7
    )
    assert model.training
    model.eval()
    lengths = []
    for row, prompt, truth in zip(found["rows"], prompts, (1, 2, 3), strict=False):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        whole = model.generate(ids, max_new_tokens=7, do_sample=False)
        response = whole[:, ids.shape[1] :]
        with torch.no_grad():
            logits = model(whole[:, :-1]).logits.double()[:, ids.shape[1] - 1 :]
        entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
        text = tokenizer.decode(response[0], skip_special_tokens=True)
        assert (row["prompt"], row["response"], row["ground_truth"]) == (
            prompt,
            text,
            truth,
        )
        assert (text, truth) in asked
        assert row["response_length"] == response.shape[1]
        assert row["token_entropy"] == pytest.approx(entropy.item(), rel=1e-4)
        lengths.append(response.shape[1])
    assert len(found["rows"]) == len(asked) == 3
    metrics = found["metrics"]
    assert metrics["response_length"] == pytest.approx(sum(lengths) / 3)
    assert metrics["response_length_correct"] == (lengths[0] + lengths[2]) / 2
    assert metrics["response_length_incorrect"] == lengths[1]
    assert metrics["reward"] == pytest.approx(2 / 3)
    entropies = [row["token_entropy"] for row in found["rows"]]
    assert metrics["token_entropy"] == pytest.approx(sum(entropies) / 3)


def test_generations_without_rewards_and_after_an_error(model):
    tokenizer = train_tokenizer()
    found = sft.log_generations(model, tokenizer, ["Say"] * 9, max_new_tokens=2)
    assert len(found["rows"]) == 5
    assert {*found["metrics"]} == {"response_length", "token_entropy"}
    model.train()
    with pytest.raises(ValueError, match="no_such_argument"):
        sft.log_generations(model, tokenizer, ["Say"], no_such_argument=1)
    assert model.training
