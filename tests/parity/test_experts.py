"""Mixtures of experts against transformers: every cut of experts, layers and heads, and ranks that step together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nemo_kd.config import ConfigError
from nemo_kd.config.convert import ConvertCheckpointConfig
from nemo_kd.config.shared import ModelConfig, check_layout
from nemo_kd.convert import convert
from nemo_kd.data.batches import collate, pack
from nemo_kd.mcore.checkpoint import open_pretrained
from nemo_kd.mcore.export import ModelExport
from nemo_kd.mcore.groups import initialize_model_parallel
from nemo_kd.mcore.model import hidden_at, output_weight
from nemo_kd.mcore.schedule import loss_positions, run_batch
from tests.parity.test_layouts import (
    BATCHES,
    CP,
    PP,
    SP,
    TP,
    VOCAB_SIZE,
    Layout,
    Rows,
    example_of,
    largest_difference,
)
from tests.parity.test_layouts import load as load_model
from tests.tiny_models import build_hf_model

TOLERANCE = 1e-4
MODELS = ("mixtral", "qwen3_moe", "qwen3_moe_raw_topk")
EP = {"expert_model_parallel_size": 2}
EP4 = {"expert_model_parallel_size": 4}
LAYOUTS: dict[int, dict[str, Layout]] = {
    1: {"one rank": {}},
    2: {"TP": TP, "TP SP": TP | SP, "PP": PP, "DP": {}, "EP": EP, "CP EP": CP | EP},
    4: {
        "EP TP": EP | TP,
        "EP TP SP": EP | TP | SP,
        "EP PP": EP | PP,
        "EP CP": EP | CP,
        "EP4": EP4,
        "EP4 CP": EP4 | CP,
    },
}


@torch.inference_mode()
def run(path: str, layout: Layout, packed: bool) -> Rows:
    """Logits at this rank's positions. The first replica has three batches, the last one, those between only filler."""
    model, groups, multiple_of = load_model(path, layout)
    last = groups.data_rank == groups.data_size - 1
    mine = (BATCHES[:3] if groups.data_rank == 0 else []) + (
        BATCHES[3:] if last else []
    )
    form = pack if packed else collate
    rows: Rows = {}
    for number in range(3 if groups.lockstep_lanes > 1 else len(mine)):
        is_filler = number >= len(mine)
        batch = (
            form([] if packed else [None], 0, multiple_of)
            if is_filler
            else form(mine[number], 0, multiple_of)
        )
        hidden = run_batch(model, batch, groups)
        if hidden is None or is_filler:
            continue
        local, whole = loss_positions(batch, groups)
        logits = (
            hidden_at(hidden, local, len(batch.tokens_BS), model)
            @ output_weight(model).T
        )
        parts = [torch.empty_like(logits) for _ in range(groups.tensor_size)]
        torch.distributed.all_gather(parts, logits, group=groups.tensor)
        for position, row in zip(
            whole.tolist(), torch.cat(parts, -1)[:, :VOCAB_SIZE], strict=True
        ):
            index, offset = example_of(batch, position)
            rows.setdefault(index, {})[offset] = row
    return rows if groups.tensor_rank == 0 else {}


def run_all(
    paths: dict[str, str], layouts: dict[str, Layout]
) -> dict[tuple[str, str, bool], Rows]:
    return {
        (name, model, packed): run(path, layout, packed)
        for name, layout in layouts.items()
        for model, path in paths.items()
        for packed in (False, True)
        if not (packed and "context_parallel_size" in layout)
    }


def resave(path: str, output: str, layout: Layout) -> None:
    model, groups, _ = load_model(path, layout)
    with open_pretrained(path) as source:
        ModelExport(model, source, groups).save_nemo(output)


def stand(layout: Layout) -> tuple[list[int], int, int]:
    """(global ranks that step together with this one, number of replicas among them, this rank's replica)."""
    groups = initialize_model_parallel(ModelConfig(**layout), 1)  # type: ignore[arg-type]
    return (
        torch.distributed.get_process_group_ranks(groups.lockstep),
        groups.lockstep_lanes,
        groups.lane,
    )


def convert_in_rank(source: str, target: str) -> None:
    convert(ConvertCheckpointConfig(input_path=source, output_path=target))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folders = {}
    for name in MODELS:
        folders[name] = str(tmp_path_factory.mktemp(name) / "hf")
        build_hf_model(name, VOCAB_SIZE).save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def reference(models) -> dict[str, dict[int, torch.Tensor]]:
    found = {}
    for name, path in models.items():
        hf = AutoModelForCausalLM.from_pretrained(path)
        with torch.no_grad():
            found[name] = {
                example.index: hf(torch.from_numpy(example.tokens_S)[None]).logits[0]
                for batch in BATCHES
                for example in batch
            }
    return found


@pytest.mark.parametrize("world_size", list(LAYOUTS))
def test_every_layout_matches_transformers(ranks, models, reference, world_size):
    results = ranks(world_size).run(run_all, models, LAYOUTS[world_size])
    for case in results[0]:
        difference = largest_difference(
            [result[case] for result in results], reference[case[1]]
        )
        assert difference < TOLERANCE, (case, difference)
    assert len({case[0] for case in results[0]}) == len(LAYOUTS[world_size])


def test_the_comparison_notices_other_weights_of_the_experts(
    ranks, models, reference, tmp_path
):
    for name, changed in (
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("mixtral", {"num_experts_per_tok": 3}),
    ):
        build_hf_model(name, VOCAB_SIZE, **changed).save_pretrained(tmp_path / name)
        results = ranks(1).run(run, str(tmp_path / name), {}, True)
        assert largest_difference(results, reference[name]) > 100 * TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_archives_written_and_read_with_experts_apart(
    ranks, models, reference, tmp_path, name
):
    archive, back = str(tmp_path / "model.nemo"), tmp_path / "back"
    ranks(4).run(resave, models[name], archive, EP | TP)
    for world_size, layout in ((1, {}), (2, EP), (2, TP), (4, EP | PP)):
        results = ranks(world_size).run(run, archive, layout, True)
        assert largest_difference(results, reference[name]) < TOLERANCE, layout
    ranks(1).run(convert_in_rank, archive, str(back))
    before, after = (
        load_file(f"{models[name]}/model.safetensors"),
        load_file(back / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_ranks_that_step_together(ranks):
    for layout, expected in (
        ({}, [([0], 1, 0), ([1], 1, 0), ([2], 1, 0), ([3], 1, 0)]),
        (EP, [([0, 1], 2, 0), ([0, 1], 2, 1), ([2, 3], 2, 0), ([2, 3], 2, 1)]),
        (EP | CP, [([0, 1], 1, 0), ([0, 1], 1, 0), ([2, 3], 1, 0), ([2, 3], 1, 0)]),
        (
            EP | TP,
            [
                ([0, 1, 2, 3], 2, 0),
                ([0, 1, 2, 3], 2, 0),
                ([0, 1, 2, 3], 2, 1),
                ([0, 1, 2, 3], 2, 1),
            ],
        ),
        (
            EP | PP,
            [
                ([0, 1, 2, 3], 2, 0),
                ([0, 1, 2, 3], 2, 1),
                ([0, 1, 2, 3], 2, 0),
                ([0, 1, 2, 3], 2, 1),
            ],
        ),
    ):
        assert ranks(4).run(stand, layout) == expected, layout


def test_layouts_that_do_not_fit_are_refused(models):
    with open_pretrained(models["qwen3_moe"]) as source:
        architecture = source.architecture
    message = r"model.expert_model_parallel_size: 3 does not divide the model's 8 experts a layer"
    with pytest.raises(ConfigError, match=message):
        check_layout(architecture, ModelConfig(expert_model_parallel_size=3))
    with pytest.raises(
        ConfigError, match="does not divide the model's 0 experts a layer"
    ):
        check_layout(replace(architecture, num_moe_experts=None), ModelConfig(**EP))
    with pytest.raises(
        ConfigError,
        match=r"expert_model_parallel_size: 2 does not divide the 1 ranks of data and context",
    ):
        ModelConfig(**EP, **TP).data_parallel_size(2)
