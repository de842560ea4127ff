"""`logit_cache inspect --html`: one self-contained page that may load nothing."""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from nemo_kd.batch import CachedExample
from nemo_kd.data.text import LossPositions, TokenText, text_ids
from nemo_kd.tools.inspect_cache import ENTROPY_EDGES, Facts, Histogram, Report

TEMPLATE = Path(__file__).with_name("inspect_page.html")
PAGE_ALTERNATIVES = 10
PROMPT_TOKENS = 400
"""Most tokens of an example that are shown before its first loss token."""
LOSS_SPAN_TOKENS = 2000
"""Most tokens of an example that are shown from its first loss token on."""

# Sizes of a histogram, in units of the picture.
_ROW = 19
_LABEL = 98
_BAR = 122
_WIDTH = 268


def choose_rows(
    num_rows: int, example: int, num_examples: int, seed: int = 0
) -> list[int]:
    """Return the positions to show: `example`, then others drawn at random, ascending."""
    random = np.random.default_rng(seed)
    drawn = random.choice(num_rows, min(num_examples, num_rows), replace=False).tolist()
    others = [position for position in drawn if position != example]
    return [example, *sorted(others[: num_examples - 1])]


def build_page(
    title: str, report: Report, rows: Iterable[tuple[int, CachedExample]], text: TokenText
) -> str:
    """Return the page of a report and of `rows`, each with its position in the cache."""
    template = TEMPLATE.read_text(encoding="utf-8")
    examples = _Examples(text)
    identity = dict(report.identity)
    lead = "Cached logits of an unknown teacher (no manifest)"
    if "teacher" in identity:
        teacher = identity["teacher"].partition(",")[0]
        lead = f"Cached logits of {teacher} over {identity['dataset']}"
    sections = {
        "Identity": report.identity,
        "Contents": report.counts,
        "Sample": report.sample,
    }
    values = {
        "policy": _policy(template),
        "title": html.escape(title.rpartition("/")[2]),
        "lead": html.escape(lead),
        "tiles": "".join(f"<div>{_fact(*fact)}</div>" for fact in report.headline),
        "facts": "\n".join(
            f"<details><summary>{name}</summary>{_fact_list(facts)}</details>"
            for name, facts in sections.items()
        ),
        "charts": "\n".join(
            _chart(histogram, is_coloured=number == 0)
            for number, histogram in enumerate(report.histograms)
        ),
        "legend": _legend(),
        "examples": "\n".join(examples.article(position, row) for position, row in rows),
        "data": examples.data(),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


class _Examples:
    """Writes examples as HTML and collects the token data that the page's script shows."""

    def __init__(self, text: TokenText) -> None:
        self._text = text
        self._texts: dict[tuple[str, int], int] = {}
        self._tokens: list[list[Any]] = []

    def article(self, position: int, row: CachedExample) -> str:
        example = row.example
        found = LossPositions.of(row)
        place_of = {s: p for p, s in enumerate(found.position_P.tolist())}
        first_loss = min(place_of, default=0)
        start = max(0, first_loss - PROMPT_TOKENS)
        end = min(example.num_tokens, first_loss + LOSS_SPAN_TOKENS)
        spans = [f"<p>{start:,} tokens before</p>"] if start else []
        token_ids = text_ids(row)[start : end + 1]
        pieces = zip(
            range(start - 1, end), token_ids, self._text.along(token_ids), strict=True
        )
        for in_loss, run in itertools.groupby(pieces, lambda piece: piece[0] in place_of):
            if in_loss:
                for s, token_id, (shown, pending) in run:
                    spans.append(
                        self._span(_escaped(shown), found, place_of[s], token_id, pending)
                    )
            else:
                _, ids, contexts = zip(*run, strict=True)
                spans.append(_escaped(self._text.of(ids, contexts[0][1])))
        if end < example.num_tokens:
            spans.append(f"<p>{example.num_tokens - end:,} positions more</p>")
        entropy = ""
        if place_of:
            entropy = f", mean entropy at least {found.entropy_P.mean():.2f} nats"
        return (
            f"<article><h3><b>Example {position:,}</b> · record {example.index:,} · "
            f"{example.num_tokens:,} positions, {example.num_loss_tokens:,} in the loss{entropy}"
            f'</h3>\n<div class="text">{"".join(spans)}</div></article>'
        )

    def data(self) -> str:
        """Return the token data as JSON without characters that could end its element."""
        payload = {"texts": [list(key) for key in self._texts], "tokens": self._tokens}
        escapes = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})
        return orjson.dumps(payload).decode().translate(escapes)

    def _span(
        self, piece: str, found: LossPositions, p: int, label: int, pending: bytes
    ) -> str:
        entropy = float(found.entropy_P[p])
        rank = int(found.label_rank_P[p])
        logprob = float(found.label_logprob_P[p])
        alternatives: list[float] = []
        for token_id, probability in found.alternatives(p, PAGE_ALTERNATIVES):
            alternatives += [self._text_number(token_id, pending), _rounded(probability)]
        number = len(self._tokens)
        self._tokens.append(
            [
                self._text_number(label, pending),
                None if math.isnan(logprob) else _rounded(math.exp(logprob)),
                rank,
                round(entropy, 2),
                int(found.num_kept_P[p]),
                _rounded(float(found.tail_mass_P[p])),
                alternatives,
            ]
        )
        level = int(np.searchsorted(ENTROPY_EDGES, entropy, side="right")) - 1
        missed = "" if rank else " miss"
        # The Tab key stops once per example; the arrow keys go on from there.
        index = 0 if p == 0 else -1
        return f'<span class="t e{level}{missed}" data-n="{number}" tabindex="{index}">{piece}</span>'

    def _text_number(self, token_id: int, pending: bytes) -> int:
        key = (self._text.visible(token_id, pending), token_id)
        return self._texts.setdefault(key, len(self._texts))


def _escaped(text: str) -> str:
    """Escape a text for HTML; mark line breaks and keep them."""
    return html.escape(text).replace("\n", "<i>⏎</i>\n").replace("\r", "<i>␍</i>")


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _policy(template: str) -> str:
    """Allow only the page's style and script, by their hashes, and no connection."""
    hashes = []
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        hashes.append(f"{tag}-src 'sha256-{digest}'")
    return f"default-src 'none'; {'; '.join(hashes)}; base-uri 'none'; form-action 'none'"


def _fact(name: str, value: str) -> str:
    return f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"


def _fact_list(facts: Facts) -> str:
    return f'<dl class="facts">{"".join(itertools.starmap(_fact, facts))}</dl>'


def _chart(histogram: Histogram, is_coloured: bool) -> str:
    """Draw horizontal bars; `is_coloured` gives them the tokens' colours."""
    scale = _BAR / max([*histogram.shares, 1e-9])
    rows = []
    for number, (label, part) in enumerate(
        zip(histogram.labels, histogram.shares, strict=True)
    ):
        y = number * _ROW
        kind = f"e{number} edge" if is_coloured else "bar"
        bar = f'x="{_LABEL}" y="{y + 4}" height="{_ROW - 8}" rx="2"'
        rows.append(
            f'<text class="end" x="{_LABEL - 8}" y="{y + 14}">{html.escape(label)}</text>'
            f'<rect class="track" {bar} width="{_BAR}"/>'
            f'<rect class="{kind}" {bar} width="{scale * part:.1f}"/>'
            f'<text class="end" x="{_WIDTH}" y="{y + 14}">{part:.1%}</text>'
        )
    title = html.escape(histogram.title)
    return (
        f"<figure><figcaption>{title}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {len(rows) * _ROW}" role="img" aria-label="{title}">'
        f"{''.join(rows)}</svg></figure>"
    )


def _legend() -> str:
    steps = [
        f'<b class="e{level}">{edge:g}</b>'
        for level, edge in enumerate(ENTROPY_EDGES[:-1])
    ]
    return f'<div class="scale"><span>nats, from</span>{"".join(steps)}</div>'
