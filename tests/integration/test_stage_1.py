"""Stage 1 on 1, 2 and 4 ranks: every row holds its own example's logits, as transformers computes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_kd.cache.layout import CacheError
from nemo_kd.config import ConfigError
from nemo_kd.data.records import DataError
from nemo_kd.teacher import compute_topk_logits
from tests.tiny_data import teacher_config, write_chat_dataset
from tests.tiny_models import save_hf_model
from tests.tiny_tokenizer import train_tokenizer

NUM_RECORDS, TOP_K = 23, 8


def run_stage_1(*args: object, **kwargs: object) -> str:
    """Runs stage 1 in a rank; the message of what it refuses, or an empty text."""
    model, dataset, output, overrides = args
    try:
        compute_topk_logits(teacher_config(model, dataset, output, **overrides))
    except (ConfigError, CacheError, DataError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage_1")
    model = save_hf_model("qwen3", folder / "teacher", 300, dtype=torch.float32)
    return folder, model, write_chat_dataset(folder / "data.jsonl", NUM_RECORDS)


@pytest.fixture(scope="module")
def reference(world):
    """Per record: ids, and float64 log-probabilities of transformers' model on the unpadded conversation."""
    _, folder, dataset = world
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).double(), train_tokenizer(300)
    rows = {}
    for index, line in enumerate(dataset.read_text().splitlines()):
        ids = tokenizer.apply_chat_template(json.loads(line)["messages"], return_dict=True)["input_ids"]
        with torch.no_grad():
            rows[index] = (ids, model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1).numpy())
    return rows


def read_rows(paths: list[Path]) -> list[dict]:
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def check_rows(rows: list[dict], reference) -> None:
    assert [row["index"] for row in rows] == [index for index in range(NUM_RECORDS) if index != 5]
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


@pytest.mark.parametrize(
    ("world_size", "tp", "micro", "global_"),
    [(1, 1, 1, 1), (1, 1, 3, 6), (2, 2, 2, 4), (2, 1, 1, 8), (2, 1, 2, 8), (4, 2, 1, 6), (4, 4, 4, 4), (4, 1, 1, 8)],
)
def test_rows_belong_to_their_example_in_every_layout(
    ranks, world, reference, tmp_path, world_size, tp, micro, global_
):
    _, model, dataset = world
    overrides = {
        "trainer__devices": world_size,
        "model__tensor_model_parallel_size": tp,
        "model__micro_batch_size": micro,
        "model__global_batch_size": global_,
        "n_examples_per_chunk": 10,
    }
    assert (
        ranks(world_size).run(run_stage_1, model, dataset, tmp_path / "c_CHUNK_ID.jsonl", overrides)
        == [""] * world_size
    )
    check_rows(read_rows([tmp_path / f"c_{chunk}.jsonl" for chunk in range(3)]), reference)
    manifest = json.loads((tmp_path / "c_manifest.json").read_text())
    assert [manifest["chunks"][key]["examples"] for key in "012"] == [9, 10, 3]
    assert manifest["chunks"]["0"]["skipped"] == {"no loss tokens": 1}


def test_a_range_in_one_file_and_a_rerun_that_skips(ranks, world, tmp_path):
    _, model, dataset = world
    output, overrides = tmp_path / "part_0.jsonl", {"start_from_idx": 7, "end_at_idx": 9}
    ranks(1).run(run_stage_1, model, dataset, output, overrides)
    assert [row["index"] for row in read_rows([output])] == [7, 8, 9]
    before = output.stat().st_mtime_ns
    assert ranks(1).run(run_stage_1, model, dataset, output, overrides) == [""]
    assert output.stat().st_mtime_ns == before
    refused = ranks(1).run(run_stage_1, model, dataset, output, {**overrides, "top_k": 4})[0]
    assert "top_k: 8 in the cache, 4 now" in refused


def test_only_missing_chunks_are_written_again(ranks, world, tmp_path):
    _, model, dataset = world
    output, overrides = tmp_path / "c_CHUNK_ID.jsonl", {"n_examples_per_chunk": 10}
    ranks(1).run(run_stage_1, model, dataset, output, overrides)
    chunks = [tmp_path / f"c_{chunk}.jsonl" for chunk in range(3)]
    content, times = [path.read_bytes() for path in chunks], [path.stat().st_mtime_ns for path in chunks]
    chunks[1].unlink()
    ranks(1).run(run_stage_1, model, dataset, output, overrides)
    assert [path.read_bytes() for path in chunks] == content
    assert chunks[0].stat().st_mtime_ns == times[0]
    assert chunks[1].stat().st_mtime_ns != times[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"top_k": 301}, "top_k: 301 exceeds the teacher's vocabulary of 300 tokens"),
        ({"start_from_idx": 23}, "start_from_idx: 23 lies outside"),
        ({"end_at_idx": 23}, "end_at_idx: 23 lies outside"),
        (
            {"model__micro_batch_size": 2, "model__global_batch_size": 3},
            "model.global_batch_size: 3 must be a multiple",
        ),
        (
            {"data__data__max_seq_length": 5000},
            "data.data.max_seq_length: 5000 exceeds the model's max_position_embeddings",
        ),
        ({"pretrained_checkpoint__restore_from_path": "/nowhere"}, "/nowhere does not exist"),
        ({"data__data__file_path": "/nowhere.jsonl"}, "/nowhere.jsonl: No such file"),
        ({"data__chat": False}, "data.chat=False, but the record is a conversation"),
        ({"trainer__accelerator": "gpu"}, "trainer.accelerator: gpu, but torch finds no GPU"),
        ({"trainer__devices": 3}, "trainer.num_nodes x trainer.devices: 1 x 3"),
        ({"model__transformer_engine": "on"}, "model.transformer_engine: on, but Transformer Engine"),
    ],
)
def test_wrong_input_is_refused_before_the_teacher_runs(ranks, world, tmp_path, overrides, message):
    _, model, dataset = world
    if "gpu" in str(overrides) and torch.cuda.is_available():
        overrides, message = {"trainer__devices": 99}, "trainer.devices: 99"
    refused = ranks(1).run(run_stage_1, model, dataset, tmp_path / "c.jsonl", overrides)[0]
    assert message in refused
    assert not list(tmp_path.glob("c*"))


def test_heads_that_tensor_parallelism_cannot_cut_are_refused(ranks, world, tmp_path):
    folder = save_hf_model(
        "llama2", tmp_path / "odd", 300, num_attention_heads=6, num_key_value_heads=3, hidden_size=48
    )
    overrides = {"trainer__devices": 2, "model__tensor_model_parallel_size": 2, "model__global_batch_size": 1}
    refused = ranks(2).run(run_stage_1, folder, world[2], tmp_path / "c.jsonl", overrides)
    assert all(
        "model.tensor_model_parallel_size: 2 does not divide the model's num_query_groups (3)" in text
        for text in refused
    )


def test_broken_json_names_file_and_line(ranks, world, tmp_path):
    lines = world[2].read_text().splitlines(keepends=True)
    broken = tmp_path / "broken.jsonl"
    broken.write_text(lines[0] + "\n" + '{"messages": [\n' + lines[1])
    refused = ranks(1).run(run_stage_1, world[1], broken, tmp_path / "c.jsonl", {})[0]
    assert f"{broken}:3: not valid JSON" in refused
    assert [path.name for path in tmp_path.glob("c*")] == ["c.manifest.json"]


def test_a_bad_record_late_in_the_file_stops_every_rank_before_the_first_chunk(ranks, world, tmp_path):
    lines = world[2].read_text().splitlines(keepends=True)
    (tmp_path / "d.jsonl").write_text("".join(lines[:20]) + '{"messages": [{"role": "user"}]}\n')
    overrides = {"trainer__devices": 2, "model__global_batch_size": 2, "n_examples_per_chunk": 4}
    output = tmp_path / "c_CHUNK_ID.jsonl"
    refused = ranks(2).run(run_stage_1, world[1], tmp_path / "d.jsonl", output, overrides)
    assert all("d.jsonl:21: message 0 (user): `content` must be a text" in text for text in refused)
    assert not list(tmp_path.glob("c_?.jsonl"))


def test_too_long_examples_are_counted(ranks, world, tmp_path):
    ranks(1).run(run_stage_1, world[1], world[2], tmp_path / "c.jsonl", {"data__data__max_seq_length": 40})
    manifest = json.loads((tmp_path / "c.manifest.json").read_text())["chunks"]["0"]
    assert manifest["skipped"]["too long"] > 0
    assert manifest["examples"] + sum(manifest["skipped"].values()) == NUM_RECORDS
    assert all(len(row["tokens"]) <= 40 for row in read_rows([tmp_path / "c.jsonl"]))
