"""CPU seconds that both commands take to start, on a tiny model.

    OMP_NUM_THREADS=1 python -m benchmarks.startup

Each row is a process of its own; its CPU time is read from /proc when the line appears, or at its end. The processes
keep compiled modules (__pycache__), as an installation has them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.tiny_data import write_chat_dataset
from tests.tiny_models import save_hf_model

TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """Return user and system time of a process and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / TICKS


def measure(
    module: str, arguments: list[str], line: str | None
) -> tuple[float, float]:
    """Return CPU and wall seconds until a line of output matches, or, with None, until the last line.

    Raises:
        RuntimeError: no line matches.
    """
    command = [sys.executable, "-m", f"nemo_kd.cli.{module}", *arguments]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    started_s = time.perf_counter()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    ) as process:
        found = (0.0, 0.0)
        matched = False
        text = ""
        for text in process.stdout or []:
            if not matched:
                wall_s = time.perf_counter() - started_s
                found = (cpu_seconds(process.pid), wall_s)
                matched = line is not None and re.search(line, text) is not None
    if not matched and line is not None:
        raise RuntimeError(
            f"{' '.join(command)}: no line matches {line!r}; last: {text}"
        )
    return found


def main() -> None:
    """Print the table as Markdown."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = save_hf_model("llama2", folder / "model")
        dataset = write_chat_dataset(folder / "data.jsonl", 24)
        cache = folder / "cache" / "c_CHUNK_ID.jsonl"
        shared = [f"model={model}", "trainer.devices=1", "trainer.precision=32"]
        stage_1 = [*shared, f"data={dataset}", f"output={cache}", "top_k=8"]
        stage_2 = [
            *shared, f"data={cache}", f"validation={cache}", f"output={folder / 'run'}", "model.global_batch_size=4",
            "trainer.knowledge_distillation.max_steps=1", "exp_manager.create_checkpoint_callback=false",
            "exp_manager.resume_if_exists=false",
        ]  # fmt: skip
        print("| command | until | CPU s | wall s |\n|---|---|---|---|")
        for module, arguments, step in (
            ("compute_topk_logits", stage_1, "^teacher: "),
            (
                "train_gpt_knowledge_distillation",
                stage_2,
                "^training: .* 1/1 |^training: 1/1 ",
            ),
        ):
            for until, given, line in (
                ("the end of `--help`", ["--help"], None),
                ("an error of the input", [*arguments, "top_kk=1"], "error:"),
                ("the first line", arguments, "."),
                ("the model is built", arguments, "^layout: "),
                ("the first step", arguments, step),
            ):
                if arguments is stage_1:
                    shutil.rmtree(cache.parent, ignore_errors=True)
                shutil.rmtree(folder / "run", ignore_errors=True)
                cpu_s, wall_s = measure(module, given, line)
                print(
                    f"| `{module}` | {until} | {cpu_s:.1f} | {wall_s:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
