"""Stage 1 under what a cluster does to a job: signals, too little memory, numbers that are none, hangs, shards."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_kd.cache.index import ChunkIndex
from nemo_kd.cache.reader import CacheReader
from nemo_kd.cache.writer import CacheWriter
from nemo_kd.config import UserInputError
from nemo_kd.run.interruption import REQUEUE
from nemo_kd.teacher import model as teacher_model
from nemo_kd.teacher.loop import compute_topk_logits
from tests.tiny_cache import summaries
from tests.tiny_data import teacher_config, write_chat_dataset
from tests.tiny_models import save_hf_model

ROOT = Path(__file__).resolve().parents[2]
NUM_RECORDS = 200
CACHE_FILES = re.compile(r"c_(\d+\.jsonl\.zst(\.idx)?|manifest\.json)")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lifetime")
    model = save_hf_model("qwen3", folder / "teacher", 300, dtype=torch.float32)
    return model, write_chat_dataset(folder / "data.jsonl", NUM_RECORDS)


def keys(world: tuple[Path, Path], folder: Path, *more: str) -> list[str]:
    model, dataset = world
    return [
        f"pretrained_checkpoint.restore_from_path={model}", f"data.data.file_path={dataset}",
        f"output_path={folder}/c_CHUNK_ID.jsonl.zst", "n_examples_per_chunk=70", "cache.segment_examples=2", "top_k=8",
        "trainer.precision=32", "trainer.accelerator=cpu", *more,
    ]  # fmt: skip


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    words = [
        sys.executable,
        str(ROOT / "examples" / "compute_topk_logits.py"),
        *arguments,
    ]
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env={**os.environ, **environment},
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(status, everything it said)."""
    out, err = process.communicate(timeout=240)
    return process.returncode, out + err


def wait_for_segments(
    process: subprocess.Popen[str], folder: Path, number: int
) -> None:
    while (
        len(list(folder.glob(".c_*.segments/[0-9]*")))
        + 35 * len(list(folder.glob("c_?.jsonl.zst")))
        < number
    ):
        assert process.poll() is None, finish(process)
        time.sleep(0.01)


def second_rank(process: subprocess.Popen[str]) -> psutil.Process:
    """Rank 1 itself, not the processes beside it."""
    ranks = [
        one
        for one in psutil.Process(process.pid).children(recursive=True)
        if one.environ().get("RANK") == "1"
    ]
    return min(ranks, key=lambda one: one.create_time())


def cache_files(folder: Path) -> dict[str, Any]:
    """Content by name, without what depends on the layout: the manifest's `config`, an index's jobs."""
    files: dict[str, Any] = {
        p.name: p.read_bytes()
        for p in folder.iterdir()
        if CACHE_FILES.fullmatch(p.name)
    }
    for name, content in files.items():
        if name.endswith(".idx"):
            index = ChunkIndex.parse(content)
            assert index is not None
            assert index.summary is not None
            assert index.summary.computed_with
            mass = round(index.summary.kept_mass_sum, 4)
            summary = replace(index.summary, computed_with=[], kept_mass_sum=mass)
            files[name] = replace(index, summary=summary).to_bytes()
        elif name.endswith("manifest.json"):
            files[name] = json.loads(content)
            assert files[name].pop("config")["top_k"] == 8
    return files


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory) -> dict[str, Any]:
    """What an uninterrupted run writes."""
    folder = tmp_path_factory.mktemp("straight")
    status, said = finish(start(keys(world, folder)))
    assert status == 0, said
    files = cache_files(folder)
    assert len(files) == 2 * 3 + 1
    return files


@pytest.mark.parametrize(
    ("number", "tensor_size"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 2)]
)
def test_a_signal_publishes_what_was_begun_and_asks_for_a_requeue(
    world, straight, tmp_path, number, tensor_size
):
    """SIGTERM to the launcher, SIGUSR1 to a rank that is not the first of its replica."""
    process = start(
        keys(
            world,
            tmp_path,
            "trainer.devices=2",
            f"model.tensor_model_parallel_size={tensor_size}",
        )
    )
    wait_for_segments(process, tmp_path, 4)
    (process if tensor_size == 1 else second_rank(process)).send_signal(number)
    status, said = finish(process)
    assert status == REQUEUE, said
    assert f"received {number.name}" in said
    assert "the same command" in said
    assert not list(tmp_path.rglob("*.tmp"))
    assert cache_files(tmp_path) != straight
    status, said = finish(start(keys(world, tmp_path)))
    assert status == 0, said
    assert cache_files(tmp_path) == straight


def test_the_end_of_the_time_asks_for_a_requeue(world, tmp_path):
    status, said = finish(start(keys(world, tmp_path, "max_time_per_run=00:00:00:01")))
    assert status == REQUEUE, said
    assert "max_time_per_run=00:00:00:01 is over" in said
    status, said = finish(
        start(keys(world, tmp_path, "exp_manager.max_time_per_run=1h"))
    )
    assert status == 2
    assert "exp_manager.max_time_per_run: '1h' is not DD:HH:MM:SS" in said


def test_a_rank_that_hangs_ends_the_run_with_what_the_others_were_doing(
    world, tmp_path
):
    process = start(
        keys(world, tmp_path, "trainer.devices=2", "model.tensor_model_parallel_size=2",
             "trainer.distributed_timeout_minutes=0.05")
    )  # fmt: skip
    wait_for_segments(process, tmp_path, 4)
    hanging = second_rank(process)
    hanging.suspend()
    killer = threading.Timer(
        25, hanging.kill
    )  # the launcher would wait longer for a process that cannot react
    killer.start()
    status, said = finish(process)
    killer.cancel()
    assert status == 1, said
    assert re.search(r"rank 0 .* no progress", said), said
    assert re.search(r"batch of \d+ tokens, examples \[\d+", said), said
    status, said = finish(start(keys(world, tmp_path)))
    assert status == 0, said


def test_shards_that_run_at_the_same_time_write_the_cache_of_one_run(
    world, straight, tmp_path
):
    first = start(keys(world, tmp_path, "shard=0/2"))
    second = start(
        keys(world, tmp_path),
        SLURM_ARRAY_TASK_ID="7",
        SLURM_ARRAY_TASK_MIN="6",
        SLURM_ARRAY_TASK_COUNT="2",
    )
    for process in (first, second):
        status, said = finish(process)
        assert status == 0, said
    assert cache_files(tmp_path) == straight
    assert {path.name for path in tmp_path.glob("*metrics*")} == {
        f"c_metrics_{i}_of_2.log" for i in range(2)
    }


def run(*args: object) -> str:
    model, dataset, output, overrides = args
    try:
        compute_topk_logits(teacher_config(model, dataset, output, **overrides))
    except UserInputError as error:
        return str(error)
    return ""


def run_with_little_memory(most_tokens: int, *args: object) -> tuple[str, list[int]]:
    """Batches of more tokens raise what CUDA raises; (error, sizes of the batches that were computed)."""
    original, computed = teacher_model.run_batch, []

    def run_batch(model, batch, groups):
        if batch.tokens_BS.numel() > most_tokens:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB"
            )
        computed.append(batch.tokens_BS.numel())
        return original(model, batch, groups)

    teacher_model.run_batch = run_batch
    try:
        return run(*args), computed
    finally:
        teacher_model.run_batch = original


def test_too_little_memory_halves_the_batches(ranks, world, tmp_path):
    model, dataset = world
    overrides = {
        "trainer__devices": 2, "data__max_tokens_per_batch": 1600,
        "end_at_idx": 39,
    }  # fmt: skip
    little, much = tmp_path / "little.jsonl", tmp_path / "much.jsonl"
    for error, sizes in ranks(2).run(
        run_with_little_memory, 500, model, dataset, little, overrides
    ):
        assert error == ""
        if sizes:
            assert 250 < max(sizes) <= 500
    assert ranks(2).run(run, model, dataset, much, overrides) == ["", ""]
    rows = [list(CacheReader(str(path))) for path in (little, much)]
    assert [row.example.index for row in rows[0]] == [
        row.example.index for row in rows[1]
    ]
    for one, other in zip(*rows, strict=True):
        torch.testing.assert_close(
            torch.from_numpy(one.loss_rows().log_sum_exp_logits_P),
            torch.from_numpy(other.loss_rows().log_sum_exp_logits_P),
            atol=0.05,  # one level of the packed codec, where rounding tips it over
            rtol=0,
        )
    found = summaries(little)[0].computed_with
    assert [settings["max_tokens_per_batch"] for settings in found] != [1600]


def test_too_little_memory_where_others_take_part_names_the_key(
    ranks, world, tmp_path
):
    model, dataset = world
    overrides = {
        "trainer__devices": 2,
        "model__tensor_model_parallel_size": 2,
        "end_at_idx": 9,
    }
    for rank, (error, _) in enumerate(
        ranks(2).run(
            run_with_little_memory, 30, model, dataset, tmp_path / "c.jsonl", overrides
        )
    ):
        assert (
            f"data.max_tokens_per_batch: rank {rank} is out of memory with a batch of"
            in error
        )
        assert "give a number below 8192" in error
        assert "spread the teacher over more ranks" in error


def test_an_example_that_does_not_fit_alone_is_named(ranks, world, tmp_path):
    model, dataset = world
    error, _ = ranks(1).run(
        run_with_little_memory,
        30,
        model,
        dataset,
        tmp_path / "c.jsonl",
        {"end_at_idx": 9},
    )[0]
    assert re.search(r"memory with a batch of \d+ tokens, examples \[\d\]", error)
    assert "lower model.max_seq_length" in error


def test_logits_that_are_not_finite_name_the_example(ranks, world, tmp_path):
    model, dataset = world
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in model.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    found = ranks(1).run(run, broken, dataset, tmp_path / "c.jsonl", {"end_at_idx": 0})
    assert re.match(
        r"example 0: the teacher's logits at position \d+ are not finite; try trainer.precision=32",
        found[0],
    )
    assert not (tmp_path / "c.jsonl").exists()
    # Where the rank that notices is not the first, the launcher ends the others.
    layout = ["trainer.devices=2", "model.pipeline_model_parallel_size=2"]
    status, said = finish(start(keys((broken, dataset), tmp_path / "cache", *layout)))
    assert status == 2, said
    assert re.search(
        r"error: example \d+: the teacher's logits at position \d+ are not finite",
        said,
    )


def test_several_splits_in_one_command(ranks, world, tmp_path):
    model, dataset = world
    other = write_chat_dataset(tmp_path / "validation.jsonl", 12, start=30)
    splits = {"train": str(dataset), "validation": str(other)}
    output = tmp_path / "SPLIT_CHUNK_ID.jsonl.zst"
    overrides = {"trainer__devices": 2, "data__data__file_path": splits}
    assert ranks(2).run(run, model, splits, output, overrides) == ["", ""]
    assert (
        len(CacheReader(str(tmp_path / "train_CHUNK_ID.jsonl.zst"))) == NUM_RECORDS - 1
    )
    assert len(CacheReader(str(tmp_path / "validation_CHUNK_ID.jsonl.zst"))) == 11
    manifest = json.loads((tmp_path / "validation_manifest.json").read_text())
    assert manifest["dataset"]["path"] == str(other)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"data__data__file_path": {"train": "a.jsonl"}},
            "output_path: .* has no SPLIT, which the splits train need",
        ),
        (
            {"data__data__file_path": ["a.jsonl", 1]},
            r"data.data.file_path: .* is neither a path nor \[PATH, PATH ...\] nor {SPLIT: PATH",
        ),
        ({"part": "2/2"}, "part: '2/2' is not i/n with i from 0 to n - 1"),
        ({"part": "1"}, "part: '1' is not i/n"),
        (
            {"data__max_tokens_per_batch": 0},
            "data.max_tokens_per_batch: 0 must be at least 1",
        ),
        (
            {"model__micro_batch_size": 0},
            "model.micro_batch_size: 0 must be at least 1",
        ),
        (
            {"trainer__distributed_timeout_minutes": 0},
            "trainer.distributed_timeout_minutes: 0.0 must be above 0",
        ),
        (
            {"exp_manager__create_wandb_logger": True},
            "exp_manager.wandb_logger_kwargs.project: .* needs a project",
        ),
        (
            {"exp_manager__log_interval_s": 0},
            "exp_manager.log_interval_s: 0.0 must be above 0",
        ),
    ],
)
def test_impossible_keys_are_refused(overrides, message):
    with pytest.raises(UserInputError, match=message):
        teacher_config(
            Path("m"), Path("d.jsonl"), Path("c_CHUNK_ID.jsonl"), **overrides
        )


def test_a_dry_run_writes_nothing(world, tmp_path):
    status, said = finish(
        start(
            keys(
                world,
                tmp_path / "cache",
                "--dry-run",
                "trainer.devices=2",
                "data.data.max_seq_length=90",
            )
        )
    )
    assert status == 0, said
    assert not (tmp_path / "cache").exists()
    assert re.search(
        r"layout: +tensor 1 x pipeline 1 x context 1 x data 2, experts over 1\n", said
    )
    assert re.search(
        r"example 0, trained between « and »:\n.*«[^»]+»", said, re.DOTALL
    )
    for name in ("disk", "time", "memory of a rank"):
        assert re.search(rf"^{name} +\S", said, re.MULTILINE), said


def test_metrics_are_written_while_it_runs(ranks, world, tmp_path):
    model, dataset = world
    overrides = {
        "trainer__devices": 2,
        "exp_manager__log_interval_s": 0.05,
        "cache__segment_examples": 5,
    }
    assert ranks(2).run(
        run, model, dataset, tmp_path / "c_CHUNK_ID.jsonl", overrides
    ) == ["", ""]
    lines = [
        json.loads(line)
        for line in (tmp_path / "c_metrics.log").read_text().splitlines()
    ]
    assert len(lines) > 2
    found = summaries(tmp_path / "c_CHUNK_ID.jsonl")[0]
    assert lines[-1]["progress/examples"] == found.examples == NUM_RECORDS - 1
    assert lines[-1]["progress/percent"] == pytest.approx(100)
    assert lines[-1]["perf/padding_percent"] == 0
    assert lines[-1]["cache/kept_mass"] == pytest.approx(
        found.kept_mass_sum / found.loss_tokens
    )
    assert all(
        line["time"] > 1.7e9 and line["perf/tokens_per_s"] >= 0 for line in lines
    )


def test_weights_and_biases_gets_the_metrics_when_asked(world, tmp_path):
    keys_of_wandb = [
        "exp_manager.create_wandb_logger=true",
        "exp_manager.wandb_logger_kwargs.project=kd",
        "end_at_idx=9",
    ]
    process = start(
        keys(world, tmp_path, *keys_of_wandb),
        WANDB_MODE="offline",
        WANDB_DIR=str(tmp_path),
    )
    status, said = finish(process)
    assert status == 0, said
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_an_array_that_is_no_range_is_refused(monkeypatch):
    """Tasks 1 and 3 would be the shards 0 and 2 of 2."""
    for name, value in {"ID": 3, "MIN": 1, "MAX": 3, "COUNT": 2}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    with pytest.raises(
        UserInputError, match="part: the Slurm array has 2 tasks that are not a range"
    ):
        teacher_config(Path("m"), Path("d.jsonl"), Path("c_CHUNK_ID.jsonl"))
    monkeypatch.setenv("SLURM_ARRAY_TASK_STEP", "2")
    assert teacher_config(
        Path("m"), Path("d.jsonl"), Path("c_CHUNK_ID.jsonl")
    ).part_number() == (
        1,
        2,
    )


def run_with_a_slow_disk(*args: object) -> str:
    original = CacheWriter.assemble_complete

    def assemble_complete(self):
        time.sleep(20)
        original(self)

    CacheWriter.assemble_complete = assemble_complete
    try:
        return run(*args)
    finally:
        CacheWriter.assemble_complete = original


def test_putting_a_large_chunk_together_is_no_hang(ranks, world, tmp_path):
    model, dataset = world
    overrides = {
        "trainer__devices": 2,
        "trainer__distributed_timeout_minutes": 0.3,
        "end_at_idx": 3,
    }
    assert ranks(2).run(
        run_with_a_slow_disk, model, dataset, tmp_path / "c.jsonl", overrides
    ) == [
        "",
        "",
    ]
    assert (tmp_path / "c.jsonl").exists()


def processes_of(marker: str) -> list[psutil.Process]:
    """Those that have the marker in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if (
                process.environ().get("NEMO_KD_TEST_MARKER") == marker
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
    return found


@pytest.mark.parametrize(
    ("number", "to_all", "segments", "status"),
    [
        (signal.SIGINT, True, 1, 130),  # Ctrl-C in a terminal
        (signal.SIGTERM, True, 3, REQUEUE),
        (signal.SIGKILL, False, 2, -signal.SIGKILL),
    ],
)
def test_no_process_outlives_the_command(
    world, tmp_path, number, to_all, segments, status
):
    """Neither one that reads ahead nor the one that publishes; they would keep stdout open."""
    marker = str(tmp_path)
    more = ["data.num_workers=2", "cache.segment_examples=1"]
    process = start(keys(world, tmp_path, *more), NEMO_KD_TEST_MARKER=marker)
    wait_for_segments(process, tmp_path, segments)
    assert len(processes_of(marker)) >= 4
    (os.killpg if to_all else os.kill)(process.pid, number)
    ended = process.wait(timeout=60)
    assert ended == status, process.stderr.read()
    ended_s = time.monotonic()
    assert "Traceback" not in process.stderr.read()  # until its end
    process.stdout.read()
    assert time.monotonic() - ended_s < 20
    while left := processes_of(marker):
        assert time.monotonic() - ended_s < 20, left
        time.sleep(0.05)
