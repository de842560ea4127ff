"""Functions for SFT loops on models and tokenizers of Hugging Face; docs/python.md has a loop.

Shape legend: B examples, S positions, V vocabulary. Position s belongs to the prediction of label s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import torch


def tokenize_prompt_and_output(
    prompt_strs: Sequence[str], output_strs: Sequence[str], tokenizer: Any
) -> dict[str, torch.Tensor]:
    """Tokenize prompts and outputs separately, join them, and pad on the right.

    Special tokens of the tokenizer stand before a prompt only. An end-of-sequence token is trained
    where the output's text holds it.

    Returns:
        `input_ids` and `labels` [B, S], shifted by one, where the longest example has S + 1 tokens;
        `response_mask` [B, S], True where the label is a token of the output.
    """
    examples = []
    masks = []
    for prompt, output in zip(prompt_strs, output_strs, strict=True):
        prompt_ids = tokenizer(prompt).input_ids
        output_ids = tokenizer(output, add_special_tokens=False).input_ids
        examples.append(torch.tensor(prompt_ids + output_ids, dtype=torch.long))
        masks.append(torch.arange(len(examples[-1])) >= len(prompt_ids))
    pad_id = tokenizer.pad_token_id
    if pad_id is None:
        pad_id = tokenizer.eos_token_id or 0  # any id works: nothing depends on it
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(examples, batch_first=True, padding_value=pad_id)
    mask = pad(masks, batch_first=True)
    return {
        "input_ids": ids[:, :-1],
        "labels": ids[:, 1:],
        "response_mask": mask[:, 1:],
    }


def compute_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Return the entropy in nats of softmax(logits) over the last dimension, in float32 at least."""
    log_probs = _log_softmax(logits)
    # A probability of 0 adds nothing, and has a gradient of 0.
    finite = log_probs.masked_fill(log_probs == -torch.inf, 0)
    return -(log_probs.exp() * finite).sum(dim=-1)


def get_response_log_probs(
    model: Any,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    return_token_entropy: bool = False,
) -> dict[str, torch.Tensor]:
    """Return the model's log-probabilities of the labels, differentiable, in float32 at least.

    Returns:
        `log_probs` [B, S] in nats; with `return_token_entropy` also `token_entropy` [B, S].
    """
    logits_BSV = model(input_ids).logits
    log_probs_BSV = _log_softmax(logits_BSV)
    found = {"log_probs": log_probs_BSV.gather(-1, labels[..., None]).squeeze(-1)}
    if return_token_entropy:
        found["token_entropy"] = compute_entropy(logits_BSV)
    return found


def masked_normalize(
    tensor: torch.Tensor,
    mask: torch.Tensor,
    normalize_constant: float = 1.0,
    dim: int | None = None,
) -> torch.Tensor:
    """Return sum(mask * tensor) / normalize_constant over `dim`; None: over everything.

    Entries with mask 0 may be infinite or NaN.
    """
    kept = tensor.masked_fill(mask == 0, 0) * mask
    return (kept.sum() if dim is None else kept.sum(dim)) / normalize_constant


def sft_microbatch_train_step(
    policy_log_probs: torch.Tensor,
    response_mask: torch.Tensor,
    gradient_accumulation_steps: int,
    normalize_constant: float = 1.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Add the gradient of one micro-batch: the mean over its examples of
    -sum(mask * log_probs) / normalize_constant, divided by `gradient_accumulation_steps`.

    Micro-batches of one size then give the gradient of the whole batch. Where the last group of an
    epoch has fewer of them, pass their number.

    Returns:
        The divided loss, and metadata: `response_tokens` of the micro-batch, and `nll`, their mean
        negative log-likelihood. All without gradient.
    """
    sums_B = masked_normalize(-policy_log_probs, response_mask, normalize_constant, -1)
    loss = sums_B.mean() / gradient_accumulation_steps
    loss.backward()
    num_tokens = response_mask.sum()
    nll = masked_normalize(-policy_log_probs.detach(), response_mask)
    return loss.detach(), {
        "response_tokens": num_tokens,
        "nll": nll / num_tokens.clamp(min=1),
    }


def log_generations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    ground_truths: Sequence[Any] | None = None,
    reward_fn: Callable[[str, Any], float] | None = None,
    num_samples: int = 5,
    **generate_arguments: Any,
) -> dict[str, Any]:
    """Generate responses to the first `num_samples` prompts with Hugging Face, and measure them.

    Generating takes time: call it every 200 steps or so. The model keeps its mode.

    Args:
        reward_fn: takes a response and its ground truth; 1 or more is a correct response.
        generate_arguments: of `model.generate`: max_new_tokens=256, do_sample=True ...

    Returns:
        `rows`, a dictionary per sample: prompt, response, ground_truth, response_length in tokens,
        token_entropy (mean over the response, in nats) and, with `reward_fn`, reward. `metrics`:
        the means of these numbers, and response_length_correct and _incorrect.
    """
    truths = ground_truths or [None] * len(prompts)
    samples = list(zip(prompts, truths, strict=True))[:num_samples]
    was_training = model.training
    model.eval()
    try:
        rows = [
            {"prompt": prompt, "ground_truth": truth}
            | _generate(model, tokenizer, prompt, generate_arguments)
            for prompt, truth in samples
        ]
    finally:
        model.train(was_training)
    names = ["response_length", "token_entropy"]
    groups: dict[str, list[Any]] = {"_correct": [], "_incorrect": []}
    if reward_fn is not None:
        names.append("reward")
        for row in rows:
            row["reward"] = float(reward_fn(row["response"], row["ground_truth"]))
            groups["_correct" if row["reward"] >= 1 else "_incorrect"].append(row)
    metrics = {name: fmean(row[name] for row in rows) for name in names}
    for kind, chosen in groups.items():
        if chosen:
            lengths = [row["response_length"] for row in chosen]
            metrics[f"response_length{kind}"] = fmean(lengths)
    return {"rows": rows, "metrics": metrics}


@torch.no_grad()
def _generate(
    model: Any, tokenizer: Any, prompt: str, arguments: dict[str, Any]
) -> dict[str, Any]:
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    made = model.generate(
        **inputs, return_dict_in_generate=True, output_logits=True, **arguments
    )
    response_ids = made.sequences[0, inputs.input_ids.shape[1] :]
    return {
        "response": tokenizer.decode(response_ids, skip_special_tokens=True),
        "response_length": len(response_ids),
        "token_entropy": compute_entropy(torch.cat(made.logits)).mean().item(),
    }


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.log_softmax(dim=-1, dtype=dtype)
