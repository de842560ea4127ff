"""Counters, derived metrics and their sinks; FLOPs against torch's own count of a transformers model."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from nemo_kd.config.shared import GPTArchitecture
from nemo_kd.files import FileError
from nemo_kd.mcore.architecture import ForwardFlops, peak_flops
from nemo_kd.run import metrics
from nemo_kd.run.metrics import MetricsFile, Progress, WandbRun

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "vocab_size": 500,
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}


def flops_of(**changes: Any) -> ForwardFlops:
    architecture = GPTArchitecture("qwen3", 500, 3, 64, 160, 4, 2, 24, 512, 1e-6, 1e4)
    return ForwardFlops(dataclasses.replace(architecture, **changes))


class Seen:
    """A sink that keeps what it is shown."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.closed = False

    def log(self, metrics: dict[str, float]) -> None:
        self.metrics.append(metrics)

    def finish(self) -> None:
        self.closed = True


@pytest.fixture
def clock(monkeypatch):
    """time.monotonic of the module, set by hand."""

    class Clock:
        now_s = 1000.0

    monkeypatch.setattr(metrics.time, "monotonic", lambda: Clock.now_s)
    return Clock


def counted_flops(model: torch.nn.Module, num_tokens: int) -> int:
    """By FlopCounterMode; attention is not causal to it: every token is paired with every other."""
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, num_tokens, dtype=torch.long))
    return counter.get_total_flops()


def test_flops_are_what_torch_counts_for_a_dense_model():
    model = LlamaForCausalLM(
        LlamaConfig(**SIZES, **HEADS, attn_implementation="eager")
    )
    flops = flops_of()
    for num_tokens in (1, 40, 129):
        unseen_pairs = num_tokens * (num_tokens - 1) / 2
        ours = flops.example(num_tokens, num_tokens) + flops.per_pair * unseen_pairs
        # Rotary frequencies are a product of two vectors for each position, which nobody counts as the model's work.
        assert counted_flops(model, num_tokens) == pytest.approx(ours, rel=2e-4)


def test_flops_are_what_torch_counts_with_experts():
    config = MixtralConfig(
        **SIZES,
        **HEADS,
        num_local_experts=4,
        num_experts_per_tok=2,
        attn_implementation="eager",
    )
    config._experts_implementation = "eager"
    flops = flops_of(num_moe_experts=4, moe_router_topk=2)
    ours = flops.example(40, 40) + flops.per_pair * 40 * 39 / 2
    assert counted_flops(MixtralForCausalLM(config), 40) == pytest.approx(
        ours, rel=2e-4
    )


def test_a_window_counts_the_pairs_that_are_seen():
    whole = flops_of()
    mixed = flops_of(window_size=7, window_layers=[0, 2])
    for num_tokens in (3, 7, 8, 50):
        seen = sum(min(position + 1, 7) for position in range(num_tokens))
        pairs = num_tokens * (num_tokens + 1) // 2
        less = whole.example(num_tokens, 0) - mixed.example(num_tokens, 0)
        assert less == pytest.approx(2 / 3 * whole.per_pair * (pairs - seen))


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16-mixed", 756e12),
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA B200", "bf16", 2250e12),
        ("NVIDIA GB200", "bf16", None),
        ("NVIDIA H200", "32", None),
        ("Tesla T4", "bf16", None),
    ],
)
def test_peak_of_known_gpus(monkeypatch, name, precision, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), precision) == peak


def test_metrics_of_one_replica(clock):
    seen = Seen()
    progress = Progress(
        "kd", total=10_000, interval_s=10, sinks=[seen], peak_flops=1e6
    )
    for _ in range(4):
        clock.now_s += 5
        progress.add(
            tokens=450,
            padding_tokens=50,
            loss_tokens=200,
            examples=3,
            flops=1e6,
            data_wait_s=0.5,
        )
    progress.add(
        cached_tokens=400, cached_loss_tokens=100, kept_mass_sum=97, bytes=48_000
    )
    assert len(seen.metrics) == 2  # one an interval
    assert seen.metrics[1] == pytest.approx(
        {
            "progress/tokens": 1800,
            "progress/examples": 12,
            "progress/percent": 18,
            "perf/tokens_per_s": 90,
            "perf/tokens_per_s_overall": 90,
            "perf/eta_s": 8200 / 90,
            "perf/padding_percent": 10,
            "perf/data_wait_percent": 10,
            "perf/mfu_percent": 20,
        }
    )
    progress.finish()
    progress.close()
    assert seen.closed
    assert seen.metrics[2]["cache/kept_mass"] == pytest.approx(0.97)
    assert seen.metrics[2]["cache/bytes_per_token"] == pytest.approx(120)


def test_rates_and_eta_follow_the_recent_past(clock):
    seen = Seen()
    progress = Progress("kd", total=100_000, interval_s=1, sinks=[seen])
    for second in range(60):
        clock.now_s += 1
        progress.add(tokens=1000 if second < 40 else 100)
    last = seen.metrics[-1]
    assert last["perf/tokens_per_s"] == pytest.approx(100)
    assert last["perf/eta_s"] == pytest.approx((100_000 - 42_000) / 100)
    assert last["perf/tokens_per_s_overall"] == pytest.approx(42_000 / 60)


def test_nothing_known_is_nothing_shown(clock):
    seen = Seen()
    Progress("kd", total=0, interval_s=1, sinks=[seen]).report()
    assert set(seen.metrics[0]) == {
        "progress/tokens",
        "progress/examples",
        "perf/tokens_per_s",
        "perf/tokens_per_s_overall",
    }
    assert set(seen.metrics[0].values()) == {0.0}


def test_replica_0_shows_the_whole_job_and_waits_for_nobody(clock):
    server = torch.distributed.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    seen = Seen()
    members = []
    for rank in range(3):
        store = torch.distributed.TCPStore("127.0.0.1", server.port, is_master=False)
        members.append(
            Progress(
                "kd" if rank == 0 else None,
                3000,
                10,
                [seen],
                store,
                rank,
                num_replicas=3,
            )
        )
    clock.now_s += 10
    members[0].add(tokens=100, data_wait_s=3)
    assert (
        seen.metrics[-1]["progress/tokens"] == 100
    )  # the others have told nothing yet
    members[1].add(tokens=200, data_wait_s=6)
    clock.now_s += 10
    members[2].add(tokens=300)
    members[0].add(tokens=100)
    assert seen.metrics[-1]["progress/tokens"] == 700
    assert seen.metrics[-1]["perf/tokens_per_s"] == pytest.approx(35)
    assert seen.metrics[-1]["perf/data_wait_percent"] == pytest.approx(
        100 * 9 / 20 / 3
    )


def test_the_metrics_file_is_appended_to(tmp_path):
    path = tmp_path / "logs" / "metrics.jsonl"
    for tokens in (1.0, 2.0):
        sink = MetricsFile(path)
        sink.log({"progress/tokens": tokens})
        sink.finish()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["progress/tokens"] for line in lines] == [1, 2]
    assert all(abs(line["time"] - time.time()) < 60 for line in lines)


EXAMPLE = {
    "progress/tokens": 1234.0,
    "progress/percent": 12.34,
    "perf/tokens_per_s": 5678.9,
    "perf/eta_s": 3725.0,
    "perf/padding_percent": 2.25,
    "perf/data_wait_percent": 0.5,
    "perf/mfu_percent": 41.0,
    "cache/kept_mass": 0.98765,
}


def test_a_log_file_gets_plain_lines(capsys):
    line = Progress("teacher", 10_000, 1)
    line._show(EXAMPLE)
    line._show({"progress/tokens": 5.0})
    line.close()
    assert capsys.readouterr().err.splitlines() == [
        "teacher: 1,234/10,000 tokens, 5,679 tokens/s, 41.0% MFU, 2.2% padding, 0.5% data wait, "
        "kept mass 0.9877, 1:02:05 left",
        "teacher: 5/10,000 tokens",
    ]


STEP = {
    "progress/steps": 1500.0,
    "progress/percent": 15.0,
    "epoch": 0.75,
    "train/loss": 2.34567,
    "train/kd_loss": 1.5,
    "train/sft_loss": 0.84567,
    "lr": 1e-5,
    "grad_norm": 12.345,
    "perf/tokens_per_s": 98765.4,
    "perf/data_wait_percent": 0.25,
    "perf/peak_memory_gib": 71.26,
    "perf/eta_s": 3725.0,
}


def test_a_step_is_one_line(capsys):
    line = Progress("training", 10_000, 1, unit="steps")
    line._show(STEP)
    line.note("validation after step 1,500: loss 2.0000")
    line.close()
    assert capsys.readouterr().err.splitlines() == [
        "training: 1,500/10,000 steps, epoch 0.75, loss 2.3457, kd_loss 1.5000, sft_loss 0.8457, "
        "lr 1.00e-05, grad_norm 12.3, 98,765 tokens/s, 0.2% data wait, 71.3 GiB, 1:02:05 left",
        "training: validation after step 1,500: loss 2.0000",
    ]


def test_steps_done_before_a_resume_do_not_count_in_the_rates(clock):
    seen = Seen()
    progress = Progress("kd", 100, 10, [seen], unit="steps", start={"steps": 50})
    progress.latest = {"train/loss": 2.0}
    for _ in range(10):
        clock.now_s += 1
        progress.add(steps=1, tokens=30)
    (shown,) = seen.metrics
    assert shown["progress/steps"] == shown["progress/percent"] == 60
    assert shown["perf/eta_s"] == pytest.approx(40)
    assert shown["perf/tokens_per_s"] == pytest.approx(30)
    assert shown["train/loss"] == 2
    progress.finish()
    progress.close()
    assert len(seen.metrics) == 1  # it would only repeat the last report
    assert seen.closed


def shown_on_a_terminal(num_columns: int, code: str) -> str:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, num_columns, 0, 0))
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True, cwd=ROOT)
    os.close(theirs)
    text = os.read(ours, 100_000).decode()
    os.close(ours)
    return text


def test_a_terminal_gets_one_bar():
    code = f"from nemo_kd.run.metrics import Progress; line = Progress('teacher', 10_000, 1); line._show({EXAMPLE}); line.close()"
    text = shown_on_a_terminal(200, code)
    assert text.count("\n") == 1
    assert "teacher:  12%|" in text
    assert "1.23k/10.0k" in text
    assert "kept mass 0.9877" in text


def test_wandb_offline(tmp_path):
    code = f"""
from nemo_kd.run.metrics import WandbRun
run = WandbRun({{"project": "kd", "dir": {str(tmp_path)!r}}})
run.log({{"perf/tokens_per_s": 123.0}})
run.finish()
"""
    env = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=env)
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"perf/tokens_per_s" in log.read_bytes()


def test_a_full_disk_names_the_metrics_file():
    file = MetricsFile(Path("/dev/full"))
    with pytest.raises(FileError, match="/dev/full: cannot be written .No space left"):
        file.log({"progress/tokens": 2})
    file.finish()


class LostRun:
    def log(self, metrics):
        raise ConnectionResetError(104, "Connection reset by peer")

    def finish(self, exit_code):
        raise BrokenPipeError(32, "Broken pipe")


def test_wandb_that_is_lost_is_one_warning(monkeypatch, caplog):
    given = {}
    monkeypatch.setattr(
        wandb, "init", lambda **found: given.update(found) or LostRun()
    )
    run = WandbRun({"project": "kd", "save_dir": "here", "offline": True})
    assert given == {"project": "kd", "dir": "here", "mode": "offline"}
    run.log({"perf/tokens_per_s": 123.0})
    run.log({"perf/tokens_per_s": 124.0})
    run.finish()
    (warning,) = caplog.messages
    assert "Weights & Biases failed (ConnectionResetError: [Errno 104]" in warning


def test_a_table_that_wandb_refuses_is_one_warning(monkeypatch, caplog):
    """Rank 0 alone logs; an error would leave the other ranks waiting."""
    monkeypatch.setattr(wandb, "init", lambda: LostRun())
    run = WandbRun({})
    for _ in range(2):
        run.log_table("samples", [{"answer": 1}, {"answer": "one"}], {"step": 1.0})
    (warning,) = caplog.messages
    assert "Weights & Biases failed (TypeError: Data row contained" in warning
