"""Selected positions: the trained gradient against transformers' model in float64, and the same training on every layout."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_kd.cache.reader import CacheReader
from nemo_kd.data.batches import collate, pack
from nemo_kd.mcore.checkpoint import open_pretrained
from nemo_kd.mcore.groups import initialize_model_parallel
from nemo_kd.mcore.schedule import forward_backward
from nemo_kd.student.selection import Selector
from tests.integration.test_stage_1 import run_stage_1
from tests.integration.test_stage_2 import bare_module, metrics, run_stage_2
from tests.integration.test_stage_2_losses import position_loss
from tests.tiny_cache import everywhere
from tests.tiny_data import student_config, write_chat_dataset
from tests.tiny_models import save_hf_model

VOCAB_SIZE, NUM_ROWS, PERCENT = 300, 8, 30
LOSS = "model__knowledge_distillation__"


@pytest.fixture(scope="module")
def world(ranks, tmp_path_factory):
    """A student of two layers and a cache."""
    folder = tmp_path_factory.mktemp("selection")
    teacher = save_hf_model("qwen3", folder / "teacher", VOCAB_SIZE, seed=1)
    student = save_hf_model("qwen2_tied", folder / "student", VOCAB_SIZE)
    dataset = write_chat_dataset(folder / "train.jsonl", 20)
    cache = folder / "train_CHUNK_ID.jsonl"
    assert ranks(1).run(run_stage_1, teacher, dataset, cache, {}) == [""]
    return student, cache


def selected(
    by: str, entropies_S: torch.Tensor, row, positions: list[int]
) -> set[int]:
    """The positions with the largest scores, by Python's sort."""
    teacher = everywhere(row).teacher
    scores = {}
    for s in positions:
        used = teacher.topk_token_ids_PK[s] >= 0
        p = (
            teacher.topk_logits_PK[s][used].astype(float)
            - teacher.log_sum_exp_logits_P[s]
        )
        of_kept = -sum(math.exp(x) * x for x in p)
        tail = float(teacher.tail_mass_PT[s, 0])
        of_teacher = of_kept - (tail * math.log(tail) if tail > 0 else 0)
        scores[s] = {
            "student_entropy": float(entropies_S[s]),
            "teacher_entropy": of_teacher,
            "entropy_gap": float(entropies_S[s]) - of_teacher,
        }[by]
    count = -(-len(positions) * PERCENT // 100)
    return set(sorted(positions, key=lambda s: -scores[s])[:count])


def reference(student: Path, cache: Path, by: str, sft_loss_weight: float):
    """CE over all loss tokens and KD over the selected ones: (value, gradients, share of other positions)."""
    model = AutoModelForCausalLM.from_pretrained(student).double()
    reader = CacheReader(str(cache))
    ce = kd = torch.zeros((), dtype=torch.float64)
    num_tokens = num_selected = 0
    for index in range(NUM_ROWS):
        row = reader[index]
        logits = model(torch.tensor(row.example.tokens_S)[None]).logits[0]
        labels = torch.tensor(row.example.labels_S)
        positions = row.example.loss_mask_S.nonzero()[0].tolist()
        entropies_S = torch.distributions.Categorical(logits=logits.detach()).entropy()
        chosen = selected(by, entropies_S, row, positions)
        for s in positions:
            ce = ce + torch.nn.functional.cross_entropy(logits[s], labels[s])
            if s in chosen:
                kd = kd + position_loss(logits[s], row, s, {"kd_loss": "forward_kl"})
        num_tokens += len(positions)
        num_selected += len(chosen)
    total = sft_loss_weight * ce / num_tokens + kd / num_selected
    total.backward()
    gradients = {name: each.grad for name, each in model.named_parameters()}
    return float(total), float(kd / num_selected), gradients


def gradients(student, cache, tp, form, settings):
    """(sums, this rank's gradients) of one step over all rows in micro-batches of 3."""
    config = student_config(
        student, cache, cache, Path("/nonexistent"), trainer__devices=tp, model__tensor_model_parallel_size=tp,
        model__optim__name="adam", **settings,
    )  # fmt: skip
    groups = initialize_model_parallel(config.model, 1)
    reader = CacheReader(str(cache))
    rows = [reader[index] for index in range(NUM_ROWS)]
    join = {"padded": collate, "packed": pack}[form]
    batches = [join(rows[i : i + 3], 0) for i in range(0, NUM_ROWS, 3)]
    with open_pretrained(str(student)) as pretrained:
        module = bare_module(config, pretrained, groups)
    loss = module.loss
    loss.selector = Selector(config.model.knowledge_distillation.selection, groups)
    loss.set_step(0, loss.weight_sums(batches))
    module.model.zero_grad_buffer()
    sums = forward_backward(module.model, batches, module.token_losses)
    means = module.loss.metrics("train", sums)
    return means, {
        name: parameter.main_grad.clone()
        for name, parameter in module.gpt.named_parameters()
    }


@pytest.mark.parametrize(
    ("by", "sft_loss_weight", "form"),
    [
        ("student_entropy", 0.0, "packed"),
        ("student_entropy", 0.5, "padded"),
        ("teacher_entropy", 0.0, "padded"),
        ("entropy_gap", 0.5, "packed"),
    ],
)
def test_the_gradient_is_that_of_the_selected_positions(
    ranks, world, by, sft_loss_weight, form
):
    """At TP 1 and 2; the embedding's gradient holds both of its uses."""
    student, cache = world
    loss, kd_loss, expected = reference(student, cache, by, sft_loss_weight)
    settings = {
        LOSS + "select": f"top {PERCENT}% by {by}",
        LOSS + "sft_loss_weight": sft_loss_weight,
    }
    for tp in (1, 2):
        results = ranks(tp).run(gradients, student, cache, tp, form, settings)
        means = results[0][0]
        assert means["train/loss"] == pytest.approx(loss, rel=1e-5)
        assert means["train/kd_loss"] == pytest.approx(kd_loss, rel=1e-5)
        embedding = torch.cat(
            [result[1]["embedding.word_embeddings.weight"] for result in results]
        )[:VOCAB_SIZE]
        norm = results[0][1]["decoder.final_layernorm.weight"]
        for ours, theirs in (
            (embedding, expected["model.embed_tokens.weight"]),
            (norm, expected["model.norm.weight"]),
        ):
            assert (ours.double() - theirs).norm() < 1e-5 * theirs.norm()


LAYOUTS = {
    "micro-batches of one, padded": (1, {"model__micro_batch_size": 1, "model__data__packing": False}),
    "dynamic": (1, {"model__data__max_tokens_per_batch": 150}),
    "DP": (2, {"model__micro_batch_size": 1}),
    "TP SP": (2, {"model__tensor_model_parallel_size": 2, "model__sequence_parallel": True}),
    "CP": (2, {"model__context_parallel_size": 2}),
    "PP": (2, {"model__pipeline_model_parallel_size": 2}),
}  # fmt: skip


def test_every_layout_selects_the_same(ranks, world, tmp_path):
    student, cache = world
    settings = {
        LOSS + "select": "top 25% by student_entropy",
        LOSS + "support": "label",
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
                if "loss" in key or key == "grad_norm"
            }
            for row in metrics(tmp_path / name)
        ]
        for row in rows[name]:
            row.pop("perf/loss_tokens_per_s", None)
    for name in LAYOUTS:
        for ours, straight in zip(rows[name], rows["straight"], strict=True):
            assert ours == pytest.approx(straight, rel=2e-5), name
    first, *_, last = rows["straight"]
    # Selected where the student is least certain; validation has all positions.
    assert first["train/loss"] == pytest.approx(
        first["train/kd_loss"] + 0.5 * first["train/sft_loss"]
    )
    assert last["val_loss"] == pytest.approx(
        last["validation/kd_loss"] + 0.5 * last["validation/sft_loss"]
    )
    assert abs(first["train/kd_loss"] / last["validation/kd_loss"] - 1) > 0.01
