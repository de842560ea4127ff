"""Weights of tokens, and what is refused before a run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from nemo_kd.cache.reader import CacheReader
from nemo_kd.config import ConfigError
from nemo_kd.config.loss import LossConfig
from nemo_kd.config.student import StudentDataConfig, StudentModelConfig
from nemo_kd.data.batches import collate, pack
from nemo_kd.ops.distillation import distillation_loss
from nemo_kd.ops.vocab import VocabShard
from nemo_kd.student.data import find_mismatches
from nemo_kd.student.loss import StudentLoss
from nemo_kd.student.run_folder import differences
from nemo_kd.student.token_weights import token_weights, weight_sum
from tests.tiny_cache import row, write
from tests.tiny_tokenizer import train_tokenizer

ROWS = [row(0, 6), row(1, 9), row(2, 4)]
"""3, 5 and 2 tokens in the loss."""


@pytest.mark.parametrize("join", [collate, pack])
def test_weights_of_examples_and_micro_batches(join):
    batch = join(ROWS, 0, 4)
    counts_B = batch.loss_lengths_B
    found = {
        kind: token_weights(batch, counts_B, kind)
        for kind in ("token", "sample", "microbatch")
    }
    assert found["token"].tolist() == [1] * 10
    expected = [1 / 3] * 3 + [1 / 5] * 5 + [1 / 2] * 2
    np.testing.assert_array_equal(found["sample"], expected)
    np.testing.assert_array_equal(found["microbatch"], [1 / 10] * 10)
    for kind, weights_N in found.items():
        assert float(weights_N.sum()) == pytest.approx(weight_sum(counts_B, kind))
    for kind in found:
        assert weight_sum(counts_B * 0, kind) == 0


def test_the_kd_term_of_prompts_has_every_position():
    for batch in (collate(ROWS, 0, 4, distill_on_prompt=True), pack(ROWS, 0, 4, distill_on_prompt=True)):  # fmt: skip
        assert batch.kd_lengths_B.tolist() == [6, 9, 4]
        assert batch.loss_lengths_B.tolist() == [3, 5, 2]
        assert int(batch.loss_mask_BS.sum()) == 10
        positions = batch.loss_positions_N.tolist()
        assert batch.teacher.positions_P.tolist() == positions
        assert len(positions) == 19
    halves = [collate(ROWS, 0, 4, distill_on_prompt=True).context_part(rank, 2) for rank in (0, 1)]  # fmt: skip
    assert sum(len(half.loss_positions_N) for half in halves) == 19
    for half in halves:
        assert half.teacher.positions_P.tolist() == half.loss_positions_N.tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kd_loss_weight": 0.0, "sft_loss_weight": 1.0},
            "distill_on_prompt: True selects positions of the KD term, which kd_loss_weight=0 leaves out",
        ),
        ({"kd_loss": "custom", "custom_loss": "a.b"}, "which kd_loss=custom computes"),
    ],
)
def test_prompts_need_a_kd_term(settings, message):
    with pytest.raises(ConfigError) as error:
        LossConfig(distill_on_prompt=True, **settings)
    assert message in str(error.value)


def test_prompts_need_a_cache_of_all_positions(tmp_path):
    model = StudentModelConfig(knowledge_distillation=LossConfig(distill_on_prompt=True))  # fmt: skip
    found = {}
    for codec in ("json", "packed"):
        reader = CacheReader(str(write(tmp_path / codec, codec=codec)))
        tokenizer = train_tokenizer()
        found[codec] = [
            line
            for line in find_mismatches(reader, model, 300, tokenizer)
            if "distill_on_prompt" in line
        ]
    assert found["json"] == []
    assert found["packed"] == [
        "model.knowledge_distillation.distill_on_prompt: True, but the cache holds the teacher at positions of the loss "
        "only; compute it with cache.positions=all"
    ]
    with pytest.raises(ValueError, match="of its 4 positions have teacher"):
        collate([reader[1]], 0, distill_on_prompt=True)


@pytest.mark.parametrize(
    ("weights", "loss"),
    [
        ({"sft_weight": 2.0}, {}),
        ({"kd_weight": 2.0}, {"kd_loss_weight": 0.0, "sft_loss_weight": 1.0}),
        ({"kd_weight": 2.0}, {"kd_loss": "custom", "custom_loss": "a.b"}),
        (
            {"sft_weight": 2.0},
            {"kd_loss": "custom", "custom_loss": "a.b", "sft_loss_weight": 1.0},
        ),
    ],
)
def test_weights_of_paths_without_an_effect_are_refused(weights, loss):
    data = StudentDataConfig(data_prefix={"train": [{"path": "a", **weights}]})
    with pytest.raises(
        ConfigError, match="multiplies a term that the loss leaves out"
    ):
        StudentModelConfig(data=data, knowledge_distillation=LossConfig(**loss))


@pytest.mark.parametrize(
    ("weights", "loss"),
    [
        ({"kd_weight": 0.0}, {}),
        ({"sft_weight": 0.0}, {"kd_loss_weight": 0.0, "sft_loss_weight": 1.0}),
    ],
)
def test_a_path_that_trains_nothing_is_refused(weights, loss):
    data = StudentDataConfig(data_prefix={"train": [{"path": "a", **weights}]})
    with pytest.raises(ConfigError, match="of a path train nothing"):
        StudentModelConfig(data=data, knowledge_distillation=LossConfig(**loss))


def test_a_custom_loss_without_a_weight_is_refused():
    with pytest.raises(
        ConfigError, match="kd_loss: custom needs kd_loss_weight above 0"
    ):
        LossConfig(
            kd_loss="custom",
            custom_loss="a.b",
            kd_loss_weight=0.0,
            sft_loss_weight=1.0,
        )


@pytest.mark.parametrize("join", [collate, pack])
def test_an_example_without_loss_tokens_has_no_prompt_in_the_kd_term(join):
    empty = np.zeros_like(ROWS[1].example.loss_mask_S)
    unmasked = replace(ROWS[1], example=replace(ROWS[1].example, loss_mask_S=empty))
    batch = join([ROWS[0], unmasked], 0, distill_on_prompt=True)
    assert batch.kd_lengths_B.tolist() == [6, 0]
    assert batch.loss_positions_N.tolist() == [0, 1, 2, 3, 4, 5]


def test_the_loss_for_other_trainers_refuses_a_batch_of_prompts():
    batch = collate(ROWS, 0, distill_on_prompt=True)
    logits = torch.randn(*batch.tokens_BS.shape, 50)
    with pytest.raises(ValueError, match="positions outside the loss mask"):
        distillation_loss(logits, batch)


def test_a_run_does_not_resume_with_other_weights_of_paths():
    """An older checkpoint, which knows no such weights, resumes without them."""
    key = "model.data.data_prefix.train"
    plain, weighed = (
        {key: {"weights": StudentDataConfig(data_prefix={"train": train}).all_weights("train")}}
        for train in ([0.5, "a", 0.5, "b"], [{"path": "a", "weight": 0.5}, {"path": "b", "weight": 0.5, "kd_weight": 2}])
    )  # fmt: skip
    assert plain == {key: {"weights": [0.5, 0.5]}}
    assert differences(plain, plain) == {}
    assert list(differences(plain, weighed)) == [key]
    assert list(differences(weighed, plain)) == [key]


@pytest.mark.parametrize(
    "settings", [{"reduction": "sample"}, {"distill_on_prompt": True}]
)
def test_the_loss_for_other_trainers_refuses_them(settings):
    batch = collate(ROWS, 0)
    with pytest.raises(
        ValueError, match=f"{next(iter(settings))}: .*; only train_gpt"
    ):
        distillation_loss(batch.tokens_BS, batch, LossConfig(**settings))


def test_sft_reports_entropy_and_response_length():
    """Against torch's distributions, in float64."""
    data = StudentDataConfig(
        data_impl="dataset", data_prefix={"train": ["a"], "validation": ["b"]}
    )
    config = LossConfig(kd_loss_weight=0.0, sft_loss_weight=1.0)
    loss = StudentLoss(config, data)
    batch = pack([one.example for one in ROWS], 0)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    _, sums = loss.on_hidden(hidden, weight, batch, VocabShard.of(50, 50))
    found = loss.metrics("train", sums)
    logits = hidden @ weight.T
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert found["train/entropy"] == pytest.approx(float(entropy), rel=1e-12)
    assert found["train/response_length"] == pytest.approx(10 / 3)
    assert "train/kd_loss" not in found
