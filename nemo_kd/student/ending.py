"""Tell at the end of a run of stage 2 what it has left, or where it was stopped."""

from __future__ import annotations

import shlex
from datetime import timedelta
from pathlib import Path
from stat import S_ISREG
from typing import Any

import lightning.pytorch as pl

from nemo_kd.run.metrics import Counters
from nemo_kd.student.checkpoint_folder import checkpoints, read_contents
from nemo_kd.student.checkpoints import Checkpoints
from nemo_kd.student.logging import JsonlLogger, RunLog, listed
from nemo_kd.terminal import print_table, size_text


class Ending:
    """What there is to tell about a run that ends.

    Attributes:
        trainer: None until there is one.
        checkpoints: None if the run writes none.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.trainer: pl.Trainer | None = None
        self.checkpoints: Checkpoints | None = None
        self.max_steps = 0

    def where_stopped(self) -> str:
        """Return the step that the run was stopped at, and how to go on."""
        if self.trainer is None:
            return "before the first step of this run"
        step = self.trainer.global_step
        at = f"at step {step:,} of {self.max_steps:,}"
        found = _latest(Path(self.settings["checkpoint_callback_params"]["dirpath"] or "."))
        if found is None:
            return f"{at}; no checkpoint is there: the same command starts over"
        folder, saved_step = found
        if not self.settings["resume_if_exists"]:
            return (
                f"{at}; the last checkpoint is of step {saved_step:,}: {folder}; go on from it with "
                "exp_manager.resume_if_exists=true"
            )
        return f"{at}; the same command goes on from the last checkpoint, of step {saved_step:,}: {folder}"

    def show_summary(self, totals: Counters) -> None:
        """Print what `summary` returns, on rank 0."""
        if self.trainer is None or not self.trainer.is_global_zero:
            return
        lines, commands = self.summary(totals)
        print_table([*lines, *(("next", command) for command in commands)])

    def summary(self, totals: Counters) -> tuple[list[tuple[str, str]], list[str]]:
        """Return what this run did and left as a table, and the commands that come next; rank 0 only.

        Args:
            totals: of the steps of this process.
        """
        assert self.trainer is not None
        callbacks: list[Any] = self.trainer.callbacks
        run_log = next(one for one in callbacks if isinstance(one, RunLog))
        step = self.trainer.global_step
        lines = [
            ("trained", f"{totals.steps:,.0f} steps, up to step {step:,} of {self.max_steps:,}")
        ]
        if totals.steps:
            lines += [
                ("tokens", f"{totals.tokens:,.0f} ({totals.loss_tokens:,.0f} in the loss)"),
                (
                    "time",
                    f"{timedelta(seconds=round(run_log.seconds))} with validations and checkpoints, "
                    f"{totals.tokens / max(run_log.seconds, 1e-9):,.0f} tokens/s",
                ),
                ("last step", listed(run_log.latest, "train")),
            ]
        if "val_loss" in run_log.latest:
            lines.append(("last validation", listed(run_log.latest, "validation")))
        lines += _best(self.checkpoints, run_log)
        if "test/loss" in run_log.latest:
            lines.append(("test", listed(run_log.latest, "test")))
        written, next_commands = _written(self.checkpoints)
        metrics = next(one.path for one in self.trainer.loggers if isinstance(one, JsonlLogger))
        log_dir = metrics.parent.parent
        lines += [*written, ("metrics", str(metrics))]
        return lines, [*next_commands, f"plot_runs {shlex.quote(str(log_dir))}"]


def _best(kept: Checkpoints | None, run_log: RunLog) -> list[tuple[str, str]]:
    """Return the best value over all resumed parts, or of this process without checkpoints."""
    best = kept.best if kept is not None else None
    contents = read_contents(best) if best is not None else None
    if kept is not None and best is not None and contents is not None:
        score = f"{kept.scores[best]:.4f} at step {contents.step:,}"
        return [(f"best {kept.params.monitor}", score)]
    if run_log.best is not None:
        step, loss = run_log.best
        return [("best val_loss", f"{loss:.4f} at step {step:,}")]
    return []


def _written(kept: Checkpoints | None) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the paths that there are with their sizes, and the commands that use them."""
    if kept is None:
        return [], []
    lines: list[tuple[str, str]] = []
    commands: list[str] = []
    last = kept.archive
    best = last.with_name(f"{last.stem}-best.nemo")
    last_name = "best weights" if kept.params.save_best_model else "last weights"
    for name, archive in ((last_name, last), ("best weights", best)):
        if not archive.exists():
            continue
        folder = archive.with_name(f"{archive.stem}-hf")
        # An older folder is that of an earlier part of the run, which had export.hf=true.
        has_folder = folder.exists() and folder.stat().st_mtime >= archive.stat().st_mtime
        paths = [archive, folder] if has_folder else [archive]
        lines += [(name, f"{path}, {size_text(_num_bytes(path))}") for path in paths]
        if not has_folder:
            commands = [
                f"convert_checkpoint input_path={shlex.quote(str(archive))} output_path=student_hf/"
            ]
    parent = kept.dirpath
    folders = checkpoints(parent)
    if folders:
        lines.append(
            ("checkpoints", f"{len(folders)} in {parent}, {size_text(_num_bytes(*folders))}")
        )
    return lines, commands


def _num_bytes(*paths: Path) -> int:
    """Return the size of files and folders; files with several names count once."""
    files = (file for path in paths for file in ([path] if path.is_file() else path.rglob("*")))
    sizes = {
        (stat.st_dev, stat.st_ino): stat.st_size
        for stat in map(Path.stat, files)
        if S_ISREG(stat.st_mode)
    }
    return sum(sizes.values())


def _latest(parent: Path) -> tuple[Path, int] | None:
    """Return the checkpoint that the next run resumes, and its step."""
    for folder in checkpoints(parent):
        contents = read_contents(folder)
        if contents is not None and contents.resumable:
            return folder, contents.step
    return None
