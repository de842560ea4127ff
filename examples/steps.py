"""Steps of an example: commands that run once, in one folder, with one setting."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parent


class Steps:
    """Steps whose files lie in one folder; a rerun skips those that are done.

    Args:
        settings: a dataclass; a folder holds the steps of one setting only.
    """

    name = "steps"
    """Name of the example in messages."""

    def __init__(self, folder: Path, settings: Any) -> None:
        self.folder = folder.absolute()
        self.settings = settings
        self.times_s: dict[str, float] = {}

    def claim_folder(self) -> None:
        """Write the settings into the folder, or check that its steps were made with the same."""
        file = self.folder / "settings.json"
        now = asdict(self.settings)
        if not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            if any(self.folder.iterdir()):
                sys.exit(
                    f"{self.name}: {self.folder} holds other files; "
                    "give an --output-dir that is new or empty"
                )
            file.write_text(json.dumps(now, indent=2) + "\n")
        before = json.loads(file.read_text())
        changes = [
            f"{key} {before.get(key)} (now {now[key]})"
            for key in now
            if before.get(key) != now[key]
        ]
        if changes:
            sys.exit(
                f"{self.name}: the steps in {self.folder} were made with {', '.join(changes)}; "
                "give another --output-dir"
            )

    def archive(self, name: str) -> Path:
        """Return the .nemo archive of a training run."""
        return self.folder / name / "checkpoints" / f"{name}.nemo"

    def command(self, step: str, command: str, *keys: str) -> None:
        """Run a command unless it is done; record its duration."""
        done = self.folder / f"{step}.done"
        if done.exists():
            self.times_s[step] = float(done.read_text())
            print(f"{step}: done before")
            return
        say(step)
        print(
            " \\\n    ".join(shlex.quote(word) for word in [command, *keys]),
            flush=True,
        )
        started_s = time.perf_counter()
        line = [sys.executable, str(EXAMPLES / f"{command}.py"), *keys]
        status = subprocess.run(line, check=False).returncode
        if status:
            sys.exit(
                f"{self.name}: the step {step} failed with status {status}; see its message above"
            )
        self.times_s[step] = round(time.perf_counter() - started_s, 1)
        done.write_text(str(self.times_s[step]))

    def curve(self, name: str, metric: str) -> dict[int, float]:
        """Return {step: value} of a metric of a training run."""
        file = self.folder / name / "metrics" / "metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        # A resumed run repeats steps; the later row counts.
        return {row["step"]: row[metric] for row in rows if metric in row}


def quoted(path: Path) -> str:
    """Quote a path for Hydra's grammar, which gives some characters a meaning."""
    text = str(path)
    if re.fullmatch(r"[A-Za-z0-9_/.+-]+", text):
        return text
    return "'" + text.replace("'", "\\'") + "'"


def say(title: str) -> None:
    """Print the title of a step."""
    print(f"\n=== {title}", flush=True)
