"""Reports of stage 2: setup, losses of the first step, and the result or where the run stopped."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from nemo_kd.batch import CachedExample
from nemo_kd.config.student import TrainStudentConfig
from nemo_kd.data.batches import Rows, example_of
from nemo_kd.data.text import TokenText, example_lines, trained_text
from nemo_kd.mcore.weights import hf_shapes
from nemo_kd.run.metrics import Counters
from nemo_kd.student.checkpoint_folder import checkpoints, read_contents
from nemo_kd.student.checkpoints import Checkpoints
from nemo_kd.student.progress import RunLog, format_metrics
from nemo_kd.student.schedule import TrainingPlan
from nemo_kd.terminal import print_table, size_text

if TYPE_CHECKING:
    from nemo_kd.student.module import StudentModule

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


def setup_report(
    config: TrainStudentConfig,
    student: StudentModule,
    plan: TrainingPlan,
    splits: Mapping[str, Rows],
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """Describe model, layout, steps and data, and show the first example; every rank calls this."""
    model = config.model
    loss = model.knowledge_distillation
    sizes = student.groups.layout()
    del sizes["replicas in lockstep"]
    layout = " x ".join(f"{name} {size}" for name, size in sizes.items())
    layout += f" = {math.prod(sizes.values())} ranks"
    if model.chunks_per_stage > 1:
        layout += f", stages in {model.chunks_per_stage} parts each"
    if model.expert_model_parallel_size > 1:
        layout += f", experts over {model.expert_model_parallel_size}"
    if model.sequence_parallel and model.tensor_model_parallel_size > 1:
        layout += ", sequence parallel"
    terms = [f"{loss.sft_loss_weight:g} x cross-entropy"]
    if loss.kd_loss_weight:
        divergence = loss.custom_loss or f"{loss.kd_loss} (support={loss.support})"
        terms.append(f"{loss.kd_loss_weight:g} x {divergence}")
    rows = splits["train"]
    spread = np.unique(np.linspace(0, len(rows) - 1, SAMPLED_ROWS).astype(int)).tolist()
    examples = [example_of(rows[position]) for position in spread]
    tokens = np.mean([example.num_tokens for example in examples])
    loss_tokens = np.mean([example.num_loss_tokens for example in examples])
    batch = model.global_batch_size
    schedule = f"{plan.max_steps:,} steps, {plan.steps_per_epoch:,} per epoch; "
    if config.validates:
        schedule += f"validation every {plan.val_check_interval:,}, "
    facts = {
        "student": _parameters(student),
        "layout": f"{layout}; {config.trainer.precision}, {model.optim.name}",
        "loss": " + ".join(terms),
        "step": f"{batch} examples, about {batch * tokens:,.0f} tokens, "
        f"{batch * loss_tokens:,.0f} of them in the loss",
        "run": f"{schedule}checkpoint every {plan.save_interval:,} steps",
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


def _parameters(student: StudentModule) -> str:
    parameters = list(student.gpt.parameters())
    held = sum(one.numel() for one in parameters)
    trained = sum(one.numel() for one in parameters if one.requires_grad)
    counts = torch.tensor([held, trained, -held, -trained], device=student.groups.device)
    torch.distributed.all_reduce(counts, torch.distributed.ReduceOp.MAX)
    most_held, most_trained, least_held, least_trained = map(abs, counts.tolist())
    total = sum(map(math.prod, hf_shapes(student.architecture).values()))

    def span(least: int, most: int) -> str:
        return f"{most:,}" if least == most else f"{least:,} to {most:,}"

    return (
        f"{student.architecture.family}, {total:,} weights; a rank holds "
        f"{span(least_held, most_held)} and trains {span(least_trained, most_trained)}"
    )


def first_step_report(
    means: Mapping[str, float], vocab_size: int
) -> tuple[str, str | None]:
    """Return a text about the losses of the initial weights, and a warning if they look wrong."""
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
    if ce <= uniform + 1:
        return text, None
    return text, (
        f"the student starts at a cross-entropy of {ce:.3f}, worse than a uniform guess "
        f"({uniform:.3f}): check that its weights, tokenizer and chat template belong together"
    )


def stop_report(settings: Mapping[str, Any], trainer: pl.Trainer | None) -> str:
    """Return the step at which a run was stopped, and how to resume it."""
    if trainer is None:
        return "before the first step of this run"
    at = f"at step {trainer.global_step:,} of {_run_log(trainer).max_steps:,}"
    for folder in checkpoints(
        Path(settings["checkpoint_callback_params"]["dirpath"] or ".")
    ):
        contents = read_contents(folder)
        if contents is not None and contents.resumable:
            last = f"the last checkpoint, of step {contents.step:,}: {folder}"
            if settings["resume_if_exists"]:
                return f"{at}; the same command resumes from {last}"
            return f"{at}; exp_manager.resume_if_exists=true resumes from {last}"
    return f"{at}; there is no checkpoint, so the same command starts over"


def end_report(
    trainer: pl.Trainer, kept: Checkpoints | None, totals: Counters
) -> StudentRun:
    """Print a summary of the run and the commands that come next, on rank 0.

    Args:
        kept: None if the run writes no checkpoints.
        totals: sums over the steps of this process.
    """
    run_log = _run_log(trainer)
    archive = (
        kept.archive if kept is not None and kept.params.save_nemo_on_train_end else None
    )
    run = StudentRun(run_log.log_dir, trainer.global_step, archive)
    if not trainer.is_global_zero:
        return run
    latest = run_log.latest
    steps = f"{totals.steps:,.0f} steps, up to step {run.step:,} of {run_log.max_steps:,}"
    facts = [("trained", steps)]
    if totals.steps:
        seconds = max(run_log.seconds, 1e-9)
        time = f"{timedelta(seconds=round(seconds))} with validations and checkpoints"
        facts += [
            ("tokens", f"{totals.tokens:,.0f} ({totals.loss_tokens:,.0f} in the loss)"),
            ("time", f"{time}, {totals.tokens / seconds:,.0f} tokens/s"),
            ("last step", format_metrics(latest, "train")),
        ]
    if "val_loss" in latest:
        facts.append(("last validation", format_metrics(latest, "validation")))
    if kept is not None and kept.best is not None:
        contents = read_contents(kept.best)
        step = "" if contents is None else f" at step {contents.step:,}"
        facts.append(
            (f"best {kept.params.monitor}", f"{kept.scores[kept.best]:.4f}{step}")
        )
    if "test/loss" in latest:
        facts.append(("test", format_metrics(latest, "test")))
    facts += [] if kept is None else _files(kept)
    facts.append(("metrics", str(run_log.metrics_path)))
    facts.append(("next", f"plot_runs {shlex.quote(str(run.folder))}"))
    print_table(sorted(facts, key=lambda fact: fact[0] == "next"))
    return run


def _run_log(trainer: pl.Trainer) -> RunLog:
    return next(one for one in trainer.callbacks if isinstance(one, RunLog))


def _files(kept: Checkpoints) -> list[tuple[str, str]]:
    """List what the run wrote, with sizes, and the command that converts its archive."""
    facts: list[tuple[str, str]] = []
    convert: list[tuple[str, str]] = []
    last = kept.archive
    best = last.with_name(f"{last.stem}-best.nemo")
    last_name = "best weights" if kept.params.save_best_model else "last weights"
    for name, archive in ((last_name, last), ("best weights", best)):
        if not archive.exists():
            continue
        facts.append((name, f"{archive}, {_size(archive)}"))
        folder = archive.with_name(f"{archive.stem}-hf")
        # An older folder is from an earlier part of the run, which had export.hf=true.
        if folder.exists() and folder.stat().st_mtime >= archive.stat().st_mtime:
            facts.append((name, f"{folder}, {_size(folder)}"))
        else:
            source = shlex.quote(str(archive))
            convert = [
                (
                    "next",
                    f"convert_checkpoint input_path={source} output_path=student_hf/",
                )
            ]
    folders = checkpoints(kept.dirpath)
    if folders:
        facts.append(
            ("checkpoints", f"{len(folders)} in {kept.dirpath}, {_size(*folders)}")
        )
    return facts + convert


def _size(*paths: Path) -> str:
    """Return the size of files and folders; hard links to one file count once."""
    files = [
        file for path in paths for file in (path, *path.rglob("*")) if file.is_file()
    ]
    stats = {(stat.st_dev, stat.st_ino): stat.st_size for stat in map(Path.stat, files)}
    return size_text(sum(stats.values()))
