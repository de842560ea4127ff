"""The sbatch templates on a real Slurm (one machine will do), with stand-ins for the commands where those do not matter."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.integration.test_stage_1 import run_stage_1
from tests.integration.test_stage_2 import metrics
from tests.tiny_data import write_chat_dataset
from tests.tiny_models import save_hf_model
from tests.unit.test_cli import compose

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ROOT / "scripts" / "slurm"
TIMEOUT_S = 300

# Tells about every run of every task, and ends as STATUS_<number of the array task> (or STATUS) says; RUNS is how often.
STAND_IN = """#!/usr/bin/env bash
trap '' TERM # which srun sends to the other ranks as soon as one has left
restarts="${SLURM_RESTART_COUNT:-0}" task="${SLURM_ARRAY_TASK_ID:-}"
status="STATUS${task:+_${task}}"
[[ "${SLURM_PROCID}" != 0 ]] || echo "$(basename "$0")|${task}|${restarts}|$*" >>"${CACHE_DIR}/log"
echo "run ${restarts} of rank ${SLURM_PROCID}"
((restarts >= ${RUNS:-1})) || exit "${!status:-0}"
"""

RANK = f"""#!/usr/bin/env bash
if [[ -n "${{SLURM_RESTART_COUNT:-}}" ]]; then exit 0; fi
export RANK="${{SLURM_PROCID}}" WORLD_SIZE="${{SLURM_NTASKS}}" PYTHONPATH="{ROOT}" FOLDER="${{CACHE_DIR}}" OMP_NUM_THREADS=1
exec "{sys.executable}" "{ROOT}/tests/distributed/rank_program.py" \\
    trainer.num_nodes=2 pretrained_checkpoint.restore_from_path="{ROOT}" data.data.file_path="{ROOT}/README.md" \\
    output_path=o.jsonl
"""


def _slurm_answers() -> bool:
    return (
        shutil.which("sinfo") is not None
        and subprocess.run(
            ["sinfo", "--noheader"], capture_output=True, timeout=20, check=False
        ).returncode
        == 0
    )


pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(not _slurm_answers(), reason="no Slurm answers here (sinfo)"),
]


class Cluster:
    """Submits templates and waits for their jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.jobs = folder, list[str]()
        self.cache = folder / "cache"
        self.cache.mkdir()
        (folder / "bin").mkdir()
        for name in ("compute_topk_logits", "train_gpt_knowledge_distillation"):
            self.command(name, STAND_IN)
        self.env = os.environ | {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "NEMO_KD_SLURM_DIR": str(TEMPLATES),
            "WORK_DIR": str(folder),
            "GPUS_PER_NODE": "0",
            "TASKS_PER_NODE": "2",
            "SBATCH_EXCLUSIVE": "user",
        }

    def command(self, name: str, text: str) -> None:
        (self.folder / "bin" / name).write_text(text)
        (self.folder / "bin" / name).chmod(0o755)

    def submit(
        self,
        *options: str,
        template: str = "compute_topk_logits",
        keys: Sequence[str] = (),
        **env: str,
    ) -> str:
        variables = self.env | env
        options = (
            f"--ntasks-per-node={variables['TASKS_PER_NODE']}",
            "--gpus-per-node=0",
            *options,
        )
        line = [
            "sbatch",
            "--parsable",
            *options,
            str(TEMPLATES / f"{template}.sbatch"),
            *keys,
        ]
        self.jobs.append(_output(line, cwd=self.folder, env=variables).strip())
        return self.jobs[-1]

    def submit_all(self, **env: str) -> dict[str, str]:
        """{train, validation, student: its number}."""
        said = _output(
            [str(TEMPLATES / "submit_all.sh")], cwd=self.folder, env=self.env | env
        )
        names = {
            part.split()[0]: part.split()[-1] for part in said.strip().split(", ")
        }
        self.jobs += names.values()
        return names

    def tasks(self, job: str) -> dict[str, dict[str, str]]:
        """{number of the array task, or an empty text: what Slurm knows about it}."""
        lines = _output(["scontrol", "show", "job", "--oneliner", job]).splitlines()
        tasks = [
            dict(item.partition("=")[::2] for item in line.split()) for line in lines
        ]
        return {task.get("ArrayTaskId", ""): task for task in tasks}

    def wait(self, job: str) -> dict[str, tuple[str, int]]:
        """{number of the array task: (state, restarts)} once all have ended."""
        limit_s, started = time.monotonic() + TIMEOUT_S, set()
        while True:
            tasks = self.tasks(job)
            for task in tasks.values():
                number = (
                    f"{task['ArrayJobId']}_{task['ArrayTaskId']}"
                    if "ArrayTaskId" in task
                    else task["JobId"]
                )
                run = (number, task["Restarts"])
                if (
                    task["Reason"] == "BeginTime" and run not in started
                ):  # two minutes after a requeue, by default
                    started.add(run)
                    _output(
                        ["scontrol", "update", f"JobId={number}", "StartTime=now+2"]
                    )
            states = {
                number: (task["JobState"], int(task["Restarts"]))
                for number, task in tasks.items()
            }
            if not {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING"} & {
                state for state, _ in states.values()
            }:
                return states
            assert time.monotonic() < limit_s, states
            time.sleep(0.2)

    def until(self, is_so: Callable[[], bool]) -> None:
        limit_s = time.monotonic() + TIMEOUT_S
        while not is_so():
            assert time.monotonic() < limit_s, self.output()
            time.sleep(0.1)

    def until_exists(self, *names: str) -> None:
        self.until(lambda: all((self.cache / name).exists() for name in names))

    def log(self) -> list[tuple[str, str, str, dict[str, str]]]:
        """(command, array task, restarts, its keys) of every run, in order."""
        lines = [
            line.split("|") for line in (self.cache / "log").read_text().splitlines()
        ]
        keys = [
            dict(word.partition("=")[::2] for word in line[3].split())
            for line in lines
        ]
        return [
            (line[0], line[1], line[2], key)
            for line, key in zip(lines, keys, strict=True)
        ]

    def output(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.out")))


def _output(line: list[str], **kwargs: object) -> str:
    result = subprocess.run(
        line, capture_output=True, text=True, check=False, timeout=60, **kwargs
    )
    assert result.returncode == 0, (line, result.stderr)
    return result.stdout


@pytest.fixture
def cluster(tmp_path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    if cluster.jobs:
        subprocess.run(["scancel", *cluster.jobs], check=False)


def test_array_tasks_are_shards_of_one_cache(cluster):
    job = cluster.submit("--array=3-7:2")
    assert cluster.wait(job) == {number: ("COMPLETED", 0) for number in "357"}
    keys = {task: keys for _, task, _, keys in cluster.log()}
    assert {task: key["shard"] for task, key in keys.items()} == {
        "3": "0/3",
        "5": "1/3",
        "7": "2/3",
    }
    for key in keys.values():
        assert (
            key["output_path"]
            == f"{cluster.cache}/train_with_logits_CHUNK_ID.jsonl.zst"
        )
        assert key["n_examples_per_chunk"] == "10000"
        assert key["data.max_tokens_per_batch"] == "16384"
        assert key["trainer.devices"] == "2"
        line = " ".join(f"{name}={value}" for name, value in key.items())
        config, warnings = compose("compute_topk_logits", line)
        assert (config.part, warnings) == (key["shard"], [])


def test_an_interrupted_task_runs_again_and_no_other(cluster):
    job = cluster.submit(
        "--array=0-2", STATUS_1="3", STATUS_2="75"
    )  # the last task has the array's own number
    assert cluster.wait(job) == {
        "0": ("COMPLETED", 0),
        "1": ("FAILED", 0),
        "2": ("COMPLETED", 1),
    }
    runs = [
        (task, restarts, keys["shard"]) for _, task, restarts, keys in cluster.log()
    ]
    assert sorted(runs) == [
        ("0", "0", "0/3"),
        ("1", "0", "1/3"),
        ("2", "0", "2/3"),
        ("2", "1", "2/3"),
    ]
    text = (cluster.folder / f"teacher-{job}_2.out").read_text()
    assert (
        text.index("run 0 of rank 0")
        < text.index(f"job {job}_2 goes back")
        < text.index("run 1 of rank 0")
    )


def test_a_job_that_never_gets_done_is_not_requeued_for_ever(cluster):
    job = cluster.submit(STATUS="75", RUNS="100", MAX_REQUEUES="2")
    assert cluster.wait(job) == {"": ("FAILED", 2)}
    assert [keys["shard"] for *_, keys in cluster.log()] == ["0/1"] * 3
    assert (
        f"job {job} was requeued MAX_REQUEUES=2 times; submit it again to continue"
        in cluster.output()
    )


def test_ranks_save_and_the_job_goes_on_when_slurm_warns(cluster):
    """Slurm's signal, two nodes, the real way from the signal to the status; only the teacher is missing."""
    cluster.command("compute_topk_logits", RANK)
    job = cluster.submit(
        "--nodes=2", "--array=4", TASKS_PER_NODE="1", MODE="finish_together"
    )
    cluster.until_exists("ready.0", "ready.1")
    _output(
        ["scancel", "--signal=USR1", f"{job}_4"]
    )  # to the tasks and not to the script, as --signal=USR1@120 does
    assert cluster.wait(job) == {"4": ("COMPLETED", 1)}
    assert (cluster.cache / "saved.0").exists()
    assert (cluster.cache / "saved.1").exists()
    assert (
        "received SIGUSR1; the same command continues (exit status 75)"
        in cluster.output()
    )


def test_a_cancelled_job_stays_away(cluster):
    cluster.command("compute_topk_logits", RANK)
    job = cluster.submit("--nodes=2", TASKS_PER_NODE="1", MODE="finish_together")
    cluster.until_exists("ready.0", "ready.1")
    _output(["scancel", job])
    assert cluster.wait(job) == {"": ("CANCELLED", 0)}
    time.sleep(3)
    assert cluster.wait(job) == {"": ("CANCELLED", 0)}


def test_tasks_that_are_no_range_are_refused(cluster):
    job = cluster.submit("--array=0,1,5")
    assert {state for state, _ in cluster.wait(job).values()} == {"FAILED"}
    assert (
        "--array: 3 tasks that are not a range; give one, for example --array=0-2"
        in cluster.output()
    )
    assert not (cluster.cache / "log").exists()


def test_the_student_waits_for_requeued_shards(cluster):
    jobs = cluster.submit_all(NUM_SHARDS="2", STATUS_1="75")
    for name in ("train", "validation", "student"):
        assert {state for state, _ in cluster.wait(jobs[name]).values()} == {
            "COMPLETED"
        }
    runs = [(command, keys.get("shard")) for command, _, _, keys in cluster.log()]
    assert runs[-1] == ("train_gpt_knowledge_distillation", None)
    assert sorted(shard for _, shard in runs[:-1]) == ["0/1", "0/2", "1/2", "1/2"]


def test_a_student_goes_on_after_the_signal_as_if_nothing_had_been(cluster, ranks):
    """The real command on two nodes, once without and once with a signal in the middle of an epoch."""
    teacher = save_hf_model("qwen3", cluster.folder / "teacher", 300, seed=1)
    save_hf_model("llama2", cluster.folder / "student", 300, num_hidden_layers=1)
    for split, count, start in (("train", 40, 0), ("validation", 5, 60)):
        dataset = write_chat_dataset(cluster.folder / f"{split}.jsonl", count, start)
        cache = cluster.cache / f"{split}_with_logits_CHUNK_ID.jsonl.zst"
        assert ranks(1).run(run_stage_1, teacher, dataset, cache, {"top_k": 4}) == [""]
    command = Path(sys.executable).with_name("train_gpt_knowledge_distillation")
    cluster.command(
        command.name, f'#!/usr/bin/env bash\nOMP_NUM_THREADS=1 exec "{command}" "$@"\n'
    )
    keys = [
        f"trainer.knowledge_distillation.{key}"
        for key in ("max_epochs=40", "val_check_interval=100")
    ]
    losses, restarts = {}, {}
    for name in ("straight", "signalled"):
        results = cluster.folder / name
        env = {
            "RESULTS_DIR": str(results),
            "TASKS_PER_NODE": "1",
            "GLOBAL_BATCH_SIZE": "8",
            "PRECISION": "32",
        }
        job = cluster.submit("--nodes=2", template="train_student", keys=keys, **env)
        if name == "signalled":
            cluster.until(lambda results=results: len(_steps(results)) >= 7)
            _output(["scancel", "--signal=USR1", job])
        ((state, restarts[name]),) = cluster.wait(job).values()
        assert state == "COMPLETED", cluster.output()
        losses[name] = _steps(results)
        assert list((results / "checkpoints").glob("*.nemo"))
    assert restarts == {"straight": 0, "signalled": 1}
    assert "received SIGUSR1" in cluster.output()
    assert losses["straight"] == losses["signalled"]
    assert [step for step, _ in losses["straight"]] == list(
        range(1, 40 * (39 // 8) + 1)
    )  # one of 40 records has no answer


def test_a_requeued_sft_experiment_filters_trains_and_reports(cluster):
    """The real commands, which VENV alone holds; the training starts in the second run of the job."""
    save_hf_model("qwen3", cluster.folder / "student", 300)
    (cluster.folder / "data").mkdir()
    for split, count in (("train", 48), ("validation", 4)):
        # The answer of one record in three is another than its response.
        records = [
            {"input": f"{n}?", "output": f"{n}", "answer": n - (n % 3 == 0)}
            for n in range(count)
        ]
        lines = [json.dumps(record) + "\n" for record in records]
        (cluster.folder / "data" / f"{split}.jsonl").write_text("".join(lines))
    commands = cluster.folder / "venv" / "bin"
    commands.mkdir(parents=True)
    (commands / "activate").write_text(f'PATH="{commands}:${{PATH}}"\n')
    for name, first in (
        ("python3", ""),
        ("filter_sft_data", ""),
        ("train_gpt_knowledge_distillation", "((SLURM_RESTART_COUNT)) || exit 75\n"),
    ):
        real = Path(sys.executable).with_name(name)
        text = f'#!/usr/bin/env bash\n{first}OMP_NUM_THREADS=1 exec "{real}" "$@"\n'
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    settings = {"CHECKER": "exact", "EPOCHS": "2", "NUM_EVALS": "1"}
    job = cluster.submit(
        template="run_sft_experiments",
        keys=["filtered"],
        VENV=str(commands.parent),
        MAX_NEW_TOKENS="4",
        PRECISION="32",
        **settings,
    )
    assert cluster.wait(job) == {"": ("COMPLETED", 1)}, cluster.output()
    results = cluster.folder / "sft_experiments"
    assert (results / "sft_filtered" / "final" / "model.safetensors").exists()
    report = (results / "report.md").read_text()
    assert "| filtered |      32 |     8 |" in report
    assert report in cluster.output()


def _steps(results: Path) -> list[tuple[int, float]]:
    """(step, loss) of every step of training, in the order of the file."""
    if not (results / "metrics" / "metrics.jsonl").exists():
        return []
    return [
        (row["step"], row["train/loss"])
        for row in metrics(results)
        if "train/loss" in row
    ]
