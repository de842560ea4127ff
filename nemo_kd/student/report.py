"""Reports of stage 2: setup, losses of the first step, and the result or where the run stopped."""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from nemo_kd.batch import CachedExample
from nemo_kd.data.batches import example_of
from nemo_kd.data.text import TokenText, example_lines, trained_text
from nemo_kd.mcore.weights import hf_shapes
from nemo_kd.student.checkpoint_folder import resumable
from nemo_kd.student.checkpoints import Checkpoints
from nemo_kd.student.progress import format_metrics
from nemo_kd.terminal import print_table

if TYPE_CHECKING:
    from nemo_kd.student.module import StudentModule

log = logging.getLogger(__name__)

SAMPLED_ROWS = 64
SHOWN_POSITIONS = 6


@dataclass(frozen=True)
class StudentRun:
    """A finished run of stage 2.

    Attributes:
        folder: holds logs, metrics and, by default, checkpoints.
        step: completed optimizer steps.
        archive: the student as `NAME.nemo`; None if the run does not write it. Where the best
            weights are not the last, they are beside it as `NAME-best.nemo`.
    """

    folder: Path
    step: int
    archive: Path | None


def setup_report(student: StudentModule, tokenizer: PreTrainedTokenizerBase) -> str:
    """Describe model, layout, steps and data, and show the first example."""
    config = student.config
    model = config.model
    plan = student.plan
    loss = model.knowledge_distillation
    groups = student.groups
    weights = sum(map(math.prod, hf_shapes(student.architecture).values()))
    parameters = list(student.gpt.parameters())
    held = sum(one.numel() for one in parameters)
    trained = sum(one.numel() for one in parameters if one.requires_grad)
    terms = f"{loss.sft_loss_weight:g} x cross-entropy"
    if loss.kd_loss_weight:
        divergence = loss.custom_loss or f"{loss.kd_loss} (support={loss.support})"
        terms += f" + {loss.kd_loss_weight:g} x {divergence}"
    splits = student.data.splits
    rows = splits["train"]
    sampled = range(0, len(rows), -(-len(rows) // SAMPLED_ROWS))
    examples = [example_of(rows[position]) for position in sampled]
    batch = model.global_batch_size
    tokens = batch / len(examples) * sum(one.num_tokens for one in examples)
    loss_tokens = batch / len(examples) * sum(one.num_loss_tokens for one in examples)
    lines = [
        f"student:    {student.architecture.family}, {weights:,} weights; this rank holds {held:,} "
        f"and trains {trained:,}",
        f"layout:     tensor {groups.tensor_size} x pipeline {groups.pipeline_size} x context "
        f"{groups.context_size} x data {groups.data_size}; {config.trainer.precision}, "
        f"{model.optim.name}",
        f"loss:       {terms}",
        f"step:       {batch} examples, about {tokens:,.0f} tokens, {loss_tokens:,.0f} of them in "
        "the loss",
        f"run:        {plan.max_steps:,} steps, {plan.steps_per_epoch:,} per epoch; validation "
        f"every {plan.val_check_interval:,}, checkpoint every {plan.save_interval:,} steps",
    ]
    for split, of_split in splits.items():
        paths = ", ".join(model.data.paths(split))
        lines.append(f"{split + ':':<12}{len(of_split):,} examples from {paths}")
    lines += [
        f"first example (record {examples[0].index}), trained between « and »:",
        trained_text(examples[0], tokenizer),
    ]
    if isinstance(rows[0], CachedExample):
        lines += example_lines(rows[0], TokenText(tokenizer), SHOWN_POSITIONS)
    return "\n".join(lines)


def first_step_report(means: Mapping[str, float], vocab_size: int) -> None:
    """Log the losses of the initial weights, and a warning if they look wrong."""
    uniform = math.log(vocab_size)
    ce = means["train/sft_loss"]
    text = f"before training: cross-entropy {ce:.3f} (a uniform guess has ln V = {uniform:.3f})"
    if "train/teacher_kl" in means:
        text += (
            f", KL to the teacher {means['train/teacher_kl']:.3f}, same most likely token at "
            f"{means['train/top1_agreement']:.1%} of the positions; the kept tokens hold "
            f"{means['train/teacher_mass']:.1%} of the teacher's probability and "
            f"{means['train/student_mass']:.1%} of the student's"
        )
    log.info(text)
    if ce > uniform + 1:
        log.warning(
            "the student starts at a cross-entropy of %.3f, worse than a uniform guess (%.3f): "
            "check that its weights, tokenizer and chat template belong together",
            ce,
            uniform,
        )


def stop_report(student: StudentModule | None) -> str:
    """Return the step at which a run was stopped, and its last checkpoint."""
    if student is None:
        return "before the first step of this run"
    kept = student.checkpoints
    found = [] if kept is None else resumable(kept.dirpath)
    return (
        f"at step {student.global_step:,} of {student.plan.max_steps:,}; the last checkpoint is "
        f"{found[0] if found else 'none'}"
    )


def end_report(student: StudentModule) -> StudentRun:
    """Print a summary of the run and the commands that come next, on rank 0."""
    run_log = student.run_log
    kept = student.checkpoints
    archive = None
    if kept is not None and kept.params.save_nemo_on_train_end:
        archive = kept.archive
    run = StudentRun(run_log.log_dir, student.global_step, archive)
    if run_log.progress is None:
        return run
    latest = run_log.latest
    counts = run_log.progress.counts
    time = (
        f"{timedelta(seconds=round(run_log.seconds))} with validations and checkpoints"
    )
    facts = [
        ("trained", f"{run.step:,} of {run_log.max_steps:,} steps"),
        (
            "tokens",
            f"{counts['tokens']:,.0f} ({counts['loss_tokens']:,.0f} in the loss)",
        ),
        ("time", time),
    ]
    for split in ("train", "validation", "test"):
        if f"{split}/loss" in latest:
            facts.append((f"last {split}", format_metrics(latest, split)))
    if kept is not None and kept.best is not None:
        facts.append((f"best {kept.params.monitor}", kept.best.name))
    if kept is not None:
        facts += _files(kept)
    facts.append(("metrics", str(run_log.metrics_path)))
    facts.append(("next", f"plot_runs {shlex.quote(str(run.folder))}"))
    print_table(facts)
    return run


def _files(kept: Checkpoints) -> list[tuple[str, str]]:
    """List the run's archives and exported folders, and the command that converts them."""
    paths = [*kept.dirpath.glob("*.nemo"), *kept.dirpath.glob("*-hf")]
    facts = [("weights", str(path)) for path in sorted(paths)]
    if kept.archive.exists():
        source = shlex.quote(str(kept.archive))
        command = f"convert_checkpoint input_path={source} output_path=student_hf/"
        facts.append(("next", command))
    return facts
