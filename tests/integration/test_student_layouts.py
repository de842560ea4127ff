"""Stage 2 in every layout and with every kind of batch: the same losses, gradients and weights, those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nemo_kd.cache.reader import CacheReader
from nemo_kd.config.convert import ConvertCheckpointConfig
from nemo_kd.convert import convert
from nemo_kd.data.tokenizer import load_tokenizer
from nemo_kd.mcore.checkpoint import open_pretrained
from nemo_kd.mcore.export import ModelExport
from nemo_kd.mcore.groups import initialize_model_parallel
from nemo_kd.mcore.kernels import Machine
from nemo_kd.mcore.optimizer import release
from nemo_kd.mcore.schedule import forward_backward
from nemo_kd.student.data import StudentData, load_splits
from nemo_kd.student.loss import StudentLoss
from nemo_kd.student.module import StudentModule
from nemo_kd.student.steps import TrainingPlan
from tests.integration.test_stage_1 import run_stage_1
from tests.integration.test_stage_2 import bare_module
from tests.tiny_cache import everywhere
from tests.tiny_data import student_config, write_chat_dataset
from tests.tiny_models import save_hf_model

NUM_STEPS, GLOBAL_BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 3, 12, 1e-2, 0.1
KD_WEIGHT = 20.0  # random models are near each other: as much as the cross-entropy
EPS = 1e-3  # so large that steps are in proportion to gradients: rounding of tiny ones stays tiny
STUDENTS = {
    "dense": "qwen3",
    "tied": "llama3.2_tied",
    "mixtral": "mixtral",
    "qwen3_moe": "qwen3_moe",
    "few examples": "mixtral",
    "deep": "qwen3",
    "deep tied": "llama3.2_tied",
    "deep mixtral": "mixtral",
    "deeper": "llama3.2_tied",
}
NUM_LAYERS = {"deep": 4, "deep tied": 4, "deep mixtral": 4, "deeper": 8}
FEW = {"model__global_batch_size": 3}
"""A step has three examples: of four ranks one computes nothing but filler."""
Settings = dict[str, Any]
TP, PP, CP, EP = (
    {f"model__{name}_parallel_size": 2}
    for name in ("tensor_model", "pipeline_model", "context", "expert_model")
)
SP = {"model__sequence_parallel": True}
VPP = PP | {"model__virtual_pipeline_model_parallel_size": 2}
ADAMW = {"model__optim__name": "adamw"}
PADDED = {"model__data__packing": False}
DYNAMIC = {"model__data__max_tokens_per_batch": 150}
ALONE = {"model__micro_batch_size": 1}
OVERLAP = {"overlap": True}
FULL = {"model__activations_checkpoint_granularity": "full"}
SELECTIVE = {"model__activations_checkpoint_granularity": "selective"}
RUNS: dict[int, dict[str, tuple[str, Settings]]] = {
    1: {
        "padded": ("dense", PADDED | {"model__micro_batch_size": 4}),
        "packed": ("dense", {"model__micro_batch_size": 3}),
        "dynamic": ("dense", DYNAMIC),
        "dynamic padded": ("dense", DYNAMIC | PADDED),
        "dynamic, one example a batch": ("dense", {"model__data__max_tokens_per_batch": 1}),
        "full": ("dense", DYNAMIC | FULL),
        "selective": ("dense", PADDED | SELECTIVE),
        "tied": ("tied", DYNAMIC),
        "mixtral": ("mixtral", DYNAMIC),
        "qwen3_moe": ("qwen3_moe", PADDED),
    },
    2: {
        "TP": ("dense", TP),
        "TP SP": ("dense", TP | SP | DYNAMIC | SELECTIVE),
        "PP": ("dense", PP | PADDED),
        "PP dynamic": ("dense", PP | DYNAMIC | FULL),
        "PP tied": ("tied", PP | DYNAMIC | ADAMW),
        "CP": ("dense", CP),
        "CP dynamic": ("dense", CP | DYNAMIC | FULL | ADAMW),
        "DP dynamic": ("dense", DYNAMIC | ADAMW),
        "DP overlap": ("dense", DYNAMIC | OVERLAP),
        "DP tied overlap": ("tied", OVERLAP | ADAMW),
        "EP": ("mixtral", EP | DYNAMIC),
        "EP CP": ("mixtral", EP | CP | ADAMW),
        "PP experts": ("qwen3_moe", PP | DYNAMIC),
        "VPP": ("deep", VPP | DYNAMIC | FULL),
        "VPP tied": ("deep tied", VPP | PADDED | ADAMW),
        "four parts a stage": ("deeper", VPP | DYNAMIC | {"model__virtual_pipeline_model_parallel_size": 4}),
    },
    4: {
        "PP TP SP": ("dense", PP | TP | SP | DYNAMIC),
        "PP TP tied": ("tied", PP | TP | PADDED),
        "PP CP": ("dense", PP | CP),
        "CP TP SP": ("dense", CP | TP | SP | DYNAMIC),
        "DP": ("dense", ALONE),
        "DP2 PP overlap": ("tied", PP | DYNAMIC | OVERLAP),
        "EP TP SP overlap": ("qwen3_moe", EP | TP | SP | DYNAMIC | OVERLAP),
        "EP PP": ("mixtral", EP | PP | DYNAMIC),
        "VPP TP SP": ("deep", VPP | TP | SP | DYNAMIC),
        "VPP DP overlap": ("deep tied", VPP | DYNAMIC | OVERLAP),
        "VPP EP": ("deep mixtral", VPP | EP | DYNAMIC),
        "four stages": ("deeper", VPP | DYNAMIC | {"model__pipeline_model_parallel_size": 4}),
        "four stages, one batch": ("deeper", VPP | {"model__pipeline_model_parallel_size": 4, "model__micro_batch_size": 12}),
        "EP fillers": ("few examples", FEW | EP | DYNAMIC),
        "fillers": ("few examples", FEW | ALONE | PADDED | OVERLAP),
    },
}  # fmt: skip


class Run(NamedTuple):
    """`steps`: sums of everything reported (loss, KD, CE ...), loss tokens, norm of the gradient; `validation`: the sums of the last weights."""

    steps: list[list[float]]
    validation: list[float]


@pytest.fixture(scope="module")
def world(ranks, tmp_path_factory):
    """Folders of the students, train and validation caches."""
    folder = tmp_path_factory.mktemp("student_layouts")
    teacher = save_hf_model("qwen3", folder / "teacher", 300, seed=1)
    students = {}
    for name, base in STUDENTS.items():
        students[name] = save_hf_model(
            base, folder / name, 300, num_hidden_layers=NUM_LAYERS.get(name, 2)
        )
    caches = {}
    for split, count, start in (
        ("train", NUM_STEPS * GLOBAL_BATCH_SIZE + 1, 0),
        ("validation", 17, 60),
    ):
        dataset = write_chat_dataset(folder / f"{split}.jsonl", count, start)
        caches[split] = folder / f"{split}_CHUNK_ID.jsonl"
        assert ranks(1).run(
            run_stage_1, teacher, dataset, caches[split], {"n_examples_per_chunk": 16}
        ) == [""]
    return students, caches["train"], caches["validation"], folder


def run(
    student: Path, train: Path, validation: Path, settings: Settings, archive: Path
) -> Run:
    """What stage 2 does, without Lightning."""
    settings = {
        "model__optim__lr": LEARNING_RATE,
        "model__optim__eps": EPS,
        "model__optim__weight_decay": WEIGHT_DECAY,
        "model__knowledge_distillation__kd_loss_weight": KD_WEIGHT,
    } | settings
    overlap = settings.pop("overlap", False)
    config = student_config(
        student, train, validation, Path("/nonexistent"), trainer__devices=torch.distributed.get_world_size(),
        **{"model__global_batch_size": GLOBAL_BATCH_SIZE} | settings,
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
        machine = Machine(capability=(9, 0)) if overlap else Machine()
        with mock.patch.object(Machine, "here", return_value=machine):
            module = StudentModule(
                config,
                pretrained,
                data,
                StudentLoss(config.model.knowledge_distillation, config.model.data),
            )
        optimizer = module.configure_optimizers()
        steps = []
        for batch in data.loader("train"):
            optimizer.zero_grad()
            sums = module._sum_over_ranks(
                forward_backward(module.model, batch, module.token_losses)
            )[-1].tolist()
            optimizer.step()
            steps.append([*sums, optimizer.grad_norm])
        assert len(steps) == NUM_STEPS
        module.on_validation_epoch_start()
        with torch.inference_mode():
            for number, batch in enumerate(data.loader("validation")):
                module.validation_step(batch, number)
        sums = module._sum_over_ranks(module.validation_sums)[-1].tolist()
        ModelExport(module.gpt, pretrained, groups).save_nemo(archive)
        release(
            module.model
        )  # else every layout's groups would stay until the test's end
    return Run(steps, sums)


def run_all(
    students, train, validation, runs: dict[str, tuple[str, Settings]], folder: Path
) -> dict[str, Run]:
    return {
        name: run(
            students[student],
            train,
            validation,
            dict(settings),
            folder / f"{name}.nemo",
        )
        for name, (student, settings) in runs.items()
    }


def weights(ranks, archive: Path) -> dict[str, torch.Tensor]:
    """Of an archive, by the names of transformers."""
    target = archive.with_suffix("")
    ranks(1).run(
        convert,
        ConvertCheckpointConfig(input_path=str(archive), output_path=str(target)),
    )
    return load_file(target / "model.safetensors")


@pytest.fixture(scope="module")
def straight(ranks, world):
    """One rank, an example at a time, padded: the runs that all others have to equal, and their weights."""
    students, train, validation, folder = world
    runs = {
        name: (name, PADDED | ALONE | (FEW if name == "few examples" else {}))
        for name in STUDENTS
    }
    (folder / "straight").mkdir()
    results = ranks(1).run(
        run_all, students, train, validation, runs, folder / "straight"
    )[0]
    return {
        name: (results[name], weights(ranks, folder / "straight" / f"{name}.nemo"))
        for name in STUDENTS
    }


@pytest.mark.parametrize("world_size", list(RUNS))
def test_every_layout_and_kind_of_batch_trains_the_same(
    ranks, world, straight, tmp_path, world_size
):
    students, train, validation, _ = world
    results = ranks(world_size).run(
        run_all, students, train, validation, RUNS[world_size], tmp_path, timeout_s=600
    )
    assert all(result == results[0] for result in results), (
        "every rank knows the same sums"
    )
    for name, found in results[0].items():
        expected, expected_weights = straight[RUNS[world_size][name][0]]
        assert torch.tensor(found.steps).numpy() == pytest.approx(
            torch.tensor(expected.steps).numpy(), rel=1e-4
        ), name
        assert found.validation == pytest.approx(expected.validation, rel=1e-4), name
        found_weights = weights(ranks, tmp_path / f"{name}.nemo")
        assert found_weights.keys() == expected_weights.keys()
        for weight, values in found_weights.items():
            moved = LEARNING_RATE * NUM_STEPS  # what a weight may move by at most
            assert (values - expected_weights[weight]).abs().max() < 1e-3 * moved, (
                name,
                weight,
            )


def test_the_straight_run_is_that_of_transformers(world, straight):
    students, train, _, _ = world
    model = AutoModelForCausalLM.from_pretrained(students["dense"])
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), eps=EPS)
    config = student_config(students["dense"], train, train, Path("/nonexistent"))
    reader = CacheReader(str(train))
    order = np.random.Generator(np.random.PCG64([config.model.seed, 0])).permutation(
        len(reader)
    )
    run, trained = straight["dense"]
    for step, found in enumerate(run.steps):
        optimizer.zero_grad()
        sums = torch.zeros(4)
        for index in order[
            step * GLOBAL_BATCH_SIZE : (step + 1) * GLOBAL_BATCH_SIZE
        ].tolist():
            sums = sums + example_sums(model, reader[index])
        (sums[0] / sums[3]).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert [*found[:3], *found[-2:]] == pytest.approx(
            [*sums.tolist(), float(norm)], rel=1e-4
        )
    for name, values in model.state_dict().items():
        assert (
            trained[name] - values
        ).abs().max() < 1e-3 * LEARNING_RATE * NUM_STEPS, name


def example_sums(model, row) -> torch.Tensor:
    """(loss, KD, CE, loss tokens): KD is forward KL with a tail bucket; half of the cross-entropy counts."""
    row = everywhere(row)
    logits = model(torch.tensor(row.example.tokens_S)[None]).logits[0]
    ce = torch.nn.functional.cross_entropy(
        logits, torch.tensor(row.example.labels_S), reduction="none"
    )
    kd_sum, ce_sum, positions = (
        torch.zeros(()),
        torch.zeros(()),
        row.example.loss_mask_S.nonzero()[0].tolist(),
    )
    for s in positions:
        ids = torch.tensor(row.teacher.topk_token_ids_PK[s]).long()
        kept = ids >= 0
        tail = float(row.teacher.tail_mass_PT[s, 0])
        p = (1 - tail) * torch.softmax(
            torch.tensor(row.teacher.topk_logits_PK[s])[kept], -1
        )
        q = torch.softmax(logits[s], -1)[ids[kept]]
        p, q = (
            torch.cat([p, torch.tensor([max(tail, 1e-12)])]),
            torch.cat([q, 1 - q.sum(0, keepdim=True)]),
        )
        kd_sum, ce_sum = kd_sum + (p * (p / q).log()).sum(), ce_sum + ce[s]
    return torch.stack(
        [
            KD_WEIGHT * kd_sum + 0.5 * ce_sum,
            kd_sum,
            ce_sum,
            torch.tensor(float(len(positions))),
        ]
    )


def precisions(
    student: Path, train: Path, settings: Settings
) -> dict[str, set[torch.dtype]]:
    """Dtypes of weights, gradients, and of what the optimizer keeps."""
    config = student_config(
        student, train, train, Path("/nonexistent"), trainer__devices=2, **settings
    )
    groups = initialize_model_parallel(config.model, 1)
    with open_pretrained(str(student)) as pretrained:
        module = bare_module(config, pretrained, groups)
    optimizer = module.configure_optimizers()
    inner = optimizer.megatron.chained_optimizers[0].optimizer
    kept = [
        state
        for states in inner.state.values()
        for key, state in states.items()
        if key != "step"
    ]
    return {
        "weights": {parameter.dtype for parameter in module.gpt.parameters()},
        "gradients": {
            parameter.main_grad.dtype for parameter in module.gpt.parameters()
        },
        "optimizer": {
            parameter.dtype
            for group in inner.param_groups
            for parameter in group["params"]
        },
        "states": {state.dtype for state in kept},
    }


@pytest.mark.parametrize("optimizer", ["adamw", "distributed_fused_adam"])
@pytest.mark.parametrize("precision", ["32", "bf16", "bf16-mixed"])
def test_half_precision_keeps_float32_gradients_and_optimizer(
    ranks, world, optimizer, precision
):
    students, train, _, _ = world
    settings = {"trainer__precision": precision, "model__optim__name": optimizer}
    found = ranks(2).run(precisions, students["dense"], train, settings)[0]
    whole = {torch.float32}
    weights = whole if precision == "32" else {torch.bfloat16}
    assert found == {
        "weights": weights,
        "gradients": whole,
        "optimizer": whole,
        "states": whole,
    }


def test_half_precision_in_layouts(ranks, world, straight, tmp_path):
    """bf16 has 8 bits; losses summed over a few hundred tokens, whose rounding is random, stay within a percent."""
    students, train, validation, _ = world
    expected = straight["tied"][0]
    for name, settings in {
        "PP": PP | DYNAMIC | FULL,
        "TP SP": TP | SP,
        "CP": CP | ADAMW,
    }.items():
        bf16 = {"trainer__precision": "bf16", **settings}
        found = ranks(2).run(
            run, students["tied"], train, validation, bf16, tmp_path / f"{name}.nemo"
        )[0]
        assert found.validation[:3] == pytest.approx(
            expected.validation[:3], rel=1e-2
        ), name
        for ours, theirs in zip(found.steps, expected.steps, strict=True):
            assert [*ours[:3], ours[-1]] == pytest.approx(
                [*theirs[:3], theirs[-1]], rel=1e-2
            ), name
