"""Reports of stage 2: setup and result, progress, metrics for every logger, Weights & Biases."""

from __future__ import annotations

import contextlib
import logging
import math
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from transformers import PreTrainedTokenizerBase

from nemo_kd.batch import CachedExample
from nemo_kd.config.loss import LossConfig
from nemo_kd.data.batches import example_of
from nemo_kd.data.tokenizer import TokenText, example_lines, trained_text
from nemo_kd.files import print_table
from nemo_kd.mcore.kernels import startup_facts
from nemo_kd.mcore.weights import hf_shapes
from nemo_kd.run.collective import on_rank_zero, rank
from nemo_kd.run.metrics import MetricsFile, Progress, WandbRun
from nemo_kd.student.checkpoint_folder import resumable
from nemo_kd.student.checkpoints import Checkpoints

if TYPE_CHECKING:
    from nemo_kd.student.data import StudentData
    from nemo_kd.student.module import StudentModule

log = logging.getLogger(__name__)

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


def setup_report(student: StudentModule) -> str:
    """Describe model, kernels, steps and data; every rank calls this."""
    config = student.config
    model = config.model
    plan = student.plan
    loss = model.knowledge_distillation
    weights = sum(map(math.prod, hf_shapes(student.architecture).values()))
    parameters = list(student.gpt.parameters())
    held = sum(one.numel() for one in parameters)
    trained = sum(one.numel() for one in parameters if one.requires_grad)
    terms = f"{_weight(loss.sft_loss_weight)} x cross-entropy"
    if loss.trains_on_teacher:
        divergence = loss.custom_loss or f"{loss.kd_loss} (support={loss.support})"
        terms += f" + {_weight(loss.kd_loss_weight)} x {divergence}"
    splits = student.data.splits
    examples = student.data.sample
    batch = model.global_batch_size
    tokens = batch / len(examples) * sum(one.num_tokens for one in examples)
    loss_tokens = student.data.loss_tokens_per_step
    lines = [
        f"student:    {student.architecture.family}, {weights:,} weights; this rank holds {held:,} "
        f"and trains {trained:,}",
        startup_facts(student.kernels, student.groups),
        f"loss:       {terms}",
        *describe_selection(loss),
        f"step:       {batch} examples, about {tokens:,.0f} tokens, {loss_tokens:,.0f} of them in "
        "the loss",
        f"run:        {plan.max_steps:,} steps, {plan.steps_per_epoch:,} per epoch; validation "
        f"every {plan.val_check_interval:,}, checkpoint every {plan.save_interval:,} steps",
    ]
    if student.evaluation is not None:
        lines.append(
            f"eval:       {len(student.evaluation.questions):,} questions of {config.eval.data}, every "
            f"{config.eval.interval:,} steps"
        )
    for split, of_split in splits.items():
        paths = ", ".join(model.data.paths(split))
        lines.append(f"{split + ':':<12}{len(of_split):,} examples from {paths}")
    return "\n".join(lines)


def first_example(data: StudentData, tokenizer: PreTrainedTokenizerBase) -> str:
    """Show the first training example, and the teacher's targets at its first positions."""
    row = data.splits["train"][0]
    example = example_of(row)
    lines = [
        f"first example (record {example.index}), trained between « and »:",
        trained_text(example, tokenizer),
    ]
    if isinstance(row, CachedExample):
        lines += example_lines(row, TokenText(tokenizer), SHOWN_POSITIONS)
    return "\n".join(lines)


def describe_selection(loss: LossConfig) -> list[str]:
    """Describe the positions of the KD term and the cost of selecting them, if it has not all."""
    if loss.selection is None:
        return []
    products = loss.selection.output_products(loss.trains_on_labels)
    return [
        f"selection:  the KD term has the {loss.select} of every example; {products:g} products with "
        "the output layer per loss token instead of 3"
    ]


def _weight(value: float | str) -> str:
    return f"({value})" if isinstance(value, str) else f"{value:g}"


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
    seconds = round(time.monotonic() - run_log.started_s)
    facts = [
        ("trained", f"{run.step:,} of {run_log.max_steps:,} steps"),
        (
            "tokens",
            f"{counts['tokens']:,.0f} ({counts['loss_tokens']:,.0f} in the loss)",
        ),
        ("time", f"{timedelta(seconds=seconds)} with validations and checkpoints"),
    ]
    for name in ("train/loss", "validation/loss", "eval/response_length", "test/loss"):
        split = name.partition("/")[0]
        if name in latest:
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


WANDB_AXES = {
    "*": "step",
    "train/*": "train_step",
    "perf/*": "train_step",
    "validation/*": "eval_step",
    "test/*": "eval_step",
    "eval/*": "eval_step",
}
"""Metrics and the completed steps that their charts run along."""


@dataclass
class RunLog:
    """Shows progress on stderr and passes the metrics to `metrics.jsonl` and all loggers.

    Lightning's own path to the loggers repeats the last value of a metric that a step lacks. A
    resumed run appends to `metrics.jsonl`; where it repeats steps, the later line counts.

    Attributes:
        interval_s: seconds between two lines.
        trainer: has the loggers, and logs every `log_every_n_steps`.
        sinks: files and services that take the metrics, on rank 0.
        latest: metrics of the last step and of the last evaluation of each split, by name.
        progress: its counters since the start of the run; on rank 0, from the first step on.
        started_s: start of the training on the monotonic clock.
    """

    log_dir: Path
    max_steps: int
    interval_s: float
    trainer: pl.Trainer
    sinks: list[Any] = field(default_factory=list)
    latest: dict[str, float] = field(default_factory=dict)
    progress: Progress | None = None
    started_s: float = 0.0

    def __post_init__(self) -> None:
        self.metrics_path = self.log_dir / "metrics" / "metrics.jsonl"
        if rank() == 0:
            self.sinks.append(MetricsFile(self.metrics_path))

    def start(self, step: int, peak_flops: float | None) -> None:
        """Begin the training after `step`."""
        self.started_s = time.monotonic()
        if rank() == 0:
            self.progress = Progress(
                "training",
                self.max_steps,
                self.interval_s,
                peak_flops=peak_flops,
                unit="steps",
                start={"steps": step},
            )

    def step(
        self, step: int, metrics: dict[str, float], counted: dict[str, float]
    ) -> None:
        """Log a training step; `counted` are names of Counts."""
        self.latest |= metrics
        if step % self.trainer.log_every_n_steps == 0:
            self._log(step, metrics)
        if self.progress is not None:
            self.progress.latest = metrics
            self.progress.add(steps=1, **counted)

    def evaluation(
        self, split: str, step: int, metrics: dict[str, float], seconds: float
    ) -> None:
        """Log a validation, a test, or an evaluation of responses (`eval`)."""
        self.latest |= metrics
        self._log(step, metrics)
        text = f"{split} after step {step:,}: {format_metrics(metrics, split)}, {seconds:.1f} s"
        if self.progress is not None:
            self.progress.note(text)

    def end(self) -> None:
        """End the training, also after an error."""
        if self.progress is not None:
            self.progress.finish()
            self.progress.close()

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        for sink in self.sinks:
            sink.log({"step": step, **metrics})
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step)
            logger.save()


def format_metrics(metrics: dict[str, float], section: str) -> str:
    """Return the metrics of a section as `loss 1.2345, sft_loss ...`, without single sources."""
    shown = []
    for name, value in metrics.items():
        found, _, part = name.partition("/")
        if found == section and "/" not in part and part != "skipped_steps":
            shown.append(f"{part} {value:.4f}")
    return ", ".join(shown) or "no token counts in the loss"


def start_wandb(
    run_log: RunLog,
    arguments: dict[str, Any],
    config: dict[str, Any],
    stack: contextlib.ExitStack,
) -> None:
    """Start a run on rank 0 that ends with `stack`; every rank calls this.

    Args:
        arguments: those of WandbRun.

    Raises:
        ConfigError: on every rank, if it cannot start.
    """
    settings = {"dir": str(run_log.log_dir), "config": config, **arguments}

    def start() -> None:
        run = WandbRun(settings, WANDB_AXES)
        stack.push(run.finish)
        run_log.sinks.append(run)

    on_rank_zero(start)
