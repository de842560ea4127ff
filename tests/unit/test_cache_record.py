"""One example as one line: any JSON library reads it, both codecs give back what they promise, damage is named."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import replace

import numpy as np
import pytest

from nemo_kd.batch import CachedExample, Example, TeacherRows
from nemo_kd.cache.layout import CacheError, lines_of
from nemo_kd.cache.packed_codec import (
    huffman,
    level_nats,
    levels,
    pack_bits,
    unhuffman,
    unpack_bits,
)
from nemo_kd.cache.record import decode, encode
from nemo_kd.cache.reduce import limited
from nemo_kd.config.data import CacheConfig
from tests.tiny_cache import everywhere, row, same


def logprobs(teacher: TeacherRows) -> np.ndarray:
    return teacher.topk_logits_PK - teacher.log_sum_exp_logits_P[:, None]


def in_order_of(
    original: CachedExample, ids_SK: np.ndarray, stored: np.ndarray
) -> CachedExample:
    """The row with its entries in the order of `ids_SK`: rounding may exchange neighbours, but never the likeliest token."""
    teacher, k = original.teacher, ids_SK.shape[1]
    logits, ids = (
        teacher.topk_logits_PK[:, :k].copy(),
        teacher.topk_token_ids_PK[:, :k].copy(),
    )
    for s in np.flatnonzero(stored):
        place = {token: number for number, token in enumerate(ids[s].tolist())}
        order = [place[token] for token in ids_SK[s].tolist() if token >= 0]
        assert order[0] == 0
        assert sorted(order) == list(range(len(order)))
        assert (np.diff(logits[s, order] - logits[s, 0]) < 0.51).all()
        logits[s, : len(order)], ids[s, : len(order)] = logits[s, order], ids[s, order]
    return replace(
        original,
        teacher=replace(teacher, topk_logits_PK=logits, topk_token_ids_PK=ids),
    )


def test_plain_json_reads_a_json_line_and_float32_survives():
    original = row(3)
    payload = json.loads(encode(original, "json"))
    assert {
        "index",
        "tokens",
        "labels",
        "loss_mask",
        "topk_logits",
        "topk_token_ids",
        "log_sum_exp_logits",
    } <= set(payload)
    assert payload["index"] == 3
    assert np.array_equal(
        np.array(payload["topk_logits"], dtype=np.float32),
        original.teacher.topk_logits_PK,
    )
    decoded = decode(encode(original, "json"), "x:1")
    assert same(decoded, original)
    np.testing.assert_allclose(
        decoded.teacher.tail_mass_PT, original.teacher.tail_mass_PT, atol=1e-7
    )
    assert np.array_equal(
        decoded.teacher.label_logprobs_P, original.teacher.label_logprobs_P
    )


def test_nemo_aligners_padded_lines_with_other_fields_are_read():
    original, padding = row(0), 3
    line = json.loads(encode(original, "json"))
    for name in ("hash", "tail_mass", "temperatures", "label_logprobs"):
        del line[name]
    for name, filler in (
        ("tokens", 2),
        ("labels", 2),
        ("loss_mask", 0.0),
        ("log_sum_exp_logits", 1.5),
    ):
        line[name] += [filler] * padding
    line["topk_logits"] += [[0.0, -1.0, -2.0, -3.0]] * padding
    line["topk_token_ids"] += [[1, 2, 3, 4]] * padding
    line |= {
        "contexts": [1, 2],
        "context_lengths": 2,
        "answers": [3],
        "metadata": {"id": 1},
    }
    decoded = decode(json.dumps(line).encode(), "x:1")
    assert same(decoded, original)
    np.testing.assert_allclose(
        decoded.teacher.tail_mass_PT, original.teacher.tail_mass_PT, atol=1e-6
    )
    assert decoded.teacher.label_logprobs_P is None
    del line["index"]
    assert decode(json.dumps(line).encode(), "x:1", index=8).example.index == 8


def test_logits_that_are_not_shifted_give_the_same_probabilities():
    original = row(0)
    line = json.loads(encode(original, "json"))
    line["topk_logits"] = [
        [value + 7.25 for value in position] for position in line["topk_logits"]
    ]
    line["log_sum_exp_logits"] = [value + 7.25 for value in line["log_sum_exp_logits"]]
    decoded = decode(json.dumps(line).encode(), "x:1")
    np.testing.assert_allclose(
        decoded.teacher.topk_logits_PK, original.teacher.topk_logits_PK, atol=1e-6
    )
    np.testing.assert_allclose(
        decoded.teacher.log_sum_exp_logits_P,
        original.teacher.log_sum_exp_logits_P,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": None}, "field tokens"),
        (
            {"labels": [1]},
            r"field labels: found \[1\] of shape \(1,\), expected integers of shape \(5,\)",
        ),
        (
            {"topk_logits": [[0.0, -2.0, -1.0, -3.0]] * 5},
            "expected the largest logit first",
        ),
        ({"topk_token_ids": [[1, 1, 2, 3]] * 5}, "distinct ids; position 0 has not"),
        (
            {"topk_token_ids": [[1, 2, 3]] * 5},
            r"shape \(5, 3\), expected integers of shape \(5, 4\)",
        ),
        (
            {"topk_logits": [[0.0], [0.0, -1.0], [0.0], [0.0], [0.0]]},
            r"expected numbers of shape \(5, None\)",
        ),
        ({"loss_mask": [0, 1, 2, 1, 1]}, "expected only 0 and 1"),
        ({"loss_mask": [0, 1, 1, 1, 1]}, "field hash: found"),
        ({"log_sum_exp_logits": [-5.0] * 5}, "the kept probabilities sum to"),
        ({"log_sum_exp_logits": [1e39] * 5}, r"found 1e\+39, expected numbers from"),
        (
            {"tokens": [1, 2, -3, 4, 5]},
            "found -3, expected integers from 0 to 2147483647",
        ),
        ({"tokens": [1, 2, 3, 4, 1 << 33]}, "expected integers from 0"),
        ({"tail_mass": [[0.1]]}, r"shape \(1, 1\)"),
        ({"index": -1}, "field index: found -1"),
    ],
)
def test_contradictions_in_a_json_line_are_named(change, message):
    line = {**json.loads(encode(row(0), "json")), **change}
    with pytest.raises(CacheError, match=message) as error:
        decode(json.dumps(line).encode(), "file.jsonl:7")
    assert str(error.value).startswith("file.jsonl:7: ")


@pytest.mark.parametrize(
    "values", [[1], [1, 1], list(range(1, 300)), [(1 << 24) - 1, 1, 1 << 23]]
)
def test_bit_fields_and_huffman_streams_come_back(values):
    values = np.array(values, dtype=np.uint32)
    widths = np.floor(np.log2(values)).astype(np.uint32)
    assert np.array_equal(unpack_bits(pack_bits(values, widths), widths), values)
    symbols = values.astype(np.uint8)
    assert np.array_equal(unhuffman(huffman(symbols), len(symbols)), symbols)
    with pytest.raises(ValueError, match="does not end"):
        unhuffman(huffman(symbols), len(symbols) - 1)


def test_levels_are_the_nearest_ones_and_the_error_follows_the_design():
    nats = level_nats(64, 8).astype(np.float64)
    assert (np.diff(nats) > 0).all()
    x = np.random.default_rng(0).uniform(0, 40, 100_000)
    error = np.abs(nats[levels(-x.astype(np.float32), 64, 8)] - x)
    step = np.where(x < 9.5, np.minimum(np.exp(x / 2) / 64, 1 / 8), 1 / 2)
    assert (error <= 0.55 * step + 1e-3).all()
    assert nats[
        levels(np.array([-1e9, 0.0, 1e-7], dtype=np.float32), 64, 8)
    ].tolist() == [
        nats[-1],
        0,
        0,
    ]


@pytest.mark.parametrize("length", [1, 2, 7, 700])
@pytest.mark.parametrize(
    "cache",
    [
        CacheConfig(),
        CacheConfig(min_probability=0),
        CacheConfig(top_p=0.7, min_k=2),
        CacheConfig(min_probability=0.99),
        CacheConfig(positions="all", min_probability=0.01),
    ],
    ids=["floor", "fixed k", "top-p", "one token", "all positions"],
)
def test_packed_rows_keep_ids_exactly_and_probabilities_closely(length, cache):
    original = row(5, length, k=20, cache=cache, temperatures=(1.0, 0.5, 2.0))
    line = json.loads(encode(original, "packed", cache.positions))
    assert set(line) == {
        "v",
        "index",
        "hash",
        "tokens",
        "labels",
        "loss_mask",
        "teacher",
    }
    decoded = decode(json.dumps(line).encode(), "x:1")
    assert len(decoded.teacher) == (
        length if cache.positions == "all" else decoded.example.num_loss_tokens
    )
    decoded = everywhere(decoded)
    assert np.array_equal(decoded.example.tokens_S, original.example.tokens_S)
    stored = (
        np.ones(length, bool)
        if cache.positions == "all"
        else original.example.loss_mask_S > 0
    )
    k = decoded.teacher.topk_token_ids_PK.shape[1]
    assert (original.teacher.topk_token_ids_PK[stored, k:] < 0).all()
    original = in_order_of(original, decoded.teacher.topk_token_ids_PK, stored)
    assert np.array_equal(
        decoded.teacher.topk_token_ids_PK[stored],
        original.teacher.topk_token_ids_PK[stored, :k],
    )
    assert (decoded.teacher.topk_logits_PK[stored, 0] == 0).all()
    assert (decoded.teacher.topk_token_ids_PK[~stored] == -1).all()
    assert (decoded.teacher.tail_mass_PT[~stored] == 1).all()
    assert decoded.teacher.temperatures == (1.0, 0.5, 2.0)
    used = decoded.teacher.topk_token_ids_PK >= 0
    expected, found = (
        logprobs(original.teacher)[:, :k][used],
        logprobs(decoded.teacher)[used],
    )
    assert np.abs(found - expected).max() < 0.3
    head = np.where(used, np.exp(logprobs(decoded.teacher)), 0).sum(1)
    np.testing.assert_allclose(
        (head + decoded.teacher.tail_mass_PT[:, 0])[stored], 1, atol=1e-6
    )
    odds = [
        np.log(np.clip(t, 1e-9, 1) / np.clip(1 - t, 1e-9, 1))
        for t in (original.teacher.tail_mass_PT, decoded.teacher.tail_mass_PT)
    ]
    clear = (
        (original.teacher.tail_mass_PT > 1e-6)
        & (original.teacher.tail_mass_PT < 1 - 1e-6)
        & stored[:, None]
    )
    assert (np.abs(odds[0] - odds[1])[clear] < 1 / 16 + 1e-3).all()
    assert (
        np.abs(decoded.teacher.label_logprobs_P - original.teacher.label_logprobs_P)[
            stored
        ]
        < 0.1 + 0.3 * (original.teacher.label_logprobs_P[stored] < -10)
    ).all()
    p = np.where(
        used, np.exp(logprobs(original.teacher)[:, :k].astype(np.float64)), 0
    )[stored]
    difference = np.where(used, logprobs(original.teacher)[:, :k], 0) - np.where(
        used, logprobs(decoded.teacher), 0
    )
    tail, found_tail = 1 - p.sum(1), decoded.teacher.tail_mass_PT[stored, 0]
    kl = (p * difference[stored]).sum(1) + np.where(
        tail > 1e-6, tail * np.log(tail / found_tail), 0
    )
    assert kl.max() < 1e-3


def dense_row(spread: float, num_positions: int = 300, k: int = 40) -> CachedExample:
    """A row in the loss everywhere, of dense logits with this standard deviation."""
    random = np.random.default_rng(7)
    logits = random.normal(size=(num_positions, 200)) * spread
    ids = np.argsort(-logits, axis=1)[:, :k]
    kept = np.take_along_axis(logits, ids, 1)
    log_sum_exp = np.log(np.exp(logits - kept[:, :1]).sum(1))
    kept = kept - kept[:, :1]
    tail = 1 - np.exp(kept - log_sum_exp[:, None]).sum(1)
    teacher = TeacherRows(np.arange(len(ids)), kept, ids, log_sum_exp, tail[:, None])
    tokens = random.integers(200, size=num_positions)
    return CachedExample(
        Example(0, tokens, tokens, np.ones(num_positions, np.float32)), teacher
    )


@pytest.mark.parametrize("spread", [0.3, 2.0, 6.0, 10.0])
def test_errors_stay_below_the_bound_of_the_format(spread):
    """docs/cache_format.md, section 4: step / 2 (likeliest: 3 / 2 steps) + 1/1024 + 1/16 + t / 16."""
    original = dense_row(spread)
    decoded = decode(encode(original, "packed"), "file:1")
    original = in_order_of(original, decoded.teacher.topk_token_ids_PK, np.arange(300))
    found, exact = (
        np.maximum(logprobs(one.teacher), -58) for one in (decoded, original)
    )
    nats = 0.25 - found
    step = np.where(nats > 10, 0.5, np.minimum(np.exp(nats / 2) / 64, 1 / 8))
    step[:, 0] *= 3
    shift = 1 / 16 + decoded.teacher.tail_mass_PT / 16
    assert (np.abs(found - exact) <= step / 2 + 1 / 1024 + shift + 1e-6).all()


def test_an_extreme_teacher_survives():
    """A certain teacher, logits of -10,000, k of the whole vocabulary, ids up to 2^24 - 2 and several hundred of them."""
    k = 400
    logits = (
        np.concatenate([[0.0], np.full(k - 1, -1e4)])[None]
        .repeat(2, 0)
        .astype(np.float32)
    )
    logits[1] = -np.arange(k, dtype=np.float32) / 100
    ids = (np.arange(2 * k).reshape(2, k) * 20_971).astype(np.int64)
    ids[1, -1] = (1 << 24) - 2
    log_sum_exp = np.log(np.exp(logits.astype(np.float64)).sum(1)).astype(np.float32)
    teacher = TeacherRows(
        np.arange(2), logits, ids, log_sum_exp, np.zeros((2, 1), dtype=np.float32)
    )
    original = CachedExample(
        Example(0, np.array([3, 4]), np.array([4, 5]), np.ones(2, dtype=np.float32)),
        teacher,
    )
    decoded = decode(encode(original, "packed"), "x:1").teacher
    assert np.array_equal(np.sort(decoded.topk_token_ids_PK), np.sort(ids))
    assert decoded.topk_token_ids_PK[:, 0].tolist() == ids[:, 0].tolist()
    assert np.isfinite(decoded.topk_logits_PK).all()
    np.testing.assert_allclose(
        np.exp(logprobs(decoded)), np.exp(logprobs(teacher)), atol=1e-3
    )
    assert decoded.label_logprobs_P is None


def test_tail_samples_come_back():
    original = row(1, 9, cache=CacheConfig())
    samples = np.sort(
        np.random.default_rng(0).integers(60, 120_000, size=(9, 4)), axis=1
    )
    samples[6] = -1
    samples[7] = 99
    original = replace(
        original, teacher=replace(original.teacher, tail_token_ids_PM=samples)
    )
    decoded = everywhere(decode(encode(original, "packed"), "x:1"))
    in_loss = original.example.loss_mask_S > 0
    assert np.array_equal(decoded.teacher.tail_token_ids_PM[in_loss], samples[in_loss])
    assert (decoded.teacher.tail_token_ids_PM[~in_loss] == -1).all()
    assert np.array_equal(
        decode(encode(row(1, 9), "json"), "x:1").teacher.topk_token_ids_PK,
        row(1, 9).teacher.topk_token_ids_PK,
    )


def test_positions_behind_the_last_loss_position_are_cut():
    original = row(2, 8)
    original.example.loss_mask_S[:] = [0, 0, 1, 0, 1, 0, 0, 0]
    for codec in ("packed", "json"):
        decoded = decode(encode(original, codec), "x:1")
        assert decoded.example.num_tokens == 5
        assert decoded.teacher.positions_P.tolist() == (
            [2, 4] if codec == "packed" else [*range(5)]
        )
        assert decoded.loss_rows().positions_P.tolist() == [2, 4]
    original.example.loss_mask_S[:] = 0
    assert decode(encode(original, "json"), "x:1").example.num_tokens == 1
    assert len(decode(encode(original, "packed"), "x:1").teacher) == 0


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.zst"])
def test_any_flipped_byte_is_noticed(name):
    """Every byte of a record that means something: a flip changes nothing that is read, or is refused."""
    original, lines = row(4, 12, cache=CacheConfig()), lines_of(name)
    raw, whole = (
        lines.write(encode(original, "packed")),
        decode(encode(original, "packed"), "x:1"),
    )
    unnoticed = 0
    for position in range(len(raw) - (name == "c.jsonl")):
        damaged = bytearray(raw)
        damaged[position] ^= 1 << (position % 7)
        try:
            found = decode(lines.read(bytes(damaged), "x:1"), "x:1")
        except CacheError:
            continue
        assert same(found, whole)
        unnoticed += 1
    # What is left: the digits of the index, which only the order in the file confirms.
    assert unnoticed <= 10


def test_a_damaged_packed_record_tells_what_is_wrong():
    line = json.loads(encode(row(0), "packed"))
    blob = bytearray(base64.b64decode(line["teacher"]))
    blob[len(blob) // 2] ^= 1
    for change, message in (
        (
            {"teacher": base64.b64encode(blob).decode()},
            "checksum of the teacher's blob is wrong",
        ),
        ({"teacher": "not base64!"}, "field teacher"),
        ({"teacher": None}, "field teacher"),
        ({"v": 2}, "found 2, but this version of nemo_kd reads records of version 1"),
        ({"tokens": [1, 2, 3, 4, 5]}, "field hash"),
    ):
        with pytest.raises(CacheError, match=message):
            decode(json.dumps({**line, **change}).encode(), "x:1")
    other = json.loads(encode(row(1, 9), "packed"))
    with pytest.raises(
        CacheError, match="the teacher's blob has 5 positions, the example 3"
    ):
        decode(json.dumps({**line, "teacher": other["teacher"]}).encode(), "x:1")


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, 2, "version 2 of the teacher's blob"),
        (1, 18, "with flags 18 is not read here"),
        (9, 9, "has 9 positions, the example 3"),
        (13, 200, "does not end after 200 symbols"),
    ],
)
def test_a_header_of_another_kind_is_refused_though_its_checksum_is_right(
    offset, value, message
):
    line = json.loads(encode(row(0), "packed"))
    blob = bytearray(base64.b64decode(line["teacher"]))[:-4]
    blob[offset] = value
    line["teacher"] = base64.b64encode(
        blob + zlib.crc32(blob).to_bytes(4, "little")
    ).decode()
    with pytest.raises(CacheError, match=message):
        decode(json.dumps(line).encode(), "x:1")


def test_the_json_codec_refuses_positions_that_keep_different_numbers():
    with pytest.raises(CacheError, match="positions keep different numbers of tokens"):
        encode(row(0, 9, k=20, cache=CacheConfig(min_probability=0.01)), "json")


def test_the_packed_codec_refuses_what_it_cannot_hold():
    original = row(0)
    for change, message in (
        (
            {"topk_token_ids_PK": original.teacher.topk_token_ids_PK + (1 << 24)},
            "a token id exceeds",
        ),
        ({"topk_token_ids_PK": np.full((5, 4), -1)}, "must keep 1 to"),
    ):
        with pytest.raises(CacheError, match=message):
            encode(
                replace(original, teacher=replace(original.teacher, **change)),
                "packed",
            )


def test_fewer_tokens_leave_their_mass_to_the_tail_at_every_temperature():
    temperatures = (1.0, 2.0)
    full, small = (
        row(3, 6, k=20, temperatures=temperatures),
        row(3, 6, k=5, temperatures=temperatures),
    )
    reduced = limited(full.teacher, top_k=5)
    assert np.array_equal(reduced.topk_token_ids_PK, small.teacher.topk_token_ids_PK)
    np.testing.assert_allclose(
        reduced.tail_mass_PT, small.teacher.tail_mass_PT, atol=1e-6
    )
    assert limited(full.teacher, top_k=20) is full.teacher
    outside = limited(full.teacher, vocab_size=10)
    assert outside.topk_token_ids_PK.max() < 10
    used = outside.topk_token_ids_PK >= 0
    assert (np.diff(used.astype(int), axis=1) <= 0).all()
    head = np.where(used, np.exp(logprobs(outside)), 0).sum(1)
    np.testing.assert_allclose(head + outside.tail_mass_PT[:, 0], 1, atol=1e-5)
    assert (outside.topk_logits_PK[used[:, 0], 0] == 0).all()
    nothing = limited(full.teacher, vocab_size=0)
    assert (nothing.topk_token_ids_PK == -1).all()
    assert (nothing.tail_mass_PT == 1).all()


def test_settings_that_keep_everything_do_so_although_sums_round_to_one():
    probabilities = np.array([[0.7, 0.3 + 1e-7, 1e-30, 1e-40]], dtype=np.float32)
    assert CacheConfig(min_probability=0).kept(probabilities).all()
    assert CacheConfig(min_probability=0, top_p=0.7).kept(probabilities).tolist() == [
        [True, False, False, False]
    ]
    assert CacheConfig(min_probability=0, top_p=0.9).kept(probabilities).tolist() == [
        [True, True, False, False]
    ]
