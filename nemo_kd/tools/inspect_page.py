"""`logit_cache inspect --html`: one page, complete in itself. It loads nothing, and its policy forbids it to."""

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
from nemo_kd.data.token_text import TokenText
from nemo_kd.tools.cache_statistics import ENTROPY_EDGES, Histogram, View, text_ids, view
from nemo_kd.tools.inspect_cache import Facts, Report

TEMPLATE = Path(__file__).with_name("inspect_page.html")
PAGE_ALTERNATIVES = 10
PROMPT_TOKENS, LOSS_SPAN_TOKENS = 400, 2000
"""Tokens of an example that are shown before its first loss token, and from there on."""

_ROW, _LABEL, _BAR, _WIDTH = 19, 98, 122, 268  # of a histogram, in units of the picture


def chosen(num_rows: int, example: int, num_examples: int, seed: int = 0) -> list[int]:
    """Positions to show: `example`, then others drawn at random, ascending."""
    drawn = (
        np.random.default_rng(seed)
        .choice(num_rows, min(num_examples, num_rows), replace=False)
        .tolist()
    )
    others = [position for position in drawn if position != example]
    return [example, *sorted(others[: num_examples - 1])]


def page(
    title: str, report: Report, rows: Iterable[tuple[int, CachedExample]], text: TokenText
) -> str:
    """The page.

    Args:
        rows: with the position of each in the cache.
    """
    template = TEMPLATE.read_text(encoding="utf-8")
    tokens = _Tokens(text)
    identity = dict(report.identity)
    sections = (
        ("Identity", report.identity),
        ("Contents", report.counts),
        ("Sample", report.sample),
    )
    values = {
        "policy": _policy(template),
        "title": html.escape(title.rpartition("/")[2]),
        "lead": html.escape(
            f"Cached logits of {identity['teacher'].partition(',')[0]} over {identity['dataset']}"
            if "teacher" in identity
            else "Cached logits; no manifest tells of which teacher"
        ),
        "tiles": "".join(
            f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
            for name, value in report.headline
        ),
        "facts": "\n".join(
            f"<details><summary>{name}</summary>{_facts(facts)}</details>"
            for name, facts in sections
        ),
        "charts": "\n".join(
            _chart(histogram, number == 0) for number, histogram in enumerate(report.histograms)
        ),
        "legend": _legend(),
        "examples": "\n".join(tokens.article(position, row) for position, row in rows),
        "data": tokens.data(),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


class _Tokens:
    """Gathers what the script needs to know of the tokens, while their spans are written."""

    def __init__(self, text: TokenText) -> None:
        self._text = text
        self._texts: dict[tuple[str, int], int] = {}
        self._tokens: list[list[Any]] = []

    def article(self, position: int, row: CachedExample) -> str:
        example, seen = row.example, view(row)
        place_of = {s: p for p, s in enumerate(seen.position_P.tolist())}
        first_loss = min(place_of, default=0)
        start, end = (
            max(0, first_loss - PROMPT_TOKENS),
            min(example.num_tokens, first_loss + LOSS_SPAN_TOKENS),
        )
        spans = [f"<p>{start:,} tokens before</p>"] if start else []
        token_ids = text_ids(row)[start : end + 1]
        pieces = zip(
            itertools.count(start - 1), token_ids, self._text.along(token_ids), strict=False
        )
        for in_loss, run in itertools.groupby(pieces, lambda piece: piece[0] in place_of):
            if in_loss:
                spans += [
                    self._span(_piece(shown), seen, place_of[s], i, pending)
                    for s, i, (shown, pending) in run
                ]
            else:
                _, others, contexts = zip(*run, strict=True)
                spans.append(_piece(self._text.of(others, contexts[0][1])))
        if end < example.num_tokens:
            spans.append(f"<p>{example.num_tokens - end:,} positions more</p>")
        mean = f", mean entropy at least {seen.entropy_P.mean():.2f} nats" if len(place_of) else ""
        return (
            f"<article><h3><b>Example {position:,}</b> · record {example.index:,} · {example.num_tokens:,} positions, "
            f'{example.num_loss_tokens:,} in the loss{mean}</h3>\n<div class="text">{"".join(spans)}</div></article>'
        )

    def data(self) -> str:
        """JSON without anything that could end the element it stands in."""
        payload = {"texts": [list(key) for key in self._texts], "tokens": self._tokens}
        return (
            orjson.dumps(payload)
            .decode()
            .replace("<", "\\u003c")
            .replace(">", "\\u003e")
            .replace("&", "\\u0026")
        )

    def _span(self, piece: str, seen: View, p: int, label: int, pending: bytes) -> str:
        entropy, rank = float(seen.entropy_P[p]), int(seen.label_rank_P[p])
        logprob = float(seen.label_logprob_P[p])
        others: list[float] = []
        for token, value in zip(
            seen.ids_PK[p, :PAGE_ALTERNATIVES].tolist(),
            seen.probability_PK[p].tolist(),
            strict=False,
        ):
            if token >= 0:
                others += [self._text_number(token, pending), _rounded(value)]
        kept, tail = int((seen.ids_PK[p] >= 0).sum()), _rounded(float(seen.tail_mass_P[p]))
        probability = None if math.isnan(logprob) else _rounded(math.exp(logprob))
        number = len(self._tokens)
        self._tokens.append(
            [
                self._text_number(label, pending),
                probability,
                rank,
                round(entropy, 2),
                kept,
                tail,
                others,
            ]
        )
        level = int(np.searchsorted(ENTROPY_EDGES, entropy, side="right")) - 1
        # One stop of the Tab key an example; the arrow keys go on from there.
        index = 0 if p == 0 else -1
        missed = "" if rank else " miss"
        return (
            f'<span class="t e{level}{missed}" data-n="{number}" tabindex="{index}">{piece}</span>'
        )

    def _text_number(self, token_id: int, pending: bytes) -> int:
        key = (self._text.visible(token_id, pending), token_id)
        return self._texts.setdefault(key, len(self._texts))


def _piece(text: str) -> str:
    """Line breaks are shown and take place."""
    return html.escape(text).replace("\n", "<i>⏎</i>\n").replace("\r", "<i>␍</i>")


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _policy(template: str) -> str:
    """Only this page's own style and script, known by their hashes, and no connection to anywhere."""
    (style,) = re.findall(r"<style>(.*?)</style>", template, re.DOTALL)
    (script,) = re.findall(r"<script>(.*?)</script>", template, re.DOTALL)
    return f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _facts(facts: Facts) -> str:
    return (
        '<dl class="facts">'
        + "".join(
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts
        )
        + "</dl>"
    )


def _chart(histogram: Histogram, coloured: bool) -> str:
    """Bars from left to right; `coloured` gives them the colours of the tokens."""
    largest = max([*histogram.shares, 1e-9])
    rows = []
    for number, (label, part) in enumerate(zip(histogram.labels, histogram.shares, strict=True)):
        y = number * _ROW
        kind = f"e{number} edge" if coloured else "bar"
        rows.append(
            f'<text class="end" x="{_LABEL - 8}" y="{y + 14}">{html.escape(label)}</text>'
            f'<rect class="track" x="{_LABEL}" y="{y + 4}" width="{_BAR}" height="{_ROW - 8}" rx="2"/>'
            f'<rect class="{kind}" x="{_LABEL}" y="{y + 4}" width="{_BAR * part / largest:.1f}" height="{_ROW - 8}" rx="2"/>'
            f'<text class="end" x="{_WIDTH}" y="{y + 14}">{part:.1%}</text>'
        )
    title = html.escape(histogram.title)
    return (
        f'<figure><figcaption>{title}</figcaption><svg viewBox="0 0 {_WIDTH} {len(rows) * _ROW}" role="img" '
        f'aria-label="{title}">{"".join(rows)}</svg></figure>'
    )


def _legend() -> str:
    steps = "".join(
        f'<b class="e{number}">{edge:g}</b>' for number, edge in enumerate(ENTROPY_EDGES[:-1])
    )
    return f'<div class="scale"><span>nats, from</span>{steps}</div>'
