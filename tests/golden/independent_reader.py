"""Reads a logit cache by docs/cache_format.md alone: the standard library and zstandard, nothing of nemo_kd."""

import base64
import hashlib
import json
import math
import struct
import zlib
from pathlib import Path

import zstandard


def read(path):
    """[(line's fields, per position None or (ids, log-probabilities, tail masses, label's, samples))] of a chunk."""
    raw = Path(path).read_bytes()
    if str(path).endswith(".zst"):
        raw = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True).read()
    return [(line, positions(line)) for line in map(json.loads, raw.splitlines())]


def positions(line):
    tokens, labels, mask = line["tokens"], line["labels"], line["loss_mask"]
    hashed = struct.pack(f"<{2 * len(tokens)}i", *tokens, *labels) + bytes(mask)
    assert line["hash"] == hashlib.sha256(hashed).hexdigest()[:16]
    if "v" not in line:
        logprobs = [[x - lse for x in row] for row, lse in zip(line["topk_logits"], line["log_sum_exp_logits"])]
        samples = line.get("tail_token_ids", [[]] * len(tokens))
        return list(zip(line["topk_token_ids"], logprobs, zip(*line["tail_mass"]), line["label_logprobs"], samples))
    assert line["v"] == 1
    blob = base64.b64decode(line["teacher"], validate=True)
    assert zlib.crc32(blob[:-4]) == struct.unpack("<I", blob[-4:])[0]
    version, flags, fine, coarse, num_t, num_m, num_streams, num_p, num_n = struct.unpack_from("<BBBBBBHII", blob)
    assert version == 1 and flags < 8 and struct.unpack_from("<f", blob, 16)[0] == 1
    streams, at = [], 16 + 4 * (num_t + num_streams)
    for length in struct.unpack_from(f"<{num_streams}I", blob, 16 + 4 * num_t):
        streams, at = [*streams, blob[at : at + length]], at + length
    take = iter(streams).__next__
    counts = zlib.decompress(take(), -15)
    counts = [n + 1 for n in (struct.unpack(f"<{num_p}H", counts) if flags & 4 else counts)]
    tails = [1 / (1 + math.exp((128 - x) / 8)) for x in zlib.decompress(take(), -15)]
    steps = [iter(zlib.decompress(take(), -15)) for _ in range(4)]
    ids = read_ids(zlib.decompress(take(), -15), take())
    outside = iter(zlib.decompress(take(), -15) if flags & 2 else b"")
    sampled = zlib.decompress(take(), -15) if num_m else bytes(num_p)
    differences = read_ids(zlib.decompress(take(), -15), take()) if num_m else iter(())
    stored = [s for s in range(len(tokens)) if mask[s] or flags & 1]
    assert len(stored) == num_p and sum(counts) == num_n
    found = [None] * len(tokens)
    for p, s in enumerate(stored):
        ranks = range(counts[p])
        levels = [next(steps[(r >= 1) + (r >= 4) + (r >= 16)]) for r in ranks]
        raw = [-nats(sum(levels[: r + 1]), fine, coarse) for r in ranks]
        shift = math.log(1 - tails[p]) - math.log(sum(map(math.exp, raw)))
        kept = {next(ids): x + shift for x in raw}
        label = (kept.get(labels[s]) or -nats(next(outside), fine, coarse)) if flags & 2 else None
        drawn = [next(differences) for _ in range(num_m)] if sampled[p] else [-1] * num_m
        drawn = [sum(drawn[: m + 1]) for m in range(num_m)] if sampled[p] else drawn
        found[s] = (list(kept), list(kept.values()), tails[p::num_p], label, drawn)
    return found


def read_ids(classes, packed):
    bits = int.from_bytes(packed, "little")
    for width in classes:
        yield (1 << width) + (bits & ((1 << width) - 1)) - 1
        bits >>= width


def nats(level, fine, coarse):
    knee, at_knee = 2 * math.log(fine / coarse), 2 * (fine - coarse)
    at_ten = at_knee + (10 - knee) * coarse
    if level <= at_knee:
        return -2 * math.log(1 - level / (2 * fine))
    return knee + (level - at_knee) / coarse if level <= at_ten else 10 + (level - at_ten) / 2
