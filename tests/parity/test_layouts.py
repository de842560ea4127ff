"""Every Megatron layout against transformers: the same logits from any cut of model, sequence and batch."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_kd import batch as batch_module
from nemo_kd.batch import Batch, Example
from nemo_kd.config.convert import ConvertCheckpointConfig
from nemo_kd.config.shared import ModelConfig, length_multiple
from nemo_kd.convert import convert
from nemo_kd.data.batches import collate, pack
from nemo_kd.mcore import model, schedule
from nemo_kd.mcore.checkpoint import open_pretrained
from nemo_kd.mcore.groups import initialize_model_parallel
from nemo_kd.mcore.model import (
    build_gpt_model,
    hidden_at,
    output_weight,
    project,
    transformer_config,
)
from nemo_kd.mcore.schedule import loss_positions, run_batch
from tests.tiny_models import build_hf_model

TOLERANCE = 1e-4
VOCAB_SIZE = 157
NUM_LAYERS = 4
MODELS = {
    "llama3.1": ("llama3.1", {}),
    "mistral_window": ("mistral_window", {}),
    "qwen3": ("qwen3", {}),
    "qwen2_tied": ("qwen2_tied", {}),
    # Only the last layer has a window: wrong if a pipeline stage counts its layers from 0.
    "qwen3_last_window": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": NUM_LAYERS - 1,
        },
    ),
}
LENGTHS = ((1, 7, 40, 129), (200,), (33, 2, 64), (5,))
"""Examples of each batch: shapes change from batch to batch, one is beyond the original length of Llama 3's rope."""

Layout = dict[str, int | bool]
TP, PP, CP = (
    {f"{name}_parallel_size": 2}
    for name in ("tensor_model", "pipeline_model", "context")
)
SP = {"sequence_parallel": True}
LAYOUTS: dict[int, dict[str, Layout]] = {
    1: {"one rank": {}, "SP without TP": SP},
    2: {"TP": TP, "TP SP": TP | SP, "PP": PP, "CP": CP, "DP": {}},
    4: {
        "PP TP": PP | TP,
        "PP TP SP": PP | TP | SP,
        "CP TP": CP | TP,
        "CP TP SP": CP | TP | SP,
        "PP CP": PP | CP,
        "PP4": {"pipeline_model_parallel_size": 4},
        "CP4": {"context_parallel_size": 4},
        "PP DP": PP,
        "CP DP": CP,
    },
}


def examples(lengths: tuple[int, ...], first_index: int) -> list[Example]:
    made = []
    for index, length in enumerate(lengths, start=first_index):
        generator = np.random.default_rng(index)
        tokens = generator.integers(3, VOCAB_SIZE, length + 1)
        mask = (generator.random(length) < 0.6).astype(np.float32)
        mask[-1] = 1.0
        made.append(Example(index, tokens[:-1], tokens[1:], mask))
    return made


BATCHES = [examples(lengths, 10 * number) for number, lengths in enumerate(LENGTHS)]

Rows = dict[int, dict[int, torch.Tensor]]
"""Logits by example and position."""


def load(path: str, layout: Layout, dtype: torch.dtype = torch.float32):
    config = ModelConfig(**layout, make_vocab_size_divisible_by=8)  # type: ignore[arg-type]
    groups = initialize_model_parallel(config, 1)
    with open_pretrained(path) as source:
        megatron = transformer_config(source.architecture, config, dtype)
        model = build_gpt_model(
            source.architecture, megatron, 8, transformer_engine=False
        ).eval()
        source.load_weights(model, groups)
    return model, groups, length_multiple(config)


def example_of(batch: Batch, position: int) -> tuple[int, int]:
    """(index of the example, position in it) of position b * S + s; index -1 in filler and padded rows."""
    row, column = divmod(position, batch.tokens_BS.shape[1])
    if batch.cu_seqlens is None:
        return int(batch.indices_B[row]), column
    sequence = int(torch.searchsorted(batch.cu_seqlens, column, right=True)) - 1
    indices = [*batch.indices_B.tolist(), -1]
    return indices[sequence], column - int(batch.cu_seqlens[sequence])


@torch.inference_mode()
def run(
    path: str,
    layout: Layout,
    packed: bool,
    every: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Rows:
    """What this rank's columns of this data-parallel rank's batches give, on the last stage; the vocabulary gathered."""
    model, groups, multiple_of = load(path, layout, dtype)
    rows: Rows = {}
    for number, batch_examples in enumerate(BATCHES):
        if number % groups.data_size != groups.data_rank:
            continue
        batch = (pack if packed else collate)(batch_examples, 0, multiple_of)
        hidden = run_batch(model, batch, groups)
        assert (hidden is not None) == groups.is_last_stage
        if hidden is None:
            continue
        mine, whole = loss_positions(batch, groups, every)
        logits = (
            hidden_at(hidden, mine, len(batch.tokens_BS), model)
            @ output_weight(model).T
        )
        assert torch.allclose(
            project(model, hidden).flatten(0, 1)[mine],
            logits,
            atol=1e-5 if dtype.itemsize > 2 else 0.1,
        )
        parts = [torch.empty_like(logits) for _ in range(groups.tensor_size)]
        torch.distributed.all_gather(parts, logits, group=groups.tensor)
        for position, row in zip(
            whole.tolist(), torch.cat(parts, -1)[:, :VOCAB_SIZE].float(), strict=True
        ):
            index, offset = example_of(batch, position)
            if index >= 0:  # no filler
                assert offset not in rows.setdefault(index, {})
                rows[index][offset] = row
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


def merged(results: list[Rows]) -> Rows:
    """The rows of all ranks together; no two ranks have the same one."""
    rows: Rows = {}
    for result in results:
        for index, found in result.items():
            assert not found.keys() & rows.setdefault(index, {}).keys()
            rows[index] |= found
    return rows


def largest_difference(
    results: list[Rows], expected: dict[int, torch.Tensor], every: bool = False
) -> float:
    """Of logits; that every loss-bearing position is there, and no other, is checked."""
    rows, largest = merged(results), 0.0
    for example in (example for batch in BATCHES for example in batch):
        found = rows[example.index]
        if every:
            assert set(range(example.num_tokens)) <= found.keys()
        else:
            assert sorted(found) == np.flatnonzero(example.loss_mask_S).tolist()
        for position in range(example.num_tokens):
            if position in found:
                largest = max(
                    largest,
                    (found[position] - expected[example.index][position])
                    .abs()
                    .max()
                    .item(),
                )
    return largest


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folders = {}
    for name, (base, changes) in MODELS.items():
        folder: Path = tmp_path_factory.mktemp(name.replace(".", "_")) / "hf"
        build_hf_model(
            base, VOCAB_SIZE, num_hidden_layers=NUM_LAYERS, **changes
        ).save_pretrained(folder)
        folders[name] = str(folder)
    return folders


@pytest.fixture(scope="module")
def reference(models) -> dict[str, dict[int, torch.Tensor]]:
    """Logits of every example by itself."""
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
    results = ranks(world_size).run(
        run_all, models, LAYOUTS[world_size], timeout_s=600
    )
    for case in results[0]:
        difference = largest_difference(
            [result[case] for result in results], reference[case[1]]
        )
        assert difference < TOLERANCE, (case, difference)
    assert len({case[0] for case in results[0]}) == len(LAYOUTS[world_size])


def test_every_position_of_the_examples(ranks, models, reference):
    for packed, layout in ((True, TP | SP), (False, CP)):
        results = ranks(2).run(run, models["qwen3"], layout, packed, True)
        assert largest_difference(results, reference["qwen3"], every=True) < TOLERANCE
        assert -1 not in merged(results)


def test_half_precision(ranks, models, reference):
    """bf16 has 8 bits: four layers of it stay within a few steps of the float32 logits, which reach about 3."""
    for layout, packed in ((PP, True), (TP | SP, True), (CP, False)):
        results = ranks(2).run(
            run, models["llama3.1"], layout, packed, False, torch.bfloat16
        )
        assert 1e-4 < largest_difference(results, reference["llama3.1"]) < 0.15


def test_archives_load_in_stages(ranks, models, reference, tmp_path):
    for name in ("qwen2_tied", "qwen3"):
        archive = str(tmp_path / f"{name}.nemo")
        ranks(1).run(
            convert,
            ConvertCheckpointConfig(input_path=models[name], output_path=archive),
        )
        results = ranks(4).run(run, archive, PP | TP, True)
        assert largest_difference(results, reference[name]) < TOLERANCE


def without_sequences(path: str) -> Rows:
    """Packed rows whose examples see those before them."""
    with mock.patch.object(model, "_packed_seq_params", return_value=None):
        return run(path, {}, True)


def in_one_piece(path: str) -> Rows:
    """Context-parallel ranks that take neighbouring columns, where Megatron's positions are those of two chunks."""

    def columns(num_positions: int, rank: int, size: int) -> torch.Tensor:
        return torch.arange(num_positions).chunk(size)[rank]

    with (
        mock.patch.object(batch_module, "context_positions", columns),
        mock.patch.object(schedule, "context_positions", columns),
    ):
        return run(path, CP, False)


def test_the_comparison_notices_mixed_up_positions(ranks, models, reference):
    for world_size, function in ((1, without_sequences), (2, in_one_piece)):
        results = ranks(world_size).run(function, models["llama3.1"])
        assert largest_difference(results, reference["llama3.1"]) > 100 * TOLERANCE
