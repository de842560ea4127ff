"""`logit_cache inspect`: what a cache holds, as text.

Shape legend: K kept tokens, P loss positions of a row, S positions.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from nemo_kd.batch import CachedExample
from nemo_kd.cache.layout import CacheError
from nemo_kd.cache.manifest import UNKNOWN, ChunkSummary, Manifest
from nemo_kd.cache.reader import CacheReader
from nemo_kd.data.token_text import MARKS, TokenText, marked
from nemo_kd.data.tokenizer import tokenizer_fingerprint
from nemo_kd.tools.cache_statistics import Histogram, Statistics, histograms, text_ids, view

BAR_WIDTH = 40
TEXT_ALTERNATIVES = 5
PROMPT_CHARACTERS = 1000

Facts = list[tuple[str, str]]
"""(name, value) of everything that is one line."""


@dataclass(frozen=True)
class Report:
    """All that is said about a cache but for its examples; `headline` repeats the figures that are looked for first."""

    headline: Facts
    identity: Facts
    counts: Facts
    sample: Facts
    histograms: list[Histogram]


def check_tokenizer(reader: CacheReader, tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Refuses a tokenizer that did not write the cache; where none is known any will do whose ids reach far enough.

    Raises:
        CacheError: names both.
    """
    ours = tokenizer_fingerprint(tokenizer)
    known = {manifest.tokenizer for manifest in reader.manifests} - {UNKNOWN}
    for theirs in known - {ours}:
        raise CacheError(
            f"--tokenizer: {path} has the fingerprint {ours}, but {reader.path} was written with {theirs}; "
            "give the teacher's tokenizer"
        )
    if not known and reader.max_token_id >= len(tokenizer):
        raise CacheError(
            f"--tokenizer: {path} has {len(tokenizer):,} tokens, but {reader.path} has the id {reader.max_token_id:,}; "
            "give the teacher's tokenizer"
        )


def report_of(reader: CacheReader, found: Statistics) -> Report:
    """The figures of a cache: counts are exact where a manifest tells them, all others are the sample's."""
    identity = [fact for manifest in reader.manifests[:1] for fact in _identity(manifest)]
    identity = identity or [
        ("manifest", "none: another program wrote the files, or they were moved without it")
    ]
    counts = _counts(reader, found)
    return Report(
        _headline(counts, found), identity, counts, _sample(reader, found), histograms(found)
    )


def as_text(report: Report, example: str) -> str:
    """The report and one example, 100 columns wide or a little more."""
    parts = [_table(facts) for facts in (report.identity, report.counts, report.sample)]
    parts += [_bars(histogram) for histogram in report.histograms]
    return "\n\n".join([*parts, example])


def example_as_text(row: CachedExample, position: int, num_rows: int, text: TokenText) -> str:
    """One example: its prompt in one line, then a line for every label that counts in the loss."""
    example, seen = row.example, view(row)
    first = int(seen.position_P[0]) if len(seen.position_P) else example.num_tokens - 1
    token_ids = text_ids(row)
    prompt = marked(text.of(token_ids[: first + 1])).replace(MARKS[" "], " ")
    pieces = list(text.along(token_ids))
    if len(prompt) > PROMPT_CHARACTERS:
        prompt = f"… {prompt[-PROMPT_CHARACTERS:]}"
    lines = [
        f"example {position} of {num_rows:,} (record {example.index}): {example.num_tokens:,} positions, "
        f"{example.num_loss_tokens:,} in the loss",
        f"before the first: {prompt}",
        "position  label            probability rank entropy   tail  the teacher's likeliest",
    ]
    for p, s in enumerate(seen.position_P.tolist()):
        shown = zip(
            seen.ids_PK[p, :TEXT_ALTERNATIVES].tolist(),
            seen.probability_PK[p].tolist(),
            strict=False,
        )
        _, pending = pieces[s + 1]
        others = "  ".join(
            f"{text.visible(token, pending)} {share(value)}" for token, value in shown if token >= 0
        )
        rank = seen.label_rank_P[p] or "-"
        found = share(float(np.exp(seen.label_logprob_P[p])))
        label = text.visible(int(example.labels_S[s]), pending)
        lines.append(
            f"{s:>8}  {label:<16} {found:>11} {rank:>4} {seen.entropy_P[p]:>7.2f} "
            f"{share(seen.tail_mass_P[p]):>6}  {others}"
        )
    return "\n".join(lines)


def share(probability: float) -> str:
    """A probability in percent, three digits at most."""
    if np.isnan(probability):
        return "?"
    percent = 100 * float(probability)
    if percent < 0.01:
        return "<.01%" if percent > 0 else "0%"
    return (
        f"{percent:.0f}%"
        if percent >= 99.95
        else f"{percent:.1f}%"
        if percent >= 1
        else f"{percent:.2f}%"
    )


def _headline(counts: Facts, found: Statistics) -> Facts:
    exact = dict(counts)
    facts = [
        ("examples", exact["examples"]),
        ("bytes per token", exact["bytes per token"].partition(",")[0]),
    ]
    if not len(found.num_kept_N):
        return facts
    facts += [
        ("tokens kept a position", f"{found.num_kept_N.mean():.1f}"),
        ("probability of the kept ids", share(found.kept_mass_N.mean())),
        ("mean entropy, at least", f"{found.entropy_N.mean():.2f} nats"),
        ("labels that rank first", share((found.label_rank_N == 1).mean())),
    ]
    if found.has_label_logprobs:
        facts.append(("teacher's cross-entropy", f"{-found.label_logprob_N.mean():.2f} nats"))
    return facts


def _identity(manifest: Manifest) -> Facts:
    codec = manifest.codec
    kept = [f"at most {manifest.top_k:,} tokens a position"]
    if codec.get("min_probability"):
        kept.append(f"probability at least {codec['min_probability']:g}")
    if codec.get("top_p", 1) < 1:
        kept.append(f"until they hold {codec['top_p']:g}")
    if codec.get("min_k", 1) > 1:
        kept.append(f"{codec['min_k']} in any case")
    samples = codec.get("tail_samples", 0)
    temperatures = ", ".join(f"{value:g}" for value in (1.0, *codec.get("temperatures", [])))
    records = (
        f"records {manifest.dataset.get('start_from_idx')} to {manifest.dataset.get('end_at_idx')}"
    )
    vocabulary = (
        f"{manifest.vocab_size:,} columns, of which the tokenizer knows {manifest.tokenizer_size:,}"
    )
    return [
        ("codec", f"{codec.get('name')}, {codec.get('positions', 'all')} positions"),
        ("kept", ", ".join(kept)),
        ("tail mass at temperatures", temperatures),
        ("tail samples", f"{samples} a position" if samples else "none"),
        (
            "teacher",
            f"{manifest.teacher.get('name', 'unknown')}, weights {manifest.teacher.get('weights', 'unknown')}",
        ),
        ("vocabulary", vocabulary),
        ("tokenizer", manifest.tokenizer),
        ("chat template", manifest.chat_template or "none"),
        ("dataset", f"{manifest.dataset.get('path', 'unknown')}, {records}"),
        ("longest sequence", f"{manifest.seq_length:,} tokens"),
    ]


def _counts(reader: CacheReader, found: Statistics) -> Facts:
    chunks = [chunk for manifest in reader.manifests for chunk in manifest.chunks.values()]
    if not chunks:
        return _estimated_counts(reader, found)
    total = ChunkSummary(0, 0)
    for chunk in chunks:
        total.add(chunk)
    expected = sum(manifest.num_chunks for manifest in reader.manifests)
    loss_tokens = max(1, total.loss_tokens)
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(total.skipped.items()))
    facts = [
        ("chunks", f"{len(chunks):,} of {expected:,} complete"),
        ("examples", f"{total.examples:,}"),
        ("tokens", f"{total.tokens:,}, of which {total.loss_tokens:,} count in the loss"),
        ("records left out", skipped or "none"),
        *_sizes(total.bytes, total.tokens, total.loss_tokens),
        ("tokens kept", f"{total.kept_tokens / loss_tokens:.2f} a loss token"),
        ("probability of the kept ids", share(total.kept_mass_sum / loss_tokens)),
        ("label among the kept ids", share(total.label_in_topk / loss_tokens)),
    ]
    if len(reader.chunk_facts) < len(chunks):
        facts.insert(
            1,
            ("chunks not found", f"{len(chunks) - len(reader.chunk_facts):,} of the complete ones"),
        )
    if len(reader) != total.examples:
        facts.append(("examples read", f"{len(reader):,}"))
    return facts


def _estimated_counts(reader: CacheReader, found: Statistics) -> Facts:
    """Without a manifest, from the indexes and the sample."""
    lines = sum(facts.num_lines for facts in reader.chunk_facts)
    per_row = lines / max(1, found.num_rows)
    about = "" if found.num_rows == lines else "about "
    tokens, loss_tokens = round(found.num_tokens * per_row), round(found.num_loss_tokens * per_row)
    facts = [
        ("files", f"{len(reader.chunk_facts):,}"),
        ("examples", f"{lines:,}"),
        (
            "tokens",
            f"{about}{tokens:,} up to each last loss token, {about}{loss_tokens:,} count in the loss",
        ),
        *_sizes(sum(facts.bytes for facts in reader.chunk_facts), tokens, loss_tokens, about),
    ]
    if len(reader) != lines:
        facts.append(("examples read", f"{len(reader):,}"))
    return facts


def _sizes(num_bytes: int, tokens: int, loss_tokens: int, about: str = "") -> Facts:
    per_token = f"{about}{num_bytes / max(1, tokens):,.1f}"
    if loss_tokens:
        per_token += f", {about}{num_bytes / loss_tokens:,.1f} per loss token"
    return [("bytes", f"{num_bytes:,}"), ("bytes per token", per_token)]


def _sample(reader: CacheReader, found: Statistics) -> Facts:
    measured = len(found.num_kept_N)
    facts = [
        (
            "measured",
            f"{found.num_rows:,} of {len(reader):,} examples, drawn at random: {measured:,} loss tokens",
        )
    ]
    if measured < found.num_loss_tokens:
        facts.append(
            ("nothing known of", f"{found.num_loss_tokens - measured:,} of their loss tokens")
        )
    if not measured:
        return facts
    median, p99 = np.percentile(found.num_kept_N, (50, 99))
    entropy = (
        f"mean {found.entropy_N.mean():.3f} nats at least, where all of the tail were one token"
    )
    if not np.isnan(found.rest_nats_N).any():
        entropy += f"; {(found.entropy_N + found.rest_nats_N).mean():.3f} at most, were it even"
    ranks: Counter[str] = Counter(
        np.where(found.label_rank_N == 0, "not", found.label_rank_N).tolist()
    )
    label = (
        f"ranked first {share(ranks['1'] / measured)}, kept {share(1 - ranks['not'] / measured)}"
    )
    known_N = found.label_logprob_N[~np.isnan(found.label_logprob_N)]
    cross_entropy = f"not stored; {-known_N.mean() if len(known_N) else 0:.4f} nats over the labels that are kept"
    if found.has_label_logprobs:
        cross_entropy = f"{-known_N.mean():.4f} nats, perplexity {np.exp(-known_N.mean()):,.2f}"
    return [
        *facts,
        ("tokens kept", f"mean {found.num_kept_N.mean():.2f}, median {median:.0f}, p99 {p99:.0f}"),
        ("probability of the kept ids", f"mean {share(found.kept_mass_N.mean())}"),
        ("teacher's entropy", entropy),
        ("label", label),
        ("teacher's cross-entropy", cross_entropy),
    ]


def _table(facts: Facts) -> str:
    return "\n".join(f"{name:<25}  {value}" for name, value in facts)


def _bars(histogram: Histogram) -> str:
    """As a picture of text; the fullest range takes the whole width."""
    largest = max([*histogram.shares, 1e-9])
    lines = [f"{histogram.title}:"]
    for label, part in zip(histogram.labels, histogram.shares, strict=True):
        lines.append(
            f"  {label:>13}  {part:>6.1%}  {'█' * round(BAR_WIDTH * part / largest)}".rstrip()
        )
    return "\n".join(lines)
