"""Low-rank adapters: those of a plain definition on transformers' model, the same in every layout, alone and merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from nemo_kd.cache.reader import CacheReader
from nemo_kd.config.convert import ConvertCheckpointConfig
from nemo_kd.convert import convert
from nemo_kd.data.batches import collate
from nemo_kd.data.tokenizer import load_tokenizer
from nemo_kd.mcore.checkpoint import open_pretrained
from nemo_kd.mcore.distributed_checkpoint import ShardedFolder
from nemo_kd.mcore.export import ModelExport
from nemo_kd.mcore.groups import initialize_model_parallel
from nemo_kd.mcore.model import forward
from nemo_kd.mcore.optimizer import release
from nemo_kd.mcore.schedule import forward_backward
from nemo_kd.nemo_archive import ModelFiles
from nemo_kd.student.data import StudentData, load_splits
from nemo_kd.student.loss import StudentLoss
from nemo_kd.student.module import StudentModule
from nemo_kd.student.steps import TrainingPlan
from tests.integration.test_stage_1 import run_stage_1
from tests.integration.test_stage_2 import run_stage_2, training_rows
from tests.integration.test_student_layouts import (
    ADAMW,
    CP,
    DYNAMIC,
    EP,
    EPS,
    FULL,
    GLOBAL_BATCH_SIZE,
    KD_WEIGHT,
    NUM_STEPS,
    PP,
    SP,
    TP,
    VPP,
    example_sums,
)
from tests.tiny_data import student_config, write_chat_dataset
from tests.tiny_models import save_hf_model

LEARNING_RATE, WEIGHT_DECAY, RANK, ALPHA = 1e-2, 0.1, 4, 12.0
SCALE = ALPHA / RANK
Settings = dict[str, Any]
LORA: Settings = {
    "model__peft__peft_scheme": "lora",
    "model__peft__lora_tuning": {
        "target_modules": ["all"],
        "adapter_dim": RANK,
        "alpha": ALPHA,
    },
}
ATTENTION = {
    "model__peft__lora_tuning": {"target_modules": ["attention"], "adapter_dim": RANK}
}
SECOND = {"model__peft__lora_tuning": {"target_modules": ["mlp_fc1", "mlp_fc2"], "adapter_dim": 3, "layer_selection": [2],
          "row_init_method": "normal", "column_init_method": "kaiming"}}  # fmt: skip
DROPOUT = {
    "model__peft__lora_tuning": {
        "target_modules": ["all"],
        "adapter_dim": RANK,
        "adapter_dropout": 0.5,
    }
}
# By world size and name: the student, settings, and the run on one rank with the same result.
RUNS: dict[int, dict[str, tuple[str, Settings, str]]] = {
    1: {
        "all": ("dense", {}, "all"),
        "recomputed": ("dense", FULL | DYNAMIC, "all"),
        "second": ("tied", SECOND, "second"),
        "experts": ("mixtral", ATTENTION, "experts"),
        "deep": ("deep", {}, "deep"),
        "bf16": (
            "dense",
            {"trainer__precision": "bf16", "model__optim__eps": 1e-8},
            "",
        ),
        "full": ("dense", {"model__peft__peft_scheme": "none"}, "full"),
    },
    2: {
        "TP": ("dense", TP, "all"),
        "TP SP": ("dense", TP | SP | FULL, "all"),
        "PP": ("dense", PP | FULL, "all"),
        "VPP": ("deep", VPP | FULL, "deep"),
        "CP": ("dense", CP | ADAMW, "all"),
        "DP": ("dense", DYNAMIC, "all"),
        "TP second": ("tied", TP | SECOND, "second"),
        "TP dropout": ("dense", TP | DROPOUT, ""),
    },
    4: {
        "TP4": ("dense", {"model__tensor_model_parallel_size": 4}, "all"),
        "PP TP SP": ("dense", PP | TP | SP | DYNAMIC, "all"),
        "EP TP": ("mixtral", ATTENTION | EP | TP | SP, "experts"),
    },
}
STUDENTS = {
    "dense": ("qwen3", 2),
    "tied": ("qwen2_tied", 2),
    "mixtral": ("mixtral", 2),
    "deep": ("qwen3", 4),
}


class Run(NamedTuple):
    """`steps`: (loss, KD, CE, loss tokens, norm of the gradient) of every step; `trained`: size of the gradient buffer, and
    whether it is wanted, of every weight; `replicated`: sums of those that all tensor-parallel ranks have; `logits` of the
    last weights at one rank."""

    steps: list[list[float]]
    trained: dict[str, tuple[int, bool]]
    replicated: dict[str, float]
    logits: torch.Tensor | None


@pytest.fixture(scope="module")
def world(ranks, tmp_path_factory):
    """Folders of the students, train and validation caches."""
    folder = tmp_path_factory.mktemp("lora")
    teacher = save_hf_model("qwen3", folder / "teacher", 300, seed=1)
    students = {
        name: save_hf_model(base, folder / name, 300, num_hidden_layers=layers)
        for name, (base, layers) in STUDENTS.items()
    }
    caches = {}
    for split, count, start in (
        ("train", NUM_STEPS * GLOBAL_BATCH_SIZE + 1, 0),
        ("validation", 9, 60),
    ):
        dataset = write_chat_dataset(folder / f"{split}.jsonl", count, start)
        caches[split] = folder / f"{split}_CHUNK_ID.jsonl"
        assert ranks(1).run(
            run_stage_1, teacher, dataset, caches[split], {"n_examples_per_chunk": 16}
        ) == [""]
    return students, caches["train"], caches["validation"], folder


def run(student: Path, train: Path, settings: Settings, folder: Path) -> Run:
    """What stage 2 does, without Lightning; leaves beside `folder` the weights before (if there are adapters) and after."""
    world_size = torch.distributed.get_world_size()
    config = student_config(
        student, train, train, Path("/nonexistent"), trainer__devices=world_size,
        model__global_batch_size=GLOBAL_BATCH_SIZE, model__optim__lr=LEARNING_RATE,
        model__optim__weight_decay=WEIGHT_DECAY, model__knowledge_distillation__kd_loss_weight=KD_WEIGHT,
        **{"model__optim__eps": EPS, **LORA, **settings},
    )  # fmt: skip
    groups = initialize_model_parallel(config.model, 1)
    with open_pretrained(str(student)) as pretrained:
        splits = load_splits(
            config.model,
            pretrained.architecture,
            load_tokenizer(pretrained.tokenizer_folder),
        )
        data = StudentData(
            config.model, splits, TrainingPlan(NUM_STEPS, NUM_STEPS, 1, 1), 0, groups
        )
        module = StudentModule(
            config,
            pretrained,
            data,
            StudentLoss(config.model.knowledge_distillation, config.model.data),
        )
        optimizer = module.configure_optimizers()
        if module.lora is not None:
            leave_adapter(module, Path(f"{folder}-start-hf"))
        steps = []
        for batch in data.loader("train"):
            optimizer.zero_grad()
            sums = module._sum_over_ranks(
                forward_backward(module.model, batch, module.token_losses)
            )[-1].tolist()
            optimizer.step()
            steps.append([*sums[:3], sums[-1], optimizer.grad_norm])
        before = {
            name: parameter.clone()
            for name, parameter in module.gpt.named_parameters()
        }
        config.export.hf = True
        module.save_to(Path(f"{folder}-merged.nemo"))
        if module.lora is not None:
            leave_adapter(module, Path(f"{folder}-hf"))
        assert all(
            torch.equal(before[name], parameter)
            for name, parameter in module.gpt.named_parameters()
        )
        logits = None
        if world_size == 1:
            module.gpt.eval()
            with torch.no_grad():
                row = CacheReader(str(train))[3]
                logits = forward(module.gpt, collate([row], 0))[
                    0, : len(row.example.tokens_S), :300
                ]
    trained = {
        name: (
            getattr(parameter, "main_grad", torch.zeros(0)).numel(),
            parameter.requires_grad,
        )
        for name, parameter in module.gpt.named_parameters()
    }
    replicated = {
        name: float(parameter.detach().sum())
        for name, parameter in module.gpt.named_parameters()
        if parameter.requires_grad
        and not getattr(parameter, "tensor_model_parallel", False)
    }
    release(module.model)  # else every layout's groups would stay until the test's end
    return Run(steps, trained, replicated, logits)


def leave_adapter(module: StudentModule, folder: Path) -> None:
    export = ModelExport(module.gpt, module.pretrained, module.groups)
    export.save_adapter(folder, module.lora)


def run_all(students, train, runs, folder: Path) -> dict[str, Run]:
    return {
        name: run(students[student], train, settings, folder / name)
        for name, (student, settings, _) in runs.items()
    }


@pytest.fixture(scope="module")
def straight(ranks, world):
    """The runs on one rank, and where their weights lie."""
    students, train, _, folder = world
    return ranks(1).run(run_all, students, train, RUNS[1], folder / "runs")[
        0
    ], folder / "runs"


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_only_adapters_have_gradient_buffers(straight):
    for name, (trained, _) in {
        name: (run.trained, 2) for name, run in straight[0].items() if name != "full"
    }.items():
        with_buffer = {weight for weight, (numel, _) in trained.items() if numel}
        assert with_buffer == {
            weight for weight, (_, requires_grad) in trained.items() if requires_grad
        }, name
        assert all(".lora." in weight for weight in with_buffer), name
        assert len(with_buffer) == {"experts": 8, "second": 4, "deep": 32}.get(
            name, 16
        ), name


def test_the_first_step_sees_the_base_model(straight):
    runs, _ = straight
    assert runs["all"].steps[0][:4] == pytest.approx(
        runs["full"].steps[0][:4], rel=1e-6
    )
    assert runs["all"].steps[-1][0] < 0.99 * runs["all"].steps[0][0]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_layout_trains_the_same(ranks, world, straight, tmp_path, world_size):
    students, train, _, _ = world
    runs, folder = straight
    found, found_folder = straight
    if world_size > 1:
        results = ranks(world_size).run(
            run_all, students, train, RUNS[world_size], tmp_path, timeout_s=600
        )
        assert all(
            other[name].steps == run.steps
            for other in results
            for name, run in results[0].items()
        )
        for name, run in results[0].items():
            if "TP" in name:
                assert run.replicated, name
                assert results[1][name].replicated == run.replicated, name
        found, found_folder = results[0], tmp_path
    for name, (_, _, like) in RUNS[world_size].items():
        if not like:
            assert found[name].steps[-1][0] < 0.99 * found[name].steps[0][0], name
            continue
        steps, expected = (
            torch.tensor(found[name].steps),
            torch.tensor(runs[like].steps),
        )
        torch.testing.assert_close(
            steps,
            expected,
            rtol=1e-4,
            atol=0,
            msg=lambda text, name=name: f"{name}: {text}",
        )
        if like == "full":
            continue
        for kind in ("-start-hf", "-hf"):
            ours, theirs = (
                adapter(found_folder / f"{name}{kind}"),
                adapter(folder / f"{like}{kind}"),
            )
            assert ours.keys() == theirs.keys(), name
            for weight, values in ours.items():
                moved = LEARNING_RATE * NUM_STEPS if kind == "-hf" else 0.0
                assert (values - theirs[weight]).abs().max() <= 2e-3 * moved, (
                    name,
                    kind,
                    weight,
                )
        config = json.loads(
            (found_folder / f"{name}-hf" / "adapter_config.json").read_text()
        )
        assert config == json.loads(
            (folder / f"{like}-hf" / "adapter_config.json").read_text()
        )
        ours, theirs = (
            load_file_of(found_folder / f"{name}-merged-hf"),
            load_file_of(folder / f"{like}-merged-hf"),
        )
        assert ours.keys() == theirs.keys()
        assert all(
            (ours[weight] - theirs[weight]).abs().max() < 1e-3 for weight in ours
        ), name


def load_file_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder."""
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def test_it_is_the_definition_on_transformers_model(world, straight):
    students, train, _, _ = world
    runs, folder = straight
    model = AutoModelForCausalLM.from_pretrained(students["dense"])
    model.requires_grad_(False)
    start = {
        name.removeprefix("base_model.model."): tensor
        for name, tensor in adapter(folder / "all-start-hf").items()
    }
    modules = sorted({name.rsplit(".lora_", 1)[0] for name in start})
    assert len(modules) == 2 * 7
    shared = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}

    def input_side(module: str) -> str:
        name = module.rsplit(".", 1)[1]
        return module.removesuffix(name) + shared.get(name, name)

    down = {
        module: start[f"{module}.lora_A.weight"].requires_grad_()
        for module in modules
        if input_side(module) == module
    }
    up = {
        module: start[f"{module}.lora_B.weight"].requires_grad_() for module in modules
    }
    assert not any(tensor.any() for tensor in up.values())
    base = dict(model.named_parameters())

    def adapted(tokens):
        changes = {
            f"{module}.weight": base[f"{module}.weight"]
            + SCALE * up[module] @ down[input_side(module)]
            for module in modules
        }
        return functional_call(model, changes, (tokens,))

    parameters = [*down.values(), *up.values()]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=LEARNING_RATE,
        betas=(0.9, 0.98),
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
    )
    config = student_config(students["dense"], train, train, Path("/nonexistent"))
    reader = CacheReader(str(train))
    order = np.random.Generator(np.random.PCG64([config.model.seed, 0])).permutation(
        len(reader)
    )
    for step, found in enumerate(runs["all"].steps):
        optimizer.zero_grad()
        sums = torch.zeros(4)
        for index in order[
            step * GLOBAL_BATCH_SIZE : (step + 1) * GLOBAL_BATCH_SIZE
        ].tolist():
            sums = sums + example_sums(adapted, reader[index])
        (sums[0] / sums[3]).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        assert found == pytest.approx([*sums.tolist(), float(norm)], rel=1e-4)
    trained = adapter(folder / "all-hf")
    for module in modules:
        for side, expected in (
            ("lora_A", down[input_side(module)]),
            ("lora_B", up[module]),
        ):
            values = trained[f"base_model.model.{module}.{side}.weight"]
            assert (
                values - expected
            ).abs().max() < 2e-3 * LEARNING_RATE * NUM_STEPS, (
                module,
                side,
            )


@pytest.mark.parametrize("name", ["all", "second", "experts"])
def test_merged_weights_are_those_of_the_trained_model(
    ranks, world, straight, tmp_path, name
):
    students, train, _, _ = world
    runs, folder = straight
    tokens = torch.tensor(CacheReader(str(train))[3].example.tokens_S)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(students[RUNS[1][name][0]])(
            tokens
        ).logits[0]
        merged = AutoModelForCausalLM.from_pretrained(folder / f"{name}-merged-hf")(
            tokens
        ).logits[0]
    assert (base - merged).abs().max() > 0.1
    torch.testing.assert_close(merged, runs[name].logits, rtol=0, atol=2e-4)
    archive = ConvertCheckpointConfig(
        input_path=str(folder / f"{name}-merged.nemo"),
        output_path=str(tmp_path / "hf"),
    )
    ranks(1).run(convert, archive)
    converted, exported = (
        load_file_of(tmp_path / "hf"),
        load_file_of(folder / f"{name}-merged-hf"),
    )
    assert converted.keys() == exported.keys()
    assert all(torch.equal(converted[weight], exported[weight]) for weight in exported)


@pytest.mark.parametrize("name", ["all", "second", "experts"])
def test_the_peft_library_loads_the_adapter(world, straight, name):
    peft = pytest.importorskip("peft")
    students, train, _, _ = world
    runs, folder = straight
    tokens = torch.tensor(CacheReader(str(train))[3].example.tokens_S)[None]
    model = AutoModelForCausalLM.from_pretrained(students[RUNS[1][name][0]])
    adapted = peft.PeftModel.from_pretrained(model, str(folder / f"{name}-hf"))
    with torch.no_grad():
        torch.testing.assert_close(
            adapted(tokens).logits[0], runs[name].logits, rtol=0, atol=2e-4
        )
    assert adapted.peft_config["default"].base_model_name_or_path == str(
        students[RUNS[1][name][0]]
    )
    loaded = {
        key.replace(".default", "") for key in adapted.state_dict() if ".lora_" in key
    }
    assert loaded == adapter(folder / f"{name}-hf").keys()


def test_resume(ranks, world, straight, tmp_path):
    students, train, validation, folder = world
    student = students["dense"]
    overrides = {**LORA, "trainer__knowledge_distillation__max_epochs": 2}
    assert ranks(1).run(
        run_stage_2, student, train, validation, tmp_path / "a", overrides
    ) == [""]
    expected = training_rows(tmp_path / "a")
    assert list(expected) == list(range(1, 9))
    checkpoint = next(
        path
        for path in (tmp_path / "a" / "checkpoints").iterdir()
        if "-step=4-" in path.name
    )
    tensors = ShardedFolder(ModelFiles(checkpoint)).tensors
    assert tensors
    assert all(
        ".lora." in name for name in tensors if not name.startswith("optimizer.")
    ), sorted(tensors)[:5]

    def resume(name: str, changes: Settings, world_size: int = 1) -> list[str]:
        shutil.copytree(
            checkpoint, tmp_path / name / "checkpoints" / f"{checkpoint.name}-last"
        )
        changes = {**overrides, "trainer__devices": world_size, **changes}
        return ranks(world_size).run(
            run_stage_2, student, train, validation, tmp_path / name, changes
        )

    smaller = {
        "model__peft__lora_tuning": {"target_modules": ["mlp"], "adapter_dim": 5}
    }
    refused = resume("other rank", smaller)[0]
    assert (
        "  model.peft.lora_tuning.adapter_dim: 4 in the checkpoint, 5 now\n" in refused
    )
    allowed = resume(
        "allowed", {**smaller, "allow_changed": ["model.peft.lora_tuning"]}
    )[0]
    assert (
        "  model.peft.lora_tuning.adapter_dim: 4 in the checkpoint, 5 now\n" in allowed
    )
    assert "lora_tuning.target_modules" in allowed
    assert allowed.endswith("to start over")
    assert (
        "peft_scheme: lora in the checkpoint, none now"
        in resume("none", {"model__peft__peft_scheme": "none"})[0]
    )
    other = save_hf_model("qwen3", tmp_path / "other", 300, seed=5)
    student = other
    assert (
        "  pretrained_checkpoint.restore_from_path: {'name': 'dense'"
        in resume("other model", {})[0]
    )
    student = students["dense"]
    assert resume(
        "tp",
        {**TP, **SP, "export__hf": True, "export__lora": "adapter", "name": "run"},
        2,
    ) == ["", ""]
    left = tmp_path / "tp" / "checkpoints"
    assert (
        adapter(left / "run-hf").keys() == adapter(folder / "runs" / "all-hf").keys()
    )
    provenance = json.loads((left / "run-hf" / "provenance.json").read_text())
    assert provenance["adapters"]["adapter_dim"] == RANK
    assert (
        provenance["adapters"]["pretrained_checkpoint"]
        == provenance["student"]["weights"]
    )
    with open_pretrained(str(left / "run.nemo")) as archive:
        assert not any(".lora." in name for name in archive._weights.tensors)
    resumed = training_rows(tmp_path / "tp")
    assert list(resumed) == [5, 6, 7, 8]
    for step, row in resumed.items():
        assert row["train/loss"] == pytest.approx(
            expected[step]["train/loss"], rel=1e-4
        )
        assert row["grad_norm"] == pytest.approx(expected[step]["grad_norm"], rel=1e-3)
