"""`logit_cache inspect`: counts, statistics and one example of a cache, as text.

Shape legend: N loss positions of all measured rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from nemo_kd.cache.index import ChunkSummary
from nemo_kd.cache.layout import CacheError
from nemo_kd.cache.manifest import UNKNOWN, Manifest
from nemo_kd.cache.reader import CacheReader
from nemo_kd.data.text import LossPositions, share
from nemo_kd.data.tokenizer import tokenizer_fingerprint

BAR_WIDTH = 40
ENTROPY_EDGES = (0.0, 0.02, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, math.inf)
MASS_EDGES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 1.0)
COUNT_EDGES = (1, 2, 3, 5, 9, 17, 33, 65, 129, 257, math.inf)
RANK_EDGES = (1, 2, 3, 4, 6, 11, 21, 51, 101, math.inf)

Facts = list[tuple[str, str]]
"""(name, value) pairs, one per line of a report."""


@dataclass(frozen=True)
class Statistics:
    """Measurements of sampled rows; arrays as in `LossPositions`.

    Attributes:
        num_tokens, num_loss_tokens: positions of the sampled rows.
        has_label_logprobs: all rows store them.
        max_entropy_N: entropy of a distribution with a uniform tail, an upper bound; NaN without
            a known vocabulary.
    """

    num_rows: int
    num_tokens: int
    num_loss_tokens: int
    has_label_logprobs: bool
    num_kept_N: np.ndarray
    kept_mass_N: np.ndarray
    entropy_N: np.ndarray
    max_entropy_N: np.ndarray
    label_rank_N: np.ndarray
    label_logprob_N: np.ndarray


@dataclass(frozen=True)
class Histogram:
    """Counts of values in labelled ranges."""

    title: str
    labels: list[str]
    counts: list[int]

    @property
    def shares(self) -> list[float]:
        return [count / max(1, sum(self.counts)) for count in self.counts]


@dataclass(frozen=True)
class Report:
    """Facts and histograms of a cache; `headline` repeats the most wanted figures."""

    headline: Facts
    identity: Facts
    counts: Facts
    sample: Facts
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
    for theirs in known - {ours}:
        raise CacheError(
            f"--tokenizer: {path} has the fingerprint {ours}, but {reader.path} was written with "
            f"{theirs}; give the teacher's tokenizer"
        )
    if not known and reader.max_token_id >= len(tokenizer):
        raise CacheError(
            f"--tokenizer: {path} has {len(tokenizer):,} tokens, but {reader.path} has the id "
            f"{reader.max_token_id:,}; give the teacher's tokenizer"
        )


def measure(reader: CacheReader, num_rows: int, seed: int = 0) -> Statistics:
    """Measure at most `num_rows` rows, drawn at random; the same seed draws the same rows."""
    num_rows = min(num_rows, len(reader))
    drawn = np.random.default_rng(seed).choice(len(reader), num_rows, replace=False)
    vocab_size = reader.manifests[0].vocab_size if reader.manifests else math.nan
    num_tokens = 0
    num_loss_tokens = 0
    has_label_logprobs = True
    columns: list[tuple[np.ndarray, ...]] = []
    for position in sorted(drawn.tolist()):
        row = reader[position]
        num_tokens += row.example.num_tokens
        num_loss_tokens += row.example.num_loss_tokens
        has_label_logprobs &= row.teacher.label_logprobs_P is not None
        at = LossPositions.of(row)
        tail_nats_P = at.tail_mass_P * np.log(np.maximum(vocab_size - at.num_kept_P, 1))
        columns.append(
            (
                at.num_kept_P,
                1 - at.tail_mass_P,
                at.entropy_P,
                at.entropy_P + tail_nats_P,
                at.label_rank_P,
                at.label_logprob_P,
            )
        )
    arrays = [np.concatenate(column) for column in zip(*columns, strict=True)]
    arrays = arrays or [np.zeros(0)] * 6
    return Statistics(num_rows, num_tokens, num_loss_tokens, has_label_logprobs, *arrays)


def histograms(found: Statistics) -> list[Histogram]:
    is_kept_N = found.label_rank_N > 0
    ranks = _histogram("rank of the label", found.label_rank_N[is_kept_N], RANK_EDGES)
    ranks.labels.append("not kept")
    ranks.counts.append(int((~is_kept_N).sum()))
    return [
        _histogram("entropy in nats, at least", found.entropy_N, ENTROPY_EDGES),
        _histogram("probability kept", found.kept_mass_N, MASS_EDGES),
        _histogram("tokens kept", found.num_kept_N, COUNT_EDGES),
        ranks,
    ]


def _histogram(title: str, values: np.ndarray, edges: Sequence[float]) -> Histogram:
    """Count values per range; a range includes its lower edge and excludes its upper one."""
    last = len(edges) - 2
    place = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, last)
    counts = np.bincount(place.astype(np.int64), minlength=last + 1).tolist()
    return Histogram(
        title, [_range(low, high) for low, high in itertools.pairwise(edges)], counts
    )


def _range(low: float, high: float) -> str:
    if high == math.inf:
        return f"{low:g} and more"
    if isinstance(low, float):
        return f"{low:g} to {high:g}"
    return f"{low}" if high == low + 1 else f"{low} to {high - 1:g}"


def describe_cache(reader: CacheReader, found: Statistics) -> Report:
    """Build the report of a cache: exact counts where a manifest has them, else estimates."""
    identity = [
        ("manifest", "none: another program wrote the files, or they were moved alone")
    ]
    if reader.manifests:
        identity = _identity(reader.manifests[0])
    counts = _counts(reader, found)
    exact = dict(counts)
    headline = [
        ("examples", exact["examples"]),
        ("bytes per token", exact["bytes per token"].partition(",")[0]),
    ]
    if len(found.num_kept_N):
        headline += [
            ("tokens kept per position", f"{found.num_kept_N.mean():.1f}"),
            ("probability of the kept ids", share(found.kept_mass_N.mean())),
            ("mean entropy, at least", f"{found.entropy_N.mean():.2f} nats"),
            ("labels that rank first", share((found.label_rank_N == 1).mean())),
        ]
        if found.has_label_logprobs:
            nats = -found.label_logprob_N.mean()
            headline.append(("teacher's cross-entropy", f"{nats:.2f} nats"))
    return Report(headline, identity, counts, _sample(reader, found), histograms(found))


def format_report(report: Report) -> str:
    """Format the report for a terminal, about 100 columns wide."""
    parts = [
        "\n".join(f"{name:<27}  {value}" for name, value in facts)
        for facts in (report.identity, report.counts, report.sample)
    ]
    for histogram in report.histograms:
        width = BAR_WIDTH / max([*histogram.shares, 1e-9])
        lines = [f"{histogram.title}:"]
        for label, part in zip(histogram.labels, histogram.shares, strict=True):
            lines.append(
                f"  {label:>13}  {part:>6.1%}  {'█' * round(width * part)}".rstrip()
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _identity(manifest: Manifest) -> Facts:
    codec = manifest.codec
    teacher = manifest.teacher
    dataset = manifest.dataset
    kept = [f"at most {manifest.top_k:,} tokens per position"]
    if codec.get("min_probability"):
        kept.append(f"probability at least {codec['min_probability']:g}")
    if codec.get("top_p", 1) < 1:
        kept.append(f"until they hold {codec['top_p']:g}")
    if codec.get("min_k", 1) > 1:
        kept.append(f"at least {codec['min_k']}")
    samples = codec.get("tail_samples", 0)
    temperatures = [1.0, *codec.get("temperatures", [])]
    return [
        ("codec", f"{codec.get('name')}, {codec.get('positions', 'all')} positions"),
        ("kept", ", ".join(kept)),
        ("tail mass at temperatures", ", ".join(f"{value:g}" for value in temperatures)),
        ("tail samples", f"{samples} per position" if samples else "none"),
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


def _counts(reader: CacheReader, found: Statistics) -> Facts:
    files = reader.chunk_facts
    chunks = [
        chunk for manifest in reader.manifests for chunk in manifest.chunks.values()
    ]
    total = ChunkSummary(0, 0)
    for chunk in chunks:
        total.add(chunk)
    about = ""
    until = ""
    if chunks:
        expected = sum(manifest.num_chunks for manifest in reader.manifests)
        facts = [("chunks", f"{len(chunks):,} of {expected:,} complete")]
        if len(files) < len(chunks):
            missing = len(chunks) - len(files)
            facts.append(("chunks not found", f"{missing:,} of the complete ones"))
    else:
        facts = [("files", f"{len(files):,}")]
        total.examples = sum(file.num_lines for file in files)
        total.bytes = sum(file.bytes for file in files)
        lines_per_row = total.examples / max(1, found.num_rows)
        total.tokens = round(found.num_tokens * lines_per_row)
        total.loss_tokens = round(found.num_loss_tokens * lines_per_row)
        about = "" if found.num_rows == total.examples else "about "
        until = " up to each last loss token"
    per_token = f"{about}{total.bytes / max(1, total.tokens):,.1f}"
    if total.loss_tokens:
        per_token += f", {about}{total.bytes / total.loss_tokens:,.1f} per loss token"
    facts += [
        ("examples", f"{total.examples:,}"),
        (
            "tokens",
            f"{about}{total.tokens:,}{until}, {about}{total.loss_tokens:,} in the loss",
        ),
        ("bytes", f"{total.bytes:,}"),
        ("bytes per token", per_token),
    ]
    if chunks:
        loss_tokens = max(1, total.loss_tokens)
        skipped = [
            f"{count:,} {reason}" for reason, count in sorted(total.skipped.items())
        ]
        facts += [
            ("records left out", ", ".join(skipped) or "none"),
            ("tokens kept", f"{total.kept_tokens / loss_tokens:.2f} per loss token"),
            ("probability of the kept ids", share(total.kept_mass_sum / loss_tokens)),
            ("label among the kept ids", share(total.label_in_topk / loss_tokens)),
        ]
    if len(reader) != total.examples:
        facts.append(("examples read", f"{len(reader):,}"))
    return facts


def _sample(reader: CacheReader, found: Statistics) -> Facts:
    measured = len(found.num_kept_N)
    sampled = f"{found.num_rows:,} of {len(reader):,} examples"
    facts = [("measured", f"{sampled}, drawn at random: {measured:,} loss tokens")]
    if measured < found.num_loss_tokens:
        missing = found.num_loss_tokens - measured
        facts.append(("without teacher targets", f"{missing:,} of their loss tokens"))
    if not measured:
        return facts
    median, p99 = np.percentile(found.num_kept_N, (50, 99))
    entropy = (
        f"mean {found.entropy_N.mean():.3f} nats at least, with one token as the tail"
    )
    if not np.isnan(found.max_entropy_N).any():
        entropy += f"; {found.max_entropy_N.mean():.3f} at most, with a uniform tail"
    first = share((found.label_rank_N == 1).mean())
    kept = share((found.label_rank_N > 0).mean())
    known_N = found.label_logprob_N[~np.isnan(found.label_logprob_N)]
    nats = -known_N.mean() if len(known_N) else 0.0
    cross_entropy = f"not stored; {nats:.4f} nats over the labels that are kept"
    if found.has_label_logprobs:
        cross_entropy = f"{nats:.4f} nats, perplexity {math.exp(nats):,.2f}"
    return [
        *facts,
        (
            "tokens kept",
            f"mean {found.num_kept_N.mean():.2f}, median {median:.0f}, p99 {p99:.0f}",
        ),
        ("probability of the kept ids", f"mean {share(found.kept_mass_N.mean())}"),
        ("teacher's entropy", entropy),
        ("label", f"ranked first {first}, kept {kept}"),
        ("teacher's cross-entropy", cross_entropy),
    ]
