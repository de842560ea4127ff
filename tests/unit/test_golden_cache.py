"""Caches written once and for all: another reader, made from the document alone, reads them; today's writer writes them."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import zstandard

from nemo_kd.cache.index import ChunkIndex, scan_chunk
from nemo_kd.cache.layout import LocalStorage
from nemo_kd.cache.packed_codec import pack
from nemo_kd.cache.reader import CacheReader
from nemo_kd.cache.record import encode
from tests.golden import independent_reader, make
from tests.tiny_cache import everywhere, same_places

GOLDEN = Path(make.__file__).parent
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "cache_format.md"
ROWS = json.loads((GOLDEN / "rows.json").read_text())
ZLIB_NG = (
    "ng" in zlib.ZLIB_RUNTIME_VERSION
)  # which compresses to other bytes; they inflate alike


def lines(name):
    """The lines of both chunks, decompressed."""
    found = b""
    for chunk in "01":
        raw = (GOLDEN / name.replace("CHUNK_ID", chunk)).read_bytes()
        if name.endswith(".zst"):
            raw = (
                zstandard.ZstdDecompressor()
                .stream_reader(raw, read_across_frames=True)
                .read()
            )
        found += raw
    return found.splitlines(keepends=True)


def read_independently(name):
    paths = [GOLDEN / name.replace("CHUNK_ID", chunk) for chunk in "01"]
    return [found for path in paths for found in independent_reader.read(str(path))]


def streams(blob):
    """The header and the inflated streams, bit fields as they are."""
    num_t, num_streams = blob[4], int.from_bytes(blob[7:9], "little")
    lengths = struct.unpack_from(f"<{num_streams}I", blob, 17 + 4 * num_t)
    start, found = 17 + 4 * (num_t + num_streams), [blob[: 17 + 4 * num_t]]
    for length in lengths:
        try:
            found.append(zlib.decompress(blob[start : start + length], -15))
        except zlib.error:
            found.append(blob[start : start + length])
        start += length
    return found


def step(nats):
    """Between neighbouring levels, as the document states it."""
    return np.where(nats < 10, np.minimum(np.exp(nats / 2) / 64, 1 / 8), 1 / 2)


def test_the_independent_reader_is_small_and_independent():
    source = (GOLDEN / "independent_reader.py").read_text()
    assert len(source.splitlines()) <= 60
    imported = {
        alias.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert not any(
        isinstance(node, ast.ImportFrom) for node in ast.walk(ast.parse(source))
    )
    assert imported <= {*sys.stdlib_module_names, "zstandard"}


@pytest.mark.parametrize("name", make.CACHES)
def test_another_reader_finds_what_the_teacher_said(name):
    """Ids exactly, probabilities within the error that the document states, all of it before any rounding."""
    cache, found = make.CACHES[name], read_independently(name)
    assert [line["index"] for line, _ in found] == [
        fields["index"] for fields in ROWS[name]
    ]
    num_compared = 0
    for (line, positions), row in zip(found, ROWS[name], strict=True):
        length, mask = len(line["tokens"]), row["loss_mask"]
        last = max([s for s, counted in enumerate(mask) if counted], default=0)
        assert length == (last + 1 if name.startswith("loss") else len(mask))
        for field in ("tokens", "labels", "loss_mask"):
            assert line[field] == row[field][:length]
        for s, position in enumerate(positions):
            if name.startswith("loss") and not mask[s]:
                assert position is None
                continue
            compare(cache, row, s, position)
            num_compared += 1
    assert num_compared >= 8


def compare(cache, row, s, position):
    ids, logprobs, tails, label, samples = position
    assert sorted(ids) == sorted(row["topk_token_ids"][s])
    assert ids[0] == row["topk_token_ids"][s][0]
    assert list(samples) == (row["tail_token_ids"][s] if cache.tail_samples else [])
    logits = dict(zip(row["topk_token_ids"][s], row["topk_logits"][s], strict=True))
    nats = row["log_sum_exp_logits"][s] - np.array([logits[token] for token in ids])
    expected_tails = np.array(row["tail_mass"])[:, s]
    if cache.codec == "json":
        np.testing.assert_allclose(logprobs, -nats, rtol=0, atol=1e-12)
        assert list(tails) == expected_tails.tolist()
        assert label == row["label_logprobs"][s]
        return
    shift = 1 / 16 + expected_tails[0] / 16
    half_steps = np.where(
        np.arange(len(ids)) == 0, 3, 1
    )  # the likeliest token may have given way to the next
    assert (
        np.abs(-nats - logprobs) <= half_steps * step(nats) / 2 + 1e-3 + shift
    ).all()
    assert (np.diff(logprobs) <= 0).all()
    odds = [np.log(tail / (1 - tail)) for tail in (expected_tails, np.array(tails))]
    assert (np.abs(odds[0] - odds[1]) <= 1 / 16 + 1e-5).all()
    expected_label = -row["label_logprobs"][s]
    assert abs(expected_label + label) <= step(expected_label) * 1.5 + 1e-3 + shift * (
        row["labels"][s] in ids
    )
    assert sum(np.exp(logprobs)) + tails[0] == pytest.approx(1, abs=1e-9)
    p = np.exp(-nats)
    kl = (p * (-nats - logprobs)).sum() + expected_tails[0] * np.log(
        expected_tails[0] / tails[0]
    )
    assert -1e-6 < kl < 1e-3


@pytest.mark.parametrize("name", make.CACHES)
def test_both_readers_agree(name):
    reader = CacheReader(str(GOLDEN / name))
    found = read_independently(name)
    assert len(reader) == len(found) == 5
    for number, (line, positions) in enumerate(found):
        example, teacher = reader[number].example, everywhere(reader[number]).teacher
        assert example.index == line["index"]
        length = example.num_tokens
        assert example.tokens_S.tolist() == line["tokens"][:length]
        assert not any(line["loss_mask"][length:])
        for s, position in enumerate(positions[:length]):
            if position is None:
                assert (teacher.topk_token_ids_PK[s] == -1).all()
                assert (teacher.tail_mass_PT[s] == 1).all()
                continue
            ids, logprobs, tails, label, samples = position
            assert teacher.topk_token_ids_PK[s, : len(ids)].tolist() == ids
            assert (teacher.topk_token_ids_PK[s, len(ids) :] == -1).all()
            ours = (
                teacher.topk_logits_PK[s, : len(ids)].astype(np.float64)
                - teacher.log_sum_exp_logits_P[s]
            )
            np.testing.assert_allclose(
                np.exp(ours), np.exp(logprobs), rtol=0, atol=1e-6
            )
            np.testing.assert_allclose(ours, logprobs, rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(teacher.tail_mass_PT[s], tails, rtol=1e-6)
            assert teacher.label_logprobs_P[s] == pytest.approx(
                label, rel=1e-6, abs=1e-6
            )
            if samples:
                assert teacher.tail_token_ids_PM[s].tolist() == list(samples)


@pytest.mark.parametrize("name", make.CACHES)
def test_todays_writer_writes_the_golden_lines(name):
    cache = make.CACHES[name]
    for golden, row in zip(lines(name), ROWS[name], strict=True):
        written = encode(make.from_json(row), cache.codec, cache.positions)
        if cache.codec == "packed":
            ours, theirs = json.loads(written), json.loads(golden)
            blobs = [base64.b64decode(line.pop("teacher")) for line in (ours, theirs)]
            assert ours == theirs
            assert streams(blobs[0]) == streams(blobs[1])
        assert written == golden or (cache.codec == "packed" and ZLIB_NG)


@pytest.mark.parametrize("name", make.CACHES)
def test_index_and_manifest_say_what_the_document_says(name):
    manifest = json.loads(
        (GOLDEN / f"{name.split('CHUNK_ID')[0]}manifest.json").read_bytes()
    )
    assert manifest["format_version"] == 2
    for chunk, summary in manifest["chunks"].items():
        path = GOLDEN / name.replace("CHUNK_ID", chunk)
        raw, index = path.read_bytes(), Path(f"{path}.idx").read_bytes()
        magic, digest, *numbers, n = struct.unpack_from("<8s32s8q", index)
        offsets, counts = (
            struct.unpack_from(f"<{n + 1}q", index, 104),
            struct.unpack_from(f"<{n}q", index, 112 + 8 * n),
        )
        assert len(index) == 116 + 16 * n
        assert zlib.crc32(index[:-4]) == int.from_bytes(index[-4:], "little")
        found = independent_reader.read(str(path))
        lengths = [
            max([s for s, x in enumerate(line["loss_mask"]) if x], default=0) + 1
            for line, _ in found
        ]
        tokens, topk, ks = [], [], []
        for (line, positions), length in zip(found, lengths, strict=True):
            tokens += line["tokens"][:length] + line["labels"][:length]
            kept = [position[0] for position in positions[:length] if position]
            topk += sum(kept, []) + sum(
                (list(position[4]) for position in positions[:length] if position), []
            )
            ks.append(max(map(len, kept), default=0))
        facts = [len(raw), 0, max(tokens), max(topk), min(ks), max(ks), max(lengths)]
        assert (magic, digest, numbers, n) == (
            b"NKDIDX02",
            hashlib.sha256(raw).digest(),
            facts,
            len(found),
        )
        assert list(counts) == lengths
        assert (offsets[0], offsets[-1]) == (0, len(raw))
        for (line, _), start, end in zip(
            found, offsets[:-1], offsets[1:], strict=True
        ):
            part = raw[start:end]
            assert (
                json.loads(
                    zstandard.decompress(part) if name.endswith(".zst") else part
                )
                == line
            )
        scanned = scan_chunk(LocalStorage(str(GOLDEN)), path.name)
        assert same_places(scanned, ChunkIndex.parse(index))
        masks = [line["loss_mask"] for line, _ in found]
        assert (summary["bytes"], summary["sha256"]) == (
            len(raw),
            f"sha256:{digest.hex()}",
        )
        assert (summary["examples"], summary["loss_tokens"]) == (
            n,
            sum(map(sum, masks)),
        )
        indices = [line["index"] for line, _ in found]
        assert (
            summary["first_index"] <= indices[0] < indices[-1] <= summary["last_index"]
        )
        assert (
            sum(summary["skipped"].values())
            == summary["last_index"] + 1 - summary["first_index"] - n
        )


def test_the_documents_worked_example_is_what_is_written():
    text = DOCUMENT.read_text()
    line = re.search(r"```json\n(\{\"v\":1,.*?\})\n```", text)[1]
    assert encode(make.tiny_row(), "packed").decode() == line + "\n" or ZLIB_NG
    rows = re.findall(r"^\| `((?:[0-9a-f]{2} ?)+)` \|", text, re.MULTILINE)
    blob = bytes.fromhex("".join(rows))
    assert blob == base64.b64decode(json.loads(line)["teacher"])
    assert streams(blob) == streams(pack(make.tiny_row()))
    positions = independent_reader.positions(json.loads(line))
    said = re.findall(
        r"^\| position (\d) \| ([\d, ]+) \| ([-\d., ]+) \| ([\d.]+) \| (-[\d.]+) \|",
        text,
        re.MULTILINE,
    )
    assert [int(number) for number, *_ in said] == [
        s for s, position in enumerate(positions) if position
    ]
    for number, ids, logprobs, tail, label in said:
        found = positions[int(number)]
        assert [int(token) for token in ids.split(", ")] == found[0]
        np.testing.assert_allclose(
            [float(x) for x in logprobs.split(", ")], found[1], atol=5e-5
        )
        np.testing.assert_allclose(
            [float(tail), float(label)], [found[2][0], found[3]], atol=5e-5
        )
