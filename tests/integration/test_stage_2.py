"""Stage 2: gradients that depend on no layout, exact resume, the loss against plain definitions on transformers' model."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import nemo_kd
from nemo_kd.cache.layout import CacheError
from nemo_kd.cache.reader import CacheReader
from nemo_kd.config import ConfigError, DataError
from nemo_kd.data.batches import collate
from nemo_kd.mcore.checkpoint import open_pretrained
from nemo_kd.mcore.groups import initialize_model_parallel
from nemo_kd.mcore.schedule import forward_backward
from nemo_kd.student.checkpoint_folder import CheckpointError
from nemo_kd.student.job import train_student
from nemo_kd.student.loss import StudentLoss
from nemo_kd.student.module import StudentModule
from nemo_kd.student.steps import TrainingPlan
from tests.integration.test_stage_1 import run_stage_1
from tests.tiny_cache import everywhere
from tests.tiny_data import student_config, write_chat_dataset
from tests.tiny_models import build_hf_model, save_hf_model

NUM_TRAIN, NUM_VALIDATION = 40, 11


def run_stage_2(model, train, validation, log_dir, overrides) -> str:
    try:
        train_student(student_config(model, train, validation, log_dir, **overrides))
    except (ConfigError, CacheError, DataError, CheckpointError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.fixture(scope="module")
def world(ranks, tmp_path_factory):
    """Student, train and validation caches, datasets."""
    folder = tmp_path_factory.mktemp("stage_2")
    teacher = save_hf_model("qwen3", folder / "teacher", 300, seed=1)
    student = save_hf_model("llama2", folder / "student", 300, num_hidden_layers=1)
    caches = {}
    for split, count, start in (
        ("train", NUM_TRAIN, 0),
        ("validation", NUM_VALIDATION, 60),
    ):
        dataset = write_chat_dataset(folder / f"{split}.jsonl", count, start)
        caches[split] = folder / f"{split}_CHUNK_ID.jsonl"
        assert ranks(1).run(
            run_stage_1, teacher, dataset, caches[split], {"n_examples_per_chunk": 16}
        ) == [""]
    return student, caches["train"], caches["validation"], folder


def metrics(log_dir: Path) -> list[dict]:
    return [
        json.loads(line)
        for line in (log_dir / "metrics" / "metrics.jsonl").read_text().splitlines()
    ]


def training_rows(log_dir: Path) -> dict[int, dict]:
    """Step -> what does not depend on the clock; a repeated step's last line counts."""
    keys = (
        "train/loss",
        "train/kd_loss",
        "train/sft_loss",
        "grad_norm",
        "lr",
        "consumed_samples",
    )
    return {
        row["step"]: {key: row[key] for key in keys}
        for row in metrics(log_dir)
        if "train/loss" in row
    }


def bare_module(config, pretrained, groups) -> StudentModule:
    """A student without data."""
    data = SimpleNamespace(groups=groups, plan=TrainingPlan(1, 1, 1, 1))
    loss = StudentLoss(config.model.knowledge_distillation, config.model.data)
    return StudentModule(config, pretrained, data, loss)


def gradients(student, train, tp, data_size, micro_batch_size, num_rows, overrides):
    """Full gradients by Hugging Face name order: (sums, {name: this rank's gradient})."""
    devices = torch.distributed.get_world_size()
    config = student_config(
        student, train, train, Path("/nonexistent"), trainer__devices=devices, model__tensor_model_parallel_size=tp,
        model__micro_batch_size=micro_batch_size, model__optim__name="adam", **overrides,
    )  # fmt: skip
    groups = initialize_model_parallel(config.model, 1)
    reader = CacheReader(str(train))
    rows = [reader[i] for i in range(num_rows)]
    per_rank = num_rows // data_size
    mine = rows[groups.data_rank * per_rank : (groups.data_rank + 1) * per_rank]
    batches = [
        collate(mine[i : i + micro_batch_size], 0)
        for i in range(0, len(mine), micro_batch_size)
    ]
    with open_pretrained(str(student)) as pretrained:
        module = bare_module(config, pretrained, groups)
    module.model.zero_grad_buffer()
    sums = forward_backward(module.model, batches, module.token_losses)
    torch.distributed.all_reduce(sums, group=groups.data)
    return sums, {
        name: parameter.main_grad.clone()
        for name, parameter in module.gpt.named_parameters()
    }


def reference_gradients(
    student: Path, train: Path, num_rows: int, kd_loss: str, support: str
):
    """The documented objective on transformers' model in float64, row by row without padding."""
    model = AutoModelForCausalLM.from_pretrained(student).double()
    reader = CacheReader(str(train))
    total, count = torch.zeros((), dtype=torch.float64), 0
    for index in range(num_rows):
        row = everywhere(reader[index])
        logits = model(torch.tensor(row.example.tokens_S)[None]).logits[0]
        mask = torch.tensor(row.example.loss_mask_S).double()
        ce = torch.nn.functional.cross_entropy(
            logits, torch.tensor(row.example.labels_S), reduction="none"
        )
        for s in mask.nonzero()[:, 0].tolist():
            ids = torch.tensor(row.teacher.topk_token_ids_PK[s]).long()
            p = torch.softmax(
                torch.tensor(row.teacher.topk_logits_PK[s])[ids >= 0].double(), -1
            )
            if support == "renormalize":
                q = torch.softmax(logits[s, ids[ids >= 0]], -1)
            else:
                tail = float(row.teacher.tail_mass_PT[s, 0])
                p = torch.cat(
                    [(1 - tail) * p, torch.tensor([tail], dtype=torch.float64)]
                )
                q = torch.softmax(logits[s, :300], -1)[ids[ids >= 0]]
                q = torch.cat([q, 1 - q.sum(0, keepdim=True)])
            total = total + (
                (p * (p / q).log()).sum()
                if kd_loss == "fwd_kl"
                else (q * (q / p).log()).sum()
            )
        total, count = total + 0.5 * (ce * mask).sum(), count + mask.sum()
    (total / count).backward()
    return float(total / count), {
        name: parameter.grad for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize("support", ["tail", "renormalize"])
@pytest.mark.parametrize("kd_loss", ["fwd_kl", "bwd_kl"])
def test_loss_and_gradient_match_transformers_in_float64(
    ranks, world, kd_loss, support
):
    student, train, _, _ = world
    loss, expected = reference_gradients(student, train, 8, kd_loss, support)
    overrides = {
        "model__knowledge_distillation__kd_loss": kd_loss,
        "model__knowledge_distillation__support": support,
    }
    sums, ours = ranks(1).run(gradients, student, train, 1, 1, 3, 8, overrides)[0]
    assert float(sums[-1, 0] / sums[-1, -1]) == pytest.approx(loss, rel=1e-6)
    pairs = {
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "output_layer.weight": "lm_head.weight",
        "decoder.final_layernorm.weight": "model.norm.weight",
        "decoder.layers.0.mlp.linear_fc2.weight": "model.layers.0.mlp.down_proj.weight",
        "decoder.layers.0.self_attention.linear_proj.weight": "model.layers.0.self_attn.o_proj.weight",
    }
    for name, theirs in pairs.items():
        reference = expected[theirs]
        difference = (
            ours[name][: len(reference)].double() - reference
        ).norm() / reference.norm()
        assert difference < 1e-5, f"{name}: {difference}"


def test_gradients_depend_on_no_batching_and_no_layout(ranks, world):
    student, train, _, _ = world
    sums, whole = ranks(1).run(gradients, student, train, 1, 1, 8, 8, {})[0]
    for world_size, tp, micro_batch_size in [
        (1, 1, 1),
        (1, 1, 3),
        (2, 1, 1),
        (2, 1, 4),
        (4, 1, 2),
        (2, 2, 2),
        (4, 2, 1),
        (4, 4, 3),
    ]:
        overrides = {"model__global_batch_size": 8 * 3}
        results = ranks(world_size).run(
            gradients,
            student,
            train,
            tp,
            world_size // tp,
            micro_batch_size,
            8,
            overrides,
        )
        for other_sums, other in results:
            torch.testing.assert_close(other_sums, sums, rtol=1e-6, atol=1e-6)
            norm = other["decoder.final_layernorm.weight"]
            # Replicated over tensor-parallel ranks, so comparable in every layout; float32 sums in another order.
            torch.testing.assert_close(
                norm, whole["decoder.final_layernorm.weight"], rtol=2e-4, atol=1e-7
            )
        rows = [result[1]["output_layer.weight"] for result in results[:tp]]
        assembled = torch.cat(rows)[:300]
        torch.testing.assert_close(
            assembled, whole["output_layer.weight"][:300], rtol=2e-4, atol=1e-6
        )


@pytest.mark.parametrize("world_size", [1, 2])
def test_resume_equals_an_uninterrupted_run_to_the_last_bit(
    ranks, world, tmp_path, world_size
):
    """With weights of the loss that follow schedules; validation takes those at the end."""
    student, train, validation, _ = world
    loss = "model__knowledge_distillation__"
    overrides = {
        "trainer__devices": world_size,
        "trainer__knowledge_distillation__max_epochs": 2,
        f"{loss}kd_loss_weight": "cosine from 2.0 to 0.5 over steps 1 to 7",
        f"{loss}sft_loss_weight": "linear from 0 to 0.25 over steps 0 to 6",
    }
    assert (
        ranks(world_size).run(
            run_stage_2, student, train, validation, tmp_path / "a", overrides
        )
        == [""] * world_size
    )
    straight = training_rows(tmp_path / "a")
    assert list(straight) == list(
        range(1, 9)
    )  # 39 examples: four batches of 8 an epoch
    checkpoint = next(
        path
        for path in (tmp_path / "a" / "checkpoints").iterdir()
        if "-step=4-" in path.name
    )
    shutil.copytree(
        checkpoint, tmp_path / "b" / "checkpoints" / f"{checkpoint.name}-last"
    )
    assert (
        ranks(world_size).run(
            run_stage_2, student, train, validation, tmp_path / "b", overrides
        )
        == [""] * world_size
    )
    resumed = training_rows(tmp_path / "b")
    assert list(resumed) == [5, 6, 7, 8]
    assert all(resumed[step] == straight[step] for step in resumed)
    of_steps = [row for row in metrics(tmp_path / "a") if "train/loss" in row]
    found = [
        (row["train/kd_loss_weight"], row["train/sft_loss_weight"]) for row in of_steps
    ]
    # The cosine of 60 degrees and its multiples.
    cosine = [
        2.0,
        2.0,
        *(1.25 + 0.75 * x for x in (0.75**0.5, 0.5, 0, -0.5, -(0.75**0.5))),
        0.5,
    ]
    assert found == [
        pytest.approx((kd, min(step, 6) / 24)) for step, kd in enumerate(cosine)
    ]
    for row, (kd_weight, sft_weight) in zip(of_steps, found, strict=True):
        parts = kd_weight * row["train/kd_loss"] + sft_weight * row["train/sft_loss"]
        assert row["train/loss"] == pytest.approx(parts)
    for row in metrics(tmp_path / "a"):
        if "val_loss" in row:
            parts = 0.5 * row["validation/kd_loss"] + 0.25 * row["validation/sft_loss"]
            assert row["val_loss"] == pytest.approx(parts)


def test_resume_on_another_layout(ranks, world, tmp_path):
    student, train, validation, _ = world
    overrides = {"trainer__knowledge_distillation__max_epochs": 2}
    ranks(1).run(run_stage_2, student, train, validation, tmp_path / "a", overrides)
    straight = training_rows(tmp_path / "a")
    checkpoint = next(
        path
        for path in (tmp_path / "a" / "checkpoints").iterdir()
        if "-step=4-" in path.name
    )
    for tp in (1, 2):
        log_dir = tmp_path / f"tp{tp}"
        shutil.copytree(
            checkpoint, log_dir / "checkpoints" / f"{checkpoint.name}-last"
        )
        layout = {
            **overrides,
            "trainer__devices": 2,
            "model__tensor_model_parallel_size": tp,
        }
        assert ranks(2).run(
            run_stage_2, student, train, validation, log_dir, layout
        ) == [
            "",
            "",
        ]
        resumed = training_rows(log_dir)
        assert list(resumed) == [5, 6, 7, 8]
        for step, row in resumed.items():
            assert row["train/loss"] == pytest.approx(
                straight[step]["train/loss"], rel=1e-4
            )
            assert row["grad_norm"] == pytest.approx(
                straight[step]["grad_norm"], rel=1e-3
            )


def test_resume_of_interleaved_stages(ranks, world, tmp_path):
    """On the same ranks to the last bit, on a single one within rounding."""
    _, train, validation, _ = world
    student = save_hf_model("qwen3", tmp_path / "student", 300, num_hidden_layers=4)
    overrides = {
        "trainer__knowledge_distillation__max_epochs": 2,
        "model__data__num_workers": 0,
    }
    interleaved = {
        "trainer__devices": 2, "model__pipeline_model_parallel_size": 2, "model__virtual_pipeline_model_parallel_size": 2,
    }  # fmt: skip
    found: dict[str, dict] = {}
    for name, layout in (
        ("straight", interleaved),
        ("again", interleaved),
        ("alone", {}),
    ):
        log_dir, count = tmp_path / name, layout.get("trainer__devices", 1)
        for path in (tmp_path / "straight" / "checkpoints").glob("*-step=4-*"):
            shutil.copytree(path, log_dir / "checkpoints" / f"{path.name}-last")
        assert (
            ranks(count).run(
                run_stage_2, student, train, validation, log_dir, overrides | layout
            )
            == [""] * count
        )
        found[name] = training_rows(log_dir)
    assert list(found["straight"]) == list(range(1, 9))
    assert list(found["again"]) == list(found["alone"]) == [5, 6, 7, 8]
    assert all(found["straight"][step] == row for step, row in found["again"].items())
    for step, row in found["alone"].items():
        assert row["train/loss"] == pytest.approx(
            found["straight"][step]["train/loss"], rel=1e-4
        )
        assert row["grad_norm"] == pytest.approx(
            found["straight"][step]["grad_norm"], rel=1e-3
        )


def test_distributed_optimizer_equals_adamw(ranks, world, tmp_path):
    student, train, validation, _ = world
    curves = []
    for name in ("distributed_fused_adam", "adamw"):
        overrides = {
            "trainer__devices": 2,
            "model__optim__name": name,
            "exp_manager__create_checkpoint_callback": False,
        }
        assert ranks(2).run(
            run_stage_2, student, train, validation, tmp_path / name, overrides
        ) == ["", ""]
        curves.append(
            [
                (row["train/loss"], row["grad_norm"])
                for row in training_rows(tmp_path / name).values()
            ]
        )
        assert not (tmp_path / name / "checkpoints").exists()
    assert len(curves[0]) == 4
    for ours, theirs in zip(*curves, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_bf16_keeps_learning(ranks, world, tmp_path):
    student, train, validation, _ = world
    overrides = {
        "trainer__precision": "bf16",
        "trainer__knowledge_distillation__max_epochs": 3,
    }
    assert ranks(1).run(
        run_stage_2, student, train, validation, tmp_path / "run", overrides
    ) == [""]
    losses = [row["train/loss"] for row in training_rows(tmp_path / "run").values()]
    assert losses[-1] < losses[0]


def test_sft_from_a_dataset_and_what_a_run_leaves(ranks, world, tmp_path):
    student, _, _, folder = world
    overrides = {
        "model__data__data_impl": "dataset",
        "model__data__data_prefix": {
            "train": [str(folder / "train.jsonl")],
            "validation": str(folder / "validation.jsonl"),
            "test": str(folder / "validation.jsonl"),
        },
        "model__knowledge_distillation__kd_loss_weight": 0.0,
        "model__knowledge_distillation__sft_loss_weight": 1.0,
        "trainer__knowledge_distillation__max_steps": 3,
        "trainer__knowledge_distillation__val_check_interval": 1000,
        "exp_manager__create_wandb_logger": True,
        "exp_manager__wandb_logger_kwargs": {
            "project": "p",
            "name": "n",
            "offline": True,
            "save_dir": str(tmp_path),
        },
        "name": "sft",
    }
    assert ranks(2).run(
        run_stage_2,
        student,
        "t",
        "v",
        tmp_path / "run",
        {**overrides, "trainer__devices": 2},
    ) == [
        "",
        "",
    ]
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 3, 3]
    trained = [row for row in rows if "train/loss" in row]
    assert len(trained) == 3
    assert {
        "train/loss",
        "train/sft_loss",
        "lr",
        "grad_norm",
        "perf/step_time_s",
    } <= trained[0].keys()
    assert all(
        row["train/loss"] == row["train/sft_loss"] and "train/kd_loss" not in row
        for row in trained
    )
    assert (
        sum("val_loss" in row for row in rows) == 1
    )  # an interval longer than the run still validates at its end
    test = next(row for row in rows if "test/loss" in row)
    validation = next(row for row in rows if "val_loss" in row)
    assert test["test/loss"] == pytest.approx(validation["val_loss"], rel=1e-6)
    assert list((tmp_path / "run").glob("events.out.tfevents*"))
    assert list(tmp_path.rglob("offline-run-*"))
    with open_pretrained(
        str(tmp_path / "run" / "checkpoints" / "sft.nemo")
    ) as pretrained:
        assert pretrained.architecture.num_layers == 1


def test_validation_counts_every_example_once(ranks, world, tmp_path):
    """11 examples on 1 and 4 ranks, so that most ranks get filler rows: the same token-weighted mean."""
    student, train, validation, _ = world
    losses = []
    for world_size in (1, 4):
        overrides = {
            "trainer__devices": world_size,
            "trainer__knowledge_distillation__max_steps": 1,
            "model__optim__lr": 0.0,
        }
        log_dir = tmp_path / str(world_size)
        assert set(
            ranks(world_size).run(
                run_stage_2, student, train, validation, log_dir, overrides
            )
        ) == {""}
        losses.append(
            next(row["val_loss"] for row in metrics(log_dir) if "val_loss" in row)
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"model__global_batch_size": 64},
            "model.global_batch_size: 64 exceeds the 39 training examples",
        ),
        ({"model__data__n_chunks": 7}, "the chunk is missing (3 of 7 chunks"),
        (
            {"model__data__top_k": 9},
            "model.data.top_k: 9 exceeds the 8 logits a position",
        ),
        (
            {
                "exp_manager__max_time_per_run": "00:01:00:00",
                "exp_manager__create_checkpoint_callback": False,
            },
            "exp_manager.create_checkpoint_callback=False writes none",
        ),
        (
            {"exp_manager__max_time_per_run": "1h"},
            "exp_manager.max_time_per_run: '1h' is not DD:HH:MM:SS",
        ),
        ({"exp_manager__nonsense": 1}, "nonsense"),
        (
            {
                "model__data__data_prefix": {
                    "train": ["/no/t_CHUNK_ID.jsonl"],
                    "validation": ["v"],
                }
            },
            "/no/t_0.jsonl: the chunk is missing",
        ),
        (
            {"model__max_seq_length": 9999},
            "model.max_seq_length: 9999 exceeds the model's max_position_embeddings (512)",
        ),
    ],
)
def test_wrong_input_is_refused_before_the_first_step(
    ranks, world, tmp_path, overrides, message
):
    student, train, validation, _ = world
    assert (
        message
        in ranks(1).run(
            run_stage_2, student, train, validation, tmp_path / "run", overrides
        )[0]
    )
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_blend_of_two_teachers_resumes_with_its_own_data_only(
    ranks, world, tmp_path
):
    student, train, validation, folder = world
    teacher = save_hf_model("qwen3", tmp_path / "teacher", 300, seed=2)
    second = tmp_path / "second_CHUNK_ID.jsonl.zst"
    overrides = {"n_examples_per_chunk": 10, "top_k": 5}
    assert ranks(1).run(
        run_stage_1, teacher, folder / "train.jsonl", second, overrides
    ) == [""]
    overrides = {
        "trainer__knowledge_distillation__max_epochs": 1,
        "model__data__data_prefix": {
            "train": [0.25, f"{train}[:50%]", 0.75, str(second)],
            "validation": [str(validation)],
        },
        "model__data__shuffle": "chunks",
        "model__data__num_workers": 2,
        "name": "blend",
    }
    assert ranks(1).run(
        run_stage_2, student, train, validation, tmp_path / "a", overrides
    ) == [""]
    straight = training_rows(tmp_path / "a")
    assert list(straight) == list(range(1, 8))  # 20 + 39 examples: seven batches of 8
    checkpoint = next(
        path
        for path in (tmp_path / "a" / "checkpoints").iterdir()
        if "-step=4-" in path.name
    )

    def resume(log_dir, changes, world_size=1):
        shutil.copytree(
            checkpoint, log_dir / "checkpoints" / f"{checkpoint.name}-last"
        )
        changes = {**overrides, **changes, "trainer__devices": world_size}
        return ranks(world_size).run(
            run_stage_2, student, train, validation, log_dir, changes
        )

    assert resume(tmp_path / "b", {}, 2) == ["", ""]
    resumed = training_rows(tmp_path / "b")
    assert list(resumed) == [5, 6, 7]
    for step, row in resumed.items():
        assert row["train/loss"] == pytest.approx(
            straight[step]["train/loss"], rel=1e-4
        )

    alone = {"train": [str(second)], "validation": [str(validation)]}
    message = resume(tmp_path / "c", {"model__data__data_prefix": alone})[0]
    assert (
        f"  model.data.data_prefix.train: {{'paths': ['{train}[:50%]', '{second}'], 'content"
        in message
    )
    assert (
        f"'weights': [0.25, 0.75]}} in the checkpoint, {{'paths': ['{second}'], 'content"
        in message
    )
    assert not training_rows_or_none(tmp_path / "c")

    check_provenance(
        tmp_path / "a" / "checkpoints" / "blend.nemo",
        tmp_path / "hf",
        (folder / "teacher", teacher),
        (train, second),
    )


def training_rows_or_none(log_dir: Path) -> dict[int, dict]:
    return (
        training_rows(log_dir)
        if (log_dir / "metrics" / "metrics.jsonl").exists()
        else {}
    )


def check_provenance(
    archive: Path,
    converted: Path,
    teachers: tuple[Path, ...],
    caches: tuple[Path, ...],
) -> None:
    """The archive says what it was made from, and keeps saying so as a Hugging Face folder."""
    with tarfile.open(archive) as tar:
        provenance = json.load(tar.extractfile("./provenance.json"))
    assert provenance["nemo_kd"] == nemo_kd.__version__
    assert (
        provenance["config"]["model"]["knowledge_distillation"]["sft_loss_weight"]
        == 0.5
    )
    assert (provenance["data_weights"], provenance["consumed_samples"]) == (
        [0.25, 0.75],
        56,
    )
    assert str(archive.parent.parent) not in json.dumps(provenance)
    described = provenance["data"]["train"]["caches"]
    for found, teacher, cache in zip(described, teachers, caches, strict=True):
        with open_pretrained(str(teacher)) as pretrained:
            assert found["teacher"] == pretrained.fingerprint()
        manifest = cache.with_name(
            cache.name.split("CHUNK_ID")[0] + "manifest.json"
        ).read_bytes()
        assert found["manifest"] == f"sha256:{hashlib.sha256(manifest).hexdigest()}"
        assert found["dataset"] == json.loads(manifest)["dataset"]["fingerprint"]
        assert json.loads(manifest)["dataset"]["formats"] == ["messages"]
    with open_pretrained(str(archive)) as pretrained:
        assert pretrained.provenance == provenance
    command = [
        sys.executable,
        "-m",
        "nemo_kd.cli.convert_checkpoint",
        f"input_path={archive}",
        f"output_path={converted}",
    ]
    subprocess.run(command, check=True, capture_output=True)
    assert json.loads((converted / "provenance.json").read_text()) == provenance


def test_a_student_that_does_not_match_the_cache_is_refused(ranks, world, tmp_path):
    _, train, validation, _ = world
    smaller = save_hf_model("llama2", tmp_path / "smaller", 290)
    template = tmp_path / "smaller" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    message = ranks(1).run(
        run_stage_2, smaller, train, validation, tmp_path / "run", {}
    )[0]
    assert "(300 tokens) in the cache, sha256:" in message
    assert "(290 tokens) in the student; both must share one tokenizer" in message
    assert "the student has 290 ids" in message
    assert f"{train}: chat template: sha256:" in message
    other = save_hf_model("llama2", tmp_path / "other", 300)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = ranks(1).run(
        run_stage_2, other, train, validation, tmp_path / "run", {}
    )[0]
    assert "both must share one tokenizer" in message
    assert "template" not in message


def test_a_student_of_the_same_family_may_have_a_larger_vocabulary(
    ranks, world, tmp_path
):
    """Its embedding has rows that no token stands for."""
    _, train, validation, _ = world
    student = save_hf_model("llama2", tmp_path / "student", 300, num_hidden_layers=1)
    build_hf_model("llama2", 333, num_hidden_layers=1).save_pretrained(student)
    overrides = {
        "trainer__knowledge_distillation__max_steps": 1,
        "exp_manager__create_checkpoint_callback": False,
    }
    assert ranks(1).run(
        run_stage_2, student, train, validation, tmp_path / "run", overrides
    ) == [""]
    assert list(training_rows(tmp_path / "run")) == [1]
