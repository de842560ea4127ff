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

import numpy as np
from transformers import PreTrainedTokenizerBase

from nemo_kd.batch import CachedExample
from nemo_kd.data.batches import example_of
from nemo_kd.data.text import TokenText, example_lines, trained_text
from nemo_kd.mcore.weights import hf_shapes
from nemo_kd.student.checkpoint_folder import checkpoints, read_contents, resumable
from nemo_kd.student.checkpoints import Checkpoints
from nemo_kd.student.progress import format_metrics
from nemo_kd.terminal import print_table, size_text

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
    sizes = student.groups.layout()
    del sizes["replicas in lockstep"]
    layout = " x ".join(f"{name} {size}" for name, size in sizes.items())
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
    spread = np.unique(np.linspace(0, len(rows) - 1, SAMPLED_ROWS).astype(int)).tolist()
    examples = [example_of(rows[position]) for position in spread]
    batch = model.global_batch_size
    tokens = batch * np.mean([one.num_tokens for one in examples])
    loss_tokens = batch * np.mean([one.num_loss_tokens for one in examples])
    facts = {
        "student": f"{student.architecture.family}, {weights:,} weights; this rank holds "
        f"{held:,} and trains {trained:,}",
        "layout": f"{layout} = {math.prod(sizes.values())} ranks; {config.trainer.precision}, "
        f"{model.optim.name}",
        "loss": terms,
        "step": f"{batch} examples, about {tokens:,.0f} tokens, {loss_tokens:,.0f} of them in the "
        "loss",
        "run": f"{plan.max_steps:,} steps, {plan.steps_per_epoch:,} per epoch; validation every "
        f"{plan.val_check_interval:,}, checkpoint every {plan.save_interval:,} steps",
    }
    for split, of_split in splits.items():
        paths = ", ".join(model.data.paths(split))
        facts[split] = f"{len(of_split):,} examples from {paths}"
    lines = [f"{name + ':':<12}{text}" for name, text in facts.items()]
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
    """Return the step at which a run was stopped, and how to resume it."""
    if student is None:
        return "before the first step of this run"
    at = f"at step {student.global_step:,} of {student.plan.max_steps:,}"
    found = [] if student.checkpoints is None else resumable(student.checkpoints.dirpath)
    for folder in found:
        contents = read_contents(folder)
        if contents is not None:
            command = "the same command"
            if not student.config.exp_manager.resume_if_exists:
                command = "exp_manager.resume_if_exists=true"
            return (
                f"{at}; {command} resumes from the last checkpoint, of step "
                f"{contents.step:,}: {folder}"
            )
    return f"{at}; there is no checkpoint, so the same command starts over"


def end_report(student: StudentModule) -> StudentRun:
    """Print a summary of the run and the commands that come next, on rank 0."""
    run_log = student.run_log
    kept = student.checkpoints
    writes = kept is not None and kept.params.save_nemo_on_train_end
    run = StudentRun(
        run_log.log_dir, student.global_step, kept.archive if kept and writes else None
    )
    if run_log.progress is None:
        return run
    latest = run_log.latest
    counters = run_log.progress.counts
    seconds = max(run_log.seconds, 1e-9)
    time = f"{timedelta(seconds=round(seconds))} with validations and checkpoints"
    facts = [
        ("trained", f"{run.step:,} of {run_log.max_steps:,} steps"),
        (
            "tokens",
            f"{counters['tokens']:,.0f} ({counters['loss_tokens']:,.0f} in the loss)",
        ),
        ("time", f"{time}, {counters['tokens'] / seconds:,.0f} tokens/s"),
    ]
    for name, metric, section in (
        ("last step", "train_step", "train"),
        ("last validation", "val_loss", "validation"),
        ("test", "test/loss", "test"),
    ):
        if metric in latest:
            facts.append((name, format_metrics(latest, section)))
    facts += [] if kept is None else _files(kept)
    facts.append(("metrics", str(run_log.metrics_path)))
    facts.append(("next", f"plot_runs {shlex.quote(str(run.folder))}"))
    print_table(sorted(facts, key=lambda fact: fact[0] == "next"))
    return run


def _files(kept: Checkpoints) -> list[tuple[str, str]]:
    """List the run's files with sizes, and the command that converts its archive."""
    facts = []
    if kept.best is not None:
        contents = read_contents(kept.best)
        step = "" if contents is None else f" at step {contents.step:,}"
        facts.append(
            (f"best {kept.params.monitor}", f"{kept.scores[kept.best]:.4f}{step}")
        )
    for path in (kept.archive, kept.best_archive):
        hf_folder = path.with_name(f"{path.stem}-hf")
        for written in (path, hf_folder):
            if written.exists():
                facts.append(("weights", f"{written}, {_size(written)}"))
        if path.exists() and not hf_folder.exists():
            source = shlex.quote(str(path))
            command = f"convert_checkpoint input_path={source} output_path=student_hf/"
            facts.append(("next", command))
    folders = checkpoints(kept.dirpath)
    if folders:
        size = _size(*folders)
        facts.append(("checkpoints", f"{len(folders)} in {kept.dirpath}, {size}"))
    return facts


def _size(*paths: Path) -> str:
    """Return the size of files and folders; hard links to one file count once."""
    files = [
        file for path in paths for file in (path, *path.rglob("*")) if file.is_file()
    ]
    stats = {(stat.st_dev, stat.st_ino): stat.st_size for stat in map(Path.stat, files)}
    return size_text(sum(stats.values()))
