"""Every objective through the whole of stage 2: the trained gradient against plain definitions on transformers' model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_kd.batch import SMALLEST_SAMPLED_TAIL
from nemo_kd.cache.reader import CacheReader
from nemo_kd.data.batches import collate
from nemo_kd.mcore.checkpoint import open_pretrained
from nemo_kd.mcore.groups import initialize_model_parallel
from nemo_kd.mcore.schedule import forward_backward
from tests.integration.test_stage_1 import run_stage_1
from tests.integration.test_stage_2 import bare_module, gradients, run_stage_2
from tests.tiny_cache import everywhere
from tests.tiny_data import student_config, write_chat_dataset
from tests.tiny_models import save_hf_model

VOCAB_SIZE, NUM_ROWS = 300, 8


@pytest.fixture(scope="module")
def world(ranks, tmp_path_factory):
    """A student whose embeddings are tied, a cache with a second temperature and tail samples."""
    folder = tmp_path_factory.mktemp("stage_2_losses")
    teacher = save_hf_model("qwen3", folder / "teacher", VOCAB_SIZE)
    student = save_hf_model(
        "qwen2_tied", folder / "student", VOCAB_SIZE, num_hidden_layers=1
    )
    dataset = write_chat_dataset(folder / "train.jsonl", 20)
    cache = folder / "train_CHUNK_ID.jsonl"
    settings = {
        "cache__temperatures": [2.0],
        "cache__tail_samples": 3,
        "n_examples_per_chunk": 16,
    }
    assert ranks(1).run(run_stage_1, teacher, dataset, cache, settings) == [""]
    return student, cache


def divergence(p: torch.Tensor, q: torch.Tensor, kd_loss: str) -> torch.Tensor:
    """By its definition, of distributions without zeros."""

    def kl(a, b):
        return (a * (a / b).log()).sum()

    if kd_loss == "jsd":
        m = 0.3 * p + 0.7 * q
        return 0.3 * kl(p, m) + 0.7 * kl(q, m)
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "skewed_forward_kl": lambda: kl(p, 0.2 * p + 0.8 * q),
        "skewed_reverse_kl": lambda: kl(q, 0.8 * p + 0.2 * q),
        "tvd": lambda: 0.5 * (p - q).abs().sum(),
    }[kd_loss]()


def position_loss(logits: torch.Tensor, row, s: int, settings: dict) -> torch.Tensor:
    """The KD term of one position; `logits` are the student's [V] in float64."""
    teacher, kd_loss, support = (
        everywhere(row).teacher,
        settings["kd_loss"],
        settings.get("support", "tail"),
    )
    if kd_loss in ("k2", "k3"):
        gap = logits.log_softmax(-1)[int(row.example.labels_S[s])] - float(
            teacher.label_logprobs_P[s]
        )
        return gap**2 / 2 if kd_loss == "k2" else (-gap).exp() - 1 + gap
    temperature = settings.get("temperature", 1.0)
    used = teacher.topk_token_ids_PK[s] >= 0
    ids = torch.tensor(teacher.topk_token_ids_PK[s][used]).long()
    kept = torch.tensor(teacher.topk_logits_PK[s][used]).double()
    if support == "renormalize":
        p, q = (
            (kept / temperature).softmax(-1),
            (logits[ids] / temperature).softmax(-1),
        )
        return temperature**2 * divergence(p, q, kd_loss)
    tail = float(teacher.tail_mass_PT[s, teacher.temperatures.index(temperature)])
    p, q = (
        (1 - tail) * (kept / temperature).softmax(-1),
        (logits / temperature).softmax(-1),
    )
    if support == "sampled":
        samples = teacher.tail_token_ids_PM[s]
        weight = max(tail, SMALLEST_SAMPLED_TAIL) / len(samples)
        drawn = torch.tensor(samples[samples >= 0]).long()
        entropy = torch.tensor(tail).xlogy(torch.tensor(tail))
        return (p * (p / q[ids]).log()).sum() + entropy - weight * q[drawn].log().sum()
    if support == "label":
        p_V = torch.zeros_like(logits).detach().index_put((ids,), p)
        p_V[int(row.example.labels_S[s])] += tail
        ids = p_V.nonzero()[:, 0]
        return (p_V[ids] * (p_V[ids] / q[ids]).log()).sum()
    p, q = (
        torch.cat([p, torch.tensor([tail]).double()]),
        torch.cat([q[ids], 1 - q[ids].sum(0, keepdim=True)]),
    )
    factor = temperature**2 if settings.get("multiply_by_squared_temperature") else 1
    return factor * divergence(p, q, kd_loss)


def reference(
    student: Path, cache: Path, settings: dict
) -> tuple[float, dict[str, torch.Tensor]]:
    """0.5 CE + KD over the loss tokens of all rows, on transformers' model in float64: value and gradients."""
    model = AutoModelForCausalLM.from_pretrained(student).double()
    reader, total, count = (
        CacheReader(str(cache)),
        torch.zeros((), dtype=torch.float64),
        0,
    )
    for index in range(NUM_ROWS):
        row = reader[index]
        logits = model(torch.tensor(row.example.tokens_S)[None]).logits[0]
        labels = torch.tensor(row.example.labels_S)
        for s in row.example.loss_mask_S.nonzero()[0].tolist():
            ce = torch.nn.functional.cross_entropy(
                logits[s],
                labels[s],
                label_smoothing=settings.get("label_smoothing", 0),
            )
            ce = ce + settings.get("z_loss_weight", 0) * logits[s].logsumexp(-1) ** 2
            total = total + 0.5 * ce + position_loss(logits[s], row, s, settings)
            count += 1
    (total / count).backward()
    return float(total / count), {
        name: parameter.grad for name, parameter in model.named_parameters()
    }


CASES = [
    {"kd_loss": "jsd", "jsd_beta": 0.3},
    {
        "kd_loss": "skewed_forward_kl",
        "skew_lambda": 0.2,
        "label_smoothing": 0.1,
        "z_loss_weight": 1e-3,
    },
    {
        "kd_loss": "skewed_reverse_kl",
        "skew_lambda": 0.2,
        "support": "renormalize",
        "temperature": 1.0,
    },
    {"kd_loss": "tvd"},
    {
        "kd_loss": "forward_kl",
        "temperature": 2.0,
        "multiply_by_squared_temperature": True,
    },
    {"kd_loss": "reverse_kl", "temperature": 2.0},
    {"kd_loss": "forward_kl", "support": "sampled"},
    {"kd_loss": "forward_kl", "support": "label", "temperature": 2.0},
    {"kd_loss": "forward_kl", "compile": "on"},
    {"kd_loss": "k2"},
    {"kd_loss": "k3"},
]


@pytest.mark.parametrize(
    "settings", CASES, ids=lambda case: "-".join(str(value) for value in case.values())
)
def test_every_objective_trains_what_it_says(ranks, world, settings):
    """At TP 1 and 2; the embedding's gradient holds both of its uses."""
    student, cache = world
    loss, expected = reference(student, cache, settings)
    overrides = {
        f"model__knowledge_distillation__{key}": value
        for key, value in settings.items()
    }
    for tp in (1, 2):
        check(
            ranks(tp).run(gradients, student, cache, tp, 1, 3, NUM_ROWS, overrides),
            loss,
            expected,
        )


def check(results, loss, expected):
    sums = results[0][0][-1]
    assert float(sums[0] / sums[-1]) == pytest.approx(loss, rel=1e-5)
    embedding = torch.cat(
        [result[1]["embedding.word_embeddings.weight"] for result in results]
    )[:VOCAB_SIZE]
    norm = results[0][1]["decoder.final_layernorm.weight"]
    for ours, theirs in (
        (embedding, expected["model.embed_tokens.weight"]),
        (norm, expected["model.norm.weight"]),
    ):
        assert (ours.double() - theirs).norm() < 1e-5 * theirs.norm()


def sequence_parallel_gradients(student, cache):
    """As `gradients` at TP 2, with activations cut along the sequence between the tensor-parallel regions."""
    config = student_config(student, cache, cache, Path("/nonexistent"), trainer__devices=2, model__tensor_model_parallel_size=2,
        model__optim__name="adam")  # fmt: skip
    config.model.sequence_parallel = True
    groups = initialize_model_parallel(config.model, 1)
    reader = CacheReader(str(cache))
    batches = [collate([reader[row]], 0) for row in range(NUM_ROWS)]
    for batch in batches:
        for name, values in vars(batch).items():
            if (
                isinstance(values, torch.Tensor)
                and values.dim() > 1
                and values.shape[1] % 2
            ):
                setattr(
                    batch,
                    name,
                    torch.cat([values, torch.zeros_like(values[:, :1])], dim=1),
                )
    with open_pretrained(str(student)) as pretrained:
        module = bare_module(config, pretrained, groups)
    module.model.zero_grad_buffer()
    sums = forward_backward(module.model, batches, module.token_losses)
    return sums, {
        name: parameter.main_grad.clone()
        for name, parameter in module.gpt.named_parameters()
    }


def test_sequence_parallelism_trains_the_same(ranks, world):
    student, cache = world
    loss, expected = reference(student, cache, {"kd_loss": "forward_kl"})
    check(ranks(2).run(sequence_parallel_gradients, student, cache), loss, expected)


def metrics(log_dir: Path) -> list[dict]:
    return [
        json.loads(line)
        for line in (log_dir / "metrics" / "metrics.jsonl").read_text().splitlines()
    ]


CUSTOM_LAYOUTS = {
    "one rank": (1, {}),
    "TP": (2, {"model__tensor_model_parallel_size": 2}),
    "PP CP": (
        4,
        {"model__pipeline_model_parallel_size": 2, "model__context_parallel_size": 2},
    ),
    "interleaved": (
        2,
        {
            "model__pipeline_model_parallel_size": 2,
            "model__virtual_pipeline_model_parallel_size": 2,
        },
    ),
    # One of four ranks never has an example in training, and so never learns from a call which metrics there are.
    "fillers": (
        4,
        {"model__global_batch_size": 3, "model__data__max_tokens_per_batch": 1},
    ),
}


@pytest.mark.parametrize("layout", list(CUSTOM_LAYOUTS))
def test_the_custom_example_equals_the_built_in_loss(ranks, world, tmp_path, layout):
    """examples/custom_loss.py is forward KL on renormalised top-k with T^2, and cross-entropy."""
    student, cache = world
    world_size, sizes = CUSTOM_LAYOUTS[layout]
    if "model__pipeline_model_parallel_size" in sizes:
        # A layer for each stage and part of it.
        student = save_hf_model(
            "qwen2_tied", tmp_path / "student", VOCAB_SIZE, num_hidden_layers=4
        )
    layout = sizes | {
        "trainer__devices": world_size,
        "trainer__knowledge_distillation__max_steps": 2,
        "trainer__knowledge_distillation__val_check_interval": 2,
        "exp_manager__create_checkpoint_callback": False,
    }
    prefix = "model__knowledge_distillation__"
    custom = {
        "kd_loss": "custom", "custom_loss": "examples.custom_loss.hinton",
        "custom_args": {"alpha": 0.3, "temperature": 3.0}, "kd_loss_weight": 1.0, "sft_loss_weight": 0.0,
    }  # fmt: skip
    built_in = {
        "kd_loss": "fwd_kl", "support": "renormalize", "temperature": 3.0, "multiply_by_squared_temperature": True,
        "kd_loss_weight": 0.7, "sft_loss_weight": 0.3,
    }  # fmt: skip
    rows = []
    for name, settings in (("custom", custom), ("built_in", built_in)):
        overrides = {
            **layout,
            **{prefix + key: value for key, value in settings.items()},
        }
        log_dir = tmp_path / name
        assert (
            ranks(world_size).run(
                run_stage_2, student, cache, cache, log_dir, overrides
            )
            == [""] * world_size
        )
        rows.append(metrics(log_dir))
    for ours, theirs in zip(*rows, strict=True):
        for split in ("train", "validation"):
            if f"{split}/loss" in theirs:
                assert ours[f"{split}/loss"] == pytest.approx(
                    theirs[f"{split}/loss"], rel=1e-5
                )
                assert ours[f"{split}/ce_loss"] == pytest.approx(
                    theirs[f"{split}/sft_loss"], rel=1e-5
                )
                assert ours[f"{split}/kl_loss"] == pytest.approx(
                    theirs[f"{split}/kd_loss"], rel=1e-5
                )
    assert sum("train/kl_loss" in row for row in rows[0]) == 2
    assert sum("validation/kl_loss" in row for row in rows[0]) == 1


def test_a_custom_loss_with_filler_rows_and_after_the_last_step(
    ranks, world, tmp_path
):
    """19 examples in global batches of 8 leave a micro-batch of fillers alone; a run without steps left still tests."""
    student, cache = world
    prefix = "model__knowledge_distillation__"
    overrides = {
        "trainer__devices": 2,
        "trainer__knowledge_distillation__max_steps": 1,
        "trainer__knowledge_distillation__val_check_interval": 1,
        "model__micro_batch_size": 1,
        "model__data__data_prefix": {
            split: [str(cache)] for split in ("train", "validation", "test")
        },
        prefix + "kd_loss": "custom",
        prefix + "custom_loss": "examples.custom_loss.hinton",
        prefix + "custom_args": {"alpha": 0.3, "temperature": 3.0},
    }
    found = []
    for _ in range(2):
        assert (
            ranks(2).run(run_stage_2, student, cache, cache, tmp_path, overrides)
            == [""] * 2
        )
        found.append(metrics(tmp_path)[-1])
    for name in ("loss", "kd_loss", "sft_loss", "ce_loss", "kl_loss"):
        assert found[0][f"test/{name}"] == found[1][f"test/{name}"] > 0
    assert sum("test/kl_loss" in row for row in metrics(tmp_path)) == 2
