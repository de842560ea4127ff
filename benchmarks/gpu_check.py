"""Check a machine in one command: correctness first, then speed, each step in a process of its own.

    python -m benchmarks.gpu_check [--steps NAME ...] [--minutes 8] [--output gpu_check.json]

Prints a table while it runs and writes `gpu_check.json` after every step. A step that fails or hangs is reported, and
the next one runs. The exit status is 1 if anything failed. On a machine without a GPU every step runs on tiny sizes on
the CPU: this shows that the check works, nothing about a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

PLAN_S = {
    "environment": 40,
    "model logits": 45,
    "losses": 55,
    "cached rows": 45,
    "student steps": 55,
    "loss speed": 60,
    "teacher speed": 110,
    "student speed": 70,
}
"""Steps in their order, most valuable first, with the seconds planned for each: 240 for correctness, 240 for speed.

A step may also use what the steps before it saved.
"""
PLAN_MINUTES = sum(PLAN_S.values()) / 60
GRACE_S = 5.0
SHOWN_LINES, KEPT_LINES = 15, 200


@dataclass
class Finding:
    """Result of one check of a step.

    Attributes:
        figures: values by unit ("ms", "TFLOP/s") or by name ("relative error", "driver").
        limits: largest value allowed of some figures.
        details: further lines, for example kernels.
        problem: last lines of the traceback if the check raised an error.
    """

    figures: dict[str, float | str] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    details: list[str] = field(default_factory=list)
    problem: str = ""

    @property
    def passed(self) -> bool | None:
        """None if nothing is required of the figures."""
        if self.problem:
            return False
        if not self.limits:
            return None
        return all(
            float(self.figures[name]) <= limit for name, limit in self.limits.items()
        )


@dataclass
class Outcome:
    """Result of a step.

    Attributes:
        problem: last lines of its output if it did not run to its end.
        findings: by name.
    """

    step: str
    seconds: float
    problem: str = ""
    findings: dict[str, Finding] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not self.problem and all(
            found.passed is not False for found in self.findings.values()
        )

    def as_dict(self) -> dict[str, Any]:
        findings = {
            name: {"passed": found.passed, **asdict(found)}
            for name, found in self.findings.items()
        }
        return {"passed": self.passed, **asdict(self), "findings": findings}


def run_step(step: str, limit_s: float, folder: Path) -> Outcome:
    """Run one step in its own process, which returns its findings in a file; a hanging one shows where."""
    result = folder / f"{step.replace(' ', '_')}.json"
    command = [
        sys.executable,
        "-X",
        "faulthandler",
        "-m",
        "benchmarks.gpu_check_steps",
    ]
    command += [step, str(result)]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    environment.setdefault("OMP_NUM_THREADS", "2")
    started_s = time.monotonic()
    with (folder / "output.txt").open("w+", errors="replace") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = -signal.SIGABRT
            process.send_signal(signal.SIGABRT)  # prints the stack of every thread
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        finally:
            # Its own processes too: one that is left would hold the GPU's memory.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        lines = [line for line in output.read().splitlines() if line.strip()]
    outcome = Outcome(step, round(time.monotonic() - started_s, 1))
    if result.exists():
        found = json.loads(result.read_text())
        outcome.findings = {name: Finding(**value) for name, value in found.items()}
    if status:
        reason = f"exit status {status}"
        if outcome.seconds >= limit_s:
            reason = f"stopped after {limit_s:.0f} s"
        outcome.problem = "\n".join([*lines[-KEPT_LINES:], reason])
    return outcome


def print_outcome(outcome: Outcome) -> None:
    """Print the table rows of a step."""
    verdict = "ok" if outcome.passed else "FAILED"
    print(f"\n{outcome.step}: {verdict}, {outcome.seconds:.1f} s")
    width = max(map(len, outcome.findings), default=0)
    for name, found in outcome.findings.items():
        mark = {True: "ok", False: "FAIL", None: ""}[found.passed]
        figures = [
            figure_text(what, value, found.limits.get(what))
            for what, value in found.figures.items()
        ]
        print(f"  {mark:4} {name:{width}}  {', '.join(figures)}".rstrip())
        for line in (*found.details, *_last(found.problem)):
            print(f"       {line}")
    for line in _last(outcome.problem):
        print(f"  | {line}")
    sys.stdout.flush()


def figure_text(what: str, value: float | str, limit: float | None) -> str:
    """Return a figure with its unit, or with its name and limit."""
    if isinstance(value, str):
        return f"{what} {value}"
    if limit is not None:
        return f"{what} {value:.2g} (limit {limit:g})"
    if isinstance(value, int) or not math.isfinite(value) or abs(value) >= 1000:
        return f"{value:,.0f} {what}"
    return f"{value:.3g} {what}"


def _last(text: str) -> list[str]:
    return text.splitlines()[-SHOWN_LINES:]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the steps; exit with status 1 if one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", nargs="+", choices=PLAN_S, default=list(PLAN_S))
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"))
    parser.add_argument(
        "--minutes",
        type=float,
        default=PLAN_MINUTES,
        help="longest time for all steps together, divided as planned; default %(default)g",
    )
    options = parser.parse_args(arguments)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # an aborted step leaves no core
    started_s = time.monotonic()
    date = datetime.now().astimezone().isoformat(timespec="seconds")
    outcomes: list[Outcome] = []
    end_s = started_s
    with tempfile.TemporaryDirectory() as folder:
        for step in options.steps:
            end_s += PLAN_S[step] * options.minutes / PLAN_MINUTES
            limit_s = max(1.0, end_s - time.monotonic() - GRACE_S)
            outcome = run_step(step, limit_s, Path(folder))
            outcomes.append(outcome)
            print_outcome(outcome)
            # Written after each step: a machine that is taken away leaves what is known by then.
            content = {
                "date": date,
                "seconds": round(time.monotonic() - started_s, 1),
                "passed": all(one.passed for one in outcomes),
                "steps": [one.as_dict() for one in outcomes],
            }
            options.output.write_text(json.dumps(content, indent=1) + "\n")
    failed = [one.step for one in outcomes if not one.passed]
    print(
        f"\n{len(outcomes) - len(failed)} of {len(outcomes)} steps passed in "
        f"{time.monotonic() - started_s:.0f} s; {options.output} has all figures"
    )
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
