"""Memory of a training batch and the wait for it, where half of the tokens are prompts.

    OMP_NUM_THREADS=1 python -m benchmarks.batches [--length 1024] [--examples 8] [--cache FOLDER]

Reads rows of a synthetic packed cache (100 kept logits a position, prompts without) and collates
them: time, bytes of all tensors of a batch, and what the process grows by. Then a small student
trains on the same cache: the share of a step that waits for data, and the largest memory of the
process (VmHWM). Each part runs in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.teacher import machine
from benchmarks.teacher_variants import status_bytes
from nemo_kd.cache.reader import CacheReader
from nemo_kd.data.batches import collate

VOCAB_SIZE = 32_000
TOP_K = 100
NUM_EXAMPLES = 64


def write_cache(folder: Path, length: int) -> Path:
    """Write rows whose first half is a prompt."""
    from nemo_kd.batch import CachedExample, Example, TeacherRows
    from nemo_kd.cache.layout import CacheLayout
    from nemo_kd.cache.manifest import Manifest, codec_settings
    from nemo_kd.cache.segment import publish_segment
    from nemo_kd.cache.writer import CacheWriter
    from nemo_kd.config.data import CacheConfig

    layout = CacheLayout(str(folder / "half_CHUNK_ID.jsonl"))
    manifest = Manifest(
        codec=codec_settings(CacheConfig(min_probability=0)),
        top_k=TOP_K,
        vocab_size=VOCAB_SIZE,
        tokenizer_size=VOCAB_SIZE,
        seq_length=length,
        teacher={"name": "synthetic"},
        tokenizer="",
        chat_template=None,
        dataset={
            "path": "synthetic",
            "fingerprint": "none",
            "start_from_idx": 0,
            "end_at_idx": NUM_EXAMPLES - 1,
        },
        n_examples_per_chunk=None,
        segment_examples=NUM_EXAMPLES,
    )
    writer = CacheWriter(layout, manifest, [range(NUM_EXAMPLES)])
    rows = []
    for index in range(NUM_EXAMPLES):
        random = np.random.default_rng(index)
        positions_P = np.arange(length // 2, length)
        num_rows = len(positions_P)
        logits_PK = -np.sort(
            random.exponential(4.0, (num_rows, TOP_K)).astype(np.float32), axis=1
        )
        logits_PK -= logits_PK[:, :1]
        offsets_PK = random.integers(1, VOCAB_SIZE // TOP_K, (num_rows, TOP_K)).cumsum(
            axis=1
        )
        mass_P = np.exp(logits_PK.astype(np.float64)).sum(axis=1)
        teacher = TeacherRows(
            positions_P=positions_P,
            topk_logits_PK=logits_PK,
            topk_token_ids_PK=offsets_PK,
            log_sum_exp_logits_P=np.log(mass_P / 0.95).astype(np.float32),
            tail_mass_PT=np.full((num_rows, 1), 0.05, dtype=np.float32),
            label_logprobs_P=np.full(num_rows, -1, dtype=np.float32),
        )
        tokens_S = random.integers(VOCAB_SIZE, size=length + 1)
        mask_S = (np.arange(length) >= length // 2).astype(np.float32)
        rows.append(
            CachedExample(Example(index, tokens_S[:-1], tokens_S[1:], mask_S), teacher)
        )
    publish_segment(layout, manifest, (0, range(NUM_EXAMPLES)), rows, {})
    writer.assemble_complete()
    writer.close()
    layout.manifest_path.unlink()  # it names a tokenizer that the student does not have
    return folder / "half_CHUNK_ID.jsonl"


def tensors(value: Any) -> list[torch.Tensor]:
    """Return all tensors of a batch, also of dataclasses inside it."""
    if isinstance(value, torch.Tensor):
        return [value]
    fields = vars(value).values() if hasattr(value, "__dataclass_fields__") else []
    return [tensor for field in fields for tensor in tensors(field)]


def read_and_collate(connection: Any, cache: Path, num_examples: int) -> None:
    """Send the time to read and collate a batch, its bytes and the growth of the process."""
    reader = CacheReader(str(cache))
    collate([reader[0]], 0)
    before = status_bytes("VmRSS")
    times: list[tuple[float, float]] = []
    for start in range(0, NUM_EXAMPLES - num_examples + 1, num_examples):
        started_s = time.perf_counter()
        rows = [reader[start + number] for number in range(num_examples)]
        read_s = time.perf_counter()
        batch = collate(rows, 0)
        times.append((read_s - started_s, time.perf_counter() - read_s))
    num_bytes = sum(
        tensor.numel() * tensor.element_size() for tensor in tensors(batch)
    )
    read_ms, collate_ms = (
        1e3 * statistics.median(part) for part in zip(*times, strict=True)
    )
    connection.send(
        {
            "milliseconds to read a batch": read_ms,
            "milliseconds to collate it": collate_ms,
            "MiB of a batch": num_bytes / 2**20,
            "MiB the process grows by": (status_bytes("VmHWM") - before) / 2**20,
        }
    )


def train(connection: Any, cache: Path, num_examples: int) -> None:
    """Send the median wait and time of a training step, and the largest memory."""
    from nemo_kd.student.job import train_student
    from tests.tiny_data import student_config
    from tests.tiny_models import build_hf_model
    from tests.tiny_tokenizer import train_tokenizer

    folder = Path(tempfile.mkdtemp())
    student = folder / "student"
    build_hf_model("llama2", VOCAB_SIZE, max_position_embeddings=8192).save_pretrained(
        student
    )
    train_tokenizer(1024).save_pretrained(student)
    keys = {
        "micro_batch_size": num_examples,
        "global_batch_size": num_examples,
        "max_seq_length": 8192,
        "data__packing": False,
        "data__data_impl": "chunked_jsonl",
    }
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        train_student(
            student_config(
                student,
                cache,
                cache,
                folder / "run",
                **{f"model__{key}": value for key, value in keys.items()},
                trainer__knowledge_distillation__max_steps=8,
                trainer__knowledge_distillation__limit_val_batches=0,
                exp_manager__create_checkpoint_callback=False,
            )
        )
    lines = (folder / "run" / "metrics" / "metrics.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if "perf/step_time_s" in row][1:]
    connection.send(
        {
            "seconds of a step": statistics.median(
                row["perf/step_time_s"] for row in steps
            ),
            "data wait of a step, percent": statistics.median(
                row["perf/data_wait_percent"] for row in steps
            ),
            "MiB of the training process at most": status_bytes("VmHWM") / 2**20,
        }
    )


def in_a_process(function: Callable[..., None], *arguments: Any) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=function, args=(theirs, *arguments))
    process.start()
    theirs.close()
    found: dict[str, float] = ours.recv()
    process.join()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--length", type=int, default=1024, help="positions of an example"
    )
    parser.add_argument("--examples", type=int, default=8, help="examples of a batch")
    parser.add_argument(
        "--cache", type=Path, help="keep the cache in this folder and use it again"
    )
    options = parser.parse_args(arguments)
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    folder = options.cache or Path(tempfile.mkdtemp())
    cache = folder / "half_CHUNK_ID.jsonl"
    if not (folder / "half_0.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_cache(folder, options.length)
    print(
        f"{date.today()}, {machine()}, torch {torch.__version__}: {options.examples} examples of "
        f"{options.length}\n"
    )
    found = in_a_process(read_and_collate, cache, options.examples)
    found |= in_a_process(train, cache, options.examples)
    print("| measure | value |\n|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value:,.2f} |")


if __name__ == "__main__":
    main()
