"""`--dry-run` of stage 2: try a step, and show its batch with the loss masks."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from nemo_kd.batch import Example
from nemo_kd.config.student import TrainStudentConfig
from nemo_kd.data.batches import example_of
from nemo_kd.data.tokenizer import TokenText, text_ids, trained_text
from nemo_kd.files import print_table, print_text, size_text, write_atomically
from nemo_kd.mcore.checkpoint import PretrainedModel
from nemo_kd.mcore.optimizer import release
from nemo_kd.mcore.schedule import forward_backward
from nemo_kd.page import build_page
from nemo_kd.run.collective import gather, on_rank_zero
from nemo_kd.student.data import StudentData
from nemo_kd.student.loss import StudentLoss
from nemo_kd.student.module import StudentModule
from nemo_kd.student.reports import StudentRun, setup_report

TEMPLATE = Path(__file__).with_name("first_batch.html")
PAGE_TOKENS = 50_000
"""Most tokens of whole examples on the page, after the first example."""
SHOWN_EXAMPLES = 3
"""Most examples on a terminal."""
GREEN = ("\x1b[32m", "\x1b[0m")


def show_first_step(
    config: TrainStudentConfig,
    pretrained: PretrainedModel,
    data: StudentData,
    loss: StudentLoss,
    tokenizer: PreTrainedTokenizerBase,
    stack: contextlib.ExitStack,
) -> StudentRun:
    """Compute the first step, print its costs and its batch, and write the page; every rank calls
    this."""
    student = StudentModule(config, pretrained, data, loss)
    stack.callback(release, student.model)
    report = setup_report(student)
    seconds = _step_time(student)
    peaks = gather(student.meter.peak_bytes)
    steps = data.plan.max_steps
    # NeMo's exp_manager moves files in a log folder away, but not its folders.
    folder = Path(config.exp_manager.explicit_log_dir or ".") / "dry_run"
    page = folder / "first_batch.html"
    costs = [
        ("memory", f"{size_text(max(peaks))} on a rank at the peak of a step"),
        (
            "time",
            f"{seconds:.2f} s a step, {timedelta(seconds=round(steps * seconds))} for {steps:,} "
            "steps without validation and checkpoints",
        ),
        ("page", str(page)),
    ]

    def show() -> None:
        examples = _first_batch(data)
        facts = [report, *(f"{name + ':':<12}{text}" for name, text in costs[:2])]
        folder.mkdir(parents=True, exist_ok=True)
        html = _page(config.name, "\n".join(facts), examples, tokenizer)
        write_atomically(page, html.encode())
        print_text(report)
        is_coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        marks = GREEN if is_coloured else ("«", "»")
        print(
            "first batch, trained", "in green:" if is_coloured else "between « and »:"
        )
        for heading, example in examples[:SHOWN_EXAMPLES]:
            print(f"{heading}\n{trained_text(example, tokenizer, marks)}")
        print_table(costs)

    on_rank_zero(show)
    return StudentRun(folder, 0, None)


def _step_time(student: StudentModule) -> float:
    """Return the seconds of the second step; the first one compiles and allocates."""
    batch = next(iter(student.data.loader("train")))
    optimizer = student.configure_optimizers()
    student.loss.set_step(0, student.loss.weight_sums(batch))
    for _ in range(2):
        started_s = time.perf_counter()
        optimizer.zero_grad()
        forward_backward(student.model, batch, student.token_losses)
        optimizer.step()
        gather(lambda: None)
        seconds = time.perf_counter() - started_s
    return seconds


def _first_batch(data: StudentData) -> list[tuple[str, Example]]:
    """Return this rank's examples of the first global batch, each with a heading."""
    micro_batches: Any = data.loader("train").dataset
    paths = data.model.data.paths("train")
    shares = micro_batches.share(next(iter(data.training)))
    examples = []
    for number, share in enumerate(shares, start=1):
        for place in share:
            example = example_of(data.splits["train"][place])
            heading = (
                f"Micro-batch {number} of {len(shares)} · record {example.index:,} of "
                f"{paths[example.source]} · {example.num_tokens:,} positions, "
                f"{example.num_loss_tokens:,} in the loss"
            )
            examples.append((heading, example))
    return examples


def _page(
    title: str,
    facts: str,
    examples: Sequence[tuple[str, Example]],
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    text = TokenText(tokenizer)
    shown: list[dict[str, Any]] = []
    num_tokens = 0
    for heading, example in examples:
        num_tokens += example.num_tokens
        if shown and num_tokens > PAGE_TOKENS:
            break
        ids = text_ids(example)
        mask = [0, *example.loss_mask_S.tolist()]
        shown.append(
            {"heading": heading, "tokens": text.along(ids), "ids": ids, "mask": mask}
        )
    content = {
        "title": f"{title}: first batch",
        "facts": facts,
        "left_out": len(examples) - len(shown),
        "examples": shown,
    }
    return build_page(TEMPLATE, content)
