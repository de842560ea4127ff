"""Define the golden runs, and record what they yield: python -m tests.golden.record_runs [PART OF A CASE'S NAME ...]

`runs.json` holds the results of both stages on small models with fixed seeds: digests and sums of
caches, the losses of every step, digests of exported weights. A refactoring must reproduce them, bit
by bit on a machine with the same `signature`; `tests/integration/test_golden_runs.py` compares.

Record again only when results are meant to change, and say in the commit which and why. Arguments
limit the recording to the cases whose names contain one of them; the others keep their numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.forked_runs import training_rows, validation_rows
from tests.golden import independent_reader
from tests.integration.test_stage_1 import run_stage_1
from tests.integration.test_stage_2 import run_stage_2
from tests.ranks import Ranks
from tests.tiny_cache import summaries
from tests.tiny_models import build_hf_model
from tests.tiny_tokenizer import CHATML, SPECIAL

RECORDED = Path(__file__).with_name("runs.json")
LICENSE = Path(__file__).resolve().parents[2] / "LICENSE"
VOCAB_SIZE = 300
NUM_TRAIN = 41
NUM_VALIDATION = 11
NO_ANSWER = 5
"""The training record without loss tokens."""
SHARPNESS = 12.0
"""Factor of the teacher's output weights: random ones give a flat distribution, of which little can be dropped."""

Settings = dict[str, Any]
RanksOfSize = Callable[[int], Ranks]


class Case(NamedTuple):
    """One run of a stage.

    Attributes:
        world_size: number of ranks.
        settings: configuration by dotted key, with __ for dots.
        model: the student's name in `MODELS`.
        exports: record the weights that the run leaves, too.
        rel: relative tolerance on other machines. Their caches differ in single values of the
            packed codec, whose steps are coarse.
    """

    world_size: int
    settings: Settings
    model: str = "student"
    exports: bool = False
    rel: float = 5e-4


TP = {"model__tensor_model_parallel_size": 2}
PP = {"model__pipeline_model_parallel_size": 2}
CP = {"model__context_parallel_size": 2}
EP = {"model__expert_model_parallel_size": 2}
SP = {"model__sequence_parallel": True}
VPP = PP | {"model__virtual_pipeline_model_parallel_size": 2}
RICH = {
    "top_k": 40,
    "cache__min_probability": 0.004,
    "cache__min_k": 2,
    "cache__temperatures": [2.0],
    "cache__tail_samples": 3,
}
"""Every optional field of a cache."""

STAGE_1: dict[str, Case] = {
    "default": Case(1, {}),
    "rich": Case(1, RICH),
    "rich, all positions": Case(
        1, RICH | {"cache__positions": "all", "data__max_tokens_per_batch": 300}
    ),
    "top-p": Case(
        1,
        {
            "top_k": 30,
            "cache__min_probability": 0.0,
            "cache__top_p": 0.8,
            "cache__tail_samples": 2,
        },
    ),
    "json": Case(
        1,
        {
            "cache__codec": "json",
            "cache__temperatures": [2.0],
            "cache__tail_samples": 2,
            "model__micro_batch_size": 3,
            "data__packing": False,
        },
    ),
    "TP": Case(2, RICH | TP | {"cache__segment_examples": 6}),
    "TP SP": Case(2, TP | SP | {"model__micro_batch_size": 4}),
    "DP": Case(2, RICH | {"cache__segment_examples": 5, "model__micro_batch_size": 2}),
    "PP": Case(2, RICH | PP | {"data__max_tokens_per_batch": 300}),
    "CP": Case(2, RICH | CP),
}

KD = "model__knowledge_distillation__"
ADAMW = {
    "model__optim__name": "adamw",
    "model__optim__lr": 1e-3,
    "model__optim__weight_decay": 0.1,
}
SHARDED = ADAMW | {"model__optim__name": "distributed_fused_adam"}
SGD = {
    "model__optim__name": "adam",
    "model__optim__betas": [0.0, 0.5],
    "model__optim__eps": 1e4,
    "model__optim__lr": 3e2,
    "model__optim__weight_decay": 0.0,
    "trainer__knowledge_distillation__gradient_clip_val": None,
}
"""SGD at a rate of 0.03: with so large an eps a step is in proportion to the gradient. AdamW and
clipping, which the other cases have, hide a wrong scale of the loss."""
LORA = {
    "model__peft__peft_scheme": "lora",
    "model__peft__lora_tuning": {
        "target_modules": ["all"],
        "adapter_dim": 4,
        "alpha": 12.0,
    },
}
TOP_3 = {"model__data__top_k": 3}
PADDED = {"model__data__packing": False}
DYNAMIC = {"model__data__max_tokens_per_batch": 300}
FULL = {"model__activations_checkpoint_granularity": "full"}


def loss(kd_loss: str, **settings: Any) -> Settings:
    """Return settings of `model.knowledge_distillation`."""
    return {KD + key: value for key, value in {"kd_loss": kd_loss, **settings}.items()}


LABEL = loss("forward_kl", support="label", temperature=2.0)

STAGE_2: dict[str, Case] = {
    "forward KL": Case(1, SGD, exports=True),
    "forward KL, T = 2": Case(
        1, SGD | loss("fwd_kl", temperature=2.0, multiply_by_squared_temperature=True)
    ),
    "KD alone, scales": Case(
        1,
        SGD
        | loss(
            "fwd_kl", sft_loss_weight=0.0, logits_scale=0.7, target_logits_scale=0.5
        ),
    ),
    "forward KL, renormalize": Case(
        1, SGD | TOP_3 | loss("fwd_kl", support="renormalize", temperature=3.0)
    ),
    "forward KL, truncate": Case(1, SGD | loss("forward_kl", support="truncate")),
    "forward KL, sampled": Case(1, SGD | loss("forward_kl", support="sampled")),
    "forward KL, label": Case(1, SGD | LABEL),
    "reverse KL": Case(1, SGD | loss("bwd_kl")),
    "JSD": Case(1, SGD | loss("jsd", jsd_beta=0.3)),
    "skewed reverse KL": Case(
        1, SGD | loss("skewed_reverse_kl", skew_lambda=0.2, support="truncate")
    ),
    "adaptive KL": Case(1, SGD | loss("adaptive_kl", adaptive_kl_alpha=0.4)),
    "TVD": Case(1, SGD | loss("tvd")),
    "k1": Case(1, SGD | loss("k1")),
    "k3": Case(1, ADAMW | loss("k3")),
    "custom loss on logits": Case(
        1,
        SGD
        | loss(
            "custom",
            custom_loss="examples.custom_loss.hinton",
            custom_args={"alpha": 0.3, "temperature": 3.0},
            sft_loss_weight=0.0,
        ),
    ),
    "label smoothing and z-loss": Case(
        1, SGD | loss("forward_kl", label_smoothing=0.1, z_loss_weight=1e-3)
    ),
    "SFT on a dataset": Case(
        1,
        SGD
        | loss("forward_kl", kd_loss_weight=0.0, sft_loss_weight=1.0)
        | {
            "model__data__data_impl": "dataset",
            "model__data__data_prefix": {
                "train": ["train.jsonl"],
                "validation": ["validation.jsonl"],
            },
        },
    ),
    "dynamic, recomputed": Case(1, SGD | DYNAMIC | FULL),
    "bf16": Case(1, SHARDED | {"trainer__precision": "bf16"}, rel=2e-2),
    "LoRA": Case(1, ADAMW | LORA | {"model__optim__lr": 1e-2}, exports=True),
    "blend": Case(
        1,
        SGD
        | {
            "model__data__data_prefix": {
                "train": [
                    0.25,
                    "rich_CHUNK_ID.jsonl[:50%]",
                    0.75,
                    "json_CHUNK_ID.jsonl",
                ],
                "validation": ["validation_CHUNK_ID.jsonl"],
            },
            "model__data__shuffle": "chunks",
            "trainer__knowledge_distillation__max_steps": 6,
            "trainer__knowledge_distillation__val_check_interval": 3,
        },
    ),
    "two epochs": Case(
        1,
        SGD
        | {
            "model__data__data_prefix": {
                "train": ["rich_CHUNK_ID.jsonl[:17]"],
                "validation": ["validation_CHUNK_ID.jsonl"],
            },
            "trainer__knowledge_distillation__max_epochs": 2,
            "trainer__knowledge_distillation__max_steps": 4,
        },
    ),
    "TP": Case(2, SGD | TP),
    "TP SP": Case(2, SGD | TP | SP | DYNAMIC),
    "TP, sampled": Case(2, SGD | TP | loss("forward_kl", support="sampled")),
    "TP, LoRA": Case(2, ADAMW | TP | LORA),
    "DP, sharded AdamW": Case(
        2, SHARDED | {"model__micro_batch_size": 1}, exports=True
    ),
    "DP dynamic": Case(2, SGD | DYNAMIC),
    "PP": Case(2, SGD | PP, exports=True),
    "PP tied, padded": Case(2, SGD | PP | PADDED, "tied"),
    "VPP": Case(2, SGD | VPP | DYNAMIC, "deep"),
    "CP": Case(2, SGD | CP),
    "CP, label": Case(2, SGD | CP | LABEL),
    "EP": Case(2, SGD | EP | DYNAMIC, "experts"),
}

MODELS: dict[str, tuple[str, Settings]] = {
    "teacher": ("qwen3", {"seed": 1}),
    "student": ("llama2", {}),
    "tied": ("qwen2_tied", {}),
    "experts": ("qwen3_moe", {}),
    "deep": ("qwen3", {"num_hidden_layers": 4}),
}
CACHES = {
    "rich": ("train", STAGE_1["rich"]),
    "json": ("train", STAGE_1["json"]),
    "validation": ("validation", STAGE_1["rich"]),
}
"""Caches that stage 2 reads: the dataset's name and how to compute them."""


def signature() -> dict[str, str]:
    """Return what decides on the last bits of a result: torch, the processor, the compression library."""
    found = {
        # Builds of one version for the CPU and for CUDA compute the same on a CPU; so do Megatron Core 0.16.1 and 0.19.2.
        "torch": torch.__version__.partition("+")[0],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    found["zlib"] = zlib.ZLIB_RUNTIME_VERSION
    found["processor"] = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(
            line.split(":", 1)
            for line in cpuinfo.read_text().split("\n\n")[0].splitlines()
        )
        of_kernels = ("vendor_id", "cpu family", "model")
        stripped = {key.strip(): value.strip() for key, value in fields.items()}
        # The matrix library chooses its kernels by these.
        found["processor"] += "".join(
            f", {key} {stripped.get(key, 'unknown')}" for key in of_kernels
        )
    return found


def make_world(ranks: RanksOfSize, folder: Path) -> Path:
    """Write models, datasets and the caches that stage 2 reads; return the folder."""
    tokenizer = train_tokenizer()
    for name, (base, overrides) in MODELS.items():
        model = build_hf_model(base, VOCAB_SIZE, **overrides)
        if name == "teacher":
            model.lm_head.weight.data *= SHARPNESS
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_dataset(folder / "train.jsonl", NUM_TRAIN, 0)
    write_dataset(folder / "validation.jsonl", NUM_VALIDATION, NUM_TRAIN)
    for name, (split, case) in CACHES.items():
        compute_cache(ranks, folder, case, split, folder / f"{name}_CHUNK_ID.jsonl")
    return folder


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Train on the license: unlike the texts of other tests, it is the same with every Python."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LICENSE.read_text().split("\n\n"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


def write_dataset(path: Path, num_records: int, start: int) -> None:
    """Write conversations with pieces of the license as answers, of one or two turns."""
    words = LICENSE.read_text().split()
    with path.open("w") as file:
        for number in range(start, start + num_records):
            messages = []
            for turn in range(1 + number % 2):
                at = 24 * number + 12 * turn
                answer = " ".join(words[at : at + 3 + (number * 7) % 9])
                messages.append(
                    {
                        "role": "user",
                        "content": f"Say {number}" + " please" * (number % 3),
                    }
                )
                messages.append({"role": "assistant", "content": answer})
            if number == NO_ANSWER:
                messages = messages[:1]
            file.write(json.dumps({"messages": messages}) + "\n")


def compute_cache(
    ranks: RanksOfSize, world: Path, case: Case, split: str, output: Path
) -> None:
    """Run stage 1."""
    settings = {
        "trainer__devices": case.world_size,
        "n_examples_per_chunk": 16,
        **case.settings,
    }
    arguments = (world / "teacher", world / f"{split}.jsonl", output, settings)
    refused = ranks(case.world_size).run(run_stage_1, *arguments)
    assert set(refused) == {""}, refused


def stage_1(
    ranks: RanksOfSize, world: Path, name: str, folder: Path
) -> dict[str, Any]:
    """Run a case of `STAGE_1`; return digests of its cache, and sums that show how far off another cache is."""
    compute_cache(ranks, world, STAGE_1[name], "train", folder / "c_CHUNK_ID.jsonl")
    chunks = sorted(folder.glob("c_?.jsonl"))
    skipped = summaries(folder / "c_CHUNK_ID.jsonl")
    rows = [row for chunk in chunks for row in independent_reader.read(str(chunk))]
    digest = hashlib.sha256()
    numbers = dict.fromkeys(
        (
            "rows",
            "tokens",
            "loss_tokens",
            "kept",
            "ids",
            "logprobs",
            "tails",
            "label_logprobs",
            "samples",
        ),
        0.0,
    )
    for line, positions in rows:
        found = [position for position in positions if position is not None]
        integers = [line[key] for key in ("index", "tokens", "labels", "loss_mask")]
        integers += [[sorted(ids), samples] for ids, _, _, _, samples in found]
        digest.update(json.dumps(integers).encode())
        numbers["rows"] += 1
        numbers["tokens"] += len(line["tokens"])
        numbers["loss_tokens"] += sum(line["loss_mask"])
        for ids, logprobs, tails, label_logprob, samples in found:
            numbers["kept"] += len(ids)
            numbers["ids"] += sum(ids)
            numbers["logprobs"] += sum(logprobs)
            numbers["tails"] += sum(tails)
            numbers["label_logprobs"] += label_logprob or 0.0
            numbers["samples"] += sum(samples)
    return {
        "chunks_sha256": [
            hashlib.sha256(chunk.read_bytes()).hexdigest() for chunk in chunks
        ],
        "integers_sha256": digest.hexdigest(),
        "skipped": [skipped[chunk].skipped for chunk in range(len(chunks))],
        "numbers": numbers,
    }


def stage_2(
    ranks: RanksOfSize, world: Path, name: str, folder: Path
) -> dict[str, Any]:
    """Run a case of `STAGE_2`; return the metrics of every step and validation, and digests of the weights."""
    case = STAGE_2[name]
    settings = {
        "trainer__devices": case.world_size,
        "trainer__knowledge_distillation__max_steps": 4,
        "trainer__knowledge_distillation__val_check_interval": 4,
        "exp_manager__create_checkpoint_callback": case.exports,
        "exp_manager__create_tensorboard_logger": False,
        **case.settings,
    }
    prefixes = settings.get("model__data__data_prefix", {})
    settings["model__data__data_prefix"] = {
        split: [
            path if isinstance(path, float) else str(world / path) for path in paths
        ]
        for split, paths in prefixes.items()
    } or {
        "train": [str(world / "rich_CHUNK_ID.jsonl")],
        "validation": [str(world / "validation_CHUNK_ID.jsonl")],
    }
    if case.exports:
        settings |= {
            "exp_manager__checkpoint_callback_params__save_top_k": 0,
            "export__hf": True,
        }
    unused = Path("/nonexistent")
    arguments = (world / case.model, unused, unused, folder / "run", settings)
    refused = ranks(case.world_size).run(run_stage_2, *arguments)
    assert set(refused) == {""}, refused
    found: dict[str, Any] = {
        "steps": {
            str(step): row for step, row in training_rows(folder / "run").items()
        },
        "validations": {
            str(step): row for step, row in validation_rows(folder / "run").items()
        },
    }
    if case.exports:
        weights = {}
        for part in (folder / "run").rglob("*.safetensors"):
            weights |= load_file(part)
        assert weights
        found["weights_sha256"] = {
            name: tensor_sha256(weights[name]) for name in sorted(weights)
        }
        found["weights_norm"] = {
            name: float(weights[name].double().norm()) for name in sorted(weights)
        }
    return found


def tensor_sha256(tensor: torch.Tensor) -> str:
    """Return the digest of dtype, shape and bytes."""
    header = f"{tensor.dtype} {list(tensor.shape)} ".encode()
    return hashlib.sha256(
        header + tensor.contiguous().view(torch.uint8).numpy().tobytes()
    ).hexdigest()


def main(parts: list[str]) -> None:
    """Record the cases whose names contain one of `parts`; all without any."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    recorded: dict[str, Any] = {"signature": signature(), "stage_1": {}, "stage_2": {}}
    if parts:
        recorded = json.loads(RECORDED.read_text())
        if recorded["signature"] != signature():
            sys.exit(
                f"{RECORDED}: recorded on another machine ({recorded['signature']}); record all cases"
            )
    pools = {size: Ranks(size) for size in (1, 2)}
    try:
        with tempfile.TemporaryDirectory() as temporary:
            world = Path(temporary) / "world"
            world.mkdir()
            make_world(pools.__getitem__, world)
            for stage, cases, run in (
                ("stage_1", STAGE_1, stage_1),
                ("stage_2", STAGE_2, stage_2),
            ):
                for number, name in enumerate(cases):
                    if parts and not any(part in name for part in parts):
                        continue
                    folder = Path(temporary) / f"{stage}_{number}"
                    folder.mkdir()
                    recorded[stage][name] = run(pools.__getitem__, world, name, folder)
                    print(stage, name)
    finally:
        for pool in pools.values():
            pool.stop()
    RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
