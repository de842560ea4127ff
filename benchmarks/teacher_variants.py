"""What the teacher's benchmark compares: four ways through the same batches, each in a process of its own."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.teacher_inputs import MAX_LENGTH, VOCAB_SIZE
from nemo_kd.batch import Batch, Example
from nemo_kd.cache.segment import segments
from nemo_kd.config.teacher import ComputeTopkLogitsConfig
from nemo_kd.data.batches import form_batches, pack
from nemo_kd.mcore.architecture import ForwardFlops
from nemo_kd.mcore.model import forward, hidden_at, hidden_states, output_weight
from nemo_kd.mcore.schedule import loss_positions
from nemo_kd.ops.topk import BLOCK_BYTES
from nemo_kd.teacher import loop
from nemo_kd.teacher.job import Run, open_run
from nemo_kd.teacher.model import Teacher
from nemo_kd.tools.verify import chunks_of, verify_chunk
from tests.tiny_data import teacher_config

TOP_K = 128
WARM_UP_EXAMPLES = 4


@dataclass(frozen=True)
class Setting:
    """What a process needs to know."""

    folder: Path
    teacher: Path
    dataset: Path
    precision: str
    max_tokens: int
    segment_examples: int

    def config(self, output: Path) -> ComputeTopkLogitsConfig:
        return teacher_config(
            self.teacher,
            self.dataset,
            output,
            top_k=TOP_K,
            trainer__precision=self.precision,
            cache__segment_examples=self.segment_examples,
            data__max_tokens_per_batch=self.max_tokens,
            model__max_seq_length=MAX_LENGTH,
        )


@dataclass
class Figures:
    """One run of a variant; CPU seconds of all its processes, FLOPs as `nemo_kd.run.metrics` counts them."""

    seconds: float
    cpu_s: float
    before_bytes: int
    host_bytes: int
    device_bytes: int
    flops: float
    details: dict[str, float]
    beside_bytes: int = 0


class Clock:
    """Seconds from `start` to `stop`: on the wall, of the CPUs, and of the CPUs by processes that end in between alone."""

    def start(self) -> None:
        self._started = self._now()

    def stop(self) -> None:
        self.wall_s, own_cpu_s, self.workers_cpu_s = (
            now - then for now, then in zip(self._now(), self._started, strict=True)
        )
        self.cpu_s = own_cpu_s + self.workers_cpu_s

    @staticmethod
    def _now() -> tuple[float, float, float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        own, of_children = (
            resource.getrusage(who)
            for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
        return (
            time.perf_counter(),
            own.ru_utime + own.ru_stime,
            of_children.ru_utime + of_children.ru_stime,
        )


@dataclass
class Bench:
    """A process's teacher and dataset."""

    setting: Setting
    run: Run
    teacher: Teacher

    def batches(self) -> Iterator[tuple[list[Example], Batch]]:
        """Stage 1's batches, tokenized when they are asked for."""
        teacher, job = self.teacher, self.run.jobs[0]
        for indices in segments(job.chunks[0], self.setting.segment_examples):
            examples = [
                one
                for index in indices
                if isinstance(one := job.dataset[index], Example)
            ]
            lengths = [example.num_tokens for example in examples]
            for places in form_batches(
                lengths,
                teacher.max_examples,
                teacher.max_tokens,
                True,
                teacher.multiple_of,
            ):
                chosen = [examples[place] for place in places]
                yield (
                    chosen,
                    pack(chosen, teacher.pad_id, teacher.multiple_of).to(
                        self.run.groups.device
                    ),
                )


Work = Callable[[Clock], dict[str, float]]
"""Starts and stops the clock; returns what else is to be told."""


def bare_forward(bench: Bench) -> Work:
    batches = list(bench.batches())

    @torch.inference_mode()
    def work(clock: Clock) -> dict[str, float]:
        clock.start()
        for _, batch in batches:
            forward(bench.teacher.model, batch)
        clock.stop()
        return {}

    return work


def bare_projection(bench: Bench) -> Work:
    model, groups, batches = (
        bench.teacher.model,
        bench.run.groups,
        list(bench.batches()),
    )
    positions = [
        loss_positions(batch.to("cpu"), groups)[0].to(groups.device)
        for _, batch in batches
    ]
    weight_VH = output_weight(model)[:VOCAB_SIZE]
    block = max(
        1, BLOCK_BYTES[weight_VH.is_cuda] // (VOCAB_SIZE * weight_VH.element_size())
    )
    logits_NV = weight_VH.new_empty(block, VOCAB_SIZE)

    @torch.inference_mode()
    def work(clock: Clock) -> dict[str, float]:
        clock.start()
        for (_, batch), positions_N in zip(batches, positions, strict=True):
            hidden_NH = hidden_at(hidden_states(model, batch), positions_N, 1, model)
            for rows_NH in hidden_NH.chunk(-(-len(hidden_NH) // block)):
                torch.mm(rows_NH, weight_VH.T, out=logits_NV[: len(rows_NH)])
        clock.stop()
        return {}

    return work


def stage_1(bench: Bench) -> Work:
    def work(clock: Clock) -> dict[str, float]:
        called_s, before_s = time.perf_counter(), 0.0

        def loaded(run: Run, step: Callable[..., None]) -> Teacher:
            nonlocal before_s
            before_s = time.perf_counter() - called_s
            bench.teacher.step = step
            clock.start()
            return bench.teacher

        folder = Path(tempfile.mkdtemp(dir=bench.setting.folder))
        with (
            mock.patch.object(loop, "Teacher", loaded),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            loop.compute_topk_logits(bench.setting.config(folder / "cache.jsonl.zst"))
        clock.stop()
        (metrics,) = folder.glob("*metrics.log")
        told = json.loads(metrics.read_text().splitlines()[-1])
        chunks, _ = chunks_of(str(folder / "cache.jsonl.zst"))
        (report,) = map(verify_chunk, chunks)
        shutil.rmtree(folder)
        return {
            "before_s": before_s,
            **told,
            "examples": report.found.examples,
            "bytes": report.found.bytes,
            "kept_tokens": report.found.kept_tokens,
            "problems": len(report.problems),
        }

    return work


def obvious(bench: Bench) -> Work:
    @torch.inference_mode()
    def work(clock: Clock) -> dict[str, float]:
        path = bench.setting.folder / "obvious.jsonl"
        clock.start()
        with path.open("w") as file:
            for examples, batch in bench.batches():
                file.writelines(
                    json.dumps(record) + "\n"
                    for record in obvious_records(bench, examples, batch)
                )
        clock.stop()
        details = {"bytes": path.stat().st_size}
        path.unlink()
        return details

    return work


def obvious_records(
    bench: Bench, examples: Sequence[Example], batch: Batch
) -> Iterator[dict[str, Any]]:
    logits_NV = forward(bench.teacher.model, batch)[0, :, :VOCAB_SIZE].float()
    log_sum_exp_N = logits_NV.logsumexp(dim=-1)
    topk = logits_NV.topk(TOP_K, dim=-1)
    del logits_NV
    logits, ids, sums = (
        found_N.tolist() for found_N in (topk.values, topk.indices, log_sum_exp_N)
    )
    ends = list(
        itertools.accumulate((example.num_tokens for example in examples), initial=0)
    )
    for example, (first, last) in zip(examples, itertools.pairwise(ends), strict=True):
        yield {
            "index": example.index,
            "tokens": example.tokens_S.tolist(),
            "labels": example.labels_S.tolist(),
            "loss_mask": example.loss_mask_S.tolist(),
            "topk_logits": logits[first:last],
            "topk_token_ids": ids[first:last],
            "log_sum_exp_logits": sums[first:last],
        }


VARIANTS: dict[str, Callable[[Bench], Work]] = {
    "forward": bare_forward,
    "projection": bare_projection,
    "stage 1": stage_1,
    "obvious": obvious,
}


def serve(connection: Any, variant: str, setting: Setting) -> None:
    """What a variant's process does: makes ready, then a run whenever it is asked for one, until it is sent False."""
    with open_run(setting.config(setting.folder / "unused.jsonl")) as run:
        teacher = Teacher(run)
        bench = Bench(setting, run, teacher)
        examples = [example for chosen, _ in bench.batches() for example in chosen]
        flops_of = ForwardFlops(run.pretrained.architecture)
        flops = sum(
            flops_of.example(one.num_tokens, one.num_loss_tokens) for one in examples
        )
        teacher.finish(teacher.start(examples[-WARM_UP_EXAMPLES:]))
        work = VARIANTS[variant](bench)
        connection.send([(one.num_tokens, one.num_loss_tokens) for one in examples])
        while connection.recv():
            Path("/proc/self/clear_refs").write_text("5")
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            before_bytes, clock = status_bytes("VmRSS"), Clock()
            details = work(clock)
            device_bytes = (
                torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
            )
            host_bytes = status_bytes("VmHWM")
            connection.send(
                Figures(
                    clock.wall_s,
                    clock.cpu_s,
                    before_bytes,
                    host_bytes,
                    device_bytes,
                    flops,
                    details,
                )
            )


def status_bytes(field: str) -> int:
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field + ":")
    )
    return int(line.split()[1]) * 1024
