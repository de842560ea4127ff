"""`logit_cache inspect`: counts, statistics and examples of a cache, as text and as a page.

Shape legend: N loss positions of all measured rows.
"""

from __future__ import annotations

import html
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from transformers import PreTrainedTokenizerBase

from nemo_kd.batch import CachedExample
from nemo_kd.cache.index import ChunkSummary
from nemo_kd.cache.layout import CacheError
from nemo_kd.cache.manifest import UNKNOWN, Manifest
from nemo_kd.cache.reader import CacheReader
from nemo_kd.data.text import LossPositions, TokenText, share, text_ids
from nemo_kd.data.tokenizer import tokenizer_fingerprint

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

Facts = list[tuple[str, str]]
"""(name, value) pairs, one per line of a report."""


@dataclass(frozen=True)
class Statistics:
    """Measurements of sampled rows; arrays as in `LossPositions`.

    Attributes:
        num_tokens, num_loss_tokens: positions of the sampled rows.
    """

    num_rows: int
    num_tokens: int
    num_loss_tokens: int
    num_kept_N: np.ndarray
    kept_mass_N: np.ndarray
    entropy_N: np.ndarray
    label_rank_N: np.ndarray
    label_logprob_N: np.ndarray


@dataclass(frozen=True)
class Histogram:
    """Shares of values in labelled ranges."""

    title: str
    labels: list[str]
    shares: list[float]


@dataclass(frozen=True)
class Report:
    """Groups of facts about a cache, and histograms."""

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
    columns: list[tuple[np.ndarray, ...]] = [(np.zeros(0),) * 5]
    for position in drawn:
        row = reader[position]
        num_tokens += row.example.num_tokens
        num_loss_tokens += row.example.num_loss_tokens
        at = LossPositions.of(row)
        columns.append(
            (
                at.num_kept_P,
                1 - at.tail_mass_P,
                at.entropy_P,
                at.label_rank_P,
                at.label_logprob_P,
            )
        )
    arrays = [np.concatenate(column) for column in zip(*columns, strict=True)]
    return Statistics(len(drawn), num_tokens, num_loss_tokens, *arrays)


def histograms(found: Statistics) -> list[Histogram]:
    """Count entropies, probabilities, tokens kept and ranks per range."""
    ranks = _histogram("rank of the label", found.label_rank_N, RANK_EDGES)
    ranks.labels[0] = "not kept"
    return [
        _histogram("entropy in nats, at least", found.entropy_N, ENTROPY_EDGES),
        _histogram("probability kept", found.kept_mass_N, MASS_EDGES),
        _histogram("tokens kept", found.num_kept_N, COUNT_EDGES),
        ranks,
    ]


def _histogram(title: str, values: np.ndarray, edges: Sequence[float]) -> Histogram:
    """Count values per range; a range includes its lower edge and excludes its upper one."""
    counts, _ = np.histogram(np.clip(values, edges[0], None), edges)
    labels = [
        f"from {low:g}" if low + 1 != high else f"{low:g}"
        for low, high in itertools.pairwise(edges)
    ]
    return Histogram(title, labels, (counts / max(1, len(values))).tolist())


def describe_cache(reader: CacheReader, found: Statistics) -> Report:
    """Build the report of a cache; a cache without a manifest has no exact counts of tokens."""
    identity = [
        ("manifest", "none: another program wrote the files, or they were moved alone")
    ]
    if reader.manifests:
        identity = _identity(reader.manifests[0])
    return Report([identity, _counts(reader), _sample(reader, found)], histograms(found))


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
        parts.append("\n".join([f"{histogram.title}:", *lines]))
    return "\n\n".join(parts)


def _identity(manifest: Manifest) -> Facts:
    teacher = manifest.teacher
    dataset = manifest.dataset
    codec = ", ".join(f"{name} {value}" for name, value in manifest.codec.items())
    return [
        ("codec", f"{codec}, at most {manifest.top_k:,} tokens per position"),
        (
            "teacher",
            f"{teacher.get('name', UNKNOWN)}, weights {teacher.get('weights', UNKNOWN)}",
        ),
        (
            "vocabulary",
            f"{manifest.vocab_size:,} columns, {manifest.tokenizer_size:,} tokens of the tokenizer",
        ),
        ("tokenizer", manifest.tokenizer),
        ("chat template", manifest.chat_template or "none"),
        (
            "dataset",
            f"{dataset.get('path', UNKNOWN)}, "
            f"records {dataset.get('start_from_idx')} to {dataset.get('end_at_idx')}",
        ),
        ("longest sequence", f"{manifest.seq_length:,} tokens"),
    ]


def _counts(reader: CacheReader) -> Facts:
    files = reader.chunk_facts
    total = ChunkSummary(0, 0)
    chunks = [
        chunk for manifest in reader.manifests for chunk in manifest.chunks.values()
    ]
    if not chunks:
        return [
            ("files", f"{len(files):,}"),
            ("examples", f"{sum(file.num_lines for file in files):,}"),
            ("bytes", f"{sum(file.bytes for file in files):,}"),
        ]
    for chunk in chunks:
        total.add(chunk)
    expected = sum(manifest.num_chunks for manifest in reader.manifests)
    loss_tokens = max(1, total.loss_tokens)
    skipped = [f"{count:,} {reason}" for reason, count in sorted(total.skipped.items())]
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
        ("tokens kept", f"{total.kept_tokens / loss_tokens:.2f} per loss token"),
        ("probability of the kept ids", share(total.kept_mass_sum / loss_tokens)),
        ("label among the kept ids", share(total.label_in_topk / loss_tokens)),
    ]


def _sample(reader: CacheReader, found: Statistics) -> Facts:
    measured = len(found.num_kept_N)
    facts = [
        (
            "measured",
            f"{found.num_rows:,} of {len(reader):,} examples with {found.num_tokens:,} tokens, "
            f"{found.num_loss_tokens:,} in the loss, {measured:,} with teacher targets",
        )
    ]
    if not measured:
        return facts
    median, p99 = np.percentile(found.num_kept_N, (50, 99))
    known_N = found.label_logprob_N[~np.isnan(found.label_logprob_N)]
    nats = -known_N.mean() if len(known_N) else math.nan
    return [
        *facts,
        (
            "tokens kept",
            f"mean {found.num_kept_N.mean():.2f}, median {median:.0f}, p99 {p99:.0f}",
        ),
        ("probability of the kept ids", f"mean {share(found.kept_mass_N.mean())}"),
        (
            "teacher's entropy",
            f"mean {found.entropy_N.mean():.3f} nats at least, with one token as the tail",
        ),
        (
            "label",
            f"ranked first {share((found.label_rank_N == 1).mean())}, "
            f"kept {share((found.label_rank_N > 0).mean())}",
        ),
        (
            "teacher's cross-entropy",
            f"{nats:.4f} nats, perplexity {np.exp(nats):,.2f}, over the {len(known_N):,} labels "
            "whose probability is stored",
        ),
    ]


def build_page(
    title: str, report: Report, rows: Iterable[tuple[int, CachedExample]], text: TokenText
) -> str:
    """Return a self-contained page of a report and of rows, each with its position in the cache."""
    tokens: list[list[Any]] = []
    articles = [_article(position, row, text, tokens) for position, row in rows]
    steps = enumerate(ENTROPY_EDGES[:-1])
    values = {
        "title": html.escape(title.rpartition("/")[2]),
        "facts": html.escape(format_facts(report)),
        "charts": "\n".join(
            _chart(histogram, is_coloured=number == 0)
            for number, histogram in enumerate(report.histograms)
        ),
        "legend": "".join(f'<b class="e{level}">{edge:g}</b>' for level, edge in steps),
        "examples": "\n".join(articles),
        # Without "<" nothing in it can end its element.
        "data": orjson.dumps(tokens).decode().replace("<", "\\u003c"),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def _article(
    position: int, row: CachedExample, text: TokenText, tokens: list[list[Any]]
) -> str:
    """Return an example as HTML; append the data of its loss tokens, which the script shows."""
    example = row.example
    found = LossPositions.of(row)
    place_of = {s + 1: p for p, s in enumerate(found.position_P.tolist())}
    first = min(place_of, default=0)
    start = max(0, first - PROMPT_TOKENS)
    shown = text_ids(row)[start : first + LOSS_SPAN_TOKENS]
    spans = [f"<p>{start:,} tokens before</p>"] if start else []
    for number, (token_id, piece) in enumerate(
        zip(shown, text.along(shown), strict=True)
    ):
        # Escape for HTML; mark line breaks and keep them.
        piece = html.escape(piece).replace("\n", "<i>⏎</i>\n")
        p = place_of.get(start + number)
        if p is None:
            spans.append(piece)
            continue
        level = np.searchsorted(ENTROPY_EDGES, found.entropy_P[p], side="right") - 1
        missed = "" if found.label_rank_P[p] else " miss"
        # The Tab key stops once per example; the arrow keys go on from there.
        index = 0 if p == 0 else -1
        spans.append(
            f'<span class="t e{level}{missed}" data-n="{len(tokens)}" tabindex="{index}">'
            f"{piece}</span>"
        )
        tokens.append(_token_data(found, p, token_id, text))
    rest = example.num_tokens + 1 - start - len(shown)
    spans += [f"<p>{rest:,} tokens more</p>"] if rest else []
    return (
        f"<article><h3><b>Example {position:,}</b> · record {example.index:,} · "
        f"{example.num_tokens:,} positions, {example.num_loss_tokens:,} in the loss"
        f'</h3>\n<div class="text">{"".join(spans)}</div></article>'
    )


def _token_data(found: LossPositions, p: int, label: int, text: TokenText) -> list[Any]:
    """Return the label, its probability or None, rank, entropy, tokens kept, tail mass, and
    [token, probability] of the likeliest kept tokens."""
    logprob = found.label_logprob_P[p]
    return [
        text.visible(label),
        None if np.isnan(logprob) else _rounded(np.exp(logprob)),
        int(found.label_rank_P[p]),
        _rounded(found.entropy_P[p]),
        int(found.num_kept_P[p]),
        _rounded(found.tail_mass_P[p]),
        [
            [text.visible(token_id), _rounded(probability)]
            for token_id, probability in found.alternatives(p, PAGE_ALTERNATIVES)
        ],
    ]


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _chart(histogram: Histogram, is_coloured: bool) -> str:
    """Draw horizontal bars; `is_coloured` gives them the tokens' colours."""
    scale = 100 / max([*histogram.shares, 1e-9])
    rows = []
    for number, (label, part) in enumerate(
        zip(histogram.labels, histogram.shares, strict=True)
    ):
        y = 19 * number
        kind = f"e{number} edge" if is_coloured else "bar"
        rows.append(
            f'<text class="end" x="90" y="{y + 14}">{label}</text>'
            f'<rect class="{kind}" x="98" y="{y + 4}" height="11" width="{scale * part:.1f}"/>'
            f'<text class="end" x="246" y="{y + 14}">{part:.1%}</text>'
        )
    return (
        f"<figure><figcaption>{histogram.title}</figcaption>"
        f'<svg viewBox="0 0 246 {19 * len(rows)}" role="img" aria-label="{histogram.title}">'
        f"{''.join(rows)}</svg></figure>"
    )
