"""`logit_cache inspect`: counts, statistics and examples of a cache, as text and as a page.

Shape legend: N loss positions of all measured rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from nemo_kd.batch import CachedExample
from nemo_kd.cache.index import ChunkSummary
from nemo_kd.cache.layout import CacheError
from nemo_kd.cache.manifest import UNKNOWN, Manifest
from nemo_kd.cache.reader import CacheReader
from nemo_kd.data.tokenizer import (
    LossPositions,
    TokenText,
    text_ids,
    tokenizer_fingerprint,
)
from nemo_kd.page import build_page

TEMPLATE = Path(__file__).with_name("inspect_page.html")
PAGE_ALTERNATIVES = 10
PROMPT_TOKENS = 400
"""Most tokens of an example on the page before its first loss token."""
LOSS_SPAN_TOKENS = 2000
"""Most tokens of an example on the page from its first loss token on."""
BAR_WIDTH = 40
ENTROPY_EDGES = (0.0, 0.02, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, math.inf)
MASS_EDGES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 1.0)
COUNT_EDGES = (1, 2, 3, 5, 9, 17, 33, 65, 129, 257, math.inf)
RANK_EDGES = (0, 1, 2, 3, 4, 6, 11, 21, 51, 101, math.inf)

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


@dataclass(frozen=True)
class Statistics:
    """Measurements of sampled rows: counts, and the arrays `MEASURED` of `LossPositions`."""

    num_rows: int
    num_tokens: int
    num_loss_tokens: int
    arrays: dict[str, np.ndarray]


@dataclass(frozen=True)
class Histogram:
    """Shares of values in labelled ranges."""

    title: str
    labels: list[str]
    shares: list[float]


@dataclass(frozen=True)
class Report:
    """Groups of facts about a cache, and histograms with means."""

    facts: list[Facts]
    histograms: list[Histogram]


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


def measure(reader: CacheReader, num_rows: int) -> Statistics:
    """Measure at most `num_rows` rows, evenly spread over the cache."""
    drawn = spread(len(reader), num_rows)
    num_tokens = 0
    num_loss_tokens = 0
    parts: dict[str, list[np.ndarray]] = {name: [np.zeros(0)] for name in MEASURED}
    for position in drawn:
        row = reader[position]
        num_tokens += row.example.num_tokens
        num_loss_tokens += row.example.num_loss_tokens
        at = LossPositions(row)
        for name in MEASURED:
            parts[name].append(getattr(at, name))
    arrays = {name: np.concatenate(part) for name, part in parts.items()}
    return Statistics(len(drawn), num_tokens, num_loss_tokens, arrays)


def histograms(found: Statistics) -> list[Histogram]:
    """Count values per range, which includes its lower edge and excludes its upper one."""
    num_kept, tail_mass, entropy, rank, logprob = found.arrays.values()
    result = []
    for title, values, edges in (
        ("entropy in nats, at least", entropy, ENTROPY_EDGES),
        ("probability kept", 1 - tail_mass, MASS_EDGES),
        ("tokens kept", num_kept, COUNT_EDGES),
        ("rank of the label, 0 if not kept", rank, RANK_EDGES),
        ("nats of the label", -logprob, ENTROPY_EDGES),
    ):
        known = values[
            ~np.isnan(values)
        ]  # a cache need not store the labels' log-probabilities
        if len(known):
            median, p99 = np.percentile(known, (50, 99))
            result.append(
                Histogram(
                    f"{title}: mean {known.mean():.3f}, median {median:.3f}, p99 {p99:.3f}",
                    [f"from {low:g}" for low in edges[:-1]],
                    (np.histogram(known, edges)[0] / len(known)).tolist(),
                )
            )
    return result


def describe_cache(reader: CacheReader, found: Statistics) -> Report:
    """Build the report of a cache; a cache without a manifest has no exact counts of tokens."""
    identity = [
        ("manifest", "none: another program wrote the files, or they were moved alone")
    ]
    if reader.manifests:
        identity = _identity(reader.manifests[0])
    measured = (
        f"{found.num_rows:,} of {len(reader):,} examples with {found.num_tokens:,} tokens, "
        f"{found.num_loss_tokens:,} in the loss, {len(found.arrays['entropy_P']):,} with teacher targets"
    )
    facts = [identity, _counts(reader), [("measured", measured)]]
    return Report(facts, histograms(found))


def format_facts(report: Report) -> str:
    """Format the facts, one per line."""
    return "\n\n".join(
        "\n".join(f"{name:<27}  {value}" for name, value in facts)
        for facts in report.facts
    )


def format_report(report: Report) -> str:
    """Format the report for a terminal, about 100 columns wide."""
    parts = [format_facts(report)]
    for histogram in report.histograms:
        width = BAR_WIDTH / max([*histogram.shares, 1e-9])
        lines = [
            f"  {label:>13}  {part:>6.1%}  {'█' * round(width * part)}".rstrip()
            for label, part in zip(histogram.labels, histogram.shares, strict=True)
        ]
        parts.append("\n".join([histogram.title, *lines]))
    return "\n\n".join(parts)


def _identity(manifest: Manifest) -> Facts:
    facts = []
    for name in IDENTITY:
        value = getattr(manifest, name)
        if isinstance(value, dict):
            value = ", ".join(f"{key}: {inner}" for key, inner in value.items())
        facts.append((name.replace("_", " "), str(value)))
    return facts


def _counts(reader: CacheReader) -> Facts:
    files = reader.chunk_facts
    chunks = [
        chunk for manifest in reader.manifests for chunk in manifest.chunks.values()
    ]
    if not chunks:
        return [
            ("files", f"{len(files):,}"),
            ("examples", f"{sum(file.num_lines for file in files):,}"),
            ("bytes", f"{sum(file.bytes for file in files):,}"),
        ]
    total = ChunkSummary.total(chunks)
    expected = sum(manifest.num_chunks for manifest in reader.manifests)
    loss_tokens = max(1, total.loss_tokens)
    skipped = [
        f"{count:,} {reason}" for reason, count in sorted(total.skipped.items())
    ]
    return [
        ("chunks", f"{len(chunks):,} of {expected:,} complete, {len(files):,} found"),
        ("examples", f"{total.examples:,}, {len(reader):,} of them read"),
        ("tokens", f"{total.tokens:,}, {total.loss_tokens:,} in the loss"),
        ("bytes", f"{total.bytes:,}"),
        (
            "bytes per token",
            f"{total.bytes / max(1, total.tokens):,.1f}, "
            f"{total.bytes / loss_tokens:,.1f} per loss token",
        ),
        ("records left out", ", ".join(skipped) or "none"),
    ]


def cache_page(
    title: str,
    report: Report,
    rows: Iterable[tuple[int, CachedExample]],
    text: TokenText,
) -> str:
    """Return a self-contained page of a report and of rows, each with its position in the cache."""
    content = {
        "title": title.rpartition("/")[2],
        "facts": format_facts(report),
        "histograms": report.histograms,
        "edges": ENTROPY_EDGES[:-1],
        "examples": [_page_example(position, row, text) for position, row in rows],
    }
    return build_page(TEMPLATE, content)


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
