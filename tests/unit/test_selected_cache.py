"""Caches of selected positions: read, checked and converted, and refused where something does not know them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from nemo_kd.cache.layout import CacheError, CacheLayout
from nemo_kd.cache.manifest import codec_settings
from nemo_kd.cache.reader import CacheReader
from nemo_kd.cache.record import decode, encode
from nemo_kd.cache.segment import publish_segment
from nemo_kd.cache.writer import CacheWriter
from nemo_kd.config import ConfigError
from nemo_kd.config.data import CacheConfig
from nemo_kd.config.loss import LossConfig
from nemo_kd.config.student import StudentModelConfig
from nemo_kd.data.batches import collate, pack
from nemo_kd.ops.distillation import distillation_loss
from nemo_kd.student.data import find_mismatches
from nemo_kd.tools.inspect_cache import describe_cache, measure
from nemo_kd.tools.recode import convert
from nemo_kd.tools.verify import verify
from tests.tiny_cache import COMPUTED_WITH, chunks_of, manifest, row
from tests.tiny_tokenizer import train_tokenizer

SELECT = "top 50% by teacher_entropy"
CACHE = CacheConfig(select=SELECT)


def selected(index: int):
    """A row of 3 to 7 loss tokens, of which every other one has targets."""
    whole = row(index, 6 + 2 * (index % 5))
    positions = whole.example.loss_mask_S.nonzero()[0][::2]
    return replace(whole, teacher=whole.teacher.at(positions), is_selected=True)


def write(folder, cache=CACHE, **changes):
    """A whole cache of ten such rows."""
    codec = codec_settings(cache) | changes
    description = replace(manifest("packed"), codec=codec)
    layout = CacheLayout(str(folder / "train_CHUNK_ID.jsonl"))
    writer = CacheWriter(layout, description, chunks_of(description))
    for segment in writer.missing_segments():
        rows = [selected(index) for index in segment[1]]
        publish_segment(layout, description, segment, rows, COMPUTED_WITH)
    writer.assemble_complete()
    writer.close()
    return folder / "train_CHUNK_ID.jsonl"


def test_rows_come_back_with_their_positions(tmp_path):
    reader = CacheReader(str(write(tmp_path)))
    for index in range(10):
        found = reader[index]
        expected = selected(index)
        positions = expected.teacher.positions_P
        np.testing.assert_array_equal(found.teacher.positions_P, positions)
        ids = np.sort(found.teacher.topk_token_ids_PK)
        np.testing.assert_array_equal(ids, np.sort(expected.teacher.topk_token_ids_PK))
        assert found.is_selected
    assert [problem for one in verify(str(reader.path)) for problem in one.problems] == []  # fmt: skip
    report = describe_cache(reader, measure(reader, 10))
    loss_tokens = sum(row(index, 6 + 2 * (index % 5)).example.num_loss_tokens for index in range(10))  # fmt: skip
    targets = sum(len(selected(index).teacher) for index in range(10))
    assert f"{loss_tokens} in the loss, {targets} with teacher targets" in report.facts[2][0][1]  # fmt: skip
    assert SELECT in str(report.facts[0])
    total = [chunk for one in reader.manifests for chunk in one.chunks.values()]
    assert sum(chunk.target_tokens for chunk in total) == targets


@pytest.mark.parametrize("kd_loss", ["k1", "k2", "k3", "low_var_kl"])
def test_estimators_on_the_label_have_the_positions_with_targets(kd_loss):
    batch = collate([selected(index) for index in range(3)], 0)
    logprobs = torch.where(batch.in_kd_N, -1.0, 0.0).double()
    batch = replace(batch, teacher=replace(batch.teacher, label_logprobs_P=logprobs))
    of_kd = replace(batch, loss_positions_N=batch.loss_positions_N[batch.in_kd_N], in_kd_N=None, teacher=batch.teacher.at(batch.in_kd_N))  # fmt: skip
    logits = torch.randn(*batch.tokens_BS.shape, 50, dtype=torch.float64)
    config = LossConfig(kd_loss=kd_loss)
    found, expected = [
        distillation_loss(logits, one, config) for one in (batch, of_kd)
    ]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("join", [collate, pack])
def test_the_kd_term_has_the_positions_with_targets(join):
    rows = [selected(index) for index in range(3)]
    batch = join(rows, 0, 4)
    found = batch.loss_positions_N[batch.in_kd_N]
    assert len(found) == sum(len(one.teacher) for one in rows)
    assert torch.equal(batch.teacher.positions_P, batch.loss_positions_N)
    has_target_N = batch.teacher.topk_token_ids_PK[:, 0] >= 0
    assert torch.equal(has_target_N, batch.in_kd_N)
    logits = torch.randn(*batch.tokens_BS.shape, 50, dtype=torch.float64)
    config = LossConfig(sft_loss_weight=0.5)
    ce = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1)[batch.loss_positions_N],
        batch.labels_BS.flatten()[batch.loss_positions_N],
    )
    of_kd = replace(batch, loss_positions_N=found, in_kd_N=None, teacher=batch.teacher.at(batch.in_kd_N))  # fmt: skip
    kd = distillation_loss(logits, of_kd, LossConfig())
    total = distillation_loss(logits, batch, config)
    torch.testing.assert_close(total, 0.5 * ce + kd)
    with pytest.raises(ValueError, match="reduction: sum, but the cache holds"):
        distillation_loss(logits, batch, config, reduction="sum")


def test_missing_rows_stay_an_error_elsewhere(tmp_path):
    one = selected(1)
    with pytest.raises(ValueError, match="only 2 of its 4 positions in the loss"):
        collate([replace(one, is_selected=False)], 0)
    with pytest.raises(CacheError, match="a position must keep"):
        encode(one, "packed", "loss")
    path = write(tmp_path / "a", CacheConfig(), positions="selected")  # fmt: skip
    with pytest.raises(CacheError, match="no manifest says that the cache was selected"):  # fmt: skip
        CacheReader(str(path))[1]
    other = CacheConfig(select="top 10% by teacher_entropy")
    path = write(tmp_path / "b", other)
    problems = [problem for one in verify(str(path)) for problem in one.problems]
    assert "the manifest says top 10% by teacher_entropy, which is 1" in problems[0]


def test_one_bit_more_is_stored_for_each_loss_position():
    line = encode(selected(4), "packed", "selected")
    found = decode(line, "here:1")
    np.testing.assert_array_equal(
        found.teacher.positions_P, selected(4).teacher.positions_P
    )


def test_conversion_keeps_the_selection(tmp_path):
    reader = CacheReader(str(write(tmp_path)))
    target = tmp_path / "b_CHUNK_ID.jsonl.zst"
    convert(reader, str(target), CacheConfig(), top_k=2)
    found = CacheReader(str(target))
    assert found.select == SELECT
    assert len(found[4].teacher) == len(reader[4].teacher)
    assert [problem for one in verify(str(target)) for problem in one.problems] == []
    with pytest.raises(CacheError, match="which the json codec cannot express"):
        convert(reader, str(tmp_path / "c.jsonl"), CacheConfig(codec="json"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kd_loss": "custom", "custom_loss": "a.b"}, "which a custom loss cannot use"),
        ({"distill_on_prompt": True}, "compute it with cache.positions=all"),
    ],
)  # fmt: skip
def test_losses_that_need_all_positions_refuse_it(tmp_path, settings, message):
    reader = CacheReader(str(write(tmp_path)))
    model = StudentModelConfig(knowledge_distillation=LossConfig(**settings))
    found = find_mismatches(reader, model, 300, train_tokenizer())
    assert any(message in line for line in found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"select": "top 25% by student_entropy"}, "stage 1 has no student"),
        ({"select": "most"}, "'most' is not a selection"),
        ({"select": SELECT, "positions": "all"}, "cache.positions=all; use packed and loss"),
        ({"select": SELECT, "codec": "json"}, "cache.codec=json"),
    ],
)  # fmt: skip
def test_selections_that_stage_1_cannot_store_are_refused(settings, message):
    with pytest.raises(ConfigError) as error:
        CacheConfig(**settings)
    assert message in str(error.value)
