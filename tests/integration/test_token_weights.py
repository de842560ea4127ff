"""Which tokens each term of the loss has and what they weigh: against plain sums on transformers' model in float64, and
the same training on every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_kd.cache.reader import CacheReader
from nemo_kd.data.batches import collate, pack
from nemo_kd.mcore.checkpoint import open_pretrained
from nemo_kd.mcore.groups import initialize_model_parallel
from nemo_kd.mcore.schedule import forward_backward
from nemo_kd.student.selection import Selector
from tests.integration.test_selection import LAYOUTS, LOSS, PERCENT, selected
from tests.integration.test_stage_1 import run_stage_1
from tests.integration.test_stage_2 import bare_module, metrics, run_stage_2
from tests.integration.test_stage_2_losses import position_loss
from tests.tiny_data import student_config, write_chat_dataset
from tests.tiny_models import save_hf_model

VOCAB_SIZE = 300
MICRO_BATCHES = [[0, 1, 2], [3], [4, 5], [6]]
"""Rows of each micro-batch; row 3 has no token in the loss."""
PATHS = [(1.0, 0.0), (0.5, 2.0)]
"""(sft_weight, kd_weight) of the rows before and from 4 on."""


@pytest.fixture(scope="module")
def world(ranks, tmp_path_factory):
    """A student, a cache of all positions and one of selected positions."""
    folder = tmp_path_factory.mktemp("token_weights")
    teacher = save_hf_model("qwen3", folder / "teacher", VOCAB_SIZE, seed=1)
    student = save_hf_model("qwen2_tied", folder / "student", VOCAB_SIZE)
    dataset = write_chat_dataset(folder / "train.jsonl", 20)
    caches = []
    for name, settings in {
        "all": {"cache__positions": "all"},
        "selected": {"cache__select": f"top {PERCENT}% by teacher_entropy"},
    }.items():
        caches.append(folder / f"{name}_CHUNK_ID.jsonl")
        found = ranks(1).run(run_stage_1, teacher, dataset, caches[-1], settings)
        assert found == [""]
    return student, *caches


def rows_of(cache: Path) -> list:
    """The rows of all micro-batches."""
    reader = CacheReader(str(cache))
    rows = [reader[place] for place in range(7)]
    for place, row in enumerate(rows):
        example = replace(row.example, source=int(place > 3))
        if place == 3:
            example = replace(example, loss_mask_S=np.zeros_like(example.loss_mask_S))
        rows[place] = replace(row, example=example)
    return rows


def reference(student: Path, cache: Path, settings: dict, by_paths: bool):
    """(objective, means of CE and KD, gradients) by sums over tokens, examples and micro-batches."""
    model = AutoModelForCausalLM.from_pretrained(student).double()
    rows = rows_of(cache)
    ce, kd = {}, {}
    for place, row in enumerate(rows):
        logits = model(torch.tensor(row.example.tokens_S)[None]).logits[0]
        labels = torch.tensor(row.example.labels_S)
        trained = row.example.loss_mask_S.nonzero()[0].tolist()
        on_prompt = settings.get("distill_on_prompt") and len(trained)
        taught = range(len(labels)) if on_prompt else trained
        taught = sorted(set(taught) & set(row.teacher.positions_P.tolist()))
        if "select" in settings:
            taught = selected("teacher_entropy", torch.zeros(len(labels)), row, taught)
        ce[place] = [
            torch.nn.functional.cross_entropy(logits[s], labels[s]) for s in trained
        ]
        kd[place] = [position_loss(logits[s], row, s, {"kd_loss": "forward_kl"}) for s in taught]  # fmt: skip

    def mean(of_rows, term: int | None):
        factors = {
            place: 1 if term is None else PATHS[row.example.source][term]
            for place, row in enumerate(rows)
        }
        units = {
            "token": [list(of_rows)],
            "sample": [[place] for place in of_rows],
            "microbatch": MICRO_BATCHES,
        }[settings.get("reduction", "token")]
        means = [
            sum(factors[place] * one for place in unit for one in of_rows[place])
            / sum(len(of_rows[place]) for place in unit)
            for unit in units
            if any(of_rows[place] for place in unit)
        ]
        return sum(means) / len(means)

    terms = (0, 1) if by_paths else (None, None)
    total = 0.5 * mean(ce, terms[0]) + mean(kd, terms[1])
    total.backward()
    gradients = {name: each.grad for name, each in model.named_parameters()}
    return float(total), float(mean(ce, None)), float(mean(kd, None)), gradients


def gradients(student, cache, tp, form, settings, by_paths):
    """(means of a training step, of a validation in two parts, this rank's gradients)."""
    prefix = {"train": [str(cache)] * 2, "validation": [str(cache)]}
    if by_paths:
        prefix["train"] = [
            {"path": str(cache), "sft_weight": sft, "kd_weight": kd}
            for sft, kd in PATHS
        ]
    config = student_config(
        student, cache, cache, Path("/nonexistent"), trainer__devices=tp, model__tensor_model_parallel_size=tp,
        model__optim__name="adam", **{LOSS + name: value for name, value in settings.items()},
    )  # fmt: skip
    config.model.data = replace(config.model.data, data_prefix=prefix)
    groups = initialize_model_parallel(config.model, 1)
    rows = rows_of(cache)
    join = {"padded": collate, "packed": pack}[form]
    options = {"distill_on_prompt": settings.get("distill_on_prompt", False)}
    batches = [join([rows[i] for i in part], 0, **options) for part in MICRO_BATCHES]
    with open_pretrained(str(student)) as pretrained:
        module = bare_module(config, pretrained, groups)
    loss = module.loss
    selection = config.model.knowledge_distillation.selection
    sums = [
        forward_backward(module.model, part, module.token_losses, forward_only=True)
        for part in (batches[:1], batches[1:])
    ]
    validation = loss.metrics("validation", sum(sums))
    if selection is not None:
        loss.selector = Selector(selection, groups)
    loss.set_step(0, loss.weight_sums(batches))
    module.model.zero_grad_buffer()
    training = loss.metrics(
        "train", forward_backward(module.model, batches, module.token_losses)
    )
    found = {
        name: one.main_grad.clone() for name, one in module.gpt.named_parameters()
    }
    return training, validation, found


ON_PROMPT = {"distill_on_prompt": True}


@pytest.mark.parametrize(
    ("kind", "form", "by_paths", "settings"),
    [
        ("all", "packed", False, ON_PROMPT),
        ("all", "padded", False, {"reduction": "sample"}),
        ("all", "packed", False, {"reduction": "microbatch"}),
        ("all", "packed", True, {"reduction": "sample", **ON_PROMPT}),
        ("all", "padded", True, {}),
        ("all", "packed", False, {"reduction": "sample", "select": f"top {PERCENT}% by teacher_entropy"}),
        ("selected", "packed", False, {}),
        ("selected", "padded", True, {"reduction": "sample"}),
    ],
)  # fmt: skip
def test_each_term_is_the_mean_over_its_own_tokens(
    ranks, world, kind, form, by_paths, settings
):
    student, *caches = world
    cache = caches[kind == "selected"]
    total, ce, kd, expected = reference(student, cache, settings, by_paths)
    plain = {name: one for name, one in settings.items() if name != "select"}
    of_validation = reference(student, cache, plain, False)[:3]
    for tp in (1, 4) if by_paths and settings else (1, 2):
        results = ranks(tp).run(
            gradients, student, cache, tp, form, settings, by_paths
        )
        training, validation, _ = results[0]
        names = ("loss", "sft_loss", "kd_loss")
        found = [training[f"train/{name}"] for name in names]
        assert found == pytest.approx([total, ce, kd], rel=1e-5)
        found = [validation[f"validation/{name}"] for name in names]
        assert found == pytest.approx(of_validation, rel=1e-5)
        embedding = torch.cat(
            [result[2]["embedding.word_embeddings.weight"] for result in results]
        )[:VOCAB_SIZE]
        norm = results[0][2]["decoder.final_layernorm.weight"]
        for ours, theirs in (
            (embedding, expected["model.embed_tokens.weight"]),
            (norm, expected["model.norm.weight"]),
        ):
            assert (ours.double() - theirs).norm() < 1e-5 * theirs.norm()


def test_stage_1_stores_the_positions_of_largest_entropy(world):
    """Entropies of transformers' model in float64 over 8 kept ids and a bucket, sorted by Python."""
    student, *caches = world
    model = AutoModelForCausalLM.from_pretrained(student.with_name("teacher")).double()
    chosen = CacheReader(str(caches[1]))
    for place in range(len(chosen)):
        row = chosen[place]
        with torch.no_grad():
            logits = model(torch.tensor(row.example.tokens_S)[None]).logits[0]
        kept = logits.softmax(-1).topk(8, dim=-1).values
        parts = torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], dim=-1)
        entropies = torch.special.entr(parts).sum(-1).tolist()
        trained = row.example.loss_mask_S.nonzero()[0].tolist()
        count = -(-len(trained) * PERCENT // 100)
        expected = sorted(trained, key=lambda s: -entropies[s])[:count]
        assert row.teacher.positions_P.tolist() == sorted(expected)
    size, whole = (
        sum(path.stat().st_size for path in cache.parent.glob(f"{name}_*.jsonl"))
        for name, cache in (("selected", caches[1]), ("all", caches[0]))
    )
    assert size < 0.8 * whole


@pytest.mark.parametrize("kind", ["all", "selected"])
def test_every_layout_weighs_tokens_alike(ranks, world, tmp_path, kind):
    student, *caches = world
    cache = caches[kind == "selected"]
    train = [
        {"path": f"{cache}[:11]", "sft_weight": 0.5},
        {"path": f"{cache}[11:]", "kd_weight": 3.0},
    ]
    settings = {
        LOSS + "reduction": "sample",
        LOSS + "distill_on_prompt": kind == "all",
        "model__data__data_prefix": {"train": train, "validation": [str(cache)]},
        "trainer__knowledge_distillation__max_steps": 2,
        "trainer__knowledge_distillation__val_check_interval": 2,
        "exp_manager__create_checkpoint_callback": False,
    }
    rows = {}
    for name, (world_size, layout) in {"straight": (1, {}), **LAYOUTS}.items():
        overrides = settings | layout | {"trainer__devices": world_size}
        found = ranks(world_size).run(
            run_stage_2, student, cache, cache, tmp_path / name, overrides
        )
        assert found == [""] * world_size, name
        rows[name] = [
            {
                key: value
                for key, value in row.items()
                if key.partition("/")[0] in ("train", "validation", "grad_norm")
            }
            for row in metrics(tmp_path / name)
        ]
    for name in LAYOUTS:
        for ours, straight in zip(rows[name], rows["straight"], strict=True):
            assert ours == pytest.approx(straight, rel=2e-5), name
