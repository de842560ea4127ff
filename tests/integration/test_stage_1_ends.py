"""Stage 1's ends: chunks that are missing, nothing to train, the summary."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_kd.config import UserInputError
from nemo_kd.teacher import loop
from nemo_kd.teacher.loop import compute_topk_logits
from nemo_kd.teacher.reports import CacheReport
from tests.tiny_data import teacher_config, write_chat_dataset
from tests.tiny_models import save_hf_model

NUM_RECORDS = 24


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ends")
    model = save_hf_model("qwen3", folder / "teacher", 300, dtype=torch.float32)
    return model, write_chat_dataset(folder / "data.jsonl", NUM_RECORDS)


def run(
    model: Path,
    dataset: Path,
    output: Path,
    overrides: dict[str, Any],
    remove: str = "",
) -> tuple[str, str, str]:
    """(error, stdout, log); `remove` is a file or folder that vanishes before the end."""
    printed = io.StringIO()
    logged = io.StringIO()
    handler = logging.StreamHandler(logged)
    logger = logging.getLogger("nemo_kd")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    original = loop.report_cache

    def report_cache(*args: Any) -> CacheReport:
        path = output.parent / remove
        args[0].writer.assemble_complete()
        if remove:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return original(*args)

    error = ""
    loop.report_cache = report_cache
    try:
        with contextlib.redirect_stdout(printed):
            compute_topk_logits(teacher_config(model, dataset, output, **overrides))
    except UserInputError as raised:
        error = str(raised)
    finally:
        loop.report_cache = original
        logger.removeHandler(handler)
    return error, printed.getvalue(), logged.getvalue()


CHUNKS = {"n_examples_per_chunk": 12, "cache__segment_examples": 3}


@pytest.mark.parametrize("remove", ["c_1.jsonl", "c_0.jsonl"])
def test_a_job_alone_never_succeeds_while_a_chunk_is_missing(
    ranks, world, tmp_path, remove
):
    overrides = {**CHUNKS, "trainer__devices": 2}
    for error, printed, _ in ranks(2).run(
        run, *world, tmp_path / "c_CHUNK_ID.jsonl", overrides, remove
    ):
        assert "1 of 2 chunks are missing at the end of this job" in error
        assert f"the first is {remove[2]}" in error
        assert "run the same command again" in error
        assert "next:" not in printed
    assert ranks(1).run(run, *world, tmp_path / "c_CHUNK_ID.jsonl", CHUNKS)[0][0] == ""
    assert (tmp_path / remove).exists()


def test_a_shard_that_did_its_part_names_the_shards_that_others_have_to_do(
    ranks, world, tmp_path
):
    output = tmp_path / "c_CHUNK_ID.jsonl"
    error, printed, logged = ranks(1).run(
        run, *world, output, {**CHUNKS, "part": "0/2"}
    )[0]
    assert error == ""
    assert "2 of 2 chunks wait for other parts" in logged
    assert "Part 0/2 is done and on disk" in logged
    assert "mass of the kept ids" not in printed  # no chunk is there to measure it on
    assert "next:" not in printed
    removed = ".c_0.jsonl.segments"
    error, _, _ = ranks(1).run(
        run, *world, output, {**CHUNKS, "part": "0/2"}, removed
    )[0]
    assert "2 of 2 chunks are missing at the end of this job" in error
    assert ranks(1).run(run, *world, output, {**CHUNKS, "part": "1/2"})[0][0] == ""
    error, printed, _ = ranks(1).run(run, *world, output, CHUNKS)[0]
    assert error == ""
    assert f"check: logit_cache verify {output}" in printed
    assert (
        f"'model.data.data_prefix={{train: [{output}], validation: [VALIDATION_CACHE]}}'"
        in printed
    )


def test_nothing_to_train_is_an_error_before_the_teacher_is_loaded(
    ranks, world, tmp_path
):
    turns = [{"role": "human", "content": "Hi"}, {"role": "gpt", "content": "Yo"}]
    usable = world[1].read_text().splitlines()[0] + "\n"
    dataset = tmp_path / "roles.jsonl"
    dataset.write_text(
        "".join(json.dumps({"messages": turns}) + "\n" for _ in range(4)) + usable
    )
    error, _, _ = ranks(1).run(
        run, world[0], dataset, tmp_path / "c.jsonl", {"end_at_idx": 3}
    )[0]
    assert (
        "nothing to train: none of the records makes an example (4 'no loss tokens')"
        in error
    )
    assert "rename the roles" in error
    assert not (tmp_path / "c.jsonl").exists()
    whole = {"cache__segment_examples": 4}
    assert (
        ranks(1).run(
            run, world[0], dataset, tmp_path / "d.jsonl", {**whole, "part": "0/2"}
        )[0][0]
        == ""
    )
    assert (
        ranks(1).run(run, world[0], dataset, tmp_path / "e.jsonl", whole)[0][0] == ""
    )
    error, _, _ = ranks(1).run(
        run,
        world[0],
        dataset,
        tmp_path / "f.jsonl",
        {"dry_run": True, "end_at_idx": 3},
    )[0]
    assert "nothing to train" in error


def test_a_cache_that_keeps_little_says_which_support_suits(ranks, world, tmp_path):
    output = tmp_path / "c.jsonl"
    error, printed, logged = ranks(1).run(
        run, *world, output, {"top_k": 4, "cache__min_probability": 0}
    )[0]
    assert error == ""
    assert "train with support=tail" in logged
    assert "a larger top_k (now 4)" in logged
    assert (
        "support=renormalize sees nothing outside them: with it keep sft_loss_weight above 0"
        in logged
    )
    for name in (
        "mass of the kept ids (at most 4)",
        "label among the kept ids",
        "computed now",
        "size",
    ):
        assert f"\n{name} " in printed
    sampled = {"top_k": 4, "cache__min_probability": 0.01, "cache__tail_samples": 2}
    _, _, logged = ranks(1).run(run, *world, tmp_path / "d.jsonl", sampled)[0]
    assert "with support=sampled and cache.tail_samples=4" in logged


def run_and_edit(
    model: Path, dataset: Path, output: Path, overrides: dict[str, Any]
) -> str:
    """The error of a run whose dataset is edited after the first published segment."""
    original = loop._publish

    def publish(*args: Any) -> None:
        loop._publish = original
        dataset.write_text(dataset.read_text().replace("Say", "Sag"))
        original(*args)

    loop._publish = publish
    try:
        return run(model, dataset, output, overrides)[0]
    finally:
        loop._publish = original


def test_a_dataset_edited_in_mid_run_is_noticed_before_a_chunk_is_listed(
    ranks, world, tmp_path
):
    dataset = tmp_path / "data.jsonl"
    shutil.copy(world[1], dataset)
    overrides = {"cache__segment_examples": 2, "data__num_workers": 0}
    error = ranks(1).run(
        run_and_edit, world[0], dataset, tmp_path / "c.jsonl", overrides
    )[0]
    assert f"{dataset}: the file was changed while it was in use" in error
    assert not (tmp_path / "c.jsonl").exists()
    shutil.copy(world[1], dataset)
    assert (
        ranks(1).run(run, world[0], dataset, tmp_path / "c.jsonl", overrides)[0][0]
        == ""
    )
    ranks(1).run(run, *world, tmp_path / "straight.jsonl", overrides)
    assert (tmp_path / "c.jsonl").read_bytes() == (
        tmp_path / "straight.jsonl"
    ).read_bytes()
