"""SFT experiments: subsets, the steps of the script with stand-ins for commands, and the report."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON_PART = ROOT / "examples" / "sft_experiments.py"
SCRIPT = ROOT / "scripts" / "run_sft_experiments.sh"
SBATCH = ROOT / "scripts" / "slurm" / "run_sft_experiments.sbatch"

# Writes what a training of 2 steps leaves. It stops after the first step in the run named in the file `interrupt`, and
# then continues; it writes its keys to the log.
TRAINING = """#!{python}
import json, os, sys
from pathlib import Path
keys = dict(key.split("=", 1) for key in sys.argv[1:])
run = Path(keys["exp_manager.explicit_log_dir"])
with open("log", "a") as log:
    print(json.dumps(keys), file=log)
(run / "metrics").mkdir(parents=True, exist_ok=True)
(run / "config.yaml").write_text(
    "model: {{data: {{data_prefix: {{train: '" + keys["model.data.data_prefix.train"] + "'}}}}}}"
)
done = len((run / "steps").read_text()) if (run / "steps").exists() else 0
for step in range(done, 2):
    with open(run / "steps", "a") as file:
        file.write(".")
    row = {{"step": 50 * step, "eval/accuracy": 0.25 * (step + 1), "eval/num_examples": 100}}
    row |= {{"eval/response_length": 20.5, "eval/entropy": 0.125}}
    with open(run / "metrics" / "metrics.jsonl", "a") as file:
        print(json.dumps(row), file=file)
    if Path("interrupt").exists() and Path("interrupt").read_text() == keys["name"]:
        Path("interrupt").unlink()
        sys.exit(75)
(run / "checkpoints" / (keys["name"] + "-hf")).mkdir(parents=True)
"""

SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
exec "$@"
"""

FILTER = """#!/usr/bin/env bash
exec "{python}" -m nemo_kd.cli.filter_sft_data "$@"
"""


def run_part(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, PYTHON_PART, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
    )


def subset(source, target, size, seed="1"):
    result = run_part("subset", source, target, "--size", str(size), "--seed", seed)
    assert result.returncode == 0, result.stderr
    return target.read_bytes().splitlines()


def test_subsets_are_nested_and_deterministic(tmp_path):
    source = tmp_path / "all.jsonl"
    lines = [b'{"number": %d}  ' % number for number in range(300)]
    source.write_bytes(b"\n".join(lines))
    sizes = [8, 64, 65, 256, 300]
    found = [subset(source, tmp_path / "subset.jsonl", size) for size in sizes]
    for smaller, larger in itertools.pairwise(found):
        assert larger[: len(smaller)] == smaller
    assert [len(lines) for lines in found] == sizes
    assert sorted(found[-1]) == sorted(lines)
    assert found[0] != lines[:8]
    assert subset(source, tmp_path / "other_seed.jsonl", 64, "2") != found[1]
    # Neither the order of the file nor blank lines change a subset.
    source.write_bytes(b"\n\n".join(reversed(lines)))
    assert subset(source, tmp_path / "again.jsonl", 64) == found[1]
    result = run_part("subset", source, tmp_path / "x", "--size", "301")
    assert result.returncode == 1
    assert result.stderr.startswith("error: --size: 301 records were asked for, but")
    assert "has 300; leave this size out" in result.stderr
    assert not (tmp_path / "x").exists()


@pytest.fixture
def work(tmp_path):
    """A folder with a dataset of 600 records, a third of them wrong, and stand-ins for commands."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (
        ("train_gpt_knowledge_distillation", TRAINING),
        ("filter_sft_data", FILTER),
        ("srun", SRUN),
        ("scontrol", "#!/usr/bin/env bash\necho localhost"),
    ):
        (commands / name).write_text(text.format(python=sys.executable))
        (commands / name).chmod(0o755)
    (tmp_path / "data").mkdir()
    with (tmp_path / "data" / "train.jsonl").open("w") as file:
        for number in range(600):
            given = number + (number % 3 == 0)
            record = {
                "input": f"{number} + 0?",
                "output": f"{given}",
                "answer": number,
            }
            print(json.dumps(record), file=file)
    return tmp_path


def experiments(work, *sizes, status=0, script=SCRIPT, **variables):
    result = subprocess.run(
        ["bash", script, *sizes],
        capture_output=True,
        text=True,
        check=False,
        cwd=work,
        env=os.environ
        | {
            "PATH": f"{work / 'bin'}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "CHECKER": "exact",
        }
        | variables,
    )
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout, result.stderr


def log(work):
    return [json.loads(line) for line in (work / "log").read_text().splitlines()]


def test_all_sizes_are_trained_and_compared(work):
    sizes = ("128", "256", "512", "full", "filtered")
    out, _ = experiments(work, *sizes)
    trained = {keys["name"]: keys for keys in log(work)}
    assert [*trained] == [f"sft_{size}" for size in sizes]
    results = work / "sft_experiments"
    epochs = "trainer.knowledge_distillation.max_epochs"
    assert [keys[epochs] for keys in trained.values()] == ["5", "5", "4", "3", "3"]
    for name, keys in trained.items():
        assert (results / name / "final").is_dir()
        assert keys["exp_manager.explicit_log_dir"] == str(results / name)
    data = {
        size: Path(trained[f"sft_{size}"]["model.data.data_prefix.train"])
        for size in sizes
    }
    lines = {size: data[size].read_bytes().splitlines() for size in sizes}
    assert [len(lines[size]) for size in sizes] == [128, 256, 512, 600, 400]
    assert {*lines["128"]} < {*lines["256"]} < {*lines["512"]} < {*lines["full"]}
    assert data["full"] == work / "data" / "train.jsonl"
    # 80 steps: the warm-up takes a tenth, and there are 8 evaluations.
    assert trained["sft_128"]["model.optim.sched.warmup_steps"] == "8"
    assert trained["sft_128"]["eval.interval"] == "10"
    report = (results / "report.md").read_text()
    assert report in out
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in report.splitlines()
    ]
    assert ["128", "128", "50", "50.0% ± 5.0%", "50.0%", "50", "20.5", "0.125"] in rows
    assert ["full", "600", "100.0%", "50", "50.0% ± 5.0%", "50.0%"] in rows
    assert ["filtered", "400", "66.7%", "50", "50.0% ± 5.0%", "50.0%"] in rows
    assert "Dropped: 200 wrong answer." in report
    assert (results / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_experiment_continues(work):
    (work / "interrupt").write_text("sft_256")
    experiments(work, "128", "256", "full", status=75)
    results = work / "sft_experiments"
    assert (results / "sft_128" / "final").exists()
    assert not (results / "sft_256" / "final").exists()
    table = run_part("report", results).stdout
    assert "|              128 |     128 |    50 |" in table
    assert "| 256 (unfinished) |     256 |     0 |" in table
    out, _ = experiments(work, "128", "256", "full")
    assert f"sft_128: done before ({results}/sft_128/final); remove" in out
    names = [keys["name"] for keys in log(work)]
    assert names == ["sft_128", "sft_256", "sft_256", "sft_full"]
    assert log(work)[1] == log(work)[2]
    for size in ("128", "256", "full"):
        assert (results / f"sft_{size}" / "steps").read_text() == ".."
    experiments(work, "128", "256", "full")
    assert len(log(work)) == 4


def test_the_template_for_slurm_runs_one_size(work):
    variables = {"script": SBATCH, "SLURM_JOB_NUM_NODES": "1"}
    (work / "interrupt").write_text("sft_filtered")
    out, _ = experiments(
        work, "filtered", status=75, MAX_REQUEUES="0", SLURM_JOB_ID="7", **variables
    )
    out, _ = experiments(work, "filtered", **variables)
    assert "| filtered |     400 |" in out
    assert (work / "sft_experiments" / "sft_filtered" / "final").is_dir()
    first, second = log(work)
    assert first == second
    assert first["trainer.devices"] == "2"
    assert first["trainer.num_nodes"] == "1"
    out, _ = experiments(work, "filtered", **variables)
    assert "sft_filtered: done before" in out
    _, err = experiments(work, "all", status=2, **variables)
    assert err.startswith("unknown size all")


def test_wrong_sizes_are_refused_before_anything_is_trained(work):
    _, err = experiments(work, "128", "64", status=2)
    assert err == "unknown size 64: give one of 128 256 512 1024 full filtered\n"
    _, err = experiments(work, "1024", status=1)
    assert "error: --size: 1024 records were asked for" in err
    assert not (work / "log").exists()
    result = run_part("report", work)
    assert "no sft_<size> in it has been evaluated" in result.stderr


def test_other_checkers_tables_and_further_keys_reach_the_commands(work):
    """The number of steps counts rows of a table, whose bytes hold line breaks anywhere."""
    lines = (work / "data" / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row["output"] = f"it is {row['output']}"
        row["answer"] = str(row["answer"])
        row["said"] = row.pop("output")
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), work / "data" / "train.parquet"
    )
    experiments(
        work,
        *("128", "full", "filtered"),
        TRAIN_DATA="data/train.parquet@[:500]",
        CHECKER="regex",
        PATTERN=r"it is (\S+)",
        LABEL_KEY="said",
        EPOCHS="1",
        FURTHER_KEYS="model.max_seq_length=64 model.data.num_workers=0",
    )
    trained = log(work)
    assert [keys["eval.interval"] for keys in trained] == ["2", "7", "5"]
    assert (
        len((work / "sft_experiments" / "data" / "128.jsonl").read_text().splitlines())
        == 128
    )
    for keys in trained:
        assert keys["eval.pattern"] == r"it is (\S+)"
        assert keys["model.data.dataset.label_key"] == "said"
        assert keys["model.max_seq_length"] == "64"
        assert keys["model.data.num_workers"] == "0"
    statistics = work / "sft_experiments" / "data" / "filtered.stats.json"
    assert json.loads(statistics.read_text())["kept"] == 333
