"""The benchmarks run and their tables hold what they are about; figures are for machines with nothing beside them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import baseline_losses, losses, real_results, results, startup
from nemo_kd.batch import Batch
from nemo_kd.config.loss import Divergence
from nemo_kd.ops.vocab import VocabShard
from tests.tiny_models import save_hf_model
from tests.tiny_tokenizer import CHATML, train_tokenizer
from tests.unit.test_cli import MINIMAL, compose

ROOT = Path(__file__).resolve().parents[2]


def test_the_codec_benchmark_runs_on_a_tiny_setting(tmp_path):
    command = [
        sys.executable, "-m", "benchmarks.cache_codec", f"--data-dir={tmp_path}", "--num-positions=96", "--vocab-size=3000",
        "--seq-length=32", "--chunk-examples", "20", "5", "--scanned-examples=5", "--seconds=0.02",
        f"--cache={ROOT / 'tests' / 'golden' / 'numbers_CHUNK_ID.jsonl'}",
    ]  # fmt: skip
    rows = _rows(command)
    codecs = [row for row in rows if len(row) == 7 and row[0] != "setting"]
    assert len(codecs) == 6 + 4  # a cache has no tail to draw samples from
    for name, kept, plain, zst, kl, encode, decode in codecs[:6]:
        mean, p99 = map(float, kl.split(" / "))
        # float16 does not keep the sum over the kept tokens, so that its KL may be below 0.
        assert (-1e-3 if "float16" in name else -1e-6) < mean <= p99 < 2e-3, name
        assert float(zst.replace(",", "")) < float(plain.replace(",", ""))
        assert float(kept) >= 1
        assert min(int(speed.replace(",", "")) for speed in (encode, decode)) > 0
    access = [row for row in rows if len(row) == 4 and row[0] != "reader"]
    assert [row[1] for row in access] == ["20", "5", "5", "5"]


def test_the_loss_benchmark_runs_on_a_tiny_setting():
    command = [
        sys.executable, "-m", "benchmarks.losses", "--num-tokens=4096", "--vocab", "3000:float32", "--top-k=8",
        "--hidden-size=16", "--repetitions=2", "--only", "torch", "`forward_kl`, sampled", "256 rows",
    ]  # fmt: skip
    rows = _rows(command)
    reference, _, ours = (  # torch's cross-entropy, the same compiled, ours
        [float(value) for value in row[1:]]
        for row in rows
        if len(row) == 4 and row[0] != "method"
    )
    assert reference[2] == pytest.approx(
        3, abs=0.3
    )  # its output, and the gradients of two of its steps
    assert ours[2] < 1
    assert all(min(ratios[:2]) > 0 for ratios in (reference, ours))
    fused = [row for row in rows if len(row) == 5 and row[0] != "method"]
    assert [row[1] for row in fused] == ["4,096", "8,192"]
    assert all(0 < float(row[3]) < 1 for row in fused)


@pytest.mark.parametrize(
    ("baseline", "divergence"),
    [
        (baseline_losses.torch_cross_entropy, None),
        (baseline_losses.gather_and_kl_div, Divergence("forward_kl", "truncate")),
        (baseline_losses.autograd_tail_kl, Divergence("forward_kl", "tail")),
    ],
)
def test_the_loss_benchmark_compares_methods_that_agree(baseline, divergence):
    setting = baseline_losses.Setting(12, 500, "float32", 7, 4, "cpu")
    inputs, found = baseline_losses.random_inputs(setting), []
    for method in (baseline, losses.ours(divergence)):
        logits_NV = inputs.logits_NV.clone().requires_grad_()
        total = method(logits_NV, inputs)
        total.backward()
        found.append((total.detach(), logits_NV.grad))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", results.VARIANTS)
def test_the_settings_whose_results_are_compared_are_taken(variant):
    keys = (
        "sft_loss_weight=1",
        "kd_loss_weight=1",
        "support=renormalize",
        *results.VARIANTS[variant],
    )
    words = [
        MINIMAL["train_gpt_knowledge_distillation"],
        *(f"{results.LOSS}{key}" for key in keys),
    ]
    compose("train_gpt_knowledge_distillation", " ".join(words))


def test_the_dense_teacher_sees_packed_examples_apart(tmp_path):
    folder = save_hf_model("qwen3", tmp_path, 300)
    parts = [
        torch.randint(300, (length,), generator=torch.manual_seed(length))
        for length in (17, 1, 9)
    ]
    tokens_BS = torch.cat(parts)[None]
    positions_BS = torch.cat([torch.arange(len(part)) for part in parts])[None]
    ones_BS = torch.ones_like(tokens_BS)
    indices_B = torch.arange(3)
    batch = Batch(
        indices_B,
        indices_B,
        torch.tensor([17, 1, 9]),
        tokens_BS,
        tokens_BS,
        ones_BS.float(),
        positions_BS,
    )
    found_BSV, _ = results._dense(
        torch.zeros(1, 27, 300), batch, VocabShard(0, 300, 300), str(folder)
    )
    teacher = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = [
            teacher(part[None]).logits[0].log_softmax(dim=-1) for part in parts
        ]
    torch.testing.assert_close(found_BSV[0], torch.cat(expected), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """The benchmark of a real teacher, with a tiny one."""
    folder = tmp_path_factory.mktemp("real_results")
    teacher = save_hf_model("llama3.2_tied", folder / "teacher", 400)
    tokenizer = train_tokenizer(400)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(teacher)
    records = [
        {
            "messages": [
                {"role": "user", "content": f"{number} apples?"},
                {"role": "assistant", "content": f"That makes {7 * number}."},
            ]
        }
        for number in range(16)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = real_results.Settings(
        teacher=str(teacher),
        data=str(data),
        num_layers=1,
        num_train=8,
        num_validation=4,
        warm_steps=2,
        steps=2,
        batch_size=2,
        angle_examples=4,
    )
    experiment = real_results.Experiment(folder / "run", settings)
    experiment.prepare()
    return experiment


def test_the_benchmark_of_a_real_teacher_measures_and_resumes(experiment, capsys):
    dense = real_results.Row(cache="dense")
    tail = real_results.Row(cache="K=128")
    few = real_results.Row(cache="K=12")
    for row in (dense, tail):
        key = {"kind": "run", "student": "cold", "row": row.name, "seed": 1}
        experiment.remember(key, lambda row=row: experiment.run("cold", row, 1))
    experiment.before("cold", 1)
    experiment.angles("cold", [dense, tail, few])
    before = experiment.log.read_text()
    experiment.before("cold", 1)
    experiment.angles("cold", [dense, tail, few])
    assert experiment.log.read_text() == before  # what is done is not done again
    lines = experiment.done()
    angle = {line["row"]: line for line in lines if line["kind"] == "angle"}
    assert angle[dense.name]["angle"] < 0.1
    assert angle[dense.name]["norm"] == pytest.approx(1, abs=1e-3)
    assert angle[tail.name]["angle"] < angle[few.name]["angle"]
    capsys.readouterr()
    real_results.print_tables(lines)
    printed = capsys.readouterr().out
    assert f"| {dense.name} | 1 | " in printed
    with pytest.raises(SystemExit, match="give another --folder"):
        real_results.Experiment(experiment.folder, real_results.Settings())


def test_samples_of_the_cache_are_unbiased_on_average(experiment):
    """The mean gradient of many draws nears the dense one; that of the bucket does not."""
    model = experiment.start("cold", 1)
    examples = experiment.train[:4]
    dense = experiment.gradient(model, examples, real_results.Row(cache="dense"))
    top_k, config = real_results.CACHES[real_results.SMALL]
    total = torch.zeros_like(dense)
    for seed in range(64):
        drawn = replace(config, seed=seed)
        experiment.rows["drawn"] = {
            example.index: experiment.cached(example, top_k, drawn)
            for example in examples
        }
        row = real_results.Row(support="sampled", cache="drawn")
        total += experiment.gradient(model, examples, row)
    error = (total / 64 - dense).norm() / dense.norm()
    one = experiment.gradient(model, examples, row)
    assert error < 0.25 * (one - dense).norm() / dense.norm()


def _rows(command: list[str]) -> list[list[str]]:
    """Cells of the table lines that a benchmark prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("| ")]
    return [
        [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        for line in lines
    ]


def test_the_startup_benchmark_measures_until_a_line():
    times = os.times()
    assert startup.cpu_seconds(os.getpid()) == pytest.approx(sum(times[:4]), abs=0.05)
    cpu_s, wall_s = startup.measure("logit_cache", ["--help"], None)
    assert cpu_s > 0
    assert wall_s > 0
    assert startup.measure("logit_cache", ["--help"], "usage: ")[0] > 0
    with pytest.raises(
        RuntimeError, match=r"--help: no line matches 'absent'; last: "
    ):
        startup.measure("logit_cache", ["--help"], "absent")
