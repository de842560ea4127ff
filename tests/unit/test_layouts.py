"""Layouts that cannot be, packed batches, and which columns a context-parallel rank holds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from nemo_kd.batch import Example, context_positions
from nemo_kd.config import ConfigError
from nemo_kd.config.shared import (
    GPTArchitecture,
    ModelConfig,
    ParallelConfig,
    check_layout,
    check_training_layout,
    length_multiple,
)
from nemo_kd.config.student import StudentModelConfig
from nemo_kd.data.batches import collate, pack
from nemo_kd.mcore.model import transformer_config

ARCHITECTURE = GPTArchitecture("llama", 100, 6, 64, 96, 8, 4, 8, 512, 1e-5, 1e4)


def example(index: int, length: int) -> Example:
    tokens = np.arange(100 * index, 100 * index + length + 1)
    return Example(index, tokens[:-1], tokens[1:], np.ones(length, dtype=np.float32))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"context_parallel_size": 0},
            r"model.context_parallel_size: 0 must be at least 1",
        ),
        (
            {"expert_model_parallel_size": -1},
            r"model.expert_model_parallel_size: -1 must be at least 1",
        ),
        (
            {"tensor_model_parallel_size": 3},
            r"^model.tensor_model_parallel_size x model.pipeline_model_parallel_size x model.context_parallel_size: 3 x 1 x 1 = 3 does not divide the 4 ranks \(tr",
        ),
        (
            {"tensor_model_parallel_size": 2, "context_parallel_size": 3},
            r"^model.tensor_model_parallel_size x model.pipeline_model_parallel_size x model.context_parallel_size: 2 x 1 x 3 = 6 does not divide the 4 ranks",
        ),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**sizes).data_parallel_size(4)


def test_replicas_are_what_the_sizes_leave():
    parallel = ParallelConfig(2, 3, 4)
    assert (parallel.data_parallel_size(24), parallel.data_parallel_size(48)) == (1, 2)
    assert ParallelConfig().data_parallel_size(5) == 5


def test_sizes_that_do_not_cut_the_model_are_refused():
    check_layout(ARCHITECTURE, ParallelConfig(4, 3))
    with pytest.raises(
        ConfigError,
        match=r"virtual_pipeline_model_parallel_size: 4 does not divide the model's num_layers \(6\)",
    ):
        check_layout(ARCHITECTURE, ParallelConfig(pipeline_model_parallel_size=4))
    with pytest.raises(
        ConfigError,
        match=r"model.tensor_model_parallel_size: 8 .* the model's num_query_groups \(4\)",
    ):
        check_layout(ARCHITECTURE, ParallelConfig(tensor_model_parallel_size=8))


def test_what_students_cannot_have_is_refused():
    StudentModelConfig(
        virtual_pipeline_model_parallel_size=1,
        pipeline_model_parallel_size=2,
        sequence_parallel=True,
    )
    with pytest.raises(
        ConfigError,
        match=r"model.virtual_pipeline_model_parallel_size: 2 with .* interleaves nothing",
    ):
        StudentModelConfig(virtual_pipeline_model_parallel_size=2)
    with pytest.raises(
        ConfigError,
        match=r"model.virtual_pipeline_model_parallel_size: 0 must be at least 1",
    ):
        StudentModelConfig(virtual_pipeline_model_parallel_size=0)
    interleaved = StudentModelConfig(
        virtual_pipeline_model_parallel_size=2, pipeline_model_parallel_size=2
    )
    with pytest.raises(
        ConfigError,
        match=r"_parallel_size: 4 does not divide the model's num_layers \(6\)",
    ):
        check_layout(ARCHITECTURE, interleaved)
    experts = replace(ARCHITECTURE, num_moe_experts=4, moe_router_topk=2)
    check_training_layout(experts, ParallelConfig(2, sequence_parallel=True))
    check_training_layout(ARCHITECTURE, ParallelConfig(2))
    with pytest.raises(
        ConfigError,
        match=r"model.sequence_parallel: False with model.tensor_model_parallel_size=2, but",
    ):
        check_training_layout(experts, ParallelConfig(2))
    with pytest.raises(
        ConfigError, match=r"pipeline_model_parallel_size: 4 does not divide"
    ):
        check_training_layout(experts, ParallelConfig(pipeline_model_parallel_size=4))


def test_recomputation_is_complete_or_refused():
    full = StudentModelConfig(activations_checkpoint_granularity="full")
    assert (
        full.activations_checkpoint_method,
        full.activations_checkpoint_num_layers,
    ) == (
        "uniform",
        1,
    )
    selective = {
        "activations_checkpoint_granularity": "selective",
        "activations_checkpoint_method": "block",
    }
    assert StudentModelConfig(**selective).activations_checkpoint_method is None
    for name, value, message in (
        ("granularity", "some", "'some' is not one of full, selective"),
        ("method", "some", "'some' is not one of uniform, block"),
        ("num_layers", 0, "0 must be at least 1"),
    ):
        with pytest.raises(
            ConfigError, match=f"model.activations_checkpoint_{name}: {message}"
        ):
            StudentModelConfig(**{f"activations_checkpoint_{name}": value})


def test_a_context_parallel_rank_holds_its_columns_of_every_field():
    rows = [example(3, 7), example(1, 16)]
    whole = collate(rows, 0, 8)
    assert whole.loss_positions_N.tolist() == [*range(7), *range(16, 32)]
    for rank in range(2):
        columns = context_positions(16, rank, 2)
        part = whole.context_part(rank, 2)
        assert torch.equal(part.position_ids_BS[1], columns)
        assert torch.equal(part.labels_BS, whole.labels_BS[:, columns])
        assert part.loss_positions_N.tolist() == [
            s for s in range(4) if columns[s] < 7
        ] + [*range(8, 16)]


def test_the_length_multiple_of_layouts():
    assert length_multiple(ParallelConfig(4, 2)) == 1
    assert length_multiple(ParallelConfig(4, 2), 16) == 16
    assert length_multiple(ParallelConfig(4, sequence_parallel=True), 16) == 64
    assert length_multiple(ParallelConfig(context_parallel_size=3), 16) == 48
    assert length_multiple(ParallelConfig(4, sequence_parallel=True)) == 4
    assert length_multiple(ParallelConfig(context_parallel_size=3)) == 6
    assert (
        length_multiple(
            ParallelConfig(4, context_parallel_size=2, sequence_parallel=True)
        )
        == 8
    )
    assert (
        length_multiple(
            ParallelConfig(3, context_parallel_size=2, sequence_parallel=True)
        )
        == 12
    )


def test_sequence_parallelism_alone_is_nothing():
    assert not transformer_config(
        ARCHITECTURE, ModelConfig(sequence_parallel=True), torch.float32
    ).sequence_parallel


def test_packed_examples_lie_end_to_end():
    batch = pack(
        [example(3, 4), example(1, 2), example(2, 5)], pad_id=7, multiple_of=4
    )
    assert batch.indices_B.tolist() == [3, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 4, 6, 11, 12]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.tokens_BS.tolist() == [
        [300, 301, 302, 303, 100, 101, 200, 201, 202, 203, 204, 7]
    ]
    assert batch.labels_BS.tolist() == [
        [301, 302, 303, 304, 101, 102, 201, 202, 203, 204, 205, 7]
    ]
    assert batch.loss_mask_BS.tolist() == [[1.0] * 11 + [0.0]]
    assert batch.position_ids_BS.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4, 0]]
    moved = batch.to("meta")
    assert (moved.tokens_BS.device.type, moved.cu_seqlens.device.type) == (
        "meta",
        "cpu",
    )


def test_packing_without_filler_and_without_examples():
    assert pack(
        [example(3, 4), example(1, 2)], pad_id=7, multiple_of=3
    ).cu_seqlens.tolist() == [
        0,
        4,
        6,
    ]
    nothing = pack([], pad_id=7, multiple_of=2)
    assert nothing.tokens_BS.tolist() == [[7, 7]]
    assert nothing.cu_seqlens.tolist() == [0, 2]
    assert nothing.loss_mask_BS.sum() == 0


@pytest.mark.parametrize("size", [1, 2, 3])
def test_context_parallel_ranks_share_the_columns_evenly(size):
    columns = [context_positions(12, rank, size) for rank in range(size)]
    assert sorted(torch.cat(columns).tolist()) == list(range(12))
    # What a rank computes is the number of keys its queries see.
    assert len({int((part + 1).sum()) for part in columns}) == 1


def test_context_parallel_ranks_hold_megatrons_chunks():
    assert context_positions(8, 0, 2).tolist() == [0, 1, 6, 7]
    assert context_positions(8, 1, 2).tolist() == [2, 3, 4, 5]
