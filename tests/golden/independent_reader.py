"""Reads a chunk by docs/cache_format.md alone: the standard library and zstandard, nothing of nemo_kd."""

import base64
import hashlib
import json
import math
import struct
import zlib

import zstandard


def read(path):
    """(line, [None or (ids, log-probabilities, tail masses, label's log-probability, samples)]) of every example."""
    with (zstandard.open if path.endswith(".zst") else open)(path, "rt", encoding="utf-8") as file:
        return [(line, positions(line)) for line in map(json.loads, file)]


def positions(line):
    tokens, labels, mask = line["tokens"], line["labels"], line["loss_mask"]
    content = struct.pack(f"<{2 * len(tokens)}i", *tokens, *labels) + bytes(mask)
    assert line["hash"] == hashlib.sha256(content).hexdigest()[:16]
    if "v" not in line:  # the json codec
        logprobs = [[x - total for x in row] for row, total in zip(line["topk_logits"], line["log_sum_exp_logits"])]
        tails, samples = zip(*line["tail_mass"]), line["tail_token_ids"]
        return list(zip(line["topk_token_ids"], logprobs, tails, line["label_logprobs"], samples))
    blob = base64.b64decode(line["teacher"], validate=True)
    version, flags, fine, coarse, num_t, num_m, num_streams, num_p, _ = struct.unpack_from("<BBBBBBHII", blob)
    assert (line["v"], version, zlib.crc32(blob)) == (1, 1, 0x2144DF1C)  # the CRC of anything followed by its CRC
    at, lengths = 16 + 4 * (num_t + num_streams), struct.unpack_from(f"<{num_streams}I", blob, 16 + 4 * num_t)
    streams = iter([blob[at + sum(lengths[:i]) :][:length] for i, length in enumerate(lengths)])
    inflated = (zlib.decompress(stream, -15) for stream in streams)
    counts, odds = struct.unpack(f"<{num_p}{'BH'[flags >> 2]}", next(inflated)), next(inflated)
    tails = [1 / (1 + math.exp((128 - level) / 8)) for level in odds]
    steps, ids = [iter(next(inflated)) for _ in range(4)], read_ids(next(inflated), next(streams))
    outside, sampled = iter(next(inflated) if flags & 2 else ()), next(inflated) if num_m else bytes(num_p)
    samples = read_ids(next(inflated), next(streams)) if num_m else None
    found, stored = [None] * len(tokens), [s for s, counted in enumerate(mask) if counted or flags & 1]
    for p, s in enumerate(stored):
        levels = [next(steps[(r >= 1) + (r >= 4) + (r >= 16)]) for r in range(counts[p] + 1)]
        raw = [-nats(sum(levels[: r + 1]), fine, coarse) for r in range(len(levels))]
        shift = math.log(1 - tails[p]) - math.log(sum(map(math.exp, raw)))
        kept = {next(ids): x + shift for x in raw}
        label = (kept[labels[s]] if labels[s] in kept else -nats(next(outside), fine, coarse)) if flags & 2 else None
        drawn = [next(samples) for _ in range(num_m)] if sampled[p] else [-1] + [0] * (num_m - 1)
        found[s] = list(kept), list(kept.values()), tails[p::num_p], label, [sum(drawn[: m + 1]) for m in range(num_m)]
    return found


def read_ids(classes, packed, at=0):
    for width in classes:
        yield (int.from_bytes(packed, "little") >> at) % (1 << width) + (1 << width) - 1
        at += width


def nats(level, fine, coarse):
    if level <= 2 * (fine - coarse):
        return -2 * math.log(1 - level / (2 * fine))
    above = 2 * math.log(fine / coarse) + level / coarse - 2 * (fine - coarse) / coarse
    return above if above <= 10 else 10 + (above - 10) * coarse / 2
