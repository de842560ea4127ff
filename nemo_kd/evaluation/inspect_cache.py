"""What a cache holds: counts, how much of the teacher is kept, how certain it is, and examples as text.

Shape legend: S positions, K kept tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from nemo_kd.batch import CachedExample
from nemo_kd.cache.layout import CacheError
from nemo_kd.cache.manifest import UNKNOWN, Manifest
from nemo_kd.cache.reader import CacheReader
from nemo_kd.data.tokenizer import tokenizer_fingerprint

MASS_EDGES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 1.0)
ENTROPY_EDGES = (0.0, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, math.inf)
COUNT_EDGES = (1, 2, 3, 5, 9, 17, 33, 65, 129, 257, math.inf)
BAR_WIDTH = 40


@dataclass
class Statistics:
    """Of the loss positions of some rows: one array of all of them for each quantity.

    Attributes:
        kept_mass: teacher probability inside the kept tokens.
        entropy: nats, of the kept tokens and one bucket for the tail: at most what the whole distribution's is.
        num_kept: tokens kept.
        label_logprob: nats; NaN where nobody stored it.
        label_kept: whether the label is among the kept tokens.
    """

    num_rows: int
    kept_mass: np.ndarray
    entropy: np.ndarray
    num_kept: np.ndarray
    label_logprob: np.ndarray
    label_kept: np.ndarray


@dataclass(frozen=True)
class Alternative:
    """A token that the teacher could have said."""

    text: str
    probability: float


@dataclass(frozen=True)
class InspectedToken:
    """A label and what the teacher thought of it; `in_loss` is False for a prompt's, of which nothing is known.

    Attributes:
        rank: the label's place among the kept tokens, from 1; None where it is not kept.
        probability: the label's; None where it is not known.
    """

    text: str
    in_loss: bool
    entropy: float = 0.0
    tail_mass: float = 0.0
    rank: int | None = None
    probability: float | None = None
    alternatives: list[Alternative] = field(default_factory=list)


def check_tokenizer(reader: CacheReader, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer that did not write the cache.

    Raises:
        CacheError: names both.
    """
    ours = tokenizer_fingerprint(tokenizer)
    for manifest in reader.manifests:
        if manifest.tokenizer not in (ours, UNKNOWN):
            raise CacheError(
                f"--tokenizer: {ours} is another tokenizer than the one the cache was written with ({manifest.tokenizer}); "
                "give the teacher's"
            )


def statistics(reader: CacheReader, num_rows: int, seed: int = 0) -> Statistics:
    """Of a random sample of rows."""
    chosen = np.random.default_rng(seed).choice(len(reader), min(num_rows, len(reader)), replace=False)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("mass", "entropy", "count", "logprob", "kept")}
    for position in sorted(chosen.tolist()):
        row = reader[position]
        in_loss = row.example.loss_mask_S > 0
        ids_SK, labels_S = row.teacher.topk_token_ids_SK[in_loss], row.example.labels_S[in_loss]
        logprobs = row.teacher.label_logprobs_S
        columns["mass"].append(1 - row.teacher.tail_mass_TS[0, in_loss].astype(np.float64))
        columns["entropy"].append(entropies(row)[in_loss])
        columns["count"].append((ids_SK >= 0).sum(axis=1))
        columns["logprob"].append(np.full(len(labels_S), np.nan) if logprobs is None else logprobs[in_loss])
        columns["kept"].append((ids_SK == labels_S[:, None]).any(axis=1))
    return Statistics(len(chosen), *(np.concatenate(columns[name]) for name in columns))


def entropies(row: CachedExample) -> np.ndarray:
    """Nats at every position [S], of the kept tokens and one bucket for the tail; 0 where nothing is known."""
    teacher = row.teacher
    used_SK = teacher.topk_token_ids_SK >= 0
    log_p_SK = np.where(used_SK, teacher.topk_logits_SK - teacher.log_sum_exp_logits_S[:, None], 0).astype(np.float64)
    head_S = -np.where(used_SK, np.exp(log_p_SK) * log_p_SK, 0).sum(axis=1)
    tail_S = teacher.tail_mass_TS[0].astype(np.float64)
    tail_part_S = -tail_S * np.log(np.maximum(tail_S, 1e-30))
    return np.where(used_SK[:, 0], head_S + tail_part_S, 0)


def inspected_tokens(
    row: CachedExample, tokenizer: PreTrainedTokenizerBase | None, num_alternatives: int
) -> list[InspectedToken]:
    """The example token by token: its first token, then every label with the teacher's view of it."""
    teacher, example, entropy_S = row.teacher, row.example, entropies(row)
    result = [InspectedToken(token_text(int(example.tokens_S[0]), tokenizer), in_loss=False)]
    for s, label in enumerate(example.labels_S.tolist()):
        ids_K = teacher.topk_token_ids_SK[s]
        ids = ids_K[ids_K >= 0].tolist()
        if example.loss_mask_S[s] == 0 or not ids:
            result.append(InspectedToken(token_text(label, tokenizer), in_loss=False))
            continue
        p = np.exp(teacher.topk_logits_SK[s, : len(ids)] - teacher.log_sum_exp_logits_S[s]).tolist()
        rank = ids.index(label) if label in ids else None
        probability = p[rank] if rank is not None else None
        if probability is None and teacher.label_logprobs_S is not None:
            probability = math.exp(teacher.label_logprobs_S[s])
        shown = list(zip(ids, p, strict=True))[:num_alternatives]
        result.append(
            InspectedToken(
                text=token_text(label, tokenizer),
                in_loss=True,
                entropy=float(entropy_S[s]),
                tail_mass=float(teacher.tail_mass_TS[0, s]),
                rank=None if rank is None else rank + 1,
                probability=probability,
                alternatives=[Alternative(token_text(token, tokenizer), value) for token, value in shown],
            )
        )
    return result


def token_text(token_id: int, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A token as text; what is no whole UTF-8 character by itself is shown as the tokenizer spells it."""
    if tokenizer is None:
        return f"[{token_id}]"
    text = tokenizer.decode([token_id])
    if text and "\N{REPLACEMENT CHARACTER}" not in text:
        return str(text)
    return str(tokenizer.convert_ids_to_tokens(token_id) or f"[{token_id}]")


def summary_lines(reader: CacheReader, found: Statistics) -> list[tuple[str, str]]:
    """(name, value) of everything that is one line."""
    lines = [line for manifest in reader.manifests[:1] for line in _identity(manifest)]
    chunks = [summary for manifest in reader.manifests for summary in manifest.chunks.values()]
    if chunks:
        tokens, loss_tokens = sum(chunk.tokens for chunk in chunks), sum(chunk.loss_tokens for chunk in chunks)
        num_bytes = sum(chunk.bytes for chunk in chunks)
        skipped: dict[str, int] = {}
        for chunk in chunks:
            for reason, count in chunk.skipped.items():
                skipped[reason] = skipped.get(reason, 0) + count
        lines += [
            ("chunks", f"{len(chunks):,}"),
            ("examples", f"{sum(chunk.examples for chunk in chunks):,}"),
            ("tokens", f"{tokens:,} ({loss_tokens:,} in the loss)"),
            ("skipped records", ", ".join(f"{count:,} {reason}" for reason, count in skipped.items()) or "none"),
            ("bytes", f"{num_bytes:,}"),
            (
                "bytes per token",
                f"{num_bytes / max(1, tokens):.1f} ({num_bytes / max(1, loss_tokens):.1f} per loss token)",
            ),
        ]
    else:
        lines += [("manifest", "none: written by another program"), ("examples", f"{len(reader):,}")]
    percentiles = np.percentile(found.num_kept, (50, 99)) if len(found.num_kept) else (0, 0)
    known = found.label_logprob[~np.isnan(found.label_logprob)]
    lines += [
        ("sample", f"{found.num_rows:,} examples, {len(found.num_kept):,} loss tokens; all below is theirs"),
        ("tokens kept", f"mean {_mean(found.num_kept):.1f}, median {percentiles[0]:.0f}, p99 {percentiles[1]:.0f}"),
        ("teacher mass kept", f"mean {_mean(found.kept_mass):.4f}"),
        ("teacher entropy", f"mean {_mean(found.entropy):.3f} nats (the tail counted as one token: a lower bound)"),
        ("label is kept", f"{_mean(found.label_kept):.2%}"),
        ("teacher cross-entropy", f"{-_mean(known):.4f} nats" if len(known) else "not stored"),
    ]
    return lines


def histogram(values: np.ndarray, edges: Sequence[float]) -> list[tuple[str, float]]:
    """(range, share of the values in it) for each pair of edges, the upper one excluded but for the last."""
    counts, _ = np.histogram(values, bins=np.array(edges, dtype=float))
    return [
        (_range(low, high), count / max(1, len(values)))
        for (low, high), count in zip(itertools.pairwise(edges), counts.tolist(), strict=True)
    ]


def histograms(found: Statistics) -> list[tuple[str, list[tuple[str, float]]]]:
    """(title, bars) of what is worth a look."""
    return [
        ("teacher mass kept", histogram(found.kept_mass, MASS_EDGES)),
        ("teacher entropy, nats", histogram(found.entropy, ENTROPY_EDGES)),
        ("tokens kept", histogram(found.num_kept, COUNT_EDGES)),
    ]


def report(reader: CacheReader, found: Statistics, tokens: Sequence[InspectedToken]) -> str:
    """All of it as text."""
    rows = summary_lines(reader, found)
    width = max(len(name) for name, _ in rows)
    parts = ["\n".join(f"{name:<{width}}  {value}" for name, value in rows)]
    for title, bars in histograms(found):
        parts.append("\n".join([f"{title}:", *(f"  {label:>13}  {_bar(share)} {share:6.1%}" for label, share in bars)]))
    parts.append("\n".join(["one example, token by token:", *map(_token_line, tokens)]))
    return "\n\n".join(parts)


def visible(text: str) -> str:
    """The text with its white space to be seen."""
    return text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")


def _identity(manifest: Manifest) -> list[tuple[str, str]]:
    codec = manifest.codec
    kept = f"top {manifest.top_k}"
    if codec.get("min_probability"):
        kept += f", p >= {codec['min_probability']:g}"
    if codec.get("top_p", 1.0) < 1:
        kept += f", top-p {codec['top_p']:g}"
    samples = f", {codec['tail_samples']} tail samples" if codec.get("tail_samples") else ""
    return [
        ("codec", f"{codec['name']}, {codec.get('positions', 'all')} positions"),
        ("kept", kept + samples),
        ("temperatures", ", ".join(f"{value:g}" for value in (1.0, *codec.get("temperatures", [])))),
        ("teacher", str(manifest.teacher.get("name", "unknown"))),
        ("vocabulary", f"{manifest.vocab_size:,}"),
        ("dataset", str(manifest.dataset.get("path", "unknown"))),
    ]


def _token_line(token: InspectedToken) -> str:
    if not token.in_loss:
        return f"  {visible(token.text):<20}"
    others = "  ".join(f"{visible(other.text)} {other.probability:.3f}" for other in token.alternatives)
    found = "-" if token.probability is None else f"{token.probability:.3f}"
    rank = "-" if token.rank is None else str(token.rank)
    return f"  {visible(token.text):<20} p {found:>5}  rank {rank:>3}  entropy {token.entropy:5.2f}  tail {token.tail_mass:.3f} | {others}"


def _range(low: float, high: float) -> str:
    if high == math.inf:
        return f"{low:g} or more"
    if isinstance(low, int):  # counts
        return f"{low}" if high == low + 1 else f"{low} - {high - 1:g}"
    return f"{low:g} - {high:g}"


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def _bar(share: float) -> str:
    return "█" * round(share * BAR_WIDTH) + "·" * (BAR_WIDTH - round(share * BAR_WIDTH))
