"""Check a machine in one command: correctness first, then speed, each step in a process of its own.

    python -m benchmarks.gpu_check [--steps NAME ...] [--profile]

Prints a table while it runs and writes `gpu_check.json`. A step that fails or hangs is reported, and the next one runs.
On a machine without a GPU every step runs on tiny sizes on the CPU: this shows that the check works, nothing about a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu_check_steps import Finding

LIMITS_S = {
    "environment": 60,
    "model logits": 120,
    "losses": 120,
    "cached rows": 90,
    "student steps": 120,
    "loss speed": 90,
    "teacher speed": 150,
    "student speed": 150,
}
"""Steps in their order, most valuable first, with the seconds after which each is stopped."""


@dataclass
class Outcome:
    """Result of a step.

    Attributes:
        problem: last lines of what a failed step printed; empty if it ran to its end.
        findings: what it measured.
    """

    step: str
    seconds: float
    problem: str = ""
    findings: list[Finding] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problem and all(
            found.passed is not False for found in self.findings
        )


def run_step(step: str, limit_s: float, profile: bool, folder: Path) -> Outcome:
    """Run one step in its own process, which returns its findings in a file."""
    path = folder / f"{step.replace(' ', '_')}.json"
    command = [sys.executable, "-m", "benchmarks.gpu_check_steps", step, str(path)]
    if profile:
        command.append("--profile")
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    environment.setdefault("OMP_NUM_THREADS", "2")
    started = time.perf_counter()
    with (folder / "output.txt").open("w+") as output:
        try:
            status = subprocess.run(
                command, stdout=output, stderr=output, env=environment, timeout=limit_s
            ).returncode
        except subprocess.TimeoutExpired:
            status = -1
            output.write(f"\nstopped after {limit_s} s")
        output.seek(0)
        lines = [line for line in output.read().splitlines() if line.strip()]
    outcome = Outcome(step, time.perf_counter() - started)
    if path.exists():
        outcome.findings = [Finding(**found) for found in json.loads(path.read_text())]
    if status:
        outcome.problem = "\n".join(lines[-12:]) or f"status {status}"
    return outcome


def print_outcome(outcome: Outcome) -> None:
    """Print the table rows of a step."""
    verdict = "ok" if outcome.passed else "FAILED"
    print(f"\n{outcome.step}: {verdict}, {outcome.seconds:.1f} s")
    width = max((len(found.name) for found in outcome.findings), default=0)
    for found in outcome.findings:
        mark = {True: "ok  ", False: "FAIL", None: "    "}[found.passed]
        print(f"  {mark} {found.name:{width}}  {found.value}")
        for line in found.details:
            print(f"       {line}")
    for line in outcome.problem.splitlines():
        print(f"  | {line}")
    sys.stdout.flush()


def report(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """Return the content of gpu_check.json."""
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "passed": all(outcome.passed for outcome in outcomes),
        "steps": [
            asdict(outcome) | {"passed": outcome.passed} for outcome in outcomes
        ],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the steps; exit with status 1 if one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", nargs="+", choices=LIMITS_S, default=list(LIMITS_S))
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"))
    parser.add_argument(
        "--profile",
        action="store_true",
        help="list the 20 longest kernels of each speed step",
    )
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        for step in options.steps:
            outcome = run_step(step, LIMITS_S[step], options.profile, Path(folder))
            outcomes.append(outcome)
            print_outcome(outcome)
            # Written after each step: a machine that is taken away leaves what is known by then.
            content = report(outcomes, time.perf_counter() - started)
            options.output.write_text(json.dumps(content, indent=1) + "\n")
    failed = [outcome.step for outcome in outcomes if not outcome.passed]
    print(
        f"\n{len(outcomes) - len(failed)} of {len(outcomes)} steps passed; {options.output} has the figures"
    )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
