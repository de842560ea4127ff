"""Stage 1 on 1, 2 and 4 ranks: every row holds its own example's logits, as transformers computes them."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_kd.cache.layout import CacheLayout
from nemo_kd.cache.reader import CacheReader
from nemo_kd.config import UserInputError
from nemo_kd.config.shared import FP8_MULTIPLE
from nemo_kd.files import Lock
from nemo_kd.mcore import kernels
from nemo_kd.mcore.schedule import run_batch
from nemo_kd.teacher import job as teacher_job
from nemo_kd.teacher import model as teacher_model
from nemo_kd.teacher.loop import compute_topk_logits
from nemo_kd.teacher.reports import estimate_cost
from tests.tiny_cache import everywhere, summaries
from tests.tiny_data import teacher_config, write_chat_dataset
from tests.tiny_models import save_hf_model
from tests.tiny_tokenizer import train_tokenizer

NUM_RECORDS, TOP_K = 23, 8
ROOT = Path(__file__).resolve().parents[2]


def run_stage_1(*args: object, **kwargs: object) -> str:
    """Runs stage 1 in a rank; the message of what it refuses, or an empty text."""
    model, dataset, output, overrides = args
    try:
        compute_topk_logits(teacher_config(model, dataset, output, **overrides))
    except UserInputError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage_1")
    model = save_hf_model("qwen3", folder / "teacher", 300, dtype=torch.float32)
    return folder, model, write_chat_dataset(folder / "data.jsonl", NUM_RECORDS)


@pytest.fixture(scope="module")
def reference(world):
    return reference_of(*world[1:])


def reference_of(
    folder: Path, dataset: Path, dtype: torch.dtype = torch.float64
) -> dict[int, tuple[list[int], np.ndarray]]:
    """Per record: ids, and log-probabilities of transformers' model on the unpadded conversation."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).to(dtype),
        train_tokenizer(300),
    )
    rows = {}
    for index, line in enumerate(dataset.read_text().splitlines()):
        ids = tokenizer.apply_chat_template(
            json.loads(line)["messages"], return_dict=True
        )["input_ids"]
        with torch.no_grad():
            rows[index] = (
                ids,
                model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1).numpy(),
            )
    return rows


def read_rows(paths: list[Path]) -> list[dict]:
    return [
        json.loads(line) for path in paths for line in path.read_text().splitlines()
    ]


def check_rows(rows: list[dict], reference) -> None:
    assert [row["index"] for row in rows] == [
        index for index in range(NUM_RECORDS) if index != 5
    ]
    for row in rows:
        ids, logprobs = reference[row["index"]]
        assert row["tokens"] == ids[:-1]
        assert row["labels"] == ids[1:]
        assert sum(row["loss_mask"]) > 0
        logits, kept = np.array(row["topk_logits"]), np.array(row["topk_token_ids"])
        assert (logits[:, 0] == 0).all()
        ours = logits - np.array(row["log_sum_exp_logits"])[:, None]
        expected = np.take_along_axis(logprobs, kept, axis=1)
        np.testing.assert_allclose(ours, expected, atol=2e-4)
        largest = -np.sort(-logprobs, axis=1)[:, :TOP_K]
        np.testing.assert_allclose(expected, largest, atol=2e-4)


TP, PP = "model__tensor_model_parallel_size", "model__pipeline_model_parallel_size"
CP, SP, EP = (
    "model__context_parallel_size",
    "model__sequence_parallel",
    "model__expert_model_parallel_size",
)
MICRO, TOKENS, SEGMENT = (
    "model__micro_batch_size",
    "data__max_tokens_per_batch",
    "cache__segment_examples",
)


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (1, {MICRO: 1}),
        (1, {MICRO: 3, SEGMENT: 4, "data__packing": False}),
        (1, {TOKENS: 150, "data__num_workers": 0}),
        (2, {TP: 2, TOKENS: 200, SEGMENT: 3}),
        (2, {TP: 2, SP: True, MICRO: 4, SEGMENT: 7}),
        (2, {PP: 2, TOKENS: 120, SEGMENT: 5}),
        (2, {PP: 2, MICRO: 2, "data__packing": False}),
        (2, {CP: 2, TOKENS: 300}),
        (2, {MICRO: 2, SEGMENT: 5}),
        (4, {TP: 2, PP: 2, SP: True, TOKENS: 160, SEGMENT: 6}),
        (4, {TP: 2, CP: 2, MICRO: 3}),
        (4, {TP: 2, MICRO: 1, SEGMENT: 2}),
        (4, {TP: 4, MICRO: 4, SEGMENT: 4}),
        (4, {PP: 2, TOKENS: 100, SEGMENT: 4}),
        (4, {MICRO: 1, SEGMENT: 1}),
    ],
    ids=str,
)
def test_rows_belong_to_their_example_in_every_layout(
    ranks, world, reference, tmp_path, world_size, layout
):
    _, model, dataset = world
    overrides = {
        "trainer__devices": world_size,
        "cache__codec": "json",
        "n_examples_per_chunk": 10,
        **layout,
    }
    assert (
        ranks(world_size).run(
            run_stage_1, model, dataset, tmp_path / "c_CHUNK_ID.jsonl", overrides
        )
        == [""] * world_size
    )
    check_rows(
        read_rows([tmp_path / f"c_{chunk}.jsonl" for chunk in range(3)]), reference
    )
    found = summaries(tmp_path / "c_CHUNK_ID.jsonl")
    assert [found[chunk].examples for chunk in range(3)] == [9, 10, 3]
    assert found[0].skipped == {"no loss tokens": 1}


def test_all_kinds_of_datasets_make_the_same_cache(ranks, world, reference, tmp_path):
    _, model, dataset = world
    rows = [json.loads(line) for line in dataset.read_text().splitlines()]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), tmp_path / "all.parquet"
    )
    (tmp_path / "all.json").write_text(json.dumps(rows))
    for part, some in (("0", rows[:9]), ("1", rows[9:])):
        lines = "".join(json.dumps(row) + "\n" for row in some)
        (tmp_path / f"part-{part}.gz").write_bytes(gzip.compress(lines.encode()))
    kinds = {
        "parquet": f"{tmp_path}/all.parquet",
        "array": [f"{tmp_path}/all.json"],
        "parts": f"{tmp_path}/part-?.gz@[:]",
    }
    for name, file_path in kinds.items():
        output = tmp_path / f"{name}_CHUNK_ID.jsonl"
        overrides = {"trainer__devices": 2, "cache__codec": "json"}
        overrides["data__data__file_path"] = file_path
        assert ranks(2).run(run_stage_1, model, "", output, overrides) == [""] * 2
        check_rows(read_rows([tmp_path / f"{name}_0.jsonl"]), reference)
    sliced = {"trainer__devices": 2, "cache__codec": "json"}
    output = tmp_path / "sliced_CHUNK_ID.jsonl"
    file_path = f"{tmp_path}/all.parquet@[-4:]"
    assert ranks(2).run(run_stage_1, model, file_path, output, sliced) == [""] * 2
    found = [row["index"] for row in read_rows([tmp_path / "sliced_0.jsonl"])]
    assert found == [*range(NUM_RECORDS - 4, NUM_RECORDS)]
    gaps = [f"{tmp_path}/part-0.gz", f"{tmp_path}/all.parquet@[9:]"]
    refused = ranks(2).run(
        run_stage_1, model, "", output, sliced | {"data__data__file_path": gaps}
    )
    assert all("the slices leave gaps between records" in text for text in refused)


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (1, {}),
        (2, {EP: 2, SEGMENT: 9}),
        (4, {EP: 2, TP: 2, SP: True, TOKENS: 150, SEGMENT: 5}),
    ],
)
def test_experts_that_are_spread_over_replicas(
    ranks, world, tmp_path, world_size, layout
):
    """Three segments for two lanes: one of them computes filler while the other is at the last one."""
    _, _, dataset = world
    model = save_hf_model("qwen3_moe", tmp_path / "teacher", 300)
    overrides = {
        "trainer__devices": world_size,
        "cache__codec": "json",
        "n_examples_per_chunk": 10,
        **layout,
    }
    output = tmp_path / "c_CHUNK_ID.jsonl"
    assert (
        ranks(world_size).run(run_stage_1, model, dataset, output, overrides)
        == [""] * world_size
    )
    check_rows(
        read_rows([tmp_path / f"c_{chunk}.jsonl" for chunk in range(3)]),
        reference_of(model, dataset, torch.float32),
    )  # its experts take no float64


def test_a_range_in_one_file_and_a_rerun_that_skips(ranks, world, tmp_path):
    _, model, dataset = world
    output, overrides = (
        tmp_path / "part_0.jsonl",
        {"start_from_idx": 7, "end_at_idx": 9, "cache__codec": "json"},
    )
    ranks(1).run(run_stage_1, model, dataset, output, overrides)
    assert [row["index"] for row in read_rows([output])] == [7, 8, 9]
    before = output.stat().st_mtime_ns
    assert ranks(1).run(run_stage_1, model, dataset, output, overrides) == [""]
    assert output.stat().st_mtime_ns == before
    refused = ranks(1).run(
        run_stage_1, model, dataset, output, {**overrides, "top_k": 4}
    )[0]
    assert "top_k: 8 in the cache, 4 now" in refused


def test_only_missing_chunks_are_written_again(ranks, world, tmp_path):
    _, model, dataset = world
    output, overrides = tmp_path / "c_CHUNK_ID.jsonl", {"n_examples_per_chunk": 10}
    ranks(1).run(run_stage_1, model, dataset, output, overrides)
    chunks = [tmp_path / f"c_{chunk}.jsonl" for chunk in range(3)]
    content, times = (
        [path.read_bytes() for path in chunks],
        [path.stat().st_mtime_ns for path in chunks],
    )
    chunks[1].unlink()
    ranks(1).run(run_stage_1, model, dataset, output, overrides)
    assert [path.read_bytes() for path in chunks] == content
    assert chunks[0].stat().st_mtime_ns == times[0]
    assert chunks[1].stat().st_mtime_ns != times[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"top_k": 301}, "top_k: 301 exceeds the teacher's vocabulary of 300 tokens"),
        ({"start_from_idx": 23}, "end_at_idx: 23 to 22 lies outside"),
        ({"end_at_idx": 23}, "end_at_idx: 0 to 23 lies outside"),
        (
            {"trainer__devices": 1, "model__tensor_model_parallel_size": 2},
            "model.tensor_model_parallel_size",
        ),
        ({"cache__min_k": 9}, "cache.min_k: 9 exceeds top_k (8)"),
        (
            {"cache__codec": "json", "cache__top_p": 0.9},
            "cache.codec: json stores top_k logits at every position",
        ),
        ({"cache__temperatures": [0]}, "cache.temperatures: [0.0] must be above 0"),
        (
            {"model__max_seq_length": 5000},
            "model.max_seq_length: 5000 exceeds the model's max_position_embeddings",
        ),
        (
            {"pretrained_checkpoint__restore_from_path": "/nowhere"},
            "/nowhere: expected a regular file, found none; check the path",
        ),
        (
            {"data__data__file_path": "/nowhere.jsonl"},
            "/nowhere.jsonl: expected a regular file, found none; check the path",
        ),
        (
            {"data__chat": False},
            "data.chat=False do not fit a record with the fields messages",
        ),
        (
            {"trainer__accelerator": "gpu"},
            "trainer.accelerator: gpu, but torch finds no GPU",
        ),
        ({"trainer__devices": 3}, "trainer.num_nodes x trainer.devices: 1 x 3"),
        (
            {"model__transformer_engine": "on"},
            "model.transformer_engine: on, but there is no GPU here",
        ),
    ],
)
def test_wrong_input_is_refused_before_the_teacher_runs(
    ranks, world, tmp_path, overrides, message
):
    _, model, dataset = world
    if "gpu" in str(overrides) and torch.cuda.is_available():
        overrides, message = {"trainer__devices": 99}, "trainer.devices: 99"
    refused = ranks(1).run(
        run_stage_1, model, dataset, tmp_path / "c.jsonl", overrides
    )[0]
    assert message in refused
    assert not list(tmp_path.glob("c*"))


def test_heads_that_tensor_parallelism_cannot_cut_are_refused(ranks, world, tmp_path):
    folder = save_hf_model(
        "llama2",
        tmp_path / "odd",
        300,
        num_attention_heads=6,
        num_key_value_heads=3,
        hidden_size=48,
    )
    overrides = {"trainer__devices": 2, "model__tensor_model_parallel_size": 2}
    refused = ranks(2).run(
        run_stage_1, folder, world[2], tmp_path / "c.jsonl", overrides
    )
    assert all(
        "model.tensor_model_parallel_size: 2 does not divide the model's num_query_groups (3)"
        in text
        for text in refused
    )


def test_broken_json_names_file_and_line(ranks, world, tmp_path):
    lines = world[2].read_text().splitlines(keepends=True)
    broken = tmp_path / "broken.jsonl"
    broken.write_text(lines[0] + "\n" + '{"messages": [\n' + lines[1])
    refused = ranks(1).run(run_stage_1, world[1], broken, tmp_path / "c.jsonl", {})[0]
    assert f"{broken}:3: not valid JSON" in refused
    assert not list(tmp_path.glob("c*"))


def test_a_bad_record_late_in_the_file_stops_every_rank_before_the_first_chunk(
    ranks, world, tmp_path
):
    lines = world[2].read_text().splitlines(keepends=True)
    (tmp_path / "d.jsonl").write_text(
        "".join(lines[:20]) + '{"messages": [{"role": "user"}]}\n'
    )
    overrides = {"trainer__devices": 2, "n_examples_per_chunk": 4}
    output = tmp_path / "c_CHUNK_ID.jsonl"
    refused = ranks(2).run(
        run_stage_1, world[1], tmp_path / "d.jsonl", output, overrides
    )
    assert all(
        "d.jsonl:21: message 0 must be an object with a `role`, and a text" in text
        for text in refused
    )
    assert not list(tmp_path.glob("c_?.jsonl"))


def test_too_long_examples_are_counted(ranks, world, tmp_path):
    ranks(1).run(
        run_stage_1,
        world[1],
        world[2],
        tmp_path / "c.jsonl",
        {"model__max_seq_length": 40},
    )
    found = summaries(tmp_path / "c.jsonl")[0]
    assert found.skipped["too long"] > 0
    assert found.examples + sum(found.skipped.values()) == NUM_RECORDS
    assert all(len(row["tokens"]) <= 40 for row in read_rows([tmp_path / "c.jsonl"]))


def contents(folder: Path) -> dict[str, bytes]:
    """The files that make the cache, without what the jobs that wrote it were told."""
    paths = [
        path
        for path in sorted(folder.iterdir())
        if not path.name.endswith(
            (".lock", "metrics.log", "config.yaml", "manifest.json")
        )
        and "_config-" not in path.name
    ]
    found = {path.name: path.read_bytes() for path in paths}
    for path in folder.glob("*manifest.json"):
        manifest = json.loads(path.read_text())
        assert manifest.pop("config")
        found[path.name] = json.dumps(manifest).encode()
    return found


def test_packed_rows_say_what_the_json_rows_say(ranks, world, tmp_path):
    """Kept ids, label log-probabilities and tails at two temperatures, on two tensor-parallel ranks."""
    _, model, dataset = world
    shared = {
        "top_k": 40,
        "cache__temperatures": [2.0],
        "trainer__devices": 2,
        "model__tensor_model_parallel_size": 2,
    }
    packed = {
        "cache__min_probability": 0.01,
        "cache__min_k": 2,
        "cache__tail_samples": 3,
    }
    for name, overrides in (
        ("json.jsonl", {"cache__codec": "json"}),
        ("packed.jsonl.zst", packed),
    ):
        assert ranks(2).run(
            run_stage_1, model, dataset, tmp_path / name, {**shared, **overrides}
        ) == ["", ""]
    ours, full = (
        CacheReader(str(tmp_path / "packed.jsonl.zst")),
        CacheReader(str(tmp_path / "json.jsonl")),
    )
    assert len(ours) == len(full) == NUM_RECORDS - 1
    assert ours.manifests[0].codec == {
        "name": "packed", "min_probability": 0.01, "top_p": 1.0, "min_k": 2, "positions": "loss", "temperatures": [2.0],
        "tail_samples": 3, "seed": 1234,
    }  # fmt: skip
    for position in range(len(ours)):
        found, exact = (everywhere(rows[position]).teacher for rows in (ours, full))
        in_loss = ours[position].example.loss_mask_S > 0
        assert np.array_equal(
            ours[position].example.tokens_S, full[position].example.tokens_S
        )
        assert found.temperatures == exact.temperatures == (1.0, 2.0)
        p = np.exp(exact.topk_logits_PK - exact.log_sum_exp_logits_P[:, None])
        counts = np.maximum(2, (p >= 0.01).sum(1))
        for s in np.flatnonzero(in_loss):
            ids = found.topk_token_ids_PK[s]
            expected = exact.topk_token_ids_PK[s, : counts[s]].tolist()
            assert ids[0] == expected[0]
            assert sorted(ids[ids >= 0].tolist()) == sorted(expected)
            samples = found.tail_token_ids_PM[s]
            assert (
                not set(samples.tolist()) & set(ids[ids >= 0].tolist())
                or (samples == -1).all()
            )
            logits = exact.topk_logits_PK[s].astype(float)
            for number, temperature in enumerate((1.0, 2.0)):
                weights = np.exp(logits / temperature)
                share = (
                    weights[: counts[s]].sum()
                    / weights.sum()
                    * (1 - exact.tail_mass_PT[s, number])
                )
                odds = (
                    np.log(share / (1 - share)),
                    -np.log(1 / found.tail_mass_PT[s, number] - 1),
                )
                assert abs(odds[0] + odds[1]) < 0.07
        np.testing.assert_allclose(
            found.label_logprobs_P[in_loss], exact.label_logprobs_P[in_loss], atol=0.15
        )


def run_plan(model, dataset, output, overrides) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        estimate_cost(teacher_config(model, dataset, output, **overrides))
    return printed.getvalue()


def test_the_plan_foretells_the_disk(ranks, world, tmp_path):
    _, model, _ = world
    dataset = write_chat_dataset(tmp_path / "more.jsonl", 200)
    overrides = {
        "trainer__devices": 2,
        "model__micro_batch_size": 2,
        "n_examples_per_chunk": 50,
        "top_k": 64,
    }
    output = tmp_path / "cache" / "c_CHUNK_ID.jsonl.zst"
    told, nothing = ranks(2).run(run_plan, model, dataset, output, overrides)
    assert nothing == ""
    assert not output.parent.exists()
    assert ranks(2).run(run_stage_1, model, dataset, output, overrides) == ["", ""]
    lines = dict(line.split("  ", 1) for line in told.splitlines())
    planned, unit = lines["disk"].split(",")[0].split()
    written = sum(path.stat().st_size for path in output.parent.glob("c_?.jsonl.zst*"))
    assert float(planned) * {"KB": 1e3, "MB": 1e6}[unit] == pytest.approx(
        written, rel=0.15
    )
    tokens = sum(chunk.tokens for chunk in summaries(output).values())
    planned_tokens = int(lines["tokens"].split()[0].replace(",", ""))
    assert planned_tokens == pytest.approx(tokens, rel=0.15)
    assert " on 2 data-parallel ranks" in lines["time"]


def test_any_number_of_data_parallel_ranks_writes_the_same_bytes(
    ranks, world, tmp_path
):
    _, model, dataset = world
    written = []
    for world_size in (1, 2, 4):
        folder = tmp_path / str(world_size)
        overrides = {
            "trainer__devices": world_size,
            "model__micro_batch_size": 2,
            "cache__segment_examples": 3,
            "cache__tail_samples": 2,
            "n_examples_per_chunk": 10,
        }
        output = folder / "c_CHUNK_ID.jsonl.zst"
        assert (
            ranks(world_size).run(run_stage_1, model, dataset, output, overrides)
            == [""] * world_size
        )
        written.append(contents(folder))
    assert set(written[0]) == {
        *(
            f"c_{chunk}.jsonl.zst{suffix}"
            for chunk in range(3)
            for suffix in ("", ".idx")
        ),
        "c_manifest.json",
    }
    assert (folder / "c_metrics.log").exists()
    assert written[1] == written[0]
    assert written[2] == written[0]


def test_another_layout_draws_the_same_tail_samples(ranks, world, tmp_path):
    _, model, dataset = world
    drawn = []
    for tp in (1, 2):
        output = tmp_path / f"tp{tp}.jsonl"
        overrides = {
            "trainer__devices": tp,
            "model__tensor_model_parallel_size": tp,
            "cache__tail_samples": 4,
        }
        ranks(tp).run(
            run_stage_1,
            model,
            dataset,
            output,
            {**overrides, "model__micro_batch_size": tp},
        )
        reader = CacheReader(str(output))
        drawn.append(
            np.concatenate(
                [reader[i].teacher.tail_token_ids_PM for i in range(len(reader))]
            )
        )
    assert (drawn[0] >= 0).any()
    assert (
        drawn[0] == drawn[1]
    ).mean() > 0.999  # rounding may move a draw over the border of two ids


def test_two_ranks_killed_with_kill_9_and_continued_by_one_write_the_same_bytes(
    world, tmp_path
):
    """The command itself: ranks die at random instants, other numbers of ranks continue."""
    _, model, _ = world
    dataset = write_chat_dataset(
        tmp_path / "many.jsonl", 160
    )  # so that no run ends before it is killed
    dice = random.Random(1)

    def command(output: Path, devices: int) -> subprocess.Popen[bytes]:
        words = [
            sys.executable, str(ROOT / "examples" / "compute_topk_logits.py"), f"pretrained_checkpoint.restore_from_path={model}",
            f"data.data.file_path={dataset}", f"output_path={output}", "n_examples_per_chunk=60", "cache.segment_examples=1",
            "cache.tail_samples=2", "trainer.precision=32", f"trainer.devices={devices}", "trainer.accelerator=cpu",
        ]  # fmt: skip
        # A session of its own: what it leaves behind when its launcher dies can be found and killed as well.
        return subprocess.Popen(
            words, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE
        )

    def num_published(folder: Path) -> int:
        return len(list(folder.glob(".c_*.segments/[0-9]*"))) + 60 * len(
            list(folder.glob("c_?.jsonl.zst"))
        )

    straight, killed = (
        tmp_path / "straight" / "c_CHUNK_ID.jsonl.zst",
        tmp_path / "killed" / "c_CHUNK_ID.jsonl.zst",
    )
    assert command(straight, 1).wait() == 0
    deaths = 0
    for devices in (2, 2, 1):
        process = command(killed, devices)
        before = after = num_published(killed.parent)
        while process.poll() is None and after < before + 3:  # then at any instant
            time.sleep(dice.uniform(0.005, 0.02))
            after = num_published(killed.parent)
        victims = psutil.Process(process.pid).children(recursive=True) or [
            psutil.Process(process.pid)
        ]
        dice.choice(victims).send_signal(signal.SIGKILL)
        time.sleep(dice.uniform(0, 0.2))
        os.killpg(process.pid, signal.SIGKILL)
        deaths += process.wait() != 0
        for path in killed.parent.glob("c_?.jsonl.zst"):
            assert path.read_bytes() == (straight.parent / path.name).read_bytes()
    assert deaths == 3
    assert command(killed, 2).wait() == 0
    assert contents(killed.parent) == contents(straight.parent)


def test_records_made_into_tokens_otherwise_are_not_mixed_in(ranks, world, tmp_path):
    _, model, _ = world
    (tmp_path / "d.jsonl").write_text(
        "".join(f'{{"input": "a {n}", "output": "b {n}"}}\n' for n in range(4))
    )
    output = tmp_path / "c.jsonl.zst"
    assert ranks(1).run(run_stage_1, model, tmp_path / "d.jsonl", output, {}) == [""]
    overrides = {
        "data__data__prompt_template": "Q: {input} A: {output}",
        "data__data__add_eos": False,
    }
    refused = ranks(1).run(
        run_stage_1, model, tmp_path / "d.jsonl", output, overrides
    )[0]
    assert (
        "dataset.formatting.prompt_template: '{input} {output}' in the cache, 'Q: {input} A: {output}' now"
        in refused
    )
    assert "dataset.formatting.add_eos: True in the cache, False now" in refused


def test_every_rank_is_told_that_another_job_writes(ranks, world, tmp_path):
    _, model, dataset = world
    lock = Lock(CacheLayout(str(tmp_path / "c.jsonl")).lock_path)
    refused = ranks(2).run(
        run_stage_1, model, dataset, tmp_path / "c.jsonl", {"trainer__devices": 2}
    )
    assert all(
        f"process {os.getpid()} on" in text and "is writing this cache" in text
        for text in refused
    )
    lock.release()
    assert ranks(2).run(
        run_stage_1, model, dataset, tmp_path / "c.jsonl", {"trainer__devices": 2}
    ) == ["", ""]


def run_in_fp8(*args: object) -> tuple[str, list[bool]]:
    """Run stage 1 with `model.fp8` on layers without FP8; the modes that its batches ran in."""
    modes = []

    def without_fp8(machine, model, precision):
        return kernels.Kernels(
            machine, dataclasses.replace(model, fp8=None), precision
        )

    def observed(model, batch, groups):
        assert batch.tokens_BS.numel() % FP8_MULTIPLE == 0
        modes.append(torch.is_grad_enabled())
        return run_batch(model, batch, groups)

    with (
        mock.patch.object(teacher_job, "Kernels", without_fp8),
        mock.patch.object(teacher_model, "Kernels", without_fp8),
        mock.patch.object(teacher_model, "run_batch", observed),
    ):
        return run_stage_1(*args), modes


def test_delayed_scales_are_found_before_the_cache_is_computed(
    ranks, world, reference
):
    folder, model, dataset = world
    output = folder / "fp8.jsonl"
    settings = {"cache__codec": "json", "model__fp8": "delayed"}
    two = settings | {"trainer__devices": 2}
    for message, modes in ranks(2).run(run_in_fp8, model, dataset, output, two):
        assert message == ""
        assert modes[:3] == [True] * 3
        assert not any(modes[3:])  # one of the ranks computes the only segment
    check_rows(read_rows([output]), reference)
    settings["model__fp8"] = "current"
    ((message, modes),) = ranks(1).run(run_in_fp8, model, dataset, output, settings)
    assert "teacher.fp8: 'delayed' in the cache, 'current' now" in message
    assert modes == []
    del settings["model__fp8"]
    (message,) = ranks(1).run(run_stage_1, model, dataset, output, settings)
    assert "teacher.fp8: 'delayed' in the cache, None now" in message


def test_fp8_is_refused_where_it_cannot_run(ranks, world):
    folder, model, dataset = world
    for fp8 in ("current", "delayed"):
        settings = {"model__fp8": fp8}
        (message,) = ranks(1).run(
            run_stage_1, model, dataset, folder / "no.jsonl", settings
        )
        assert (
            f"model.fp8: {fp8}, but FP8 needs Transformer Engine's layers" in message
        )
        assert "(here: no GPU)" in message
