"""`logit_cache inspect`: counts, statistics and examples of a cache, as text and as a page.

Shape legend: N loss positions of all measured rows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from transformers import PreTrainedTokenizerBase

from nemo_kd.batch import CachedExample
from nemo_kd.cache.index import ChunkSummary
from nemo_kd.cache.layout import CacheError
from nemo_kd.cache.manifest import UNKNOWN
from nemo_kd.cache.reader import CacheReader
from nemo_kd.data.tokenizer import (
    LossPositions,
    TokenText,
    text_ids,
    tokenizer_fingerprint,
)

TEMPLATE = Path(__file__).with_name("inspect_page.html")
PAGE_ALTERNATIVES = 10
PROMPT_TOKENS = 400
"""Most tokens of an example on the page before its first loss token."""
LOSS_SPAN_TOKENS = 2000
"""Most tokens of an example on the page from its first loss token on."""
ENTROPY_EDGES = (0.0, 0.02, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Smallest entropies of the page's colours."""
QUANTILES = (1, 10, 50, 90, 99)

IDENTITY = (
    "codec",
    "top_k",
    "teacher",
    "vocab_size",
    "tokenizer_size",
    "tokenizer",
    "chat_template",
    "seq_length",
    "dataset",
)
MEASURED = (
    "num_kept_P",
    "tail_mass_P",
    "entropy_P",
    "label_rank_P",
    "label_logprob_P",
)

Facts = list[tuple[str, str]]
"""(name, value) pairs, one per line of a report."""


def check_tokenizer(
    reader: CacheReader, tokenizer: PreTrainedTokenizerBase, path: str
) -> None:
    """Refuse a tokenizer that did not write the cache, or whose vocabulary is too small for it.

    Raises:
        CacheError: names both.
    """
    ours = tokenizer_fingerprint(tokenizer)
    known = {manifest.tokenizer for manifest in reader.manifests} - {UNKNOWN}
    if known - {ours} or reader.max_token_id >= len(tokenizer):
        raise CacheError(
            f"--tokenizer: {path} has {len(tokenizer):,} tokens and the fingerprint {ours}, but "
            f"{reader.path} has ids up to {reader.max_token_id:,} of {', '.join(known) or UNKNOWN}; "
            "give the teacher's tokenizer"
        )


def spread(num_rows: int, most: int) -> list[int]:
    """Return at most `most` positions, evenly spread over the rows."""
    return np.unique(
        np.linspace(0, num_rows - 1, min(most, num_rows)).astype(int)
    ).tolist()


def measure(reader: CacheReader, num_rows: int) -> dict[str, np.ndarray]:
    """Measure at most `num_rows` rows, evenly spread over the cache.

    Returns:
        Tokens and loss tokens of every row, and `MEASURED` of `LossPositions`.
    """
    parts = defaultdict(list)
    for position in spread(len(reader), num_rows):
        row = reader[position]
        parts["tokens"].append([row.example.num_tokens])
        parts["loss_tokens"].append([row.example.num_loss_tokens])
        at = LossPositions(row)
        for name in MEASURED:
            parts[name].append(getattr(at, name))
    return {name: np.concatenate(part) for name, part in parts.items()}


def distributions(found: dict[str, np.ndarray]) -> Facts:
    """Return mean and quantiles of every measurement."""
    facts = []
    for name, values in (
        ("entropy in nats, at least", found["entropy_P"]),
        ("probability kept", 1 - found["tail_mass_P"]),
        ("tokens kept", found["num_kept_P"]),
        ("rank of the label, 0: none", found["label_rank_P"]),
        ("nats of the label", -found["label_logprob_P"]),
    ):
        # A cache need not store the labels' log-probabilities.
        known = values[~np.isnan(values)]
        if len(known):
            quantiles = np.percentile(known, QUANTILES)
            cells = " ".join(f"{value:9.3f}" for value in (known.mean(), *quantiles))
            facts.append((name, cells))
    header = " ".join(f"{percent:>8}%" for percent in QUANTILES)
    return [("", f"{'mean':>9} {header}"), *facts]


def describe_cache(reader: CacheReader, found: dict[str, np.ndarray]) -> str:
    """Describe a cache, one fact a line; one without a manifest has no exact counts of tokens."""
    identity = [
        ("manifest", "none: another program wrote the files, or they were moved alone")
    ]
    if reader.manifests:
        known = vars(reader.manifests[0])
        identity = [(name.replace("_", " "), str(known[name])) for name in IDENTITY]
    measured = (
        f"{len(found['tokens']):,} of {len(reader):,} examples with {found['tokens'].sum():,} "
        f"tokens, {found['loss_tokens'].sum():,} in the loss, {len(found['entropy_P']):,} with "
        "teacher targets"
    )
    groups = (
        identity,
        _counts(reader),
        [("measured", measured)],
        distributions(found),
    )
    return "\n\n".join(
        "\n".join(f"{name:<27}  {value}" for name, value in facts) for facts in groups
    )


def _counts(reader: CacheReader) -> Facts:
    files = reader.chunk_facts
    facts = [
        (
            "examples",
            f"{sum(file.num_lines for file in files):,}, {len(reader):,} of them read",
        ),
        ("bytes", f"{sum(file.bytes for file in files):,}"),
        ("files", f"{len(files):,}"),
    ]
    chunks = [
        chunk for manifest in reader.manifests for chunk in manifest.chunks.values()
    ]
    if not chunks:
        return facts
    total = ChunkSummary.total(chunks)
    expected = sum(manifest.num_chunks for manifest in reader.manifests)
    skipped = [
        f"{count:,} {reason}" for reason, count in sorted(total.skipped.items())
    ]
    return [
        *facts,
        ("complete chunks", f"{len(chunks):,} of {expected:,}"),
        ("tokens", f"{total.tokens:,}, {total.loss_tokens:,} in the loss"),
        (
            "bytes per token",
            f"{total.bytes / max(1, total.tokens):,.1f}, "
            f"{total.bytes / max(1, total.loss_tokens):,.1f} per loss token",
        ),
        ("records left out", ", ".join(skipped) or "none"),
    ]


def build_page(
    title: str,
    report: str,
    rows: Iterable[tuple[int, CachedExample]],
    text: TokenText,
) -> str:
    """Return a self-contained page of `describe_cache`'s text and of rows, each with its position in the cache."""
    content = {
        "title": title.rpartition("/")[2],
        "facts": report,
        "edges": ENTROPY_EDGES,
        "examples": [_page_example(position, row, text) for position, row in rows],
    }
    # Without "<" nothing in it can end its element.
    data = orjson.dumps(content).decode().replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", data)


def _page_example(
    position: int, row: CachedExample, text: TokenText
) -> dict[str, Any]:
    """Return an example's texts and teacher targets as the page's script wants them."""
    example = row.example
    found = LossPositions(row)
    token_ids = text_ids(row.example)
    first = int(found.position_P[0]) + 1 if len(found.position_P) else 0
    start = max(0, first - PROMPT_TOKENS)
    shown = token_ids[start : first + LOSS_SPAN_TOKENS]
    targets = []
    for p, place in enumerate((found.position_P + 1 - start).tolist()):
        if place < len(shown):
            alternatives = found.alternatives(p, PAGE_ALTERNATIVES)
            targets.append(
                [
                    place,
                    text.visible(shown[place]),
                    math.exp(found.label_logprob_P[p]),  # nan becomes null
                    int(found.label_rank_P[p]),
                    float(found.entropy_P[p]),
                    int(found.num_kept_P[p]),
                    float(found.tail_mass_P[p]),
                    [
                        (text.visible(token_id), mass)
                        for token_id, mass in alternatives
                    ],
                ]
            )
    return {
        "heading": f"Example {position:,} · record {example.index:,} · {example.num_tokens:,} "
        f"positions, {example.num_loss_tokens:,} in the loss",
        "before": start,
        "tokens": text.along(shown),
        "after": len(token_ids) - start - len(shown),
        "targets": targets,
    }
