"""Reads a chunk by docs/cache_format.md alone: the standard library and zstandard, nothing of nemo_kd."""

import base64
import hashlib
import itertools
import json
import math
import struct
import zlib

import zstandard


def read(path):  # [(line, [None or (ids, log-probabilities, tail masses, log-probability of the label, samples)])]
    with (zstandard.open if path.endswith(".zst") else open)(path, "rt", encoding="utf-8") as file:
        return [(line, positions(line)) for line in map(json.loads, file)]


def positions(row):
    tokens, labels, mask = row["tokens"], row["labels"], row["loss_mask"]
    hashed = hashlib.sha256(struct.pack(f"<{2 * len(tokens)}i", *tokens, *labels) + bytes(mask))
    assert row["hash"] == hashed.hexdigest()[:16]
    if "v" not in row:  # the json codec
        kept = [[x - total for x in z] for z, total in zip(row["topk_logits"], row["log_sum_exp_logits"])]
        rest = row["label_logprobs"], row["tail_token_ids"]
        return list(zip(row["topk_token_ids"], kept, zip(*row["tail_mass"]), *rest))
    blob = base64.b64decode(row["teacher"], validate=True)
    version, flags, fine, coarse, num_t, num_m, num_c, num_streams, num_p, _ = struct.unpack_from("<7BH2I", blob)
    assert (row["v"], version, zlib.crc32(blob)) == (1, 1, 0x2144DF1C)  # the CRC of anything followed by its CRC
    at, lengths = 17 + 4 * (num_t + num_streams), struct.unpack_from(f"<{num_streams}I", blob, 17 + 4 * num_t)
    streams = iter([blob[at + sum(lengths[:i]) :][:length] for i, length in enumerate(lengths)])
    inflated = (zlib.decompress(stream, -15) for stream in streams)
    counts, odds = struct.unpack(f"<{num_p}{'BH'[flags >> 2]}", next(inflated)), next(inflated)
    tails = [1 / (1 + math.exp((max(-48, min(48, x - 136)) - 2 * (x - 136)) / 16)) for x in odds]
    levels, classes = iter(next(inflated)), [iter(next(inflated)) for _ in range(num_c)]
    widths = (next(classes[i * num_c // (n + 1)]) for n in counts for i in range(n + 1))
    distances, table = read_bits(widths, next(streams)), [-nats(level, fine, coarse) for level in range(256)]
    outside, sampled = iter(next(inflated) if flags & 2 else ()), next(inflated) if num_m else bytes(num_p)
    samples, found = read_bits(next(inflated), next(streams)) if num_m else None, [None] * len(tokens)
    for p, s in enumerate(s for s, counted in enumerate(mask) if counted or flags & 1):
        ids = itertools.accumulate(next(distances) for _ in range(counts[p] + 1))
        kept = {token - 1: table[level] for level, token in sorted((next(levels), token) for token in ids)}
        shift = math.log(1 - tails[p]) - math.log(sum(map(math.exp, kept.values())))
        label = None if not flags & 2 else kept[labels[s]] + shift if labels[s] in kept else table[next(outside)]
        drawn = itertools.accumulate((next(samples) - 1 if sampled[p] else -(not m)) for m in range(num_m))
        found[s] = list(kept), [x + shift for x in kept.values()], tails[p::num_p], label, list(drawn)
    return found


def read_bits(widths, packed, at=0):
    for width in widths:
        yield (int.from_bytes(packed, "little") >> at) % (1 << width) + (1 << width)
        at += width


def nats(level, fine, coarse):
    if level <= 2 * (fine - coarse):
        return -2 * math.log(1 - level / (2 * fine))
    above = 2 * math.log(fine / coarse) + level / coarse - 2 * (fine - coarse) / coarse - 10
    return 10 + above * (coarse / 2 if above > 0 else 1)
