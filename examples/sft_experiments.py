"""Python parts of scripts/run_sft_experiments.sh: subsets, the bundled task, and the report.

    python examples/sft_experiments.py subset train.jsonl subset.jsonl --size 128
    python examples/sft_experiments.py count train.parquet
    python examples/sft_experiments.py bundled sft_experiments/task
    python examples/sft_experiments.py report sft_experiments

`report` reads RESULTS/sft_<size>/metrics and writes report.md and accuracy.png there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent
sys.path[:0] = [str(EXAMPLES.parent), str(EXAMPLES)]

SIZES = ("128", "256", "512", "1024", "full", "filtered")
COLUMNS = (
    "size",
    "records",
    "steps",
    "accuracy",
    "best",
    "at step",
    "tokens",
    "entropy",
)
Curve = dict[int, float]


def write_subset(source: str, target: Path, size: int, seed: int) -> None:
    """Write `size` records, byte for byte; a larger subset of the same seed contains a smaller.

    Records are ordered by a hash, so that neither the file's order nor later records matter.
    """
    from nemo_kd.data.records import open_records

    records = open_records(source)
    lines = [records.raw(index).rstrip(b"\r\n") for index in records.indices]
    if size > len(lines):
        sys.exit(
            f"error: --size: {size} records were asked for, but {source} has {len(lines)}; leave "
            "this size out"
        )

    def place(line: bytes) -> bytes:
        return hashlib.sha256(b"%d " % seed + line).digest()

    chosen = sorted(lines, key=place)[:size]
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_bytes(b"".join(line + b"\n" for line in chosen))
    os.replace(temporary, target)


def write_bundled_task(folder: Path) -> None:
    """Write word problems, and a small untrained model with a tokenizer for them."""
    import torch
    from quickstart import CHAT_TEMPLATE, train_tokenizer
    from reasoning_dataset import write_dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config
    from transformers.utils import logging

    if (folder / "untrained").exists():
        return
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    write_dataset(folder / "data")
    other_problems = {"train": 12_000}
    write_dataset(folder / "other_data", other_problems, wrong_share=0.5, seed=4321)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(folder / "data" / "train.jsonl", 512),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(1234)
    model = AutoModelForCausalLM.from_config(config)
    unfinished = folder / ".untrained.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    tokenizer.save_pretrained(unfinished)
    model.save_pretrained(unfinished)
    unfinished.rename(folder / "untrained")


def write_report(results: Path) -> None:
    """Draw the accuracies of all sizes over the steps, and print and write their table."""
    from nemo_kd.tools.run_curves import read_curves

    runs = {}
    for size in SIZES:
        if (results / f"sft_{size}" / "metrics" / "metrics.jsonl").exists():
            curves = read_curves(results / f"sft_{size}")
            if "eval/accuracy" in curves:
                runs[size] = curves
    if not runs:
        sys.exit(f"error: {results}: no sft_<size> in it has been evaluated")
    rows = [describe_run(results, size, curves) for size, curves in runs.items()]
    num_examples = round(
        max(last(curves["eval/num_examples"]) for curves in runs.values())
    )
    lines = [
        *table(rows),
        "",
        f"Accuracy on {num_examples} questions after the last step, with its standard error; tokens "
        "and entropy (nats per token) are means over the responses.",
    ]
    lines += compare_filtered(results, rows)
    text = "\n".join(lines)
    # Jobs of a cluster may write it at the same time.
    new = results / f"report.{os.uname().nodename}.{os.getpid()}.md"
    new.write_text(text + "\n")
    new.replace(results / "report.md")
    draw({size: curves["eval/accuracy"] for size, curves in runs.items()}, results)
    print(text)
    print(f"\n{results / 'accuracy.png'}")


def describe_run(results: Path, size: str, curves: dict[str, Curve]) -> dict[str, str]:
    accuracy = curves["eval/accuracy"]
    best_step = max(accuracy, key=lambda step: (accuracy[step], -step))
    final = last(accuracy)
    error = math.sqrt(final * (1 - final) / last(curves["eval/num_examples"]))
    is_done = (results / f"sft_{size}" / "final").exists()
    values = (
        size if is_done else f"{size} (unfinished)",
        f"{num_records(results, size):,}",
        f"{max(accuracy):,}",
        f"{final:.1%} ± {error:.1%}",
        f"{accuracy[best_step]:.1%}",
        f"{best_step:,}",
        f"{last(curves['eval/response_length']):.1f}",
        f"{last(curves['eval/entropy']):.3f}",
    )
    return dict(zip(COLUMNS, values, strict=True))


def num_records(results: Path, size: str) -> int:
    """Count the training records of a run, at the path that its configuration names."""
    from omegaconf import OmegaConf

    config = OmegaConf.load(results / f"sft_{size}" / "config.yaml")
    return count_records(config.model.data.data_prefix.train)


def count_records(path: str) -> int:
    from nemo_kd.data.records import open_records

    return len(open_records(path).indices)


def compare_filtered(results: Path, rows: list[dict[str, str]]) -> list[str]:
    """Return a table of all records and of the correct ones; nothing before both were trained on."""
    chosen = [row for row in rows if row["size"] in ("full", "filtered")]
    statistics = results / "data" / "filtered.stats.json"
    if len(chosen) < 2 or not statistics.exists():
        return []
    found = json.loads(statistics.read_text())
    retention = {"full": "100.0%", "filtered": f"{found['retention']:.1%}"}
    compared = [
        {
            "size": row["size"],
            "records": row["records"],
            "retention": retention[row["size"]],
        }
        | {name: row[name] for name in ("steps", "accuracy", "best")}
        for row in chosen
    ]
    dropped = ", ".join(
        f"{count:,} {reason}" for reason, count in found["reasons"].items() if count
    )
    return ["", *table(compared), "", f"Dropped: {dropped or 'none'}."]


def table(rows: list[dict[str, str]]) -> list[str]:
    """Return a Markdown table."""
    widths = {
        name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]
    }

    def line(values: dict[str, str]) -> str:
        return (
            "| "
            + " | ".join(values[name].rjust(widths[name]) for name in widths)
            + " |"
        )

    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths.values()) + "|"
    return [line({name: name for name in widths}), rule, *map(line, rows)]


def draw(accuracies: dict[str, Curve], results: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for size, accuracy in accuracies.items():
        percent = [100 * value for value in accuracy.values()]
        style = "--" if size == "filtered" else "-"
        axes.plot([*accuracy], percent, style, marker="o", markersize=4, label=size)
    axes.set(
        xlabel="step",
        ylabel="accuracy (%)",
        title="Accuracy on the validation questions",
    )
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(title="training records")
    figure.savefig(results / "accuracy.png", dpi=130)


def last(curve: Curve) -> float:
    return curve[max(curve)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    subset = commands.add_parser("subset", help="write some records of a dataset")
    subset.add_argument("source")
    subset.add_argument("target", type=Path)
    subset.add_argument("--size", type=int, required=True, help="number of records")
    subset.add_argument("--seed", type=int, default=1234)
    count = commands.add_parser("count", help="print the number of records")
    count.add_argument("source")
    bundled = commands.add_parser(
        "bundled", help="write the bundled task and its model"
    )
    bundled.add_argument("folder", type=Path)
    report = commands.add_parser("report", help="compare all sizes that were trained")
    report.add_argument("results", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "subset":
        write_subset(
            arguments.source, arguments.target, arguments.size, arguments.seed
        )
    elif arguments.command == "count":
        print(count_records(arguments.source))
    elif arguments.command == "bundled":
        write_bundled_task(arguments.folder)
    else:
        write_report(arguments.results)


if __name__ == "__main__":
    main()
