"""What stage 2 tells before its first step, and of the first step itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from nemo_kd.batch import CachedExample
from nemo_kd.config.model import GPTArchitecture
from nemo_kd.config.student import TrainStudentConfig
from nemo_kd.data.rows import Rows
from nemo_kd.data.text import TokenText, example_lines, trained_text

SAMPLED_ROWS = 64
SHOWN_POSITIONS = 6


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights: of the whole student, and the least and most that a rank holds and trains."""

    total: int
    held: tuple[int, int]
    trained: tuple[int, int]


def startup_report(
    config: TrainStudentConfig,
    architecture: GPTArchitecture,
    parameters: Parameters,
    world_size: int,
    steps: dict[str, int],
    splits: dict[str, Rows],
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """Layout, size, batches, run, data and the first example with what the teacher says about it."""
    model = config.model
    sizes = {
        "tensor": model.tensor_model_parallel_size,
        "pipeline": model.pipeline_model_parallel_size,
        "context": model.context_parallel_size,
        "data": model.data_parallel_size(world_size),
    }
    product = " x ".join(f"{name} {size}" for name, size in sizes.items())
    expert = (
        f", experts over {model.expert_model_parallel_size}"
        if model.expert_model_parallel_size > 1
        else ""
    )
    sequence = (
        ", sequence parallel"
        if model.sequence_parallel and model.tensor_model_parallel_size > 1
        else ""
    )
    tokens, loss_tokens = _tokens_per_example(splits["train"])
    batch = model.global_batch_size
    interleaved = (
        f", stages in {model.chunks_per_stage} parts each" if model.chunks_per_stage > 1 else ""
    )
    facts = {
        "student": f"{architecture.family}, {parameters.total:,} weights; a rank holds {_span(*parameters.held)} and trains "
        f"{_span(*parameters.trained)}",
        "layout": f"{product} = {world_size} ranks{interleaved}{expert}{sequence}; {config.trainer.precision}, {model.optim.name}",
        "step": f"{batch} examples, about {batch * tokens:,.0f} tokens, {batch * loss_tokens:,.0f} of them in the loss",
        "run": ", ".join(f"{value:,} {name}" for name, value in steps.items()),
        **{
            split: f"{len(rows):,} examples from {', '.join(rows.description()['paths'])}"
            for split, rows in splits.items()
        },
    }
    lines = [f"{name + ':':<12}{text}" for name, text in facts.items()]
    return "\n".join([*lines, *_first_example(splits["train"], tokenizer)])


def first_step_report(means: dict[str, float], vocab_size: int) -> tuple[str, str | None]:
    """What the losses of the first step, those of the weights that training starts from, say; and what is wrong with them."""
    uniform, ce = math.log(vocab_size), means["sft_loss"]
    text = f"before training: cross-entropy {ce:.3f} (a uniform guess has ln V = {uniform:.3f})"
    if "teacher_kl" in means:
        text += (
            f", KL to the teacher {means['teacher_kl']:.3f}, same first token at {means['top1_agreement']:.1%} of the positions; "
            f"the kept tokens hold {means['teacher_mass']:.1%} of the teacher's probability, {means['student_mass']:.1%} of the student's"
        )
    doubt = None
    if ce > uniform + 1:
        doubt = (
            f"the student starts at a cross-entropy of {ce:.3f}, worse than a uniform guess ({uniform:.3f}): are its weights, its "
            "tokenizer and the chat template those that belong together?"
        )
    return text, doubt


def _tokens_per_example(rows: Rows) -> tuple[float, float]:
    """(mean tokens, mean loss tokens) of some examples, spread over all."""
    chosen = np.unique(np.linspace(0, len(rows) - 1, SAMPLED_ROWS).astype(int)).tolist()
    found = [
        row.example if isinstance(row, CachedExample) else row
        for row in map(rows.__getitem__, chosen)
    ]
    return (
        float(np.mean([example.num_tokens for example in found])),
        float(np.mean([example.num_loss_tokens for example in found])),
    )


def _first_example(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    first = rows[0]
    example = first.example if isinstance(first, CachedExample) else first
    lines = [
        f"example {example.index}, trained between « and »:",
        trained_text(example, tokenizer),
    ]
    if isinstance(first, CachedExample):
        lines += example_lines(first, TokenText(tokenizer), SHOWN_POSITIONS)
    return lines


def _span(least: int, most: int) -> str:
    return f"{most:,}" if least == most else f"{least:,} to {most:,}"
