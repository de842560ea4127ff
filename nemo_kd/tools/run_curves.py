"""Draw curves of training runs side by side."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import orjson

from nemo_kd.config import UserInputError

METRICS_FILE = Path("metrics") / "metrics.jsonl"
SECTIONS = ("validation", "train", "eval", "perf", "test")
"""One picture per section of metrics named SECTION/...; those without one belong to train."""
COUNTERS = ("consumed_samples", "epoch", "train_step", "eval_step")
"""Metrics that only count steps; drawn if a pattern asks for them."""
Curves = dict[str, dict[int, float]]
"""metric -> step -> value."""


class RunError(UserInputError):
    """A path is not a run, or its metrics cannot be read."""


def read_curves(path: Path) -> Curves:
    """Read the metrics of a run, given its folder or its metrics file.

    If a resumed run repeats a step, the later line counts.

    Raises:
        RunError: there is no such file, or a line in it is not a JSON object with a step.
    """
    file = path / METRICS_FILE if path.is_dir() else path
    if not file.is_file():
        raise RunError(
            f"{path}: not a run: there is no {file}; give a run's exp_manager.explicit_log_dir, or a "
            "metrics.jsonl"
        )
    curves: Curves = {}
    lines = file.read_bytes().split(b"\n")[:-1]  # a killed run may leave half a line
    for number, line in enumerate(lines, start=1):
        try:
            metrics = orjson.loads(line)
            step = metrics.pop("step")
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise RunError(
                f"{file}:{number}: not an object with a step ({error}); take the line out"
            ) from error
        for name, value in metrics.items():
            if name != "time" and isinstance(value, int | float):
                curves.setdefault(name, {})[step] = value
    return {name: dict(sorted(curve.items())) for name, curve in curves.items()}


def plot_runs(
    paths: Sequence[Path], output: Path, pattern: str | None = None
) -> list[Path]:
    """Write a picture per section, OUTPUT/validation.png, train.png ...

    Every metric that any of the runs has gets one diagram with all runs.

    Args:
        pattern: regular expression that the metrics' names must contain; None draws all but
            COUNTERS.

    Raises:
        RunError: as `read_curves`; no metric is left.
    """
    runs = {str(path): read_curves(path) for path in paths}
    sections: dict[str, list[str]] = {}
    for name in sorted(set().union(*runs.values())):
        if re.search(pattern, name) if pattern else name not in COUNTERS:
            section = name.partition("/")[0]
            section = section if section in SECTIONS else "train"
            sections.setdefault(section, []).append(name)
    if not sections:
        raise RunError(f"--metrics: no metric of these runs contains {pattern!r}")
    output.mkdir(parents=True, exist_ok=True)
    return [
        _draw(runs, names, output / f"{section}.png")
        for section, names in sorted(sections.items())
    ]


def _draw(runs: dict[str, Curves], names: Sequence[str], path: Path) -> Path:
    from matplotlib.figure import Figure  # not needed for training

    figure = Figure(figsize=(8, 3.2 * len(names)), layout="constrained")
    grid = figure.subplots(len(names), squeeze=False)
    for axes, name in zip(grid.flat, names, strict=True):
        for label, curves in runs.items():
            curve = curves.get(name, {})
            marker = "o" if len(curve) < 30 else None
            axes.plot([*curve], [*curve.values()], label=label, marker=marker)
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
    grid[0, 0].legend()
    figure.savefig(path, dpi=130)
    return path
